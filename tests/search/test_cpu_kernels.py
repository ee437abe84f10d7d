"""Compiled kernels against torch's operators."""

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.fresh import run_fresh
from support.processes import run_tests

from tl_latentlens.search import backend
from tl_latentlens.search.settings import search_settings
from tl_latentlens.search.vectors import VectorSearch

kernels = pytest.importorskip("tl_latentlens.search.cpu_kernels")
llvm = pytest.importorskip("llvmlite.binding")
CPU = torch.device("cpu")


def halves(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of a half precision."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    return numbers[torch.isfinite(numbers)]


@pytest.mark.parametrize("cast", [torch.Tensor.float, torch.Tensor.bfloat16, lambda raw: (raw * 1000).int()])
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("n_queries", [1, 31, 32, 70, 200])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_pairs_above_the_least_score(
    monkeypatch: pytest.MonkeyPatch, cast: Callable[[torch.Tensor], torch.Tensor], groups: int, n_queries: int, n_threads: int
) -> None:
    monkeypatch.setattr(kernels, "_n_threads", lambda n_numbers: n_threads)
    generator = torch.Generator().manual_seed(n_queries)
    raw = cast(torch.randn(96, n_queries + 3, generator=generator))
    least = cast(torch.randn(groups, n_queries, generator=generator)).float()
    least[0] = raw[5, :n_queries].float()  # as large as a score, so reached
    every = least.repeat_interleave(96 // groups, 0)
    rows, queries = (raw[:90, :n_queries].float() >= every[:90]).nonzero(as_tuple=True)
    found = kernels.pairs_above(raw, least, 96 // groups, 90, len(rows))
    assert found is not None
    assert torch.equal(found[0], rows)
    assert torch.equal(found[1], queries)
    assert torch.equal(found[2].float(), raw[rows, queries].float())
    assert kernels.pairs_above(raw, least, 96 // groups, 90, len(rows) - 1) is None


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
def test_every_number_of_half_precision_is_read(storage: torch.dtype) -> None:
    numbers = halves(storage)
    at = torch.arange(len(numbers))
    found = kernels.dot_products(numbers[:, None], torch.ones(1, 1), at, torch.zeros_like(at), torch.float64)
    assert torch.equal(found, numbers.double())


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("n", [7, 3000])
def test_dots(monkeypatch: pytest.MonkeyPatch, storage: torch.dtype, dtype: torch.dtype, error: float, n: int) -> None:
    monkeypatch.setattr(kernels, "_MIN_NUMBERS_PER_THREAD", 2**14)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # the longer one is done by all
    generator = torch.Generator().manual_seed(n)
    vectors, queries = torch.randn(50, 33, generator=generator).to(storage), torch.randn(9, 33, generator=generator)
    rows, of = torch.randint(50, (n,), generator=generator), torch.randint(9, (n,), generator=generator)
    found = kernels.dot_products(vectors, queries, rows, of, dtype)
    assert found.dtype == dtype
    expected = (vectors[rows].double() * queries[of].double()).sum(-1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=error)


@pytest.fixture
def tiles() -> None:
    if not kernels.MAX_QUERY_CODE:
        pytest.skip("numba has no products of bytes for this processor")


def extremes(n: int, d: int, levels: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and queries of bytes, among them the largest of one sign, whose sums an instruction could cut off."""
    rows = torch.randint(256, (n, d), generator=generator, dtype=torch.uint8)
    rows[0], rows[1] = 255, 0
    queries = torch.randint(-levels, levels + 1, (300, d), generator=generator).float()
    queries[0], queries[1] = levels, -levels
    return rows, queries


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("n_queries", [1, 2, 16, 17, 33, 64, 65, 300])
@pytest.mark.parametrize("d", [4, 40, 1024])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_products_of_bytes(monkeypatch: pytest.MonkeyPatch, n_queries: int, d: int, n_threads: int) -> None:
    monkeypatch.setattr(kernels, "_n_threads", lambda n_numbers: n_threads)
    rows, queries = extremes(112, d, kernels.MAX_QUERY_CODE, torch.Generator().manual_seed(3))
    queries = queries[:n_queries]
    packed = kernels.pack_queries(queries)
    assert packed[:, 0].numel() >= n_queries
    found = torch.zeros((112, packed[:, 0].numel()), dtype=torch.int32)
    kernels.code_products(rows, packed, found)
    expected = (rows.double() - 128) @ queries.double().T
    assert torch.equal(found[:, :n_queries].double(), expected)
    least = expected[5::16].contiguous().float()  # as large as a score, so reached
    reached = expected[:100] >= least.double().repeat_interleave(16, 0)[:100]
    among = kernels.fused_pairs_above(rows, packed, least, 100, int(reached.sum()))
    assert among is not None
    assert torch.equal(torch.stack(among[:2]), torch.stack(reached.nonzero(as_tuple=True)))
    assert torch.equal(among[2].double(), expected[:100][reached])
    assert kernels.fused_pairs_above(rows, packed, least, 100, int(reached.sum()) - 1) is None


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instructions of other processors")
@pytest.mark.parametrize(("features", "lanes", "levels"), [("+avx2", 8, 64), ("+avx2,+avxvnni", 8, 127), ("+sse4.2", 8, 0)])
def test_instructions_of_other_processors(features: str, lanes: int, levels: int) -> None:
    """The tests of products and of reaching in a process for which numba compiles as for a processor with less."""
    host = llvm.get_host_cpu_features()
    if missing := [name for name in features.replace("+", "").split(",") if not host.get(name)]:
        pytest.skip(f"this processor has no {missing[0]}")
    environment = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features, "EXPECTED": f"{lanes} {levels}"}
    chosen = ["--noconftest", "-n0", "tests/search/test_cpu_kernels.py", "-k", "products or a_search or expected"]
    again = run_fresh(run_tests, *chosen, env=environment, cwd=Path(__file__).parents[2])
    assert again.code == 0, again.out
    assert ("skipped" in again.out) == (not levels)


@pytest.mark.skipif("EXPECTED" not in os.environ, reason="run by test_instructions_of_other_processors")
def test_kernels_are_the_expected_ones() -> None:
    assert f"{kernels.LANES} {kernels.MAX_QUERY_CODE}" == os.environ["EXPECTED"]


def test_a_search_does_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    vectors = torch.nn.functional.normalize(torch.randn(5000, 24, generator=generator), dim=-1).half()
    queries = torch.randn(3, 24, generator=generator)
    fast = VectorSearch(vectors, "cpu").top_k(queries, 7)
    monkeypatch.setitem(sys.modules, "numba", None)
    for module in ("cpu_kernels", "cpu_loops", "cpu_dots", "compile_loop"):
        monkeypatch.delitem(sys.modules, f"tl_latentlens.search.{module}")
        monkeypatch.delattr(f"tl_latentlens.search.{module}")
    backend.load_cpu_kernels.cache_clear()
    try:
        assert backend.cpu_kernels(CPU, 5000) is None
        plain = VectorSearch(vectors, "cpu").top_k(queries, 7)
    finally:
        backend.load_cpu_kernels.cache_clear()
    assert torch.equal(fast.rows, plain.rows)
    assert torch.equal(fast.similarities, plain.similarities)


def test_a_search_by_another_default_dtype() -> None:
    generator = torch.Generator().manual_seed(5)
    vectors = torch.nn.functional.normalize(torch.randn(5000, 24, generator=generator), dim=-1).half()
    queries = torch.randn(3, 24, generator=generator)
    expected = {kind: VectorSearch(vectors, "cpu", kind).top_k(queries, 7) for kind in ("int8", "bfloat16", "float32")}
    for use_cpu_kernels in (True, False):
        torch.set_default_dtype(torch.float64)
        try:
            with search_settings(use_cpu_kernels=use_cpu_kernels):
                found = {kind: VectorSearch(vectors, "cpu", kind).top_k(queries, 7) for kind in expected}
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(found[kind].rows, expected[kind].rows) for kind in expected)
        assert all(one.similarities.dtype == torch.float32 for one in found.values())
