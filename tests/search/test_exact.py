"""Any search equals a brute force over the stored vectors, ties included, whatever the way, the chunks and the queries."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vectors import (
    BUDGETS,
    KINDS,
    PASSES,
    STORAGE,
    check,
    compared_rows,
    every_way,
    make_queries,
    make_rows,
    queries_of,
    quick,
    unit,
)

from tl_latentlens.search.driver import top_k_of_parts
from tl_latentlens.search.vectors import VectorSearch


@every_way
@quick
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 260),
    d=st.integers(1, 24),
    q=st.integers(1, 5),
    k=st.integers(1, 300) | st.integers(1, 5),
    storage=st.sampled_from(STORAGE),
    dtype=st.sampled_from(PASSES),
    budget=st.sampled_from(BUDGETS),
    normalized=st.booleans(),
    centered=st.booleans(),
)
def test_any_search_equals_the_brute_force(
    seed: int,
    kind: str,
    n: int,
    d: int,
    q: int,
    k: int,
    storage: torch.dtype,
    dtype: str,
    budget: int,
    normalized: bool,
    centered: bool,
) -> None:
    rng = np.random.default_rng(seed)
    rows = make_rows(kind, n, d, rng)
    rows = unit(rows) if normalized else rows
    vectors = torch.from_numpy(rows).to(storage)
    center = torch.from_numpy(0.3 * rng.standard_normal(d)) if centered else None
    queries = make_queries(q, rows, rng)
    found = VectorSearch(vectors, "cpu", dtype, center=center, memory_budget=budget).top_k(queries, k)
    assert found.rows.shape == (q, min(k, n))
    check(found, compared_rows(vectors, center), queries, k)


@every_way
@pytest.mark.parametrize("dtype", PASSES)
@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("budget", [10_000, 2**28])
def test_ids_equal_a_plain_float32_search_where_it_can_tell(storage: torch.dtype, dtype: str, budget: int) -> None:
    generator = torch.Generator().manual_seed(1)
    vectors = torch.nn.functional.normalize(torch.randn(1001, 48, generator=generator), dim=-1).to(storage)
    queries = torch.nn.functional.normalize(torch.randn(9, 48, generator=generator), dim=-1)
    found = VectorSearch(vectors, "cpu", dtype, memory_budget=budget).top_k(queries, 20)
    plain = (queries @ torch.nn.functional.normalize(vectors.float(), dim=-1).T).sort(dim=-1, descending=True, stable=True)
    gaps = torch.nn.functional.pad(plain.values[:, :20] - plain.values[:, 1:21], (1, 0), value=1.0)
    clear = torch.minimum(gaps[:, :-1], gaps[:, 1:]) > 1e-5
    assert clear.float().mean() > 0.9
    assert torch.equal(found.rows[clear], plain.indices[:, :20][clear])
    torch.testing.assert_close(found.similarities, plain.values[:, :20], rtol=0, atol=1e-6)
    check(found, compared_rows(vectors), queries, 20)


@every_way
@pytest.mark.parametrize("dtype", PASSES)
def test_neighbors_nearer_to_each_other_than_the_first_pass_can_tell(dtype: str) -> None:
    rng = np.random.default_rng(2)
    rows = unit(rng.standard_normal(64) + 1e-4 * rng.standard_normal((4000, 64)))
    vectors = torch.from_numpy(rows).float()
    queries = torch.from_numpy(rows[:4] + 1e-3 * rng.standard_normal((4, 64))).float()
    check(VectorSearch(vectors, "cpu", dtype, memory_budget=10**5).top_k(queries, 10), compared_rows(vectors), queries, 10)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 257])
def test_chunks_that_do_not_divide_the_rows(n: int, budget: int) -> None:
    rng = np.random.default_rng(n)
    vectors = torch.from_numpy(unit(rng.standard_normal((n, 8)))).half()
    queries = torch.from_numpy(rng.standard_normal((6, 8)))
    search = VectorSearch(vectors, "cpu", memory_budget=budget)
    assert len(search) == n
    assert search.d == 8
    for k in (1, 7, n, n + 3):
        check(search.top_k(queries, k), compared_rows(vectors), queries, k)


@every_way
@pytest.mark.parametrize("dtype", PASSES)
@pytest.mark.parametrize("kind", ["random", "duplicates", "cluster", "integers"])
def test_parts_are_ranked_together_as_one(dtype: str, kind: str) -> None:
    rng = np.random.default_rng(5)
    rows = torch.from_numpy(unit(make_rows(kind, 300, 24, rng)))
    queries = make_queries(12, rows.numpy(), rng)
    whole = VectorSearch(rows, "cpu")
    expected = whole.unclamped_top_k(queries, 8)
    parts = [VectorSearch(part, "cpu", dtype, memory_budget=10_000) for part in rows.split([50, 0, 3, 200, 47])]
    units = whole.normalize_queries(queries)
    for search_first in (0, 3):
        found = top_k_of_parts([part.part(units) for part in parts], 8, search_first=search_first)
        assert torch.equal(found.rows, expected.rows)
        assert torch.equal(found.similarities, expected.similarities)


def test_parts_may_have_queries_of_their_own() -> None:
    rng = np.random.default_rng(6)
    rows = torch.from_numpy(unit(make_rows("random", 90, 8, rng)))
    first, second = queries_of(4, 8), -queries_of(4, 8)
    searches = [VectorSearch(part, "cpu") for part in rows.split(45)]
    units = [search.normalize_queries(queries) for search, queries in zip(searches, (first, second), strict=True)]
    found = top_k_of_parts([search.part(part_units) for search, part_units in zip(searches, units, strict=True)], 90)
    scores = torch.cat([units[0] @ rows[:45].float().T, units[1] @ rows[45:].float().T], -1)
    assert torch.equal(found.rows, scores.argsort(-1, descending=True))


@every_way
@pytest.mark.parametrize("dtype", PASSES)
@pytest.mark.parametrize("budget", [300, 5000, 2**28])
def test_equal_rows_come_in_row_order(dtype: str, budget: int) -> None:
    vectors = torch.nn.functional.normalize(torch.ones(700, 5), dim=-1)
    found = VectorSearch(vectors, "cpu", dtype, memory_budget=budget).top_k(torch.tensor([[1.0, 2.0, 0.0, -1.0, 3.0]]), 300)
    assert found.rows.tolist() == [list(range(300))]
    assert found.similarities.unique().numel() == 1


@every_way
@pytest.mark.parametrize("dtype", PASSES)
def test_more_duplicates_than_candidates(dtype: str) -> None:
    """500 copies of the nearest row, scattered: a first pass with 2 * 5 + 32 candidates sees few of them."""
    rng = np.random.default_rng(3)
    rows = unit(rng.standard_normal((2000, 16)))
    copies = np.sort(rng.choice(2000, 500, replace=False))
    rows[copies] = rows[copies[0]]
    vectors = torch.from_numpy(rows).to(torch.bfloat16)
    queries = torch.from_numpy(rows[copies[:1]] + 0.01 * rng.standard_normal((3, 16)))
    for budget in (2000, 2**28):
        found = VectorSearch(vectors, "cpu", dtype, memory_budget=budget).top_k(queries, 5)
        assert found.rows.tolist() == [copies[:5].tolist()] * 3
    check(VectorSearch(vectors, "cpu", dtype).top_k(queries, 600), compared_rows(vectors), queries, 600)


@settings(quick, max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(PASSES),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    budget=st.sampled_from([300, 7000, 2**20]),
)
def test_a_result_does_not_depend_on_the_other_queries(seed: int, kind: str, dtype: str, cuts: list[int], budget: int) -> None:
    rng = np.random.default_rng(seed)
    rows = make_rows(kind, 150, 10, rng)
    queries = make_queries(12, rows, rng)
    vectors = torch.from_numpy(rows).float()
    together = VectorSearch(vectors, "cpu").top_k(queries, 6)
    search = VectorSearch(vectors, "cpu", dtype, memory_budget=budget)
    shuffle = torch.from_numpy(rng.permutation(12))
    edges = [0, *sorted(cuts), 12]
    parts = [search.top_k(queries[shuffle][first:last], 6) for first, last in itertools.pairwise(edges)]
    assert torch.equal(torch.cat([part.rows for part in parts]), together.rows[shuffle])
    assert torch.equal(torch.cat([part.similarities for part in parts]), together.similarities[shuffle])


def test_a_smaller_top_k_is_the_head_of_a_larger_one() -> None:
    rng = np.random.default_rng(12)
    rows = make_rows("integers", 400, 6, rng)
    queries = make_queries(5, rows, rng)
    search = VectorSearch(torch.from_numpy(rows).half(), "cpu")
    everything = search.top_k(queries, 400)
    for k in (1, 2, 30, 200, 399):
        assert torch.equal(search.top_k(queries, k).rows, everything.rows[:, :k])
    assert torch.equal(everything.rows.sort(-1).values, torch.arange(400).expand(5, -1))


def rounded(tensor: torch.Tensor, precision: str) -> torch.Tensor:
    """What a product of that precision multiplies: TF32, with 10 bits after the point, or bfloat16."""
    if precision == "high":
        return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return tensor.bfloat16().float()


@pytest.mark.parametrize("emulated", [False, True])  # few CPUs have such products of their own
@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("center", [False, True])
def test_exact_whatever_the_precision_of_float32_products(
    precision: str, center: bool, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(11)
    rows = unit(rng.standard_normal(64) + 2e-3 * rng.standard_normal((3000, 64)))
    vectors = torch.from_numpy(rows).float()
    middle = vectors.double().mean(0) if center else None
    queries = torch.from_numpy(rows[:5] + 1e-2 * rng.standard_normal((5, 64))).float()
    product = torch.Tensor.__matmul__

    def reduced(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return product(rounded(a, precision), rounded(b, precision)) if a.dtype == torch.float32 else product(a, b)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with monkeypatch.context() as patch:
            if emulated:
                patch.setattr(torch.Tensor, "__matmul__", reduced)
            found = VectorSearch(vectors, "cpu", center=middle, memory_budget=10**5).top_k(queries, 10)
    finally:
        torch.set_float32_matmul_precision(before)
    check(found, compared_rows(vectors, middle), queries, 10)
