"""Approximate search: what it finds is exact, what it misses is said."""

import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import tl_latentlens as tll
from tl_latentlens.search.approximate import ApproximateSearch
from tl_latentlens.search.vectors import VectorSearch

pytest.importorskip("faiss")


def clustered(n: int, d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(60, d, generator=generator)
    return normalize(centers[torch.randint(0, 60, (n,), generator=generator)] + torch.randn(n, d, generator=generator), dim=-1)


@pytest.fixture(scope="module")
def vectors() -> torch.Tensor:
    return clustered(6000, 32, 0).half()


def test_what_is_found_is_exact_and_most_is_found(vectors: torch.Tensor) -> None:
    queries = clustered(50, 32, 1)
    search = ApproximateSearch(vectors, "cpu")
    found, exact = search.top_k(queries, 10), VectorSearch(vectors, "cpu").top_k(queries, 10)
    similarities = (normalize(queries, dim=-1) @ normalize(vectors.float(), dim=-1).T).gather(-1, found.rows)
    torch.testing.assert_close(found.similarities, similarities, rtol=0, atol=1e-6)
    assert (found.similarities.diff(dim=-1) <= 0).all()
    share = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.rows.tolist(), exact.rows.tolist(), strict=True)])
    assert search.recall(queries, 10) == pytest.approx(share, abs=1e-6)
    assert 0.5 < share < 1


def test_a_query_for_which_too_few_rows_are_proposed_is_searched_exactly(vectors: torch.Tensor) -> None:
    queries = clustered(8, 32, 2)
    search = ApproximateSearch(vectors, "cpu", factory="IVF60,Flat")
    found, exact = search.top_k(queries, 400), VectorSearch(vectors, "cpu").top_k(queries, 400)
    assert torch.equal(found.rows, exact.rows)


@pytest.mark.parametrize("options", [{"center": torch.full((32,), 0.1)}, {"remove_means": True}, {"unit_length": False}])
def test_an_index_that_keeps_all_finds_all(vectors: torch.Tensor, options: dict) -> None:
    queries = clustered(20, 32, 3)
    found = ApproximateSearch(vectors, "cpu", factory="Flat", **options).top_k(queries, 7)
    exact = VectorSearch(vectors, "cpu", **options).top_k(queries, 7)
    assert torch.equal(found.rows, exact.rows)
    assert torch.equal(found.similarities, exact.similarities)


def test_an_index_is_approximate_only_where_asked_for(bank: tll.Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = torch.from_numpy(np.array(bank.vectors(bank.hook_names[0])[:20])).float()
    exact = tll.ContextualIndex(bank, device="cpu")
    assert set(exact.recall(queries).values()) == {1.0}
    flat = tll.ContextualIndex(bank, device="cpu", approximate="Flat")
    assert torch.equal(flat.search(queries, 6).rows, exact.search(queries, 6).rows)
    assert flat.recall(queries, 6) == dict.fromkeys(bank.hook_names, 1.0)
    with pytest.raises(tll.InvalidInputError, match="FAISS cannot make an index 'IVF,what'"):
        tll.ContextualIndex(bank, device="cpu", approximate="IVF,what")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(tll.MissingExtraError, match=r"pip install 'tl-latentlens\[faiss\]'"):
        tll.ContextualIndex(bank, device="cpu", approximate=True)
