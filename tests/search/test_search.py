"""VectorSearch against a brute force over the stored vectors."""

import collections
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.search import candidates as preselect
from tl_latentlens.search.candidates import GROUP, Scratch
from tl_latentlens.search.codes import Codes, byte_codes
from tl_latentlens.search.ranking import TopK, rank_together
from tl_latentlens.search.vectors import DTYPES, VectorSearch

STORAGE = [torch.float16, torch.bfloat16, torch.float32]
PASSES = ["auto", "int8", *DTYPES]
BUDGETS = [1, 300, 1000, 7000, 2**20]
both = pytest.mark.usefixtures("loops")
quick = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module", params=["torch", "compiled", "shortlists"])
def loops(request: pytest.FixtureRequest) -> Iterator[str]:
    """A test runs with torch alone, with compiled loops for chunks of any size, and with shortlists, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "compiled":
            pytest.importorskip("numba")
            patch.setattr(preselect, "_WORTH_COMPILING", 0)
            patch.setattr("tl_latentlens.search.vectors._FIRST", GROUP)
        else:
            patch.setattr(preselect, "_compiled", lambda: None)
        if request.param == "shortlists":
            patch.setattr("tl_latentlens.search.vectors._AT_ONCE", frozenset())
        yield request.param


# ------------------------------------------------------------------------------------------------------------- brute force


def to_float64(vectors: torch.Tensor | np.ndarray) -> np.ndarray:
    return vectors.double().cpu().numpy() if isinstance(vectors, torch.Tensor) else np.asarray(vectors).astype(np.float64)


def unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def compared_rows(
    vectors: torch.Tensor | np.ndarray, center: torch.Tensor | None = None, normalize: bool | None = None
) -> np.ndarray:
    """The rows a query is multiplied with: as stored where they are unit vectors up to rounding, else made so."""
    rows = to_float64(vectors)
    if center is not None:
        rows = rows - to_float64(center)
    if normalize is None:
        normalize = center is not None or bool((np.abs(np.linalg.norm(rows, axis=-1) - 1) > 1e-2).any())
    return unit(rows) if normalize else rows


def brute_force(rows: np.ndarray, queries: torch.Tensor | np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Similarities in float64, rounded to float32 once; sorted by (-similarity, row)."""
    units = unit(to_float64(queries)).astype(np.float32).astype(np.float64)
    scores = np.stack([(rows * query).sum(-1) for query in units.reshape(-1, rows.shape[1])])
    scores = scores.round(15).astype(np.float32)  # products that cancel leave 1e-17 in one order of summing, and 0 in another
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
    shape = (*units.shape[:-1], order.shape[1])
    return np.take_along_axis(scores, order, -1).clip(-1, 1).reshape(shape), order.reshape(shape)


def check(found: TopK, rows: np.ndarray, queries: torch.Tensor | np.ndarray, k: int) -> None:
    similarities, ids = brute_force(rows, queries, k)
    assert found.similarities.dtype == torch.float32
    assert found.rows.dtype == torch.int64
    np.testing.assert_array_equal(found.rows.cpu().numpy(), ids)
    np.testing.assert_allclose(found.similarities.cpu().numpy(), similarities, rtol=0, atol=1.2e-7)
    assert float(found.similarities.abs().max()) <= 1


