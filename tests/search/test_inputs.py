"""Shapes, kinds and precisions of vectors and queries, and what is refused."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from support.vectors import STORAGE, check, compared_rows, queries_of, unit

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.search.vectors import VectorSearch


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


@pytest.mark.parametrize("make", [torch.tensor, np.asarray], ids=["tensor", "array"])
def test_what_is_not_a_real_vector_is_named(make: Callable[[list[complex]], Any]) -> None:
    search = VectorSearch(torch.eye(2), "cpu")
    with pytest.raises(InvalidInputError, match=r"^1 of 1 queries cannot be compared: the query is zero$"):
        search.top_k(make([0.0, 0.0]), 1)
    with pytest.raises(InvalidInputError, match=r"^got a \w+ of (torch\.)?complex\d+; expected real numbers"):
        search.top_k(make([1.0, 1j]), 1)


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


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "kwargs", [{}, {"unit_length": False}, {"center": torch.full((6,), 0.1)}], ids=["", "any_length", "center"]
)
def test_rows_too_short_for_float32_have_no_direction(storage: torch.dtype, kwargs: dict[str, Any]) -> None:
    vectors = queries_of(40, 6)
    vectors[7] *= 1e-39
    found = VectorSearch(vectors.to(storage), "cpu", **kwargs).top_k(queries_of(3, 6), 40)
    assert [sorted(rows) for rows in found.rows.tolist()] == [list(range(40))] * 3
    if "center" not in kwargs:
        assert (found.similarities[found.rows == 7] == 0).all()
