"""What is known of SAE features: neighbors, a label for each that has earned one, and the figures that say so."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_latentlens.directions.activity import Activity
from tl_latentlens.directions.direction_result import DirectionResult
from tl_latentlens.directions.label_summary import summarize
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.neighbor import Neighbor


@dataclass(frozen=True)
class FeatureResult(DirectionResult):
    """Neighbors of SAE features, a label for each that has earned one, and the figures that say so.

    `ids`, `positive` and `negative` leave out features whose decoder row is zero: they point nowhere.

    Attributes:
        table: One line a feature, in the order asked for: feature, label, why_not (what kept the label back, else empty),
            similarity (mean cosine of the neighbors) and p_similarity against random directions. With an encoder and a bank
            of the activation it reads:
            density (share of rows on which it is active), mean_activation and max_activation; auroc and auroc_same_token in
            [0, 1], their 95 % intervals (_low, _high), the means of shuffled decoders (_null) and p-values (p_auroc, ...);
            overlap in [0, 1] and overlap_null. With a model: logit_tokens and logit_tokens_negative (of v and of -v), steered
            and steered_next in [0, 1], their nulls.
        activity: Max-activating rows and histograms, from the pass over the bank; None without an encoder.
        nulls: Score → what wrong directions score: similarity (random directions), auroc and auroc_same_token (shuffled).
        sae, model: What the features were labelled with.
    """

    table: pd.DataFrame = field(repr=False)
    activity: Activity | None = field(repr=False, default=None)
    nulls: dict[str, Float[np.ndarray, " nulls"]] = field(repr=False, default_factory=dict)
    sae: Any = field(repr=False, default=None)
    model: Any = field(repr=False, default=None)

    def __repr__(self) -> str:
        return f"FeatureResult({len(self.table)} features, {np.count_nonzero(self.table['label'] != '')} labelled)"

    def __str__(self) -> str:
        from tl_latentlens.views.terminal import features_as_text

        return features_as_text(self)

    def _repr_html_(self) -> str:
        from tl_latentlens.views.html import features_html

        return features_html(self)

    def to_html(self, path: str | Path, contexts: int = 20, *, progress: bool = True) -> Path:
        """Write one page that needs no network: a table of the features to search and sort, and a card for the one chosen.

        A card has the neighbors of v and of -v, max-activating contexts shaded by the activation of each token, a histogram of
        activations, the logit lens of both, and each score among those of wrong directions: what of these there is. Tokens that
        are no rows of the bank are shaded only where the features were labelled with a model, which then runs their texts.
        `path#feature=123` opens a card.

        Args:
            path: The file.
            contexts: Max-activating contexts of each feature; at most four times the `top_k` of `label_features` are kept.
            progress: Show a progress bar.

        Returns:
            The file's path.

        Raises:
            InvalidInputError: No such folder.
        """
        from tl_latentlens.views.features import write_features

        return write_features(self, path, contexts, progress)

    def with_evidence(self, rows: int = 3) -> pd.DataFrame:
        """The table, and the contexts of the first `rows` neighbors and max-activating rows, as columns of lists."""
        place = {feature: i for i, feature in enumerate(self.ids)}
        features = self.table["feature"].tolist()
        neighbors = [self.positive.neighbors_of(place[f])[:rows] if f in place else [] for f in features]
        largest = [[neighbor for _, neighbor in self.max_activating(f, rows)] for f in features]
        columns = {"neighbors": neighbors, "max_activating": largest}
        return self.table.assign(**{name: [[n.context for n in found] for found in each] for name, each in columns.items()})

    def max_activating(self, feature: int, top_k: int = 10) -> list[tuple[float, Neighbor]]:
        """Activation and row of a feature's max-activating rows, the largest first.

        Empty without an encoder, and for a feature whose decoder row is zero.

        At most four times the `top_k` of `label_features` are kept. The rows' similarity is NaN: none was computed.

        Raises:
            InvalidInputError: The feature was not asked for.
        """
        if feature not in self.table["feature"].to_numpy():
            raise InvalidInputError(f"feature {feature} is not among the {len(self.table)} that were labelled")
        if self.activity is None or feature not in self.ids:
            return []
        at = list(self.ids).index(feature)
        values, rows = (part[at, :top_k] for part in (self.activity.top.similarities, self.activity.top.rows))
        index = self.positive.index
        hook_id = index.hook_names.index(self.activity.hook_name)
        pairs = [(value, row) for value, row in zip(values.tolist(), rows.tolist(), strict=True) if value > float("-inf")]
        return [(value, index.neighbor(row, hook_id, float("nan"))) for value, row in pairs]

    def summary(self) -> pd.DataFrame:
        """How many features are alive and labelled, and the mean of each score beside its null, with 95 % intervals."""
        return summarize(self.table)
