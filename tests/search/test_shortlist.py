"""Shortlists: the best rows of each query."""

import pytest
import torch
from support.vectors import check, every_way, queries_of, to_float64

from tl_latentlens.search.chunks import SHORTLIST_GROUP_ROWS, Chunk, ScratchMemory
from tl_latentlens.search.driver import top_k_of_parts
from tl_latentlens.search.error_bounds import CoarseScores, ErrorBound
from tl_latentlens.search.settings import search_settings
from tl_latentlens.search.shortlist import BestRows, make_shortlist
from tl_latentlens.search.topk import TopK
from tl_latentlens.search.vectors import VectorSearch


def scores_of(raw: torch.Tensor, first_row: int) -> CoarseScores:
    """Scores in whole groups of rows, with padding columns too."""
    padded = torch.nn.functional.pad(raw, (0, 3, 0, -len(raw) % SHORTLIST_GROUP_ROWS), value=-torch.inf)
    return CoarseScores(first_row, len(raw), padded, ErrorBound(None, torch.zeros(raw.shape[1])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("n_queries", [1, 6])
@pytest.mark.parametrize(("n", "size"), [(5, 8), (5, 5), (100, 7), (100, 99), (3000, 40)])
def test_the_best_rows(dtype: torch.dtype, n_queries: int, n: int, size: int) -> None:
    raw = torch.randn(n, n_queries, generator=torch.Generator().manual_seed(n)).to(dtype)
    found = BestRows.of(scores_of(raw, 1000), n_queries, size)
    best = raw.T.sort(-1, descending=True).values[:, :size]
    torch.testing.assert_close(found.raw.sort(-1, descending=True).values, best, rtol=0, atol=0)
    torch.testing.assert_close(raw.T.gather(1, found.row_ids - 1000), found.raw, rtol=0, atol=0)
    assert all(len(set(rows)) == min(size, n) for rows in found.row_ids.tolist())


def test_merged_lists_are_the_list_of_all_rows() -> None:
    raw = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    whole = BestRows.of(scores_of(raw, 0), 4, 30)
    parts = [BestRows.of(scores_of(raw[first:last], first), 4, 30) for first, last in ((0, 10), (10, 150), (150, 200))]
    merged = parts[0].merged(parts[1], 30).merged(parts[2], 30)
    assert torch.equal(merged.row_ids.sort(-1).values, whole.row_ids.sort(-1).values)


@pytest.mark.parametrize("budget", [2**16, 2**20])
@pytest.mark.parametrize(("storage", "dtype"), [(torch.float16, "float16"), (torch.float32, "float32")])
@pytest.mark.parametrize("size", [1000, 6000])  # of the lowest score of half of the rows, about 0, rounding takes no share
def test_no_other_row_is_nearer_than_a_shortlist_says(size: int, storage: torch.dtype, dtype: str, budget: int) -> None:
    generator = torch.Generator().manual_seed(2)
    vectors = torch.nn.functional.normalize(torch.randn(12_000, 16, generator=generator), dim=-1).to(storage)
    ends = torch.rand(40, 16, generator=generator).argsort(-1)[:, :4]
    queries = torch.zeros(40, 16).scatter_(1, ends, 0.5)  # nothing is lost when they are rounded, only by the product
    queries[20:] = torch.nn.functional.normalize(queries[20:] + 0.01 * torch.randn(20, 16, generator=generator), dim=-1)
    search = VectorSearch(vectors, "cpu", dtype, unit_length=True, memory_budget=budget)
    source = search.coarse_pass.float_source(queries, 0, ScratchMemory(search.rows.device))
    shortlist = make_shortlist(source.scores(Chunk(0, len(search))), len(queries), len(search), size)
    exact, rows, bound = queries.double() @ vectors.double().T, shortlist.row_ids, shortlist.excluded_bound
    assert bound is not None
    assert bool((exact.scatter(1, rows, -torch.inf).amax(1) <= bound).all())
    assert bool((bound - exact.gather(1, rows).amin(1) < 2e-3).all())


@every_way
def test_each_part_says_what_its_shortlist_leaves_out() -> None:
    other = torch.randn(1400, 32, generator=torch.Generator().manual_seed(4))
    other[1000:] = queries_of(1, 32) + 1e-4 * other[1000:]
    rows = torch.nn.functional.normalize(other, dim=-1).half()
    searches = [VectorSearch(part, "cpu", "float16", unit_length=True) for part in (rows[:500], rows[500:1000], rows[1000:])]
    found = top_k_of_parts([search.part(search.normalize_queries(queries_of(1, 32))) for search in searches], 20)
    check(TopK(found.similarities.clamp(-1, 1), found.rows), to_float64(rows), queries_of(1, 32), 20)


def test_each_part_counts_the_queries_that_its_shortlist_did_not_settle() -> None:
    """Those of the part with many rows too near to tell apart, wherever it stands; no more lists are made of it."""
    rows = torch.nn.functional.normalize(torch.randn(1600, 32, generator=torch.Generator().manual_seed(5)), dim=-1)
    rows[800:] = torch.nn.functional.normalize(queries_of(1, 32) + 1e-5 * rows[800:], dim=-1)
    vectors, queries = rows.half(), queries_of(1, 32).repeat(40, 1)
    with search_settings(use_cpu_kernels=False, synchronous_devices=frozenset()):
        searches = [VectorSearch(part, "cpu", "float16", unit_length=True) for part in (vectors[:800], vectors[800:])]
        parts = [search.part(search.normalize_queries(queries)) for search in searches]
        found = top_k_of_parts(parts, 20)
        first, second = (search.coarse_pass.stats for search in searches)
        assert (first.n_queries, first.n_unsettled) == (40, 0)
        assert (second.n_queries, second.n_unsettled) == (40, 40)
        assert [search.coarse_pass.can_shortlist for search in searches] == [True, False]
        again = top_k_of_parts(parts, 20)
        assert second.n_queries == 40
    assert torch.equal(again.rows, found.rows)
    check(TopK(found.similarities.clamp(-1, 1), found.rows), to_float64(vectors), queries, 20)
