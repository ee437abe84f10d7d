"""Labels of SAE features, with neighbors and scores, as `label_features` returns them."""

from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from tl_latentlens.directions.direction_result import DirectionResult
from tl_latentlens.directions.features.activity import Activity
from tl_latentlens.directions.features.label_check import shares_on
from tl_latentlens.directions.features.label_summary import is_labelled, label_places, summarize
from tl_latentlens.directions.features.neuronpedia.export import NeuronpediaExport
from tl_latentlens.directions.features.page import feature_page_data
from tl_latentlens.directions.features.sae import TensorSAE
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.index.neighbor import Neighbor
from tl_latentlens.views.data import FeatureLine
from tl_latentlens.views.features import feature_page
from tl_latentlens.views.files import output_path
from tl_latentlens.views.notebook import features_html
from tl_latentlens.views.terminal.features import feature_table, label_counts
from tl_latentlens.views.terminal.layout import plain_text


@dataclass(frozen=True)
class FeatureResult(NeuronpediaExport, DirectionResult):
    """Neighbors of SAE features, a label for each feature whose scores allow one, and the scores.

    `ids`, `positive` and `negative` leave out features whose decoder row is zero, since they have no direction. So
    `neighbors(n)` counts places in `ids`; `neighbors_of` and `max_activating` take the number of a feature.

    Attributes:
        table: One line a feature, in the order asked for; `label_features` says what its columns are: the label with its kind,
            its parts and the words near; why_not (what kept a label back, else empty); the words of both ends; scores, with
            95 % intervals (`_low`, `_high`), means of their nulls (`_null`) and p-values (`p_`). With an encoder and a bank of
            the activation it reads: density (share of rows on which it is active), mean_activation and max_activation. With
            a model: logit_tokens and logit_tokens_negative (of v and of -v).
        activity: Max-activating rows and histograms, from the pass over the bank; None without an encoder.
        nulls: Score → what wrong directions score: similarity and z of 2,000 random directions; auroc and auroc_same_token of
            shuffled decoders, and `density`, how often the feature of each is active.
        sae, model: What the features were labelled with. Another process gets neither the model nor an object of SAELens; give
            them back there where `to_html` is to run them: `dataclasses.replace(result, sae=sae, model=model)`.
    """

    table: pd.DataFrame = field(repr=False)
    activity: Activity | None = field(repr=False, default=None)
    nulls: dict[str, Float[np.ndarray, " nulls"]] = field(repr=False, default_factory=dict)
    sae: Any = field(repr=False, default=None)
    model: Any = field(repr=False, default=None)

    def __repr__(self) -> str:
        return f"FeatureResult({len(self.table)} features, {self._n_labelled} labelled)"

    def __str__(self) -> str:
        return plain_text(Group(self.to_rich(neighbors=None), Text(self.label_counts())))

    def _repr_html_(self) -> str:
        lines = (self._feature_line(record) for record in self.table.to_dict("records"))
        return features_html(lines, len(self.table), self._n_labelled, self.transform)

    def __getstate__(self) -> dict[str, Any]:
        """All but the model, and an SAE that is code of another library."""
        sae = self.sae if isinstance(self.sae, TensorSAE | Tensor | np.ndarray) else None
        return {**vars(self), "sae": sae, "model": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "FeatureResult":
        """A copy with the same SAE and model."""
        memo |= {id(shared): shared for shared in (self.sae, self.model)}
        return replace(self, **{part.name: deepcopy(getattr(self, part.name), memo) for part in fields(self)})

    @cached_property
    def places(self) -> dict[int, int]:
        """Feature number → its place in `ids`, `positive`, `negative` and `activity`; zero decoder rows have none."""
        return {int(feature): place for place, feature in enumerate(self.ids)}

    @property
    def _n_labelled(self) -> int:
        return int(is_labelled(self.table).sum())

    def neighbors_of(self, feature: int) -> tuple[list[Neighbor], list[Neighbor]]:
        """Neighbors of +v and of -v for a feature by its number; empty for one whose decoder row is zero.

        `neighbors(n)` takes the place in `ids` instead, which is another number once features were chosen or a row is zero.

        Raises:
            InvalidInputError: The feature was not asked for.
        """
        self._require(feature)
        return self.neighbors(self.places[feature]) if feature in self.places else ([], [])

    def to_html(self, path: str | Path, contexts: int = 20, *, call: str = "", progress: bool = True) -> Path:
        """Write one page that needs no network: a table of the features to search and sort, and a card for the one chosen.

        A card has the parts of the label with their shares, the words and next tokens of v and of -v, max-activating contexts
        shaded by the activation of each token, the neighbors of v and of -v, each score among those of wrong labels and
        directions, and a histogram of activations: what of these there is. Tokens that are no rows of the bank are shaded only
        where the features were labelled with a model, which then runs their texts.
        `path#feature=123` opens a card.

        Args:
            path: The file.
            contexts: Max-activating contexts of each feature; at most four times the `top_k` of `label_features` are kept.
            call: The command that made the labels, for the page's head; empty: the call of `label_features`.
            progress: Show a progress bar.

        Returns:
            The file's path.

        Raises:
            InvalidInputError: No such folder; or the result came from another process without its SAE.
        """
        if self.activity is not None and self.sae is None:
            raise InvalidInputError(
                "got a result of another process, which came without its SAE; give it back: dataclasses.replace(found, sae=sae)"
            )
        path = output_path(path)
        data = feature_page_data(
            self.table,
            self.places,
            {"positive": self.positive, "negative": self.negative},
            self.activity,
            self.nulls,
            sae=self.sae,
            model=self.model,
            n_contexts=contexts,
            call=call,
            progress=progress,
        )
        path.write_text(feature_page(data), encoding="utf-8")
        return path

    def to_rich(self, lines: int = 30, neighbors: int | None = 0, *, width: int | None = None) -> Table:
        """A table for the terminal (`rich.print`): a line a feature, named ones first, then mixed ones.

        The best come first: by detection where it is known, and then by how near the nearest rows are.

        Args:
            lines: Most features shown.
            neighbors: Most neighbors of each, below its label; None: all that were asked for.
            width: In characters; None: the terminal's.
        """
        place = label_places(self.table)
        # Cosines order the labelled features where detection does not: the AUROC of many of them is 1.
        scores = [name for name in ("detection", "similarity") if name in self.table]
        ascending = [True, *(False for _ in scores)]
        ordered = self.table.assign(place=place).sort_values(["place", *scores], ascending=ascending, kind="stable")
        features = [self._feature_line(record, neighbors) for record in ordered.head(lines).to_dict("records")]
        return feature_table(features, list(self.table), len(self.table), self.transform, width)

    def label_counts(self) -> str:
        """The number of features, of those named by each kind of label, of mixed ones, and of others by reason, in one line."""
        return label_counts(self.table)

    def _feature_line(self, record: dict[str, Any], n_neighbors: int | None = None) -> FeatureLine:
        """A line of the table as views draw it."""
        place = self.places.get(record["feature"])
        neighbors = [] if place is None else self.positive.neighbor_lines(place, n_neighbors)
        texts = (record["label"], record["label_kind"], record["why_not"])
        return FeatureLine(record["feature"], *texts, list(record["words"]), record, neighbors)

    def to_dataframe(self) -> pd.DataFrame:
        """One line a feature: its label or why it has none, and its scores; a copy of `table`.

        `with_evidence` adds contexts; `neighbors_dataframe` has a line for each feature, sign and rank.
        """
        table = self.table.assign(label_parts=self._parts_as_records())
        table.attrs["transform"] = self.transform
        return table

    def with_evidence(self, rows: int = 3) -> pd.DataFrame:
        """The table, and the contexts of the first `rows` neighbors and max-activating rows, as columns of lists."""
        features = self.table["feature"].tolist()
        columns = {
            "neighbors": [self.neighbors_of(feature)[0][:rows] for feature in features],
            "max_activating": [[row for _, row in self.max_activating(feature, rows)] for feature in features],
        }
        contexts = {name: [[near.context for near in rows] for rows in column] for name, column in columns.items()}
        return self.table.assign(label_parts=self._parts_as_records(), **contexts)

    def _parts_as_records(self) -> list[list[dict[str, Any]]]:
        """The parts of the labels as files of tables can hold them."""
        return [[{"text": text, "share": share} for text, share in parts] for parts in self.table["label_parts"]]

    def max_activating(self, feature: int, top_k: int = 10) -> list[tuple[float, Neighbor]]:
        """Activation and row of a feature's max-activating rows, the largest first.

        Empty without an encoder, and for a feature whose decoder row is zero.

        At most four times the `top_k` of `label_features` are kept. The rows' similarity is NaN: none was computed.

        Raises:
            InvalidInputError: The feature was not asked for.
        """
        self._require(feature)
        if self.activity is None or feature not in self.places:
            return []
        place = self.places[feature]
        top, index = self.activity.top, self.positive.index
        n = min(top_k, int(top.n_active[place]))
        hook_id = index.hook_names.index(self.activity.hook_name)
        pairs = zip(top.activations[place, :n].tolist(), top.rows[place, :n].tolist(), strict=True)
        return [(activation, index.neighbor(row, hook_id, float("nan"))) for activation, row in pairs]

    def summary(self) -> pd.DataFrame:
        """Figures over living features: the share labelled and the mean of each score beside its null, with 95 % intervals."""
        return summarize(self.table)

    def shares_on(self, index: ContextualIndex, *, progress: bool = True) -> pd.DataFrame:
        """How much of each labelled feature's activation its label carries on another index; see `label_check.shares_on`.

        Raises:
            InvalidInputError: The features were labelled without an encoder.
        """
        if self.activity is None or self.sae is None:
            raise InvalidInputError("got features without activations; label them with an SAE that has an encoder")
        return shares_on(self.table, self.sae, index, self.activity.hook_name, progress=progress)

    def _require(self, feature: int) -> None:
        if feature not in self.table["feature"].to_numpy():
            raise InvalidInputError(f"feature {feature} is not among the {len(self.table)} that were labelled")
