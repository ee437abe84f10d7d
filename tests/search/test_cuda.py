"""What only a GPU does: kernels, copies behind the model's back, rows that do not fit. Without one these tests are skipped."""

import itertools
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.vectors import KINDS, PASSES, STORAGE, check, compared_rows, make_queries, make_rows, unit

import tl_latentlens as tll
from tl_latentlens.index.transforms import TRANSFORMS
from tl_latentlens.model.loading import load_model
from tl_latentlens.search import device
from tl_latentlens.search.codes import QuantizedRows
from tl_latentlens.search.vectors import VectorSearch

pytestmark = pytest.mark.usefixtures("cuda")
TEXTS = list(islice(tll.load_corpus("demo"), 400))


def units(n: int, d: int, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


def same(found: Any, expected: Any) -> None:
    assert torch.equal(found.rows.cpu(), expected.rows)
    torch.testing.assert_close(found.similarities.cpu(), expected.similarities, rtol=0, atol=1.2e-7)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> tll.Bank:
    folder = tmp_path_factory.mktemp("cuda")
    return tll.build_bank(tll.load_demo_model(), TEXTS, folder / "bank.h5", progress=False)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("d", [33, 768, 2500])
def test_kernels_multiply_what_is_stored(cuda: str, storage: torch.dtype, d: int) -> None:
    kernels = pytest.importorskip("tl_latentlens.search.gpu_kernels")
    wide = units(300, 2 * d).to(cuda, storage)
    queries = units(9, d, 1).to(cuda)
    rows = torch.arange(299, -1, -1, device=cuda)
    of = torch.tensor([[4]], device=cuda).expand(1, 300).flatten()  # in memory a single number
    for vectors in (wide[:, :d], wide[:, ::2]):
        expected = vectors.double() @ queries[4].double()
        for dtype, error in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
            found = kernels.dot_products(vectors, queries, rows, of, dtype)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), expected.flip(0), rtol=0, atol=error)
        for length in (77, 96, 129):
            found = kernels.products_with_one_query(vectors[:77], queries[4:5], length)
            torch.testing.assert_close(found[:77].double(), expected[:77, None], rtol=0, atol=1e-6)
            assert found.shape == (length, 1)
            assert bool((found[77:] == -torch.inf).all())


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("n_queries", [1, 3, 300])
def test_shortlists_and_what_they_cannot_settle(cuda: str, storage: torch.dtype, n_queries: int) -> None:
    rows = units(50_000, 256)
    rows[20_000:21_000] = rows[:1] + 1e-4 * rows[20_000:21_000]  # more near rows than a list holds
    rows[30_000:30_300] = rows[5]  # and equal ones
    vectors = torch.nn.functional.normalize(rows, dim=-1).to(storage)
    queries = torch.cat([rows[5:6], units(n_queries, 256, 1)])[:n_queries]
    queries[-1] = rows[0] if n_queries > 1 else queries[-1]
    expected = VectorSearch(vectors, "cpu", "float32").top_k(queries, 10)
    for budget in (None, 2**22):
        on_gpu = VectorSearch(vectors, cuda, memory_budget=budget)
        same(on_gpu.top_k(queries, 10), expected)
        same(on_gpu.top_k(queries.to(cuda), 10), expected)


@pytest.mark.parametrize("held", ["codes", "nothing"])
@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_rows_that_do_not_fit(cuda: str, monkeypatch: pytest.MonkeyPatch, held: str, storage: torch.dtype) -> None:
    vectors, queries = units(30_000, 192).to(storage), units(70, 192, 1)
    n_bytes = QuantizedRows.n_bytes(len(vectors), 192, torch.int8) if held == "codes" else 0
    monkeypatch.setattr(device, "free_memory", lambda gpu: (n_bytes + device.working_memory(gpu) + 1) / 0.8)
    streamed = VectorSearch(vectors, cuda, memory_budget=2**22)
    assert not streamed.rows.is_on_device
    assert (streamed.coarse_pass.codes is not None) == (held == "codes")
    same(streamed.top_k(queries, 10), VectorSearch(vectors, "cpu", "float32").top_k(queries, 10))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_an_index_finds_what_it_finds_on_a_cpu(cuda: str, bank: tll.Bank, transform: str) -> None:
    vectors = torch.from_numpy(bank.vectors(bank.hook_names[3])[::997].astype(np.float32)) + 0.02 * units(1, 256)
    here, there = (tll.ContextualIndex(bank, device=device, transform=transform) for device in ("cpu", cuda))
    for hook_name in (None, bank.hook_names[3]):
        expected = here.search(vectors, 5, query_hook_name=hook_name)
        found = there.search(vectors.to(cuda), 5, query_hook_name=hook_name)
        assert torch.equal(found.rows.cpu(), expected.rows)
        assert torch.equal(found.hook_ids.cpu(), expected.hook_ids)
        assert found.neighbors()[0][0].token == expected.neighbors()[0][0].token


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_bank_is_built_as_on_a_cpu(cuda: str, tmp_path: Path, bank: tll.Bank, dtype: str) -> None:
    model = load_model("demo", device=cuda)
    built = tll.build_bank(model, TEXTS, tmp_path / "bank.h5", progress=False, dtype=dtype)
    built.verify()
    assert built.n_rows == bank.n_rows
    for name in bank.hook_names:
        ours, theirs = built.vectors(name).astype(np.float32), bank.vectors(name).astype(np.float32)
        assert float(np.abs(ours - theirs).max()) < (2e-2 if dtype == "bfloat16" else 2e-3)
        np.testing.assert_allclose(built.std(name), built.vectors(name).astype(np.float64).std(0), atol=1e-12)
    tll.ContextualIndex(bank, device=cuda).check_model(model)  # the same model, on another device


def test_a_forward_pass_is_read_where_it_runs(cuda: str, bank: tll.Bank) -> None:
    model = load_model("demo", device=cuda)
    index = tll.ContextualIndex(bank, device=cuda)
    hooks = tll.latentlens_hooks(index)
    tokens = model.to_tokens(TEXTS[7]).to(cuda)
    bare = model(tokens)
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=hooks), bare)
    result = hooks.result
    _, cache = model.run_with_cache(tokens, names_filter=list(bank.hook_names))
    on_cpu = tll.ContextualIndex(bank, device="cpu")
    decoded = torch.from_numpy(result.decoded)
    for name in bank.hook_names:
        expected = on_cpu.search(cache[name].cpu()[decoded], result.found[name].rows.shape[-1], query_hook_name=name)
        assert torch.equal(result.found[name].rows.cpu(), expected.rows)


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
