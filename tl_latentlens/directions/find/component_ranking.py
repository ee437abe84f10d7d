"""Components ranked by their share of a word's meaning, with p-values among all and against two nulls of their own."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from tl_latentlens.directions.find.word_in_context import WordInContext
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.statistics.p_values import p_values

_SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True, eq=False)
class Contributions:
    """The outputs of components, projected on the direction of a word's meaning.

    Attributes:
        at_word: At the word itself.
        at_contrast: At the contrast uses of its token.
        at_random: At random rows.
        along_others: The largest excess of any component at the word, along the meaning of each of some other words. An excess
            is what a component adds more than it usually does.
    """

    at_word: Float[np.ndarray, " components"]
    at_contrast: Float[np.ndarray, "uses components"]
    at_random: Float[np.ndarray, "random components"]
    along_others: Float[np.ndarray, " meanings"]


@dataclass(frozen=True, eq=False)
class RankedComponents:
    """Components with the largest shares.

    Attributes:
        places: Their places among all components, the largest share first.
        table: A line for each: contribution, usual, share, beats_null, why_not, p_family, n_family, and p, z and n against each
            null of its own.
        shares: The shares of all components.
    """

    places: Int[np.ndarray, " top"]
    table: pd.DataFrame
    shares: Float[np.ndarray, " components"]


def rank_components(contributions: Contributions, word: WordInContext, total: float, top_k: int) -> RankedComponents:
    """The `top_k` components with the largest shares.

    Args:
        contributions: The contributions of all components.
        word: The word.
        total: How much more of the direction the word has than the rows it is compared with: what shares are shares of.
        top_k: At least 1.

    Raises:
        InvalidInputError: `top_k` is below 1.
    """
    if top_k < 1:
        raise InvalidInputError(f"got top_k={top_k}; expected at least 1")
    at_word = contributions.at_word
    usual = (contributions.at_contrast if word.has_contrast else contributions.at_random).mean(0)
    shares = (at_word - usual) / total
    top = np.argsort(-shares, kind="stable")[:top_k]
    table = pd.DataFrame({"contribution": at_word[top], "usual": usual[top], "share": shares[top]})
    table["beats_null"], table["why_not"], table["p_family"], table["n_family"] = False, "", np.nan, 0
    for name, null in (("same_token", contributions.at_contrast[:, top]), ("random", contributions.at_random[:, top])):
        for figure, values in _null_figures(at_word[top], null).items():
            table[f"{figure}_{name}"] = values
    table["p_family"] = p_values((at_word - usual)[top], contributions.along_others)
    table["n_family"] = len(contributions.along_others)
    table["why_not"] = _why_not(table, word.has_contrast)
    table["beats_null"] = table["why_not"] == ""
    return RankedComponents(top, table, shares)


def _why_not(table: pd.DataFrame, has_contrast: bool) -> list[str]:
    """What each component fails of: to add more than it does elsewhere, and more than any does along other meanings."""
    null, rows = ("same_token", "other uses of the token") if has_contrast else ("random", "random rows")
    fewest = math.ceil(1 / _SIGNIFICANCE_LEVEL) - 1
    reasons = []
    for p, n, p_family, n_family in table[[f"p_{null}", f"n_{null}", "p_family", "n_family"]].itertuples(index=False):
        if not p <= max(_SIGNIFICANCE_LEVEL, 1 / (1 + n)):
            reasons.append(f"adds as much at {rows} (p = {p:.2g})")
        elif n_family < fewest:
            reasons.append(f"the bank has {n_family:.0f} other words to compare with, of {fewest} at least")
        elif p_family > _SIGNIFICANCE_LEVEL:
            reasons.append(f"adds no more than some component does along other words' meanings (p = {p_family:.2g})")
        else:
            reasons.append("")
    return reasons


def _null_figures(
    values: Float[np.ndarray, " top"], null: Float[np.ndarray, "n top"]
) -> dict[str, Float[np.ndarray, " top"] | float | int]:
    """p, z and n of each value against its own nulls; NaN where there are none."""
    n = len(null)
    if not n:
        return {"p": np.nan, "z": np.nan, "n": 0}
    std = null.std(0) if n > 1 else np.zeros(len(values))
    return {
        "p": (1 + (null >= values).sum(0)) / (1 + n),
        "z": (values - null.mean(0)) / np.where(std > 0, std, np.nan),
        "n": n,
    }
