"""How far found rows are above random rows, and random directions that vary as the rows do."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.index.hook_name_search import HookNameSearch
from tl_latentlens.index.search_result import SearchResult

_MAX_NUMBERS = 2**22  # similarities to the sample, or numbers of rows, that are held at once
_MIN_DISTANCE = 1e-5  # from the mean row; rows that are nearer are equal up to rounding
_MIN_STD = 1e-6  # below it, all rows are as near to a direction up to rounding


def nearness(
    searches: Mapping[str, HookNameSearch], queries: Mapping[str, Float[Tensor, "n d"]], found: SearchResult
) -> Float[Tensor, "n k"]:
    """How far each found row is above up to 4,096 random rows of its hook name, in their standard deviations, float64.

    The similarity of a row is first taken about the mean row: above the mean similarity, and divided by the row's distance
    from the mean row. So it is a cosine with the centered row for every transform. Otherwise, in a raw index, the few rows
    that are far from all others would decide, such as those of massive activations.

    Args:
        searches: The hook names of the index, in its order.
        queries: Hook name that was searched → the directions as it compares them.
        found: Their neighbors.
    """
    z = torch.zeros(found.similarities.shape, dtype=torch.float64, device=found.similarities.device)
    for hook_id, (name, search) in enumerate(searches.items()):
        places = (found.hook_ids == hook_id).nonzero(as_tuple=True)
        if name not in queries or not len(places[0]):
            continue
        mean, moments = _sample_moments(search, queries[name])
        distances = _distances(search, found.rows[places])
        about_mean = (found.similarities[places].double() - mean[places[0]]) / distances
        std = moments[1, places[0]]
        z[places] = torch.where(std > _MIN_STD, (about_mean - moments[0, places[0]]) / std, 0.0)
    return z


def _sample_moments(search: HookNameSearch, queries: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "2 n"]]:
    """Mean similarity of the sample to each query; mean and standard deviation of the similarities about the mean row.

    They are computed in float64 and rounded to float32, so that a query has the same figures whichever stand beside it.
    """
    sample = search.null_sample
    units, penalties = sample.units.double(), sample.penalties.double()
    distances = (units - units.mean(0)).norm(dim=-1).clamp(min=_MIN_DISTANCE)
    parts = []
    for some in queries.split(max(1, _MAX_NUMBERS // len(units))):
        scores = some.double() @ units.T - penalties
        mean = scores.mean(-1)
        about_mean = (scores - mean[:, None]) / distances
        middle = about_mean.mean(-1)
        parts.append(torch.stack([mean, middle, (about_mean - middle[:, None]).square().mean(-1).sqrt()]))
    rounded = torch.cat(parts, -1).float().double()
    return rounded[0], rounded[1:]


def _distances(search: HookNameSearch, row_ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The distance of rows, as they are compared, from the mean row of the sample."""
    mean = search.null_sample.units.double().mean(0)
    unique, inverse = row_ids.unique(return_inverse=True)
    parts = unique.split(max(1, _MAX_NUMBERS // search.d))
    distances = [(search.normalized_rows(part)[0].double() - mean).norm(dim=-1) for part in parts]
    return torch.cat(distances).clamp(min=_MIN_DISTANCE)[inverse]


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
        is_varied |= bool(centered.norm(dim=-1).max() > _MIN_DISTANCE)
        if search.geometry.affine.weight is not None:  # A search of directions multiplies by it.
            centered = centered / search.geometry.affine.weight.to(centered)
        weights = torch.from_numpy(rng.standard_normal((n, len(centered)), np.float32))
        mixtures += weights.to(centered.device) @ centered
    return mixtures if is_varied else mixtures[:0]
