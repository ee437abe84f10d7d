"""Detection: does what a label says tell contexts in which a feature is active from silent ones?"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from tl_latentlens.directions.features.contexts import Contexts
from tl_latentlens.directions.features.evidence import Evidence
from tl_latentlens.directions.features.label_rule import Rules
from tl_latentlens.directions.features.row_texts import NumberedTexts
from tl_latentlens.directions.features.samples import DrawnRows

N_TENTHS = 10
_N_TOP = 10  # Neuronpedia scores an explanation on the ten texts that activate the feature most.
_Z = float(stats.norm.ppf(0.975))


@dataclass(frozen=True, eq=False)
class Detection:
    """Balanced accuracy of the features' rules on contexts: the mean of two shares.

    Attributes:
        score: With the share of active contexts that hold the rule counted in each tenth of the feature's largest activation,
            tenths without a context left out, and all tenths counting the same; NaN without active or silent contexts.
        low, high: Its 95 % interval, from Wilson's of both shares (MOVER: Newcombe, 1998).
        top: With the ten most active contexts in place of all.
    """

    score: Float[np.ndarray, " f"]
    low: Float[np.ndarray, " f"]
    high: Float[np.ndarray, " f"]
    top: Float[np.ndarray, " f"]


class ContextRules:
    """Tells which contexts hold a rule's texts of one kind."""

    def __init__(self, contexts: Contexts, texts: NumberedTexts, silent: Int[np.ndarray, " n"]) -> None:
        """Note the texts of all contexts.

        Args:
            contexts: The contexts.
            texts: The text of each row.
            silent: Contexts that are looked up for all features.
        """
        self._n_texts = len(texts.texts)
        has_text = (contexts.of_rows >= 0) & (texts.ids >= 0)
        self._codes = np.unique(contexts.of_rows[has_text] * self._n_texts + texts.ids[has_text])
        self._silent = np.zeros((len(silent), self._n_texts + 1), bool)  # The last column, of no text, stays False.
        places = np.minimum(np.searchsorted(silent, contexts.of_rows), max(0, len(silent) - 1))
        of_silent = has_text & (silent[places] == contexts.of_rows) if len(silent) else np.zeros(len(has_text), bool)
        self._silent[places[of_silent], texts.ids[of_silent]] = True

    def n_holding(self, is_counted: Bool[np.ndarray, " contexts"]) -> Int[np.ndarray, " texts"]:
        """In how many of some contexts each text is."""
        is_counted = is_counted[self._codes // self._n_texts]
        return np.bincount(self._codes[is_counted] % self._n_texts, minlength=self._n_texts)

    def hold(self, contexts: Int[np.ndarray, "f n"], parts: Int[np.ndarray, "f 3"]) -> Bool[np.ndarray, "f n"]:
        """Where a context of a feature's line holds one of the feature's parts."""
        found = np.zeros(contexts.shape, bool)
        for part in parts.T[:, :, None]:
            codes = contexts * self._n_texts + part
            places = np.minimum(np.searchsorted(self._codes, codes), max(0, len(self._codes) - 1))
            found |= (self._codes[places] == codes) & (part >= 0) if len(self._codes) else False
        return found

    def silent_hold(self, parts: Int[np.ndarray, "f 3"]) -> Bool[np.ndarray, "n f"]:
        """Which of the contexts that are looked up for all hold one of each feature's parts."""
        return np.asarray(self._silent[:, parts].any(-1))


def detect(
    rules: Rules, context_rules: ContextRules, evidence: Evidence, largest: Float[np.ndarray, " f"], *, held_out: bool
) -> Detection:
    """How well each feature's rule tells the contexts of one side apart.

    Args:
        rules: A rule a feature.
        context_rules: Of the same kind.
        evidence: Of the same features.
        largest: The largest activation of each feature.
        held_out: Whether on the held-out contexts, or on those that the rule was found on.
    """
    drawn = evidence.held_out if held_out else evidence.fitted
    is_drawn = drawn.rows >= 0
    holds = context_rules.hold(evidence.contexts.of_rows[np.maximum(drawn.rows, 0)], rules.parts) & is_drawn
    recall, n_active = _recall_by_tenth(holds, drawn, largest)
    silent = evidence.silent
    is_silent = ~silent.is_active & (silent.is_held_out == held_out)[:, None]
    n_silent = is_silent.sum(0)
    hits = (context_rules.silent_hold(rules.parts) & is_silent).sum(0)
    specificity = 1 - hits / np.where(n_silent, n_silent, np.nan)
    score = (recall + specificity) / 2
    half_low, half_high = np.zeros(len(score)), np.zeros(len(score))
    for share, n in ((recall, n_active), (specificity, n_silent)):
        low, high = _wilson(share, n)
        half_low, half_high = half_low + (share - low) ** 2, half_high + (high - share) ** 2
    is_top = is_drawn & (np.argsort(np.argsort(-np.where(is_drawn, drawn.activations, -1), -1), -1) < _N_TOP)
    top = np.where(n_active > 0, (holds & is_top).sum(-1) / np.maximum(is_top.sum(-1), 1), np.nan)
    return Detection(score, score - np.sqrt(half_low) / 2, score + np.sqrt(half_high) / 2, (top + specificity) / 2)


def _recall_by_tenth(
    holds: Bool[np.ndarray, "f n"], drawn: DrawnRows, largest: Float[np.ndarray, " f"]
) -> tuple[Float[np.ndarray, " f"], Int[np.ndarray, " f"]]:
    """The share of contexts that hold the rule, averaged over the tenths of activation, and how many contexts were drawn."""
    is_drawn = drawn.rows >= 0
    tenths = np.minimum(N_TENTHS * drawn.activations / np.maximum(largest, 1e-30)[:, None], N_TENTHS - 1).astype(int)
    cells = np.arange(len(holds))[:, None] * N_TENTHS + tenths
    shape = len(holds), N_TENTHS
    n = np.bincount(cells[is_drawn], drawn.counts[is_drawn], len(holds) * N_TENTHS).reshape(shape)
    n_held = np.bincount(cells[holds], drawn.counts[holds], len(holds) * N_TENTHS).reshape(shape)
    n_tenths = (n > 0).sum(-1)
    recall = (n_held / np.where(n > 0, n, 1)).sum(-1) / np.where(n_tenths, n_tenths, np.nan)
    return recall, is_drawn.sum(-1)


def _wilson(share: Float[np.ndarray, " f"], n: Int[np.ndarray, " f"]) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval of each share of so many."""
    n = np.where(n > 0, n, np.nan)
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return middle - half, middle + half
