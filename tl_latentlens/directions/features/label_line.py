"""What a line of the table of features says, in one form whatever columns the table has."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LabelLine:
    """A feature's label and what it rests on.

    Attributes:
        feature: Its number.
        label: What people read; empty where there is none.
        kind: "token", "before", "after", "position" or "mixed"; empty where the feature has no label.
        parts: Texts, with the share of the feature's activation that each carries.
        near: Words that stand near its rows.
        words: Other words that its direction is near to.
        logit_tokens, logit_tokens_negative: What the direction and its opposite promote; empty without a model.
        density: Share of rows on which it is active; NaN without an encoder.
        detection: Balanced accuracy of the label's rule on held-out contexts; NaN where it was not computed.
        sentence: A language model's sentence, where it beats the label; else empty.
    """

    feature: int
    label: str
    kind: str
    parts: tuple[tuple[str, float], ...]
    near: tuple[str, ...]
    words: tuple[str, ...]
    logit_tokens: tuple[str, ...]
    logit_tokens_negative: tuple[str, ...]
    density: float
    detection: float
    sentence: str

    @property
    def name(self) -> str:
        """The label where it names something; empty for a feature without a label and for a mixed one."""
        return "" if self.kind == "mixed" else self.label


def label_line(record: Mapping[str, Any]) -> LabelLine:
    """A line of `FeatureResult.table`, given as a mapping."""
    label = str(record["label"])
    lists = {name: _items(record.get(column)) for name, column in _LISTS.items()}
    return LabelLine(
        feature=int(record["feature"]),
        label=label,
        kind=str(record.get("label_kind") or ("token" if label else "")),
        parts=tuple((str(text), float(share)) for text, share in _items(record.get("label_parts"))),
        density=float(record.get("density", math.nan)),
        detection=float(record.get("detection", math.nan)),
        sentence=str(record.get("sentence", "")),
        **{name: tuple(map(str, items)) for name, items in lists.items()},
    )


_LISTS = {
    "near": "label_near",
    "words": "words",
    "logit_tokens": "logit_tokens",
    "logit_tokens_negative": "logit_tokens_negative",
}


def _items(value: Any) -> tuple[Any, ...]:
    """The items of a list; none where the table has NaN in its place, as on the line of a zero decoder row."""
    return () if value is None or isinstance(value, float | str) else tuple(value)
