"""What a language model is asked about a feature: for a sentence, and whether the sentence tells which texts activate it."""

import json
import re
from collections.abc import Sequence
from typing import Any

from tl_latentlens.directions.features.label_line import LabelLine
from tl_latentlens.endpoint.chat import Messages

VERSION = 1  # is part of every answer's key; raise it where an answer to the same words would mean something else
_MAX_SENTENCE, _MAX_WORDS = 400, 20
_DESCRIBE = """\
A feature is a direction in the inner state of a language model. It is active on some tokens of a text and silent on the others.
{known}
Texts in which it is most active, each with the most active token between « and »:

{texts}

Write one sentence of at most 25 words that says on what the feature is active, so that another reader can tell from it alone
whether a new text activates the feature. What is known may be wrong, or too narrow: the texts decide. Do not mention features.
Answer with one JSON object: {{"sentence": "..."}}"""
_DETECT = """\
A feature in the inner state of a language model is said to be active on this:

{sentence}

Which of these texts activate it? A text activates it if one place in the text does.

{texts}

Answer with one JSON object that lists their numbers, such as {{"active": [2, 5]}}, or {{"active": []}} where none does."""


def sentence_messages(line: LabelLine, texts: Sequence[str]) -> Messages:
    """The question for a sentence, from a feature's label, what the label rests on, and marked texts."""
    return _messages(_DESCRIBE.format(known=_known(line), texts=_numbered(texts)))


def detection_messages(sentence: str, texts: Sequence[str]) -> Messages:
    """The question which of the texts activate a feature, by a sentence on it."""
    return _messages(_DETECT.format(sentence=sentence, texts=_numbered(texts)))


def read_sentence(answer: str) -> str:
    """The sentence in an answer, in one line, without control characters; empty where there is none."""
    found = _last_field(answer, "sentence")
    plain = "".join(sign if sign.isprintable() else " " for sign in found) if isinstance(found, str) else ""
    text = " ".join(plain.split())
    return text if len(text) <= _MAX_SENTENCE else ""


def read_active(answer: str, n_texts: int) -> set[int] | None:
    """The places, from 0, of the texts that an answer names; None where it says nothing of the kind."""
    found = _last_field(answer, "active")
    if not isinstance(found, list) or not all(type(number) is int and 1 <= number <= n_texts for number in found):
        return None
    return {number - 1 for number in found}


def _messages(prompt: str) -> Messages:
    return [{"role": "user", "content": prompt}]


def _numbered(texts: Sequence[str]) -> str:
    return "\n".join(f"{number}. {json.dumps(text, ensure_ascii=False)}" for number, text in enumerate(texts, 1))


def _known(line: LabelLine) -> str:
    """What is known of a feature without a language model, a line a fact."""
    facts = {
        "A label, counted from texts": line.label,
        "Shares of its activation, squared": ", ".join(f"{_quoted(text)} {share:.0%}" for text, share in line.parts),
        "Words near by": _listed(line.near),
        "Other words that its direction is near to": _listed(line.words),
        "Tokens that it promotes next": _listed(line.logit_tokens),
        "Tokens that it suppresses next": _listed(line.logit_tokens_negative),
    }
    known = [f"{name}: {fact}" for name, fact in facts.items() if fact]
    return "\n".join(["", *known, ""]) if known else ""


def _listed(words: Sequence[str]) -> str:
    return ", ".join(map(_quoted, words[:_MAX_WORDS]))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _last_field(answer: str, name: str) -> Any:
    """A field of the last JSON object in a text that has it; None without such an object."""
    decoder = json.JSONDecoder()
    for start in reversed([match.start() for match in re.finditer(r"\{", answer)]):
        try:
            found, _ = decoder.raw_decode(answer, start)
        except ValueError:
            continue
        if name in found:
            return found[name]
    return None
