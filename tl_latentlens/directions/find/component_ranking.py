"""Components ranked by their share of a word's meaning, with p-values among all and against two nulls of their own."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped

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
    nulls = {"same_token": contributions.at_contrast[:, top], "random": contributions.at_random[:, top]}
    figures = {name: _null_figures(at_word[top], null) for name, null in nulls.items()}
    p_family, n_family = p_values((at_word - usual)[top], contributions.along_others), len(contributions.along_others)
    why_not = _why_not(figures["same_token" if word.has_contrast else "random"], p_family, n_family, word.has_contrast)
    columns = {
        "contribution": at_word[top],
        "usual": usual[top],
        "share": shares[top],
        "beats_null": [reason == "" for reason in why_not],
        "why_not": why_not,
        "p_family": p_family,
        "n_family": n_family,
    }
    columns |= {f"{figure}_{name}": values for name, of_null in figures.items() for figure, values in of_null.items()}
    return RankedComponents(top, pd.DataFrame(columns), shares)


def _why_not(
    own: dict[str, Shaped[np.ndarray, " top"]], p_family: Float[np.ndarray, " top"], n_family: int, has_contrast: bool
) -> list[str]:
    """What each component fails of: to add more than it does elsewhere, and more than any does along other meanings."""
    rows = "other uses of the token" if has_contrast else "random rows"
    fewest = math.ceil(1 / _SIGNIFICANCE_LEVEL) - 1
    reasons = []
    for p, n, p_among_all in zip(own["p"], own["n"], p_family, strict=True):
        if not p <= max(_SIGNIFICANCE_LEVEL, 1 / (1 + n)):
            reasons.append(f"adds as much at {rows} (p = {p:.2g})")
        elif n_family < fewest:
            reasons.append(f"the bank has {n_family} other words to compare with, of {fewest} at least")
        elif p_among_all > _SIGNIFICANCE_LEVEL:
            reasons.append(f"adds no more than some component does along other words' meanings (p = {p_among_all:.2g})")
        else:
            reasons.append("")
    return reasons


def _null_figures(values: Float[np.ndarray, " top"], null: Float[np.ndarray, "n top"]) -> dict[str, Shaped[np.ndarray, " top"]]:
    """p, z and n of each value against its own nulls; NaN where there are none."""
    n = len(null)
    counts = np.full(len(values), n)
    if not n:
        nothing = np.full(len(values), np.nan)
        return {"p": nothing, "z": nothing, "n": counts}
    std = null.std(0) if n > 1 else np.zeros(len(values))
    return {
        "p": (1 + (null >= values).sum(0)) / (1 + n),
        "z": (values - null.mean(0)) / np.where(std > 0, std, np.nan),
        "n": counts,
    }
