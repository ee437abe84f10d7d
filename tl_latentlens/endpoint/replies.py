"""Replies to a chat completion: the parts of them that are kept."""

import json
from typing import Any


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
