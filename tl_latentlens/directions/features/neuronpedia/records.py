"""Features as Neuronpedia takes them: density, logits, explanations and activations, within its limits."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_latentlens.directions.features.activity import Activity
from tl_latentlens.directions.features.context_texts import ContextTexts
from tl_latentlens.directions.features.label_line import LabelLine, label_line
from tl_latentlens.directions.features.neuronpedia.intervals import interval_rows
from tl_latentlens.directions.features.sae import decoder_of
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.search_result import SearchedIndex
from tl_latentlens.lens.lenses import top_logits

BATCH_SIZE = 128  # The most features that Neuronpedia takes at once.
MAX_LOGITS, MAX_TOKENS, MAX_TEXT = 20, 1024, 512
N_BEFORE, N_AFTER = 48, 16  # Tokens around a row.
_DIGITS = 5


@dataclass(frozen=True)
class ActivationRecord:
    """A context with the feature's activation on each token.

    Attributes:
        tokens: Their texts, none of them empty.
        values: The activations; 0 where they are not known.
        at: The place of the row for which the context was chosen.
        interval: Least and largest activation of the interval that the context stands for, and the share of the contexts with
            the feature that are in it; None for max-activating ones.
    """

    tokens: list[str]
    values: list[float]
    at: int
    interval: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class FeatureRecord:
    """A feature.

    Attributes:
        feature: Its number.
        density: Share of rows on which it is active; None where it is not known.
        label: Its label; empty for a feature without one, or whose label says that it is mixed.
        sentence: A language model's sentence that beats the label; else empty.
        top_logits, bottom_logits: Tokens and logits, the largest and the most negative first; empty without a model.
        activations: The max-activating contexts, the largest first, then those of intervals of activation, the lowest first.
    """

    feature: int
    density: float | None
    label: str
    sentence: str
    top_logits: list[tuple[str, float]]
    bottom_logits: list[tuple[str, float]]
    activations: list[ActivationRecord]

    @cached_property
    def max_activation(self) -> float:
        """The largest value of all contexts; 0 where there are none."""
        return max((max(activation.values) for activation in self.activations), default=0.0)


class FeatureRecords:
    """The features of a table in batches; the texts of a batch are made when it is read."""

    def __init__(
        self,
        table: pd.DataFrame,
        places: Mapping[int, int],
        index: SearchedIndex,
        activity: Activity | None,
        *,
        sae: Any,
        model: Any,
        contexts: int = 20,
        progress: bool = True,
    ) -> None:
        """Compute activations and logits of all features.

        Args:
            table: The table of the `FeatureResult`.
            places: Feature number → its place among the max-activating rows.
            index: The rows.
            activity: Max-activating rows; None without an encoder.
            sae: What the features were labelled with.
            model: The bank's model, or None.
            contexts: Max-activating contexts of each feature.
            progress: Show progress bars.

        Raises:
            InvalidInputError: No context asked for; or the SAE is missing.
        """
        if contexts < 1:
            raise InvalidInputError(f"got contexts={contexts}; expected at least one for each feature")
        if sae is None:
            raise InvalidInputError(
                "got a result of another process, which came without its SAE; give it back: dataclasses.replace(found, sae=sae)"
            )
        self._lines = [label_line(record) for record in table.to_dict("records")]
        self._places, self._texts, self._intervals, self._n_top = places, None, None, 0
        if activity is not None:
            top = np.where(activity.top.is_active, activity.top.rows, -1)[:, :contexts]
            self._intervals, self._n_top = interval_rows(activity, top), top.shape[1]
            rows = np.concatenate([top, self._intervals.rows], -1)
            window, run = {"before": N_BEFORE, "after": N_AFTER}, {"model": model, "progress": progress}
            self._texts = ContextTexts(sae, index, activity.hook_name, list(places), rows, **window, **run)
        self._logits = []
        if model is not None and "logit_tokens" in table:
            directions = decoder_of(sae)[list(places)]
            self._logits = [top_logits(model, sign * directions, MAX_LOGITS) for sign in (1, -1)]

    @property
    def n_features(self) -> int:
        """Number of features of all batches."""
        return len(self._lines)

    def __iter__(self) -> Iterator[list[FeatureRecord]]:
        for first in range(0, len(self._lines), BATCH_SIZE):
            yield [self._record(line) for line in self._lines[first : first + BATCH_SIZE]]

    def _record(self, line: LabelLine) -> FeatureRecord:
        place = self._places.get(line.feature)
        top, bottom = ([], []) if place is None or not self._logits else (self._logit_pairs(i, place) for i in (0, 1))
        activations = [] if place is None or self._texts is None else self._activation_records(place, self._texts)
        return FeatureRecord(
            line.feature,
            None if np.isnan(line.density) else line.density,
            _within(line.name),
            _within(line.sentence),
            top,
            [(token, -value) for token, value in bottom],
            activations,
        )

    def _activation_records(self, place: int, texts: ContextTexts) -> list[ActivationRecord]:
        records = []
        for context in texts.of(place):
            column = context.column - self._n_top
            interval = None if column < 0 or self._intervals is None else self._intervals.interval(place, column)
            values = _rounded(np.where(np.isnan(context.activations), 0, context.activations))
            records.append(ActivationRecord(context.tokens, values, context.at, interval))
        return records

    def _logit_pairs(self, end: int, place: int) -> list[tuple[str, float]]:
        reading = self._logits[end]
        values = _rounded(reading.scores[place])
        tokens = (token.replace("\0", "␀") or "\N{REPLACEMENT CHARACTER}" for token in reading.tokens(place))
        return list(zip(tokens, values, strict=True))


def _rounded(values: Float[np.ndarray, " n"]) -> list[float]:
    """The values to five significant digits, so that files and requests are half as long."""
    values = values.astype(np.float64)
    sizes = np.where(values == 0, 1.0, np.abs(values))
    scale = 10.0 ** (_DIGITS - 1 - np.floor(np.log10(sizes)))
    return (np.rint(values * scale) / scale).tolist()


def _within(text: str) -> str:
    """The text, cut at the length that Neuronpedia takes: it counts as JavaScript does, in units of UTF-16."""
    units = text.encode("utf-16-le")
    return text if len(units) <= 2 * MAX_TEXT else f"{units[: 2 * (MAX_TEXT - 1)].decode('utf-16-le', 'ignore')}…"
