"""How near random rows come to directions, and random directions that vary as the rows do: what a direction is held against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.index.hook_name_search import HookNameSearch

_MAX_SCORES = 2**22  # similarities of directions to the sample that are held at once
_MIN_LENGTH = 1e-6  # rows that differ by less are equal up to rounding


@dataclass(frozen=True, eq=False)
class Projections:
    """The similarities of random rows to directions: up to 4,096 rows of each hook name, evenly spaced over the bank.

    Attributes:
        hook_names: The hook names that a search of the directions searches.
        mean: Mean similarity, float32, [n, hooks], by the hook's place in the index; NaN where it is not searched.
        std: Standard deviation of the similarities, [n, hooks].
    """

    hook_names: list[str]
    mean: Float[Tensor, "n hooks"]
    std: Float[Tensor, "n hooks"]


def project(searches: Mapping[str, HookNameSearch], queries: Mapping[str, Float[Tensor, "n d"]]) -> Projections:
    """The similarities of the sample of each hook name to queries, which are given as that hook name compares them.

    They are computed in float64 and rounded to float32, so that a query has the same figures whichever stand beside it.
    """
    n = len(next(iter(queries.values())))
    moments = [_moments(search, queries[name]) if name in queries else None for name, search in searches.items()]
    device = next(iter(queries.values())).device
    unknown = torch.full((2, n), torch.nan, device=device)
    mean, std = torch.stack([unknown if known is None else known for known in moments], -1)
    return Projections(list(queries), mean, std)


def _moments(search: HookNameSearch, queries: Float[Tensor, "n d"]) -> Float[Tensor, "2 n"]:
    """Mean and standard deviation of the similarities of one hook name's sample to each query."""
    sample = search.null_sample
    units, penalties = sample.units.double(), sample.penalties.double()
    moments = []
    for some in queries.split(max(1, _MAX_SCORES // len(units))):
        scores = some.double() @ units.T - penalties
        mean = scores.mean(-1)
        moments.append(torch.stack([mean, (scores - mean[:, None]).square().mean(-1).sqrt()]))
    return torch.cat(moments, -1).float()


def mix_rows(searches: Sequence[HookNameSearch], n: int, seed: int) -> Float[Tensor, "n d"]:
    """Random directions with the covariance of the rows: mixtures of the centered rows of each sample with normal weights.

    No matrix of d × d is made. Rows that are all equal give none, [0, d].
    """
    rng = np.random.default_rng((seed, 4))
    d = searches[0].d
    mixtures, is_varied = torch.zeros(n, d, device=searches[0].null_sample.units.device), False
    for search in searches:
        units = search.null_sample.units
        centered = units - units.mean(0)
        is_varied |= bool(centered.norm(dim=-1).max() > _MIN_LENGTH)
        if search.geometry.affine.weight is not None:  # A search of directions multiplies by it.
            centered = centered / search.geometry.affine.weight.to(centered)
        weights = torch.from_numpy(rng.standard_normal((n, len(centered)), np.float32))
        mixtures += weights.to(centered.device) @ centered
    return mixtures if is_varied else mixtures[:0]
