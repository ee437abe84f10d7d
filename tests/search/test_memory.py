"""Working memory stays within the budget, and rows are not copied."""

import collections
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from support.vectors import BUDGETS, check, check_without_means, compared_rows, make_queries, make_rows, queries_of, unit
from torch.utils._python_dispatch import TorchDispatchMode

from tl_latentlens.search.chunks import GROUP_ROWS, Chunk
from tl_latentlens.search.codes import QuantizedRows
from tl_latentlens.search.driver import top_k_of_parts
from tl_latentlens.search.settings import search_settings
from tl_latentlens.search.vectors import VectorSearch


class Memory(TorchDispatchMode):
    """Bytes of the tensors made while active: the largest, and the most alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.users: collections.Counter[int] = collections.Counter()
        self.sizes: dict[int, int] = {}
        self.alive = self.largest = self.peak = 0

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
            self.alive += storage.nbytes() - self.sizes.get(at, 0)
            self.sizes[at] = storage.nbytes()
            weakref.finalize(tensor, self._release, at)
            self.largest = max(self.largest, storage.nbytes())
            self.peak = max(self.peak, self.alive)
        return out

    def _release(self, at: int) -> None:
        self.users[at] -= 1
        if not self.users[at]:
            self.alive -= self.sizes.pop(at)
            del self.users[at]


@pytest.mark.parametrize("kind", ["gaussian", "equal", "cluster"])
@pytest.mark.parametrize(
    ("storage", "dtype"),
    [(torch.float16, "auto"), (torch.float16, "int8"), (torch.float32, "float16"), (torch.float32, "float32")],
)
@pytest.mark.parametrize("centered", [False, True])
def test_working_memory_stays_within_the_budget(kind: str, storage: torch.dtype, dtype: str, centered: bool) -> None:
    rng = np.random.default_rng(13)
    n, d, q, budget = 4200, 32, 32, 2**18
    vectors = torch.from_numpy(unit(make_rows(kind, n, d, rng))).to(storage)
    queries = make_queries(q, vectors.double().numpy(), rng)
    center = torch.full((d,), 0.01) if centered else None
    assert n * d * 4 > 2 * budget  # so one float32 copy of the rows, or all scores at once, would be seen
    assert n * q * 4 > 2 * budget
    with Memory() as memory:
        found = VectorSearch(vectors, "cpu", dtype, center=center, memory_budget=budget).top_k(queries, 5)
    codes = QuantizedRows.n_bytes(n, d, torch.bfloat16)
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
    assert 0 < memory.largest <= max(budget, QuantizedRows.n_bytes(6000, 32, torch.bfloat16))
    check(found, compared_rows(vectors), queries, 2500)


def test_working_memory_without_means_stays_within_the_budget() -> None:
    rng = np.random.default_rng(16)
    n, d, q, budget = 4200, 32, 40, 2**18
    vectors = torch.from_numpy(rng.standard_normal((n, d)) + 0.2).half()
    queries = make_queries(q, vectors.double().numpy(), rng)
    with Memory() as memory:
        found = VectorSearch(vectors, "cpu", remove_means=True, memory_budget=budget).top_k(queries, 5)
    codes = QuantizedRows.n_bytes(n, d, torch.bfloat16)
    assert 0 < memory.largest <= max(budget, codes)
    assert memory.peak <= budget + 40 * n + 40 * q * d + codes
    check_without_means(found, vectors, queries, 5)


@pytest.mark.parametrize("n", [1, 5, 999])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("bytes_per_row", [1, 4000])
def test_chunks_cover_the_rows_once_and_fit_the_budget(n: int, budget: int, bytes_per_row: int) -> None:
    search = VectorSearch(torch.nn.functional.normalize(torch.ones(n, 4), dim=-1), "cpu", memory_budget=budget)
    chunks = search.rows.chunks(Chunk(0, n), bytes_per_row)
    assert [row for chunk in chunks for row in range(chunk.first, chunk.last)] == list(range(n))
    for chunk in chunks:
        assert chunk.first % GROUP_ROWS == 0
        assert len(chunk) <= GROUP_ROWS or bytes_per_row * len(chunk) <= budget


def test_rows_are_not_copied() -> None:
    for vectors in (torch.nn.functional.normalize(queries_of(64, 6), dim=-1), unit(np.ones((64, 6))).astype(np.float16)):
        held = VectorSearch(vectors, "cpu").rows.vectors
        assert held.data_ptr() == (vectors.data_ptr() if isinstance(vectors, torch.Tensor) else vectors.ctypes.data)


def test_codes_take_only_the_memory_that_other_codes_left(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.from_numpy(unit(np.random.default_rng(0).standard_normal((5000, 32)))).half()
    queries = queries_of(3, 32)
    left = 2 * QuantizedRows.n_bytes(5000, 32, torch.int8) + 2 * 2**28

    class Machine:
        @property
        def available(self) -> int:
            made = [search for search in searches if "codes" in vars(search.coarse_pass)]
            return left - sum(search.coarse_pass.codes is not None for search in made) * left // 2

    monkeypatch.setattr("psutil.virtual_memory", Machine)
    with search_settings(code_dtypes=(torch.int8,)):
        searches = [VectorSearch(vectors, "cpu") for _ in range(3)]
        found = top_k_of_parts([search.part(search.normalize_queries(queries)) for search in searches], 6)
        assert [search.coarse_pass.codes is not None for search in searches] == [True, False, False]
    expected = VectorSearch(torch.cat([vectors] * 3), "cpu", "float32").top_k(queries, 6)
    assert torch.equal(found.rows, expected.rows)
