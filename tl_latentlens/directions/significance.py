"""Is a direction anything? Its neighbors' nearness in standard deviations, against that of random directions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.index.search_result import SearchResult
from tl_latentlens.search.ambient import own_arithmetic
from tl_latentlens.statistics.p_values import p_values

N_NULL_DIRECTIONS = 1000  # of each kind
_Z_DECIMALS = 5  # The rest of z is rounding, which decides nothing where all rows are neighbors and z is 0.
_COMPARISON_SEED = 2**32  # added to a seed, gives a direction that no null of a small seed holds
_NULL_STEP = 250  # directions that are searched at once


@dataclass(frozen=True, eq=False)
class DirectionNull:
    """The nearness of random directions of two kinds to their neighbors.

    Attributes:
        isotropic: z of directions whose dimensions are independent and normal.
        covariance: z of directions with the covariance of the rows, which are mixtures of them; empty where all rows are equal.
        similarities: The mean similarities of both, one kind after the other.
    """

    isotropic: Float[np.ndarray, " nulls"]
    covariance: Float[np.ndarray, " mixtures"]
    similarities: Float[np.ndarray, " both"]


@dataclass(frozen=True, eq=False)
class DirectionScores:
    """How near the neighbors of directions are, and how often those of random directions are as near.

    Attributes:
        similarity: The mean similarity of the neighbors.
        z: How far the neighbors are above random rows of their hook name, in standard deviations of these; their mean.
        p_isotropic: The share of isotropic random directions of at least this z.
        p_covariance: The share of random directions with the covariance of the rows; NaN where all rows are equal.
        null: The random directions.
    """

    similarity: Float[np.ndarray, " n"]
    z: Float[np.ndarray, " n"]
    p_isotropic: Float[np.ndarray, " n"]
    p_covariance: Float[np.ndarray, " n"]
    null: DirectionNull

    @property
    def p(self) -> Float[np.ndarray, " n"]:
        """The larger of the two p-values."""
        return np.fmax(self.p_isotropic, self.p_covariance)


def scores_table(ids: Sequence[int | str], positive: DirectionScores, negative: DirectionScores) -> pd.DataFrame:
    """Two lines a direction, sign +1 and -1: direction, sign, similarity, z, p_isotropic, p_covariance, p."""
    columns = ("similarity", "z", "p_isotropic", "p_covariance", "p")
    ends = [
        pd.DataFrame({"direction": list(ids), "sign": sign, **{name: getattr(scores, name) for name in columns}})
        for sign, scores in ((1, positive), (-1, negative))
    ]
    return pd.concat(ends).sort_index(kind="stable", ignore_index=True)


def comparison_direction(index: ContextualIndex, hook_names: Sequence[str], d: int, seed: int) -> Float[Tensor, "1 d"]:
    """One random direction to show beside others: with the covariance of the rows, isotropic where all rows are equal.

    It is none of those that p is of.
    """
    mixture = index.random_directions(1, hook_names, seed + _COMPARISON_SEED)
    if len(mixture):
        return mixture
    rng = np.random.default_rng((seed, 6))
    return torch.from_numpy(rng.standard_normal((1, d), np.float32)).to(index.device)


class _Nearness(NamedTuple):
    """Mean similarity and z of directions' neighbors."""

    similarity: Float[np.ndarray, " n"]
    z: Float[np.ndarray, " n"]


_nulls: WeakKeyDictionary[ContextualIndex, dict[tuple[tuple[str, ...], int, int], DirectionNull]] = WeakKeyDictionary()


def direction_scores(
    index: ContextualIndex,
    directions: Float[Tensor, "n d"],
    found: SearchResult,
    hook_names: int | str | Sequence[int | str] | None,
    *,
    seed: int = 0,
    progress: bool = True,
) -> DirectionScores:
    """How near the neighbors of directions are, held against two kinds of random directions, 1,000 of each.

    A cosine of 0.4 is near for one direction and nothing for another: rows point mostly the same way, and vary more along some
    directions than along others. So the neighbors of a direction are compared with random rows along that same direction (see
    `ContextualIndex.nearness`). Random directions are searched and scored the same way.

    They are scored once for an index, the searched hook names, a number of neighbors and a seed.

    Args:
        index: The rows.
        directions: The directions, [n, d].
        found: Their neighbors in the index.
        hook_names: The hook names that were searched.
        seed: Seed of the random directions.
        progress: Show a progress bar.
    """
    searched = index.searched_hook_names(directions, hook_names)
    nearness = _nearness(index, directions, found, searched)
    null = _null(index, searched, directions.shape[-1], found.rows.shape[-1], seed, progress)
    p_isotropic, p_covariance = p_values(nearness.z, null.isotropic), p_values(nearness.z, null.covariance)
    if not len(null.covariance):
        p_covariance = np.full(len(nearness.z), np.nan)
    return DirectionScores(*nearness, p_isotropic, p_covariance, null)


def _null(index: ContextualIndex, hook_names: list[str], d: int, top_k: int, seed: int, progress: bool) -> DirectionNull:
    """The random directions, from the index's earlier ones where they are the same."""
    of_index, key = _nulls.setdefault(index, {}), (tuple(hook_names), top_k, seed)
    if key not in of_index:
        rng = np.random.default_rng((seed, 5))
        isotropic = torch.from_numpy(rng.standard_normal((N_NULL_DIRECTIONS, d), np.float32)).to(index.device)
        kinds = [isotropic, index.random_directions(N_NULL_DIRECTIONS, hook_names, seed)]
        steps = torch.cat(kinds).split(_NULL_STEP)
        with tqdm(steps, desc="random directions", delay=2, disable=not progress) as bar:
            scored = [_nearness(index, step, index.search(step, top_k, hook_names), hook_names) for step in bar]
        z = np.concatenate([step.z for step in scored])
        similarities = np.concatenate([step.similarity for step in scored])
        of_index[key] = DirectionNull(z[:N_NULL_DIRECTIONS], z[N_NULL_DIRECTIONS:], similarities)
    return of_index[key]


@own_arithmetic()
def _nearness(
    index: ContextualIndex, directions: Float[Tensor, "n d"], found: SearchResult, hook_names: list[str]
) -> _Nearness:
    z = index.nearness(directions, found, hook_names).mean(-1).round(decimals=_Z_DECIMALS)
    return _Nearness(found.similarities.mean(-1).cpu().numpy(), z.cpu().numpy())
