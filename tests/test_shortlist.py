"""Shortlists: the best rows of each query, and a bound on what they leave out."""

import pytest
import torch

from tl_latentlens.preselect import Scores
from tl_latentlens.shortlist import WIDE, Shortlist


def scores_of(raw: torch.Tensor, rounding: float = 0.0) -> Scores:
    n_queries = raw.shape[1]
    padded = torch.nn.functional.pad(raw, (0, 3, 0, -len(raw) % WIDE), value=-torch.inf)  # columns may be made up too
    none, one = torch.zeros(n_queries), torch.ones(n_queries)
    return Scores(None, none, 0.01 * one, one, none, rounding, raw=padded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "size"), [(5, 8), (5, 5), (100, 7), (100, 99), (3000, 40)])
def test_the_best_rows_and_the_best_of_the_rest(dtype: torch.dtype, n: int, size: int) -> None:
    raw = torch.randn(n, 6, generator=torch.Generator().manual_seed(n)).to(dtype)
    found = Shortlist.of(scores_of(raw, 1e-3), 1000, 1000 + n, size)
    every = (raw.float() + 1e-3 * raw.float().abs() + 0.01).T
    reach = every.sort(-1, descending=True)
    torch.testing.assert_close(found.reach.sort(-1, descending=True).values, reach.values[:, :size])
    torch.testing.assert_close(every.gather(1, found.rows - 1000), found.reach)
    assert all(len(set(rows)) == min(size, n) for rows in found.rows.tolist())
    # Equal scores may stand in any order, so the last row that is listed bounds the others, not the next one.
    torch.testing.assert_close(found.left, reach.values[:, size - 1] if size < n else torch.full((6,), -torch.inf))


def test_merged_lists_are_the_list_of_all_rows() -> None:
    raw = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    whole = Shortlist.of(scores_of(raw), 0, 200, 30)
    parts = [Shortlist.of(scores_of(raw[first:last]), first, last, 30) for first, last in ((0, 10), (10, 150), (150, 200))]
    merged = parts[0].merged(parts[1], 30).merged(parts[2], 30)
    assert torch.equal(merged.rows.sort(-1).values, whole.rows.sort(-1).values)
    torch.testing.assert_close(merged.left, whole.left)
