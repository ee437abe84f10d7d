"""Compiled loops against torch's operators."""

import sys
from collections.abc import Callable

import pytest
import torch

from tl_latentlens import preselect
from tl_latentlens.search import VectorSearch

compiled = pytest.importorskip("tl_latentlens.compiled")
CPU = torch.device("cpu")


def halves(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of a half precision."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    return numbers[torch.isfinite(numbers)]


@pytest.mark.parametrize("cast", [torch.Tensor.float, torch.Tensor.bfloat16, lambda raw: (raw * 1000).int()])
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("n_queries", [1, 31, 32, 70, 200])
@pytest.mark.parametrize("threads", [1, 3])
def test_reach_finds_what_reaches(
    monkeypatch: pytest.MonkeyPatch, cast: Callable[[torch.Tensor], torch.Tensor], groups: int, n_queries: int, threads: int
) -> None:
    monkeypatch.setattr(compiled, "_n_threads", lambda n_numbers: threads)
    generator = torch.Generator().manual_seed(n_queries)
    raw = cast(torch.randn(96, n_queries + 3, generator=generator))
    least = cast(torch.randn(groups, n_queries, generator=generator)).float()
    least[0] = raw[5, :n_queries].float()  # as large as a score, so reached
    every = least.repeat_interleave(96 // groups, 0)
    rows, queries = (raw[:90, :n_queries].float() >= every[:90]).nonzero(as_tuple=True)
    found = compiled.reach(raw, least, 96 // groups, 90, len(rows))
    assert found is not None
    assert torch.equal(found[0], rows)
    assert torch.equal(found[1], queries)
    assert torch.equal(found[2].float(), raw[rows, queries].float())
    assert compiled.reach(raw, least, 96 // groups, 90, len(rows) - 1) is None


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
def test_every_number_of_half_precision_is_read(storage: torch.dtype) -> None:
    numbers = halves(storage)
    at = torch.arange(len(numbers))
    found = compiled.dots(numbers[:, None], torch.ones(1, 1), at, torch.zeros_like(at), torch.float64)
    assert torch.equal(found, numbers.double())


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("n", [7, 3000])
def test_dots(monkeypatch: pytest.MonkeyPatch, storage: torch.dtype, dtype: torch.dtype, error: float, n: int) -> None:
    monkeypatch.setattr(compiled, "_A_THREAD", 2**14)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # the longer one is done by all
    generator = torch.Generator().manual_seed(n)
    vectors, queries = torch.randn(50, 33, generator=generator).to(storage), torch.randn(9, 33, generator=generator)
    rows, of = torch.randint(50, (n,), generator=generator), torch.randint(9, (n,), generator=generator)
    found = compiled.dots(vectors, queries, rows, of, dtype)
    assert found.dtype == dtype
    expected = (vectors[rows].double() * queries[of].double()).sum(-1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=error)


def test_products_of_bytes() -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(256, (100, 40), generator=generator, dtype=torch.uint8)
    queries = torch.randn(2, 40, generator=generator)
    expected = codes.double() @ queries.double().T
    torch.testing.assert_close(compiled.products(codes, queries).double(), expected, rtol=0, atol=1e-2)


def test_a_search_does_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    vectors = torch.nn.functional.normalize(torch.randn(5000, 24, generator=generator), dim=-1).half()
    queries = torch.randn(3, 24, generator=generator)
    fast = VectorSearch(vectors, "cpu").top_k(queries, 7)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "tl_latentlens.compiled")
    monkeypatch.delattr("tl_latentlens.compiled")
    preselect._compiled.cache_clear()
    try:
        assert preselect.compiled_loops(CPU, 5000) is None
        plain = VectorSearch(vectors, "cpu").top_k(queries, 7)
    finally:
        preselect._compiled.cache_clear()
    assert torch.equal(fast.rows, plain.rows)
    assert torch.equal(fast.similarities, plain.similarities)
