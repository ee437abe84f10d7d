"""Compiled loops against torch's operators."""

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tl_latentlens.search import candidates as preselect
from tl_latentlens.search import threads
from tl_latentlens.search.vectors import VectorSearch

compiled = pytest.importorskip("tl_latentlens.search.cpu_kernels")
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
def test_reach_finds_what_reaches(
    monkeypatch: pytest.MonkeyPatch, cast: Callable[[torch.Tensor], torch.Tensor], groups: int, n_queries: int, n_threads: int
) -> None:
    monkeypatch.setattr(compiled, "_n_threads", lambda n_numbers: n_threads)
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


@pytest.fixture
def tiles() -> None:
    if not compiled.LEVELS:
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
    monkeypatch.setattr(compiled, "_n_threads", lambda n_numbers: n_threads)
    rows, queries = extremes(112, d, compiled.LEVELS, torch.Generator().manual_seed(3))
    queries = queries[:n_queries]
    panels = compiled.pack(queries)
    assert panels[:, 0].numel() >= n_queries
    found = torch.zeros((112, panels[:, 0].numel()), dtype=torch.int32)
    compiled.products(rows, panels, found)
    expected = (rows.double() - 128) @ queries.double().T
    assert torch.equal(found[:, :n_queries].double(), expected)
    least = expected[5::16].contiguous().float()  # as large as a score, so reached
    reached = expected[:100] >= least.double().repeat_interleave(16, 0)[:100]
    among = compiled.reach_products(rows, panels, least, 100, int(reached.sum()))
    assert among is not None
    assert torch.equal(torch.stack(among[:2]), torch.stack(reached.nonzero(as_tuple=True)))
    assert torch.equal(among[2].double(), expected[:100][reached])
    assert compiled.reach_products(rows, panels, least, 100, int(reached.sum()) - 1) is None


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instructions of other processors")
@pytest.mark.parametrize(("features", "lanes", "levels"), [("+avx2", 8, 64), ("+avx2,+avxvnni", 8, 127), ("+sse4.2", 8, 0)])
def test_instructions_of_other_processors(features: str, lanes: int, levels: int) -> None:
    """The tests of products and of reaching in a process for which numba compiles as for a processor with less."""
    host = llvm.get_host_cpu_features()
    if missing := [name for name in features.replace("+", "").split(",") if not host.get(name)]:
        pytest.skip(f"this processor has no {missing[0]}")
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features}
    show = "from tl_latentlens.search import cpu_kernels as c; print(c._LANES, c.LEVELS)"
    shown = subprocess.run([sys.executable, "-c", show], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == [str(lanes), str(levels)]
    chosen = ["tests/test_compiled.py", "-k", "products or search", "-p", "no:xdist"]
    again = subprocess.run([sys.executable, "-m", "pytest", *chosen], env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout
    assert ("skipped" in again.stdout) == (not levels)


def test_a_search_does_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    vectors = torch.nn.functional.normalize(torch.randn(5000, 24, generator=generator), dim=-1).half()
    queries = torch.randn(3, 24, generator=generator)
    fast = VectorSearch(vectors, "cpu").top_k(queries, 7)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "tl_latentlens.search.cpu_kernels")
    monkeypatch.delattr("tl_latentlens.search.cpu_kernels")
    preselect._compiled.cache_clear()
    try:
        assert preselect.compiled_loops(CPU, 5000) is None
        plain = VectorSearch(vectors, "cpu").top_k(queries, 7)
    finally:
        preselect._compiled.cache_clear()
    assert torch.equal(fast.rows, plain.rows)
    assert torch.equal(fast.similarities, plain.similarities)


@pytest.fixture(params=["OpenMP", "threads of Python"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    if request.param != "OpenMP":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif threads._openmp() is None:
        pytest.skip("torch is built with another OpenMP, or none")
    return request.param


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("n", [0, 1, 2, 50])
def test_parts_are_done_in_threads(n: int) -> None:
    meet = threading.Barrier(min(3, max(n, 1)))
    seen = set()

    def call(part: int) -> int:
        if part < meet.parties:
            meet.wait(timeout=20)  # so many at once
        seen.add(threading.get_ident())
        return part * part

    assert threads.in_threads(call, range(n)) == [part * part for part in range(n)]
    assert len(seen) >= min(n, 3)


@pytest.mark.usefixtures("kind")
def test_errors_come_out_of_threads() -> None:
    done = []

    def call(part: int) -> None:
        if part == 3:
            raise ValueError("three")
        done.append(part)

    with pytest.raises(ValueError, match="three"):
        threads.in_threads(call, range(9))
    assert 3 not in done


def test_an_interrupt_between_two_lines_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Ctrl-C comes when OpenMP has called, but no line that could catch it has begun."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(threads, "_openmp", lambda: lambda work, *_: None)
    with pytest.raises(KeyboardInterrupt):
        threads.in_threads(abs, range(9))


def test_a_search_by_another_default_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    vectors = torch.nn.functional.normalize(torch.randn(5000, 24, generator=generator), dim=-1).half()
    queries = torch.randn(3, 24, generator=generator)
    expected = {kind: VectorSearch(vectors, "cpu", kind).top_k(queries, 7) for kind in ("int8", "bfloat16", "float32")}
    for without in (False, True):
        if without:
            monkeypatch.setattr(preselect, "_compiled", lambda: None)
        torch.set_default_dtype(torch.float64)
        try:
            found = {kind: VectorSearch(vectors, "cpu", kind).top_k(queries, 7) for kind in expected}
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(found[kind].rows, expected[kind].rows) for kind in expected)
        assert all(one.similarities.dtype == torch.float32 for one in found.values())


@pytest.mark.usefixtures("kind")
def test_searches_at_once() -> None:
    generator = torch.Generator().manual_seed(4)
    search = VectorSearch(torch.nn.functional.normalize(torch.randn(9000, 24, generator=generator), dim=-1).half(), "cpu")
    queries = torch.randn(40, 24, generator=generator)
    alone = [search.top_k(some, 5).rows for some in queries.split(4)]
    with ThreadPoolExecutor(5) as pool:
        together = list(pool.map(lambda some: search.top_k(some, 5).rows, queries.split(4)))
    assert all(map(torch.equal, alone, together))
