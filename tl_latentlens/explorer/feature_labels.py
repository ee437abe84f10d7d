"""The labels of an SAE's features, which are made when the first is asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tl_latentlens.directions.features.label import label_features
from tl_latentlens.directions.features.label_summary import is_labelled
from tl_latentlens.directions.features.sae import decoder_of
from tl_latentlens.errors import LatentLensError
from tl_latentlens.index.contextual import ContextualIndex

_MAX_ACTIVATIONS = 1e8  # rows times features; about ten seconds on two cores


@dataclass(frozen=True)
class ShownLabel:
    """A feature's label.

    Attributes:
        text: What people read; empty where it has none.
        is_named: Whether it names something: a mixed one does not.
    """

    text: str = ""
    is_named: bool = False


class FeatureLabels:
    """The label of each feature that has one; see `label_features`.

    A large SAE, one that the bank's rows are not the activations of, or one that cannot be labelled has none.
    """

    def __init__(self, sae: Any, hook_name: str | None, index: Callable[[], ContextualIndex]) -> None:
        """Label nothing yet.

        Args:
            sae: The SAE.
            hook_name: The activation that it writes.
            index: Gives the rows, centered.
        """
        self._sae, self._hook_name, self._index = sae, hook_name, index

    def of(self, feature: int) -> ShownLabel:
        """The label of one feature; empty where it has none."""
        return self._labels.get(feature, ShownLabel())

    @cached_property
    def _labels(self) -> dict[int, ShownLabel]:
        if self._sae is None or self._hook_name is None:
            return {}
        index = self._index()
        if self._hook_name not in index.hook_names or index.n_rows * len(decoder_of(self._sae)) > _MAX_ACTIVATIONS:
            return {}
        try:
            table = label_features(self._sae, index, hook_name=self._hook_name, progress=False).table
        except LatentLensError:
            return {}
        labels = map(ShownLabel, table["label"].tolist(), is_labelled(table).tolist())
        return dict(zip(table["feature"].tolist(), labels, strict=True))
