"""Shortlists: the best rows of each query."""

import pytest
import torch

from tl_latentlens.search.shortlist import WIDE, Shortlist
from tl_latentlens.search.vectors import VectorSearch


def padded(raw: torch.Tensor) -> torch.Tensor:
    """Whole groups of rows; columns may be made up too."""
    return torch.nn.functional.pad(raw, (0, 3, 0, -len(raw) % WIDE), value=-torch.inf)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("n_queries", [1, 6])
@pytest.mark.parametrize(("n", "size"), [(5, 8), (5, 5), (100, 7), (100, 99), (3000, 40)])
def test_the_best_rows(dtype: torch.dtype, n_queries: int, n: int, size: int) -> None:
    raw = torch.randn(n, n_queries, generator=torch.Generator().manual_seed(n)).to(dtype)
    found = Shortlist.of(padded(raw), n_queries, 1000, 1000 + n, size)
    best = raw.T.sort(-1, descending=True).values[:, :size]
    torch.testing.assert_close(found.raw.sort(-1, descending=True).values, best, rtol=0, atol=0)
    torch.testing.assert_close(raw.T.gather(1, found.rows - 1000), found.raw, rtol=0, atol=0)
    assert all(len(set(rows)) == min(size, n) for rows in found.rows.tolist())


def test_merged_lists_are_the_list_of_all_rows() -> None:
    raw = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    whole = Shortlist.of(padded(raw), 4, 0, 200, 30)
    parts = [Shortlist.of(padded(raw[first:last]), 4, first, last, 30) for first, last in ((0, 10), (10, 150), (150, 200))]
    merged = parts[0].merged(parts[1], 30).merged(parts[2], 30)
    assert torch.equal(merged.rows.sort(-1).values, whole.rows.sort(-1).values)


@pytest.mark.parametrize("budget", [2**16, 2**20])
@pytest.mark.parametrize(("storage", "dtype"), [(torch.float16, "float16"), (torch.float32, "float32")])
@pytest.mark.parametrize("size", [1000, 15_000])  # of the lowest score of half of the rows, about 0, rounding takes no share
def test_no_other_row_is_nearer_than_a_shortlist_says(size: int, storage: torch.dtype, dtype: str, budget: int) -> None:
    generator = torch.Generator().manual_seed(2)
    vectors = torch.nn.functional.normalize(torch.randn(30_000, 16, generator=generator), dim=-1).to(storage)
    ends = torch.rand(40, 16, generator=generator).argsort(-1)[:, :4]
    queries = torch.zeros(40, 16).scatter_(1, ends, 0.5)  # nothing is lost when they are rounded, only by the product
    queries[20:] = torch.nn.functional.normalize(queries[20:] + 0.01 * torch.randn(20, 16, generator=generator), dim=-1)
    rows, most = VectorSearch(vectors, "cpu", dtype, unit_length=True, memory_budget=budget).shortlist(queries, size)
    exact = queries.double() @ vectors.double().T
    assert most is not None
    assert bool((exact.scatter(1, rows, -torch.inf).amax(1) <= most).all())
    assert bool((most - exact.gather(1, rows).amin(1) < 2e-3).all())
