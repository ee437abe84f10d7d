"""Rows that are compared otherwise than they are stored: lengths, centers, weights, their own means, hubs."""

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
    check_without_means,
    compared_rows,
    every_way,
    make_queries,
    make_rows,
    queries_of,
    quick,
    to_float64,
    unit,
    without_means,
)

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.search.geometry import HubSample, RowGeometry
from tl_latentlens.search.vectors import VectorSearch


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


@every_way
@pytest.mark.parametrize("dtype", PASSES)
@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("center", [False, True])
def test_the_length_that_rounding_left_changes_no_rank(storage: torch.dtype, dtype: str, center: bool) -> None:
    rng = np.random.default_rng(8)
    rows = rng.standard_normal((600, 64))
    rows[:, 0] = 20  # one massive dimension: cosines differ by less than rounding changes lengths
    vectors = torch.from_numpy(unit(rows)).to(storage)
    middle = vectors.double().mean(0) if center else None
    asked = np.arange(0, 600, 20)
    queries = torch.from_numpy(unit(to_float64(vectors))[asked] - (0 if middle is None else to_float64(middle)))
    for unit_length in (None, False):
        found = VectorSearch(vectors, "cpu", dtype, unit_length=unit_length, center=middle).top_k(queries, 12)
        check(found, compared_rows(vectors, middle), queries, 12)
        assert found.rows[:, 0].tolist() == asked.tolist()


@every_way
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_means_and_a_center_taken_away_together(dtype: str) -> None:
    rng = np.random.default_rng(22)
    near = unit(without_means(rng.standard_normal(32)))
    vectors = torch.from_numpy(10 + 0.1 * unit(near + 2e-3 * rng.standard_normal((3000, 32)))).float()
    center = torch.from_numpy(1e-3 * rng.standard_normal(32))
    queries = torch.from_numpy(near + 1e-2 * rng.standard_normal((6, 32))).float()
    search = VectorSearch(vectors, "cpu", dtype, center=center, remove_means=True, memory_budget=10**5)
    check_without_means(search.top_k(queries, 5), vectors, queries, 5, center)


@every_way
@pytest.mark.parametrize("dtype", PASSES)
@pytest.mark.parametrize("budget", [3000, 2**28])
@pytest.mark.parametrize("centered", [False, True])
def test_means_taken_away_before_weights_and_directions(centered: bool, dtype: str, budget: int) -> None:
    generator = torch.Generator().manual_seed(23)
    vectors = torch.randn(900, 48, generator=generator) + 2 * torch.rand(900, 1, generator=generator)
    weight, queries = 0.1 + torch.rand(48, generator=generator), torch.randn(8, 48, generator=generator)
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


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_hubness_is_half_the_mean_cosine_to_the_nearest_of_a_sample(dtype: str) -> None:
    vectors = torch.nn.functional.normalize(queries_of(20_000, 16), dim=-1)
    queries = torch.randn(20, 16, generator=torch.Generator().manual_seed(3))
    far = torch.nn.functional.normalize(torch.eye(16)[:1] * 20 + queries_of(300, 16), dim=-1)
    hubs = HubSample(far, torch.full((300,), -1), 10)
    search = VectorSearch(vectors, "cpu", dtype, geometry=RowGeometry(hubs=hubs))
    found = search.top_k(queries, 5)
    exact, cosines = vectors.double(), (vectors.double() @ far.double().T)
    scores = torch.nn.functional.normalize(queries, dim=-1).double() @ exact.T - cosines.topk(10).values.mean(-1) / 2
    best = scores.topk(5)
    assert torch.equal(found.rows, best.indices)
    torch.testing.assert_close(found.similarities.double(), best.values, rtol=0, atol=1e-6)
    assert float(found.similarities.max()) > 1  # these are no cosines: nothing is clamped
    plain = VectorSearch(vectors, "cpu", dtype).top_k(queries, 5)
    assert not torch.equal(found.rows, plain.rows)
