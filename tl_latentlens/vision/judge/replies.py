"""The replies of a judge: the parts of a chat completion that are kept, and the relations that an answer names."""

import json
import re
from typing import Any

from tl_latentlens.vision.judge.questions import RELATIONS


class MalformedError(Exception):
    """A reply without an answer in it."""


def read_reply(text: str) -> dict[str, Any]:
    """The fields of a chat completion that are kept: answer, finish_reason, model, input_tokens, output_tokens.

    A refusal is an answer too, and so is a text that was cut at the endpoint's limit of tokens.

    Raises:
        MalformedError: The reply holds no answer.
    """
    try:
        reply = json.loads(text)
        choice = reply["choices"][0]
        message, usage = choice["message"], reply.get("usage") or {}
        return {
            "answer": str(message.get("content") or message.get("refusal") or ""),
            "finish_reason": choice.get("finish_reason"),
            "model": reply.get("model"),
            "input_tokens": usage.get("prompt_tokens"),
            "output_tokens": usage.get("completion_tokens"),
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise MalformedError(f"a reply without an answer: {text[:200]!r}") from error


def parse_relations(answer: str, n_words: int) -> tuple[str, ...] | None:
    """The relation of each word, from the last JSON object in the answer that has one for each; None without such an object."""
    for json_text in reversed(re.findall(r"\{[^{}]*\}", answer)):
        try:
            relation_of = json.loads(json_text)
        except ValueError:
            continue
        relations = tuple(str(relation_of.get(str(k)) or "").strip().lower() for k in range(1, n_words + 1))
        if set(relations) <= set(RELATIONS):
            return relations
    return None