def make_rows(kind: str, n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "duplicates":  # many more equal rows than the search keeps candidates
        return rng.standard_normal((3, d))[rng.integers(0, 3, n)]
    if kind == "equal":
        return np.repeat(rng.standard_normal((1, d)), n, 0)
    if kind == "cluster":  # nearer to each other than half precision can tell
        return rng.standard_normal((1, d)) + 1e-3 * rng.standard_normal((n, d))
    if kind == "integers":  # exact ties between different rows, and rows of length zero
        return rng.integers(-1, 2, (n, d)).astype(float)
    return rng.standard_normal((n, d))


KINDS = ["gaussian", "duplicates", "equal", "cluster", "integers"]


def make_queries(q: int, rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    queries = rng.standard_normal((q, rows.shape[1]))
    near = rows[rng.integers(0, len(rows), q)]
    own = (np.arange(q) % 2 == 1) & (np.linalg.norm(near, axis=-1) > 0)
    queries[own] = near[own]  # every other query is a row itself
    return torch.from_numpy(queries).float()


# ------------------------------------------------------------------------------------------------- equals the brute force


@both
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


@both
@pytest.mark.parametrize("kind", [*KINDS, "outliers"])
@pytest.mark.parametrize("away", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("q", [1, 9])
def test_scores_of_codes_are_off_by_no_more_than_they_say(kind: str, away: float, dtype: torch.dtype, q: int) -> None:
    if dtype == torch.uint8 and byte_codes(torch.device("cpu"), 500) != dtype:
        pytest.skip("int8 is multiplied here")
    rng = np.random.default_rng(31)
    rows = make_rows(kind, 500, 40, rng) + away
    if kind == "outliers":  # dimensions that are as large as all others together, as some models have
        rows[:, 7] *= 40
        rows[::3, 21] *= -25
    rows, queries = (torch.from_numpy(unit(part)).float() for part in (rows, make_queries(q, rows, rng).numpy()))
    codes = Codes(500, rows[:90].mean(0), dtype)
    codes.put(0, rows[:304])
    codes.put(304, rows[304:])
    scores = codes.scores(codes.encode(queries), 16, 500, Scratch(torch.device("cpu")))
    exact = (rows[16:].double() @ queries.double().T).float()
    group, query = (torch.arange(484) // GROUP)[:, None].expand(-1, q), torch.arange(q).expand(484, -1)
    raw = scores.raw[:484, :q]
    middle, error = scores.similarity(raw.flatten(), group.flatten(), query.flatten())
    middle, error = middle.view_as(exact), error.view_as(exact)
    assert ((exact - middle).abs() <= error + 1e-6).all()
    for threshold in (0.3, 0.9):
        least = scores.least(torch.full((q,), threshold)).expand(31, q)[group, query]
        assert (raw >= least)[exact >= threshold].all()
    outliers, others = (0.35, 0.04) if dtype == torch.uint8 else (0.25, 0.03)  # its queries have 7 bits
    assert float(error.max()) < (0.015 if dtype == torch.bfloat16 else outliers if kind == "outliers" else others)


@both
@pytest.mark.parametrize(("dtype", "share"), [("int8", 0.02), ("bfloat16", 0.005)])
def test_codes_leave_few_rows_to_score(monkeypatch: pytest.MonkeyPatch, dtype: str, share: float) -> None:
    rng = np.random.default_rng(32)
    vectors = torch.from_numpy(unit(rng.standard_normal((20_000, 64)))).half()
    scored = []
    whole = VectorSearch.scores
    monkeypatch.setattr(
        VectorSearch, "scores", lambda self, q, rows, *rest: scored.append(len(rows)) or whole(self, q, rows, *rest)
    )
    queries = make_queries(8, vectors.double().numpy(), rng)
    found = VectorSearch(vectors, "cpu", dtype).top_k(queries, 10)
    assert 80 <= sum(scored) < share * 8 * 20_000
    check(found, compared_rows(vectors), queries, 10)


@both
@pytest.mark.parametrize("dtype", PASSES)
@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("budget", [20_000, 2**28])
def test_ids_equal_a_plain_float32_search_where_it_can_tell(storage: torch.dtype, dtype: str, budget: int) -> None:
    generator = torch.Generator().manual_seed(1)
    vectors = torch.nn.functional.normalize(torch.randn(3001, 48, generator=generator), dim=-1).to(storage)
    queries = torch.nn.functional.normalize(torch.randn(9, 48, generator=generator), dim=-1)
    found = VectorSearch(vectors, "cpu", dtype, memory_budget=budget).top_k(queries, 20)
    plain = (queries @ vectors.float().T).sort(dim=-1, descending=True, stable=True)
    gaps = torch.nn.functional.pad(plain.values[:, :20] - plain.values[:, 1:21], (1, 0), value=1.0)
    clear = torch.minimum(gaps[:, :-1], gaps[:, 1:]) > 1e-5
    assert clear.float().mean() > 0.9
    assert torch.equal(found.rows[clear], plain.indices[:, :20][clear])
    torch.testing.assert_close(found.similarities, plain.values[:, :20], rtol=0, atol=1e-6)
    check(found, compared_rows(vectors), queries, 20)


@both
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


# ----------------------------------------------------------------------------------------------------------------- ties


@both
@pytest.mark.parametrize("dtype", PASSES)
@pytest.mark.parametrize("kind", ["random", "duplicates", "cluster", "integers"])
def test_parts_are_ranked_together_as_one(dtype: str, kind: str) -> None:
    rng = np.random.default_rng(5)
    rows = torch.from_numpy(unit(make_rows(kind, 700, 24, rng)))
    queries = make_queries(40, rows.numpy(), rng)
    whole = VectorSearch(rows, "cpu")
    expected = whole.rank(queries, 8)
    parts = [VectorSearch(part, "cpu", dtype, memory_budget=20_000) for part in rows.split([100, 0, 3, 500, 97])]
    for nearest in (0, 3):
        found = rank_together(parts, [whole.units(queries)] * 5, 8, nearest=nearest)
        assert torch.equal(found.rows, expected.rows)
        assert torch.equal(found.similarities, expected.similarities)


def test_parts_may_be_asked_differently() -> None:
    rng = np.random.default_rng(6)
    rows = torch.from_numpy(unit(make_rows("random", 90, 8, rng)))
    first, second = queries_of(4, 8), -queries_of(4, 8)
    parts = [VectorSearch(part, "cpu") for part in rows.split(45)]
    found = rank_together(parts, [part.units(asked) for part, asked in zip(parts, (first, second), strict=True)], 90)
    scores = torch.cat([parts[0].units(first) @ rows[:45].float().T, parts[0].units(second) @ rows[45:].float().T], -1)
    assert torch.equal(found.rows, scores.argsort(-1, descending=True))


@both
@pytest.mark.parametrize("dtype", PASSES)
@pytest.mark.parametrize("budget", [300, 5000, 2**28])
def test_equal_rows_come_in_row_order(dtype: str, budget: int) -> None:
    vectors = torch.nn.functional.normalize(torch.ones(700, 5), dim=-1)
    found = VectorSearch(vectors, "cpu", dtype, memory_budget=budget).top_k(torch.tensor([[1.0, 2.0, 0.0, -1.0, 3.0]]), 300)
    assert found.rows.tolist() == [list(range(300))]
    assert found.similarities.unique().numel() == 1


@both
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


# --------------------------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("dtype", PASSES)
@pytest.mark.parametrize("unit_length", [None, False])
@pytest.mark.parametrize("spread", [1, 8])
def test_rows_of_any_length_are_compared_by_cosine(dtype: str, unit_length: bool | None, spread: int) -> None:
    rng = np.random.default_rng(4)
    rows = rng.standard_normal((800, 12)) * 10 ** rng.uniform(-spread, spread, (800, 1))
    rows[17] = 0
    vectors = torch.from_numpy(rows).float()
    queries = torch.from_numpy(rng.standard_normal((5, 12)) * 1e-9)
    search = VectorSearch(vectors, "cpu", dtype, unit_length=unit_length, memory_budget=30_000)
    check(search.top_k(queries, 12), compared_rows(vectors), queries, 12)
    everything = search.top_k(queries, 800)
    check(everything, compared_rows(vectors), queries, 800)
    assert (everything.similarities[everything.rows == 17] == 0).all()


def test_unit_length_decides_whether_rows_are_normalized() -> None:
    rng = np.random.default_rng(5)
    vectors = torch.from_numpy(unit(rng.standard_normal((50, 4))) * rng.uniform(0.992, 1.008, (50, 1))).float()
    queries = torch.from_numpy(rng.standard_normal((4, 4)))
    for unit_length, normalize in ((None, True), (True, False), (False, True)):
        found = VectorSearch(vectors, "cpu", unit_length=unit_length).top_k(queries, 50)
        check(found, compared_rows(vectors, normalize=normalize), queries, 50)
    one_longer = vectors.clone()
    one_longer[49] *= 1.1
    check(VectorSearch(one_longer, "cpu").top_k(queries, 50), compared_rows(one_longer, normalize=True), queries, 50)


@both
@pytest.mark.parametrize("dtype", PASSES)
@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_center_is_taken_from_every_row(storage: torch.dtype, dtype: str) -> None:
    rng = np.random.default_rng(6)
    vectors = torch.from_numpy(unit(rng.standard_normal((900, 20)) + 4)).to(storage)
    center = vectors.double().mean(0)
    queries = torch.from_numpy(rng.standard_normal((6, 20)))
    before = vectors.clone()
    found = VectorSearch(vectors, "cpu", dtype, center=center, memory_budget=40_000).top_k(queries, 15)
    check(found, compared_rows(vectors, center), queries, 15)
    assert torch.equal(vectors, before)
    assert not torch.equal(found.rows, VectorSearch(vectors, "cpu").top_k(queries, 15).rows)


def test_row_equal_to_the_center_has_similarity_zero() -> None:
    vectors = torch.eye(3)
    found = VectorSearch(vectors, "cpu", center=vectors[1]).top_k(torch.tensor([-1.0, 0.5, 0.25]), 3)
    check(found, compared_rows(vectors, vectors[1]), torch.tensor([-1.0, 0.5, 0.25]), 3)
    assert found.similarities[found.rows == 1].tolist() == [0.0]


@pytest.mark.parametrize("dtype", PASSES)
@pytest.mark.parametrize(("length", "away"), [(300, 0.1), (300, 290), (1e-3, 0.1)])
def test_center_with_rows_of_any_length(dtype: str, length: float, away: float) -> None:
    """The first pass is off by its rounding of the rows, which grows with their length and not with the center's."""
    rng = np.random.default_rng(7)
    rows = length * unit(rng.standard_normal(32) + 2e-3 * rng.standard_normal((3000, 32)))
    vectors, center = torch.from_numpy(rows).float(), torch.from_numpy(away * unit(rows.mean(0)))
    queries = torch.from_numpy(unit(rows[:8]) + 1e-2 * rng.standard_normal((8, 32)))
    found = VectorSearch(vectors, "cpu", dtype, center=center, memory_budget=10**5).top_k(queries, 10)
    check(found, compared_rows(vectors, center), queries, 10)


# ---------------------------------------------------------------------------------------------------------- without means


def without_means(rows: np.ndarray) -> np.ndarray:
    return rows - rows.mean(-1, keepdims=True)


def check_without_means(
    found: TopK, vectors: torch.Tensor, queries: torch.Tensor, k: int, center: torch.Tensor | None = None
) -> None:
    """Against float64; only rows that agree to its own rounding may stand for one another."""
    rows = to_float64(vectors)
    left = without_means(rows) - (0 if center is None else to_float64(center))
    something = np.linalg.norm(left, axis=-1) > 1e-6 * np.linalg.norm(rows, axis=-1)
    units = unit(without_means(to_float64(queries))).astype(np.float32).astype(np.float64)
    scores = units @ (unit(left) * something[:, None]).T
    order = np.argsort(-scores.astype(np.float32), axis=-1, kind="stable")[:, :k]
    ids = found.rows.numpy()
    assert ids.shape == order.shape
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    ours, best = np.take_along_axis(scores, ids, -1), np.take_along_axis(scores, order, -1)
    assert (np.abs(ours - best)[ids != order] < 1e-13).all()
    np.testing.assert_allclose(found.similarities.numpy(), ours.clip(-1, 1), rtol=0, atol=1.2e-7)
    assert (found.similarities[~torch.from_numpy(something)[found.rows]] == 0).all()


@settings(quick, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 200),
    d=st.integers(2, 24),
    k=st.integers(1, 250) | st.integers(1, 5),
    storage=st.sampled_from(STORAGE),
    dtype=st.sampled_from(PASSES),
    budget=st.sampled_from(BUDGETS),
    normalized=st.booleans(),
    offset=st.sampled_from([0.0, 0.1, 3.0, -1000.0]),
)
def test_any_search_without_means_equals_the_brute_force(
    seed: int,
    kind: str,
    n: int,
    d: int,
    k: int,
    storage: torch.dtype,
    dtype: str,
    budget: int,
    normalized: bool,
    offset: float,
) -> None:
    rng = np.random.default_rng(seed)
    rows = make_rows(kind, n, d, rng) + offset
    vectors = torch.from_numpy(unit(rows) if normalized else rows).to(storage)
    queries = make_queries(4, rows, rng)
    queries[(without_means(queries.numpy()) ** 2).sum(-1) < 1e-4] = torch.arange(d).float()
    search = VectorSearch(vectors, "cpu", dtype, remove_means=True, unit_length=normalized or None, memory_budget=budget)
    check_without_means(search.top_k(queries, k), vectors, queries, k)


@pytest.mark.parametrize("dtype", PASSES)
@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-4])
def test_means_far_larger_than_what_tells_rows_apart(dtype: str, noise: float) -> None:
    """The first pass sees next to nothing but the mean, and rounds it."""
    rng = np.random.default_rng(20)
    rows = 10 + noise * unit(rng.standard_normal(48) + 1e-2 * rng.standard_normal((1500, 48)))
    vectors = torch.from_numpy(rows).float()
    queries = torch.from_numpy(10 + noise * unit(rng.standard_normal((4, 48)))).float()
    queries[0] = vectors[7]
    search = VectorSearch(vectors, "cpu", dtype, remove_means=True, memory_budget=10**5)
    found = search.top_k(queries, 10)
    check_without_means(found, vectors, queries, 10)
    assert found.rows[0, 0] == 7
    assert found.similarities[0, 0] == 1
    check_without_means(search.top_k(queries, 1500), vectors, queries, 1500)


@pytest.mark.parametrize("dtype", PASSES)
@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_constant_rows_have_similarity_zero(storage: torch.dtype, dtype: str) -> None:
    rng = np.random.default_rng(21)
    rows = rng.standard_normal((60, 12))
    rows[[3, 17, 41]] = [[0.3], [-1e-3], [0.0]]
    vectors = torch.from_numpy(rows).to(storage)
    queries = torch.from_numpy(rng.standard_normal((5, 12)))
    found = VectorSearch(vectors, "cpu", dtype, remove_means=True, memory_budget=3000).top_k(queries, 60)
    for row in (3, 17, 41):
        assert (found.similarities[found.rows == row] == 0).all()
    check_without_means(found, vectors, queries, 60)
    assert not bool(VectorSearch(vectors[[3, 17, 41]], "cpu", dtype, remove_means=True).top_k(queries, 3).similarities.any())


def test_the_mean_of_a_query_does_not_matter() -> None:
    vectors = torch.nn.functional.normalize(queries_of(80, 16), dim=-1)
    search = VectorSearch(vectors, "cpu", remove_means=True)
    queries = queries_of(3, 2, 16).double()
    expected = search.top_k(queries, 9)
    assert expected.rows.shape == (3, 2, 9)
    for other in (queries + 5, 40 * (queries - 0.3)):
        found = search.top_k(other, 9)
        assert torch.equal(found.rows, expected.rows)
        torch.testing.assert_close(found.similarities, expected.similarities, rtol=0, atol=1.2e-7)
    assert not torch.equal(expected.rows, VectorSearch(vectors, "cpu").top_k(queries + 5, 9).rows)


@pytest.mark.parametrize("constant", [1.0, -0.1, 1e-30, 3e30])
@pytest.mark.parametrize("rounding", [0, 2.0**-23])
@pytest.mark.parametrize("d", [1, 7, 100])
def test_query_that_is_nothing_but_its_mean_is_named(constant: float, rounding: float, d: int) -> None:
    search = VectorSearch(queries_of(9, d), "cpu", remove_means=True)
    queries = queries_of(2, 3, d).double()
    queries[1, 2] = constant
    queries[1, 2, ::2] *= 1 + rounding
    expected = r"the query at index \(1, 2\) is zero" if d > 1 else r"6 of \d+ queries cannot be compared: .* is zero"
    with pytest.raises(InvalidInputError, match=expected):
        search.top_k(queries, 3)


def test_nan_in_a_query_is_named_without_its_mean_too() -> None:
    queries = queries_of(3, 8)
    queries[2, 5] = float("nan")
    with pytest.raises(InvalidInputError, match=r"1 of \d+ queries cannot be .*: the query at index \(2,\) is NaN or inf"):
        VectorSearch(queries_of(9, 8), "cpu", remove_means=True).top_k(queries, 3)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_hubness_counts_from_the_next_search_on(dtype: str) -> None:
    vectors = torch.nn.functional.normalize(queries_of(20_000, 16), dim=-1)
    queries, far = torch.randn(20, 16, generator=torch.Generator().manual_seed(3)), torch.eye(16)[:1] * 20 + queries_of(300, 16)
    asked, fresh = (VectorSearch(vectors, "cpu", dtype) for _ in range(2))
    asked.top_k(queries, 5)
    for search in (asked, fresh):
        search.subtract_hubness(torch.nn.functional.normalize(far, dim=-1), torch.full((300,), -1), 10)
    assert torch.equal(asked.top_k(queries, 5).rows, fresh.top_k(queries, 5).rows)


@both
def test_each_part_says_what_its_shortlist_leaves_out() -> None:
    other = torch.randn(1400, 32, generator=torch.Generator().manual_seed(4))
    other[1000:] = queries_of(1, 32) + 1e-4 * other[1000:]
    rows = torch.nn.functional.normalize(other, dim=-1).half()
    parts = [VectorSearch(part, "cpu", "float16", unit_length=True) for part in (rows[:500], rows[500:1000], rows[1000:])]
    found = rank_together(parts, [part.units(queries_of(1, 32)) for part in parts], 20)
    check(TopK(found.similarities.clamp(-1, 1), found.rows), to_float64(rows), queries_of(1, 32), 20)


def test_codes_take_only_the_memory_that_other_codes_left(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.from_numpy(unit(np.random.default_rng(0).standard_normal((5000, 32)))).half()
    queries = queries_of(3, 32)
    left = 2 * Codes.bytes(5000, 32, torch.int8) + 2 * 2**28

    class Memory:
        @property
        def available(self) -> int:
            return left - sum(part._codes is not None for part in parts if "_codes" in vars(part)) * left // 2

    monkeypatch.setattr("tl_latentlens.search.vectors.fast_codes", lambda *_: [torch.int8])
    monkeypatch.setattr("psutil.virtual_memory", Memory)
    parts = [VectorSearch(vectors, "cpu") for _ in range(3)]
    found = rank_together(parts, [part.units(queries) for part in parts], 6)
    assert [part._codes is not None for part in parts] == [True, False, False]
    expected = VectorSearch(torch.cat([vectors] * 3), "cpu", "float32").top_k(queries, 6)
    assert torch.equal(found.rows, expected.rows)


@pytest.mark.parametrize("make", [torch.tensor, np.asarray], ids=["tensor", "array"])
def test_what_is_not_a_real_vector_is_named(make: Callable[[list[complex]], Any]) -> None:
    search = VectorSearch(torch.eye(2), "cpu")
    with pytest.raises(InvalidInputError, match=r"^1 of 1 queries cannot be compared: the query is zero$"):
        search.top_k(make([0.0, 0.0]), 1)
    with pytest.raises(InvalidInputError, match=r"^got a \w+ of (torch\.)?complex\d+; expected real numbers"):
        search.top_k(make([1.0, 1j]), 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_means_and_a_center_taken_away_together(dtype: str) -> None:
    rng = np.random.default_rng(22)
    near = unit(without_means(rng.standard_normal(32)))
    vectors = torch.from_numpy(10 + 0.1 * unit(near + 2e-3 * rng.standard_normal((3000, 32)))).float()
    center = torch.from_numpy(1e-3 * rng.standard_normal(32))
    queries = torch.from_numpy(near + 1e-2 * rng.standard_normal((6, 32))).float()
    search = VectorSearch(vectors, "cpu", dtype, center=center, remove_means=True, memory_budget=10**5)
    check_without_means(search.top_k(queries, 5), vectors, queries, 5, center)


@both
@pytest.mark.parametrize("dtype", PASSES)
@pytest.mark.parametrize("budget", [3000, 2**28])
@pytest.mark.parametrize("centered", [False, True])
def test_means_taken_away_before_weights_and_directions(centered: bool, dtype: str, budget: int) -> None:
    generator = torch.Generator().manual_seed(23)
    vectors = torch.randn(3000, 48, generator=generator) + 2 * torch.rand(3000, 1, generator=generator)
    weight, queries = 0.1 + torch.rand(48, generator=generator), torch.randn(20, 48, generator=generator)
    removed = torch.linalg.qr(torch.randn(48, 3, generator=generator)).Q.T
    center = 0.2 + 0.1 * torch.randn(48, generator=generator) if centered else torch.zeros(48)
    search = VectorSearch(
        vectors,
        "cpu",
        dtype,
        center=center if centered else None,
        weight=weight,
        removed=removed,
        remove_means=True,
        unit_length=False,
        memory_budget=budget,
    )
    found = search.top_k(queries, 5)
    units = unit(vectors.double().numpy())
    rows = (units - units.mean(-1, keepdims=True) - center.double().numpy()) * weight.double().numpy()
    rows = unit(rows - rows @ removed.double().numpy().T @ removed.double().numpy())
    exact = unit(without_means(queries.double().numpy())) @ rows.T
    assert np.array_equal(found.rows.numpy(), np.argsort(-exact, axis=-1, kind="stable")[:, :5])
    np.testing.assert_allclose(found.similarities.numpy(), -np.sort(-exact, axis=-1)[:, :5], atol=1e-6)


# ------------------------------------------------------------------------------------------- shapes and kinds of input


@pytest.fixture(scope="module")
def search() -> VectorSearch:
    vectors = torch.randn(120, 6, generator=torch.Generator().manual_seed(8))
    return VectorSearch(torch.nn.functional.normalize(vectors, dim=-1), "cpu")


def queries_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("shape", [(6,), (1, 6), (4, 6), (2, 3, 6), (2, 1, 3, 6)])
def test_results_have_the_shape_of_the_queries(search: VectorSearch, shape: tuple[int, ...]) -> None:
    queries = queries_of(*shape)
    found = search.top_k(queries, 4)
    assert found.rows.shape == found.similarities.shape == (*shape[:-1], 4)
    flat = search.top_k(queries.reshape(-1, 6), 4)
    assert torch.equal(found.rows.reshape(-1, 4), flat.rows)
    assert torch.equal(found.similarities.reshape(-1, 4), flat.similarities)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (0, 3, 6)])
def test_no_queries_no_neighbors(search: VectorSearch, shape: tuple[int, ...]) -> None:
    found = search.top_k(torch.zeros(shape), 4)
    assert found.rows.shape == found.similarities.shape == (*shape[:-1], 4)
    assert (found.rows.dtype, found.similarities.dtype) == (torch.int64, torch.float32)


def test_no_rows_no_neighbors() -> None:
    for kwargs in ({}, {"unit_length": False}, {"center": torch.ones(6)}, {"remove_means": True}):
        found = VectorSearch(torch.zeros(0, 6), "cpu", **kwargs).top_k(queries_of(3, 6), 4)
        assert found.rows.shape == found.similarities.shape == (3, 0)


def test_one_row() -> None:
    found = VectorSearch(torch.tensor([[3.0, 4.0]]), "cpu").top_k(torch.tensor([1.0, 0.0]), 5)
    assert found.rows.tolist() == [0]
    assert found.similarities.tolist() == pytest.approx([0.6])


def test_a_row_finds_itself_with_similarity_one() -> None:
    vectors = torch.nn.functional.normalize(queries_of(200, 32), dim=-1)
    for storage in STORAGE:
        found = VectorSearch(vectors.to(storage), "cpu").top_k(vectors.to(storage), 1)
        assert found.rows[:, 0].tolist() == list(range(200))
        assert (found.similarities > 0.99).all()
        assert (found.similarities <= 1).all()


@pytest.mark.parametrize("query_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_queries_of_any_precision_and_with_gradients(search: VectorSearch, query_dtype: torch.dtype) -> None:
    queries = queries_of(5, 6).to(query_dtype).requires_grad_()
    found = search.top_k(queries, 7)
    plain = queries.detach().float() if query_dtype == torch.bfloat16 else queries.detach()
    assert torch.equal(found.rows, search.top_k(plain.numpy(), 7).rows)
    assert not found.similarities.requires_grad


def test_length_and_layout_of_a_query_do_not_matter(search: VectorSearch) -> None:
    queries = queries_of(6, 5).T
    assert not queries.is_contiguous()
    reference = search.top_k(queries.contiguous(), 9)
    for other in (queries, queries * 2.0**-60, queries.double() * 2.0**400):
        found = search.top_k(other, 9)
        assert torch.equal(found.rows, reference.rows)
        assert torch.equal(found.similarities, reference.similarities)


@pytest.mark.parametrize("numpy_dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("mode", ["c", "r"])
def test_memory_maps_and_bfloat16_arrays(tmp_path: Path, numpy_dtype: Any, mode: str) -> None:
    rng = np.random.default_rng(10)
    array = unit(rng.standard_normal((500, 16))).astype(numpy_dtype)
    array.tofile(tmp_path / "vectors.bin")
    mapped = np.memmap(tmp_path / "vectors.bin", numpy_dtype, mode, shape=array.shape)
    queries = rng.standard_normal((4, 16))
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch says some things once a process, so only the first test would hear them
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = [VectorSearch(vectors, "cpu", memory_budget=20_000).top_k(queries, 8) for vectors in (array, mapped)]
    finally:
        torch.set_warn_always(always)
    for one in found:
        check(one, compared_rows(array), queries, 8)
    assert np.array_equal(mapped.view(np.uint8), array.view(np.uint8))


def test_rows_are_not_copied() -> None:
    for vectors in (torch.nn.functional.normalize(queries_of(64, 6), dim=-1), unit(np.ones((64, 6))).astype(np.float16)):
        held = VectorSearch(vectors, "cpu")._vectors
        assert held.data_ptr() == (vectors.data_ptr() if isinstance(vectors, torch.Tensor) else vectors.ctypes.data)


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


# ---------------------------------------------------------------------------------------------- independence, memory


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


class Memory(TorchDispatchMode):
    """Bytes of the tensors made while active: the largest, and the most alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.users: collections.Counter[int] = collections.Counter()
        self.sizes: dict[int, int] = {}
        self.largest = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given_ones = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor) and not a.is_mkldnn}
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if not isinstance(tensor, torch.Tensor) or tensor.is_mkldnn:  # packed queries hide their storage
                continue
            storage = tensor.untyped_storage()
            at = storage.data_ptr()
            if at in given_ones and at not in self.users:
                continue  # a view of a tensor made before
            self.users[at] += 1
            self.sizes[at] = storage.nbytes()
            weakref.finalize(tensor, self._release, at)
            self.largest = max(self.largest, storage.nbytes())
            self.peak = max(self.peak, sum(self.sizes.values()))
        return out

    def _release(self, at: int) -> None:
        self.users[at] -= 1
        if not self.users[at]:
            del self.users[at], self.sizes[at]


@pytest.mark.parametrize("kind", ["gaussian", "equal", "cluster"])
@pytest.mark.parametrize(
    ("storage", "dtype"),
    [(torch.float16, "auto"), (torch.float16, "int8"), (torch.float32, "float16"), (torch.float32, "float32")],
)
@pytest.mark.parametrize("centered", [False, True])
def test_working_memory_stays_within_the_budget(kind: str, storage: torch.dtype, dtype: str, centered: bool) -> None:
    rng = np.random.default_rng(13)
    n, d, q, budget = 4200, 32, 40, 2**18
    vectors = torch.from_numpy(unit(make_rows(kind, n, d, rng))).to(storage)
    queries = make_queries(q, vectors.double().numpy(), rng)
    center = torch.full((d,), 0.01) if centered else None
    assert n * d * 4 > 2 * budget  # so one float32 copy of the rows, or all scores at once, would be seen
    assert n * q * 4 > 2 * budget
    with Memory() as memory:
        found = VectorSearch(vectors, "cpu", dtype, center=center, memory_budget=budget).top_k(queries, 5)
    codes = Codes.bytes(n, d, torch.bfloat16)
    assert 0 < memory.largest <= max(budget, codes)
    # The queries, their results, a length for each row and the codes are no working memory.
    assert memory.peak <= budget + 40 * n + 40 * q * d + codes
    check(found, compared_rows(vectors, center), queries, 5)


def test_working_memory_of_a_large_top_k() -> None:
    """The candidates are scored a few at a time too: 5032 of them, gathered at once in float64, are five budgets."""
    rng = np.random.default_rng(15)
    vectors = torch.from_numpy(unit(rng.standard_normal((6000, 32)))).half()
    queries = make_queries(2, vectors.double().numpy(), rng)
    budget = 2**18
    with Memory() as memory:
        found = VectorSearch(vectors, "cpu", memory_budget=budget).top_k(queries, 2500)
    assert 0 < memory.largest <= max(budget, Codes.bytes(6000, 32, torch.bfloat16))
    check(found, compared_rows(vectors), queries, 2500)


def test_working_memory_without_means_stays_within_the_budget() -> None:
    rng = np.random.default_rng(16)
    n, d, q, budget = 4200, 32, 40, 2**18
    vectors = torch.from_numpy(rng.standard_normal((n, d)) + 0.2).half()
    queries = make_queries(q, vectors.double().numpy(), rng)
    with Memory() as memory:
        found = VectorSearch(vectors, "cpu", remove_means=True, memory_budget=budget).top_k(queries, 5)
    codes = Codes.bytes(n, d, torch.bfloat16)
    assert 0 < memory.largest <= max(budget, codes)
    assert memory.peak <= budget + 40 * n + 40 * q * d + codes
    check_without_means(found, vectors, queries, 5)


@pytest.mark.parametrize("n", [1, 5, 999])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("a_row", [1, 4000])
def test_chunks_cover_the_rows_once_and_fit_the_budget(n: int, budget: int, a_row: int) -> None:
    search = VectorSearch(torch.nn.functional.normalize(torch.ones(n, 4), dim=-1), "cpu", memory_budget=budget)
    spans = search._spans(0, n, a_row)
    assert [row for first, last in spans for row in range(first, last)] == list(range(n))
    for first, last in spans:
        assert first % GROUP == 0
        assert last - first <= GROUP or a_row * (last - first) <= budget


# -------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_query_with_nan_or_inf_is_named(search: VectorSearch, bad: float) -> None:
    queries = queries_of(2, 3, 6)
    queries[1, 2, 4] = bad
    with pytest.raises(InvalidInputError, match=r"1 of \d+ queries cannot be .*: the query at index \(1, 2\) is NaN or inf"):
        search.top_k(queries, 3)
    with pytest.raises(InvalidInputError, match=r"the query at index \(2,\) is NaN or inf"):
        search.top_k(queries[1].numpy(), 3)
    with pytest.raises(InvalidInputError, match=r"the query is NaN or inf"):
        search.top_k(queries[1, 2], 3)


def test_query_of_length_zero_is_named(search: VectorSearch) -> None:
    queries = queries_of(4, 6)
    queries[2] = 0
    queries[3] = 0
    with pytest.raises(InvalidInputError, match=r"2 of \d+ queries cannot be .*: the query at index \(2,\) is zero"):
        search.top_k(queries, 3)


@pytest.mark.parametrize(("shape", "printed"), [((3, 5), r"\(3, 5\)"), ((7,), r"\(7,\)"), ((), r"\(\)"), ((0, 5), r"\(0, 5\)")])
def test_queries_of_another_width_are_refused(search: VectorSearch, shape: tuple[int, ...], printed: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"got queries of shape {printed}; expected a last dimension of 6"):
        search.top_k(torch.ones(shape), 3)


@pytest.mark.parametrize("k", [0, -2, 2.5])
def test_top_k_below_one_is_refused(search: VectorSearch, k: int) -> None:
    with pytest.raises(InvalidInputError, match=f"got top_k={k}; expected at least 1"):
        search.top_k(queries_of(2, 6), k)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"unit_length": False}, {"center": torch.ones(4)}, {"remove_means": True}],
    ids=["", "any_length", "center", "means"],
)
def test_rows_with_nan_or_inf_are_refused(bad: float, storage: torch.dtype, kwargs: dict[str, Any]) -> None:
    vectors = torch.nn.functional.normalize(torch.ones(300, 4), dim=-1).to(storage)
    vectors[203, 1] = bad
    with pytest.raises(InvalidInputError, match="vectors hold NaN or inf, first in row 203"):
        VectorSearch(vectors, "cpu", memory_budget=1000, **kwargs)


@pytest.mark.parametrize(
    "vectors", [torch.ones(3), torch.ones(2, 2, 2), torch.ones(3, 2, dtype=torch.int64), np.ones((2, 2), np.uint8)]
)
def test_vectors_that_are_no_table_of_floats_are_refused(vectors: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"got vectors of shape \(.*\); expected \[n, d\] floating-point"):
        VectorSearch(vectors, "cpu")


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(
        InvalidInputError, match=r"got dtype='int4'; expected 'auto' or one of \['int8', 'float16', 'bfloat16', 'float32'\]"
    ):
        VectorSearch(torch.eye(2), "cpu", "int4")


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidInputError, match=r"got device='cuda'; torch .* sees 0 CUDA devices; use device='cpu'"):
        VectorSearch(torch.eye(2), "cuda")
    with pytest.raises(InvalidInputError, match=r"got device='gpu'; expected 'cpu', 'cuda' or 'cuda:1', say"):
        VectorSearch(torch.eye(2), "gpu")


# ------------------------------------------------------------------------------------------------------------------ CUDA


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("dtype", PASSES)
@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_cuda_equals_the_brute_force(cuda: str, storage: torch.dtype, dtype: str, precision: str) -> None:
    rng = np.random.default_rng(14)
    torch.set_float32_matmul_precision(precision)
    for kind, centered, budget in itertools.product(KINDS, (False, True), (10**6, 2**28)):
        rows = make_rows(kind, 4001, 192, rng)
        vectors = torch.from_numpy(unit(rows)).to(storage)
        queries = make_queries(6, rows, rng)
        middle = torch.full((192,), 0.01) if centered else None
        found = VectorSearch(vectors, cuda, dtype, center=middle, memory_budget=budget).top_k(queries.to(cuda), 10)
        assert found.rows.device.type == found.similarities.device.type == "cuda"
        check(found, compared_rows(vectors, middle), queries, 10)


@pytest.mark.parametrize("dtype", PASSES)
@pytest.mark.parametrize("storage", STORAGE)
def test_columns_of_longer_rows_are_brought_to_unit_length_first(storage: torch.dtype, dtype: str) -> None:
    rng = np.random.default_rng(3)
    wide = rng.standard_normal((700, 48)) * rng.uniform(0.01, 1, (700, 1)) / 7
    wide[11, 16:32] = 0
    columns = torch.from_numpy(wide).to(storage)[:, 16:32]
    assert not columns.is_contiguous()
    center = torch.from_numpy(0.3 * rng.standard_normal(16))
    queries = make_queries(9, to_float64(columns), rng)
    for middle in (None, center):
        search = VectorSearch(columns, "cpu", dtype, unit_length=False, center=middle, memory_budget=4000)
        rows = unit(to_float64(columns))
        rows[rows.any(-1)] -= 0 if middle is None else to_float64(middle)
        check(search.top_k(queries, 5), unit(rows), queries, 5)
