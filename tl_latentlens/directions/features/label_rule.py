"""What carries at least half of a feature's activation: the rule behind a label, and how well it tells contexts apart."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from tl_latentlens.directions.features.row_texts import NumberedTexts
from tl_latentlens.directions.features.samples import DrawnRows

MAX_PARTS = 3
MIN_SHARE = 0.5
"""The parts of a label carry so much of the activation together."""
_MIN_PART = 0.1  # A text with less is no part.


@dataclass(frozen=True, eq=False)
class Rules:
    """For each feature up to three texts of one kind, the largest share first.

    Attributes:
        texts: The texts of all rows.
        keys: Places in `texts.texts`; -1 past the last.
        shares: The share of the activation that each carries; 0 past the last.
        n_parts: How many of them carry a tenth or more; 0 where these do not carry half together.
    """

    texts: NumberedTexts
    keys: Int[np.ndarray, "f 3"]
    shares: Float[np.ndarray, "f 3"]
    n_parts: Int[np.ndarray, " f"]

    @property
    def parts(self) -> Int[np.ndarray, "f 3"]:
        """The keys of the rule; -1 for others."""
        return np.where(np.arange(MAX_PARTS) < self.n_parts[:, None], self.keys, -1)

    def select(self, places: Int[np.ndarray, " some"]) -> "Rules":
        """The rules of some features, by their places."""
        return Rules(self.texts, self.keys[places], self.shares[places], self.n_parts[places])


def find_rules(rows: DrawnRows, texts: NumberedTexts) -> Rules:
    """The texts that carry most of each feature's activation.

    Args:
        rows: Rows of each feature.
        texts: The texts of all rows, of one kind.
    """
    n_features = len(rows.rows)
    feature, key, share = text_shares(rows, texts.ids)
    order = np.lexsort((key, -share, feature))
    feature, key, share = feature[order], key[order], share[order]
    counts = np.bincount(feature, minlength=n_features)
    rank = np.arange(len(feature)) - (counts.cumsum() - counts)[feature]
    is_first = rank < MAX_PARTS
    keys, shares = np.full((n_features, MAX_PARTS), -1), np.zeros((n_features, MAX_PARTS))
    at = feature[is_first], rank[is_first]
    keys[at], shares[at] = key[is_first], share[is_first]
    n_parts = (shares >= _MIN_PART).sum(-1)
    reaches_half = np.where(shares >= _MIN_PART, shares, 0).sum(-1) >= MIN_SHARE
    return Rules(texts, keys, shares, np.where(reaches_half, n_parts, 0))


def text_shares(
    rows: DrawnRows, ids: Int[np.ndarray, " rows"]
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The share of each feature's weight that each text carries: feature, text and share, ascending in both."""
    keys = np.where(rows.rows >= 0, ids[rows.rows], -1)
    feature, place = np.nonzero(keys >= 0)
    n_texts = int(ids.max(initial=0)) + 1
    codes, inverse = np.unique(feature * n_texts + keys[feature, place], return_inverse=True)
    sums = np.bincount(inverse, rows.weights[feature, place], len(codes))
    feature = codes // n_texts
    return feature, codes % n_texts, sums / rows.weights.sum(-1)[feature]


def is_among(keys: Int[np.ndarray, "..."], parts: Int[np.ndarray, "... 3"]) -> Bool[np.ndarray, "..."]:
    """Where a key is one of the parts."""
    return ((keys[..., None] == parts) & (parts >= 0)).any(-1)


def rule_precision(rules: Rules, drawn: DrawnRows, n_holding: Int[np.ndarray, " texts"]) -> Float[np.ndarray, " f"]:
    """The share of the contexts with a row that a feature's rule names in which such a row activates it most; 0 without a rule.

    Args:
        rules: A rule a feature.
        drawn: Contexts of each feature, each by its row with the largest activation.
        n_holding: In how many contexts of those that they were drawn from each text is.
    """
    parts = rules.parts
    n_named = np.where(parts >= 0, np.append(n_holding, 0)[parts], 0).sum(-1)
    keys = np.where(drawn.rows >= 0, rules.texts.ids[drawn.rows], -1)
    n_active = (drawn.counts * is_among(keys, parts[:, None])).sum(-1)  # An estimate, which may exceed what there is.
    return np.minimum(1, n_active / np.maximum(n_named, 1))
