"""The relations that a judge's answer names."""

import json
import re

from tl_latentlens.vision.judge.questions import RELATIONS


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
