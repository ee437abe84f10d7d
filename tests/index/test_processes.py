"""Banks, indices, hooks and results in another process, as copies, and as they come back."""

import copy
import io
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.banks import make_record, make_rows
from support.fresh import process_context
from support.models import TEXTS

import tl_latentlens as tll
from tl_latentlens.search.approximate import ApproximateSearch
from tl_latentlens.search.settings import search_settings

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def found(index: tll.ContextualIndex) -> tll.SearchResult:
    return index.search(torch.eye(256)[:3], 4, query_hook_name=HOOK, calibrate=True)


@pytest.fixture
def own_bank(any_model: Any, tmp_path: Path) -> tll.Bank:
    """A bank whose file a test may change."""
    return tll.build_bank(any_model, TEXTS, tmp_path / "own.h5", hook_names=HOOK, progress=False)


def sent(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def same_rows(one: tll.SearchResult, other: tll.SearchResult) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("rows", "hook_ids", "similarities", "chances", "known")
    )


def test_a_bank_opens_its_file_again(bank: tll.Bank, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _ = bank.vectors(HOOK), bank.row(3).token, bank.plan
    data = pickle.dumps(bank)
    assert len(data) < 1000
    monkeypatch.chdir(tmp_path)
    for again in (pickle.loads(data), copy.copy(bank), copy.deepcopy(bank)):
        assert again.path == bank.path
        assert again.row(3).context() == bank.row(3).context()
        again.verify()
        again.close()
    assert sent(bank.row(3)).context() == bank.row(3).context()


def test_another_bank_in_its_place_is_refused(any_model: Any, own_bank: tll.Bank) -> None:
    index = tll.ContextualIndex(own_bank, device="cpu")
    things = [own_bank, index, index.search(torch.ones(256)), tll.latentlens_hooks(index)]
    data = [pickle.dumps(thing) for thing in things]
    own_bank.path.unlink()
    for one in data:
        with pytest.raises(tll.BankError, match="no bank file at "):
            pickle.loads(one)
    tll.build_bank(any_model, TEXTS[:2], own_bank.path, hook_names=HOOK, progress=False)
    for one in data:
        with pytest.raises(tll.BankError, match="is another bank than the one that was copied or sent"):
            pickle.loads(one)


def test_the_same_bank_put_back_is_taken(own_bank: tll.Bank) -> None:
    index = tll.ContextualIndex(own_bank, device="cpu")
    expected, data = index.search(torch.ones(256)), pickle.dumps(index)
    content = own_bank.path.read_bytes()
    own_bank.path.unlink()
    own_bank.path.write_bytes(content)
    again = pickle.loads(data)
    assert again is not index
    assert torch.equal(again.search(torch.ones(256)).rows, expected.rows)


def test_other_picklers(bank: tll.Bank, index: tll.ContextualIndex, found: tll.SearchResult) -> None:
    """joblib and Dask send things by cloudpickle, torch.save by pickle."""
    cloudpickle = pytest.importorskip("cloudpickle")
    assert cloudpickle.loads(cloudpickle.dumps(index)) is index
    assert cloudpickle.loads(cloudpickle.dumps(bank)).path == bank.path
    buffer = io.BytesIO()
    torch.save(found, buffer)
    buffer.seek(0)
    assert same_rows(torch.load(buffer, weights_only=False), found)


def test_a_writer_stays_in_its_process(bank: tll.Bank, tmp_path: Path) -> None:
    plan = make_rows()
    with tll.BankWriter.create(tmp_path / "a.h5", plan, make_record(plan)) as writer:
        for send in (pickle.dumps, copy.deepcopy):
            with pytest.raises(tll.InvalidInputError, match="a BankWriter holds the lock"):
                send(writer)


def test_copies_in_one_process_share_the_index(index: tll.ContextualIndex, found: tll.SearchResult) -> None:
    assert sent(index) is copy.deepcopy(index) is copy.copy(index) is index
    again = sent([found, found[0]])
    assert again[0].index is again[1].index is index
    assert same_rows(again[0], found)
    assert [neighbor.context for neighbor in again[1].neighbors()] == [neighbor.context for neighbor in found[0].neighbors()]


SETTINGS: list[dict[str, Any]] = [
    {"transform": "csls"},
    {"transform": "standardize", "dtype": "int8", "hook_names": [HOOK]},
    {"hook_names": HOOK, "memory_budget": 10**6, "allow_mismatch": True, "verify": False},
    {"transform": "center_writing", "dtype": "float32"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.get("transform", "raw"))
def test_settings_survive(bank: tll.Bank, settings: dict[str, Any]) -> None:
    index = tll.ContextualIndex(bank, device="cpu", **settings)
    queries, layers = torch.eye(256)[:3], index.hook_names
    expected, data, text = index.search(queries, 4, query_hook_name=HOOK, calibrate=True), pickle.dumps(index), repr(index)
    allows, budget = index.allow_mismatch, index._searches[HOOK].parts[0].search.rows.memory_budget
    dtypes = index._searches[HOOK].parts[0].search.coarse_pass.code_dtypes
    del index
    again = pickle.loads(data)
    assert (repr(again), again.hook_names, again.allow_mismatch) == (text, layers, allows)
    search = again._searches[HOOK].parts[0].search
    assert (search.rows.memory_budget, search.coarse_pass.code_dtypes) == (budget, dtypes)
    assert same_rows(again.search(queries, 4, query_hook_name=HOOK, calibrate=True), expected)


def test_a_setting_that_was_changed_later_survives(bank: tll.Bank) -> None:
    index = tll.ContextualIndex(bank, device="cpu")
    index.allow_mismatch = True
    assert sent(index).allow_mismatch


def test_several_banks_and_heads(any_model: Any, tmp_path: Path) -> None:
    z = "blocks.2.attn.hook_z"
    banks = [tll.build_bank(any_model, TEXTS[i:], tmp_path / f"{i}.h5", hook_names=z, progress=False) for i in (0, 2)]
    index = tll.ContextualIndex(banks, f"{z}[:]", device="cpu")
    query, data = torch.ones(index.d(f"{z}[1]")), pickle.dumps(index)
    expected = index.search(query, 30, f"{z}[1]")
    n_rows = index.n_rows
    del index
    again = pickle.loads(data)
    assert (again.n_rows, [bank.path for bank in again.banks]) == (n_rows, [bank.path for bank in banks])
    assert torch.equal(again.search(query, 30, f"{z}[1]").rows, expected.rows)


def test_a_device_that_is_not_there_is_named(bank: tll.Bank) -> None:
    data = pickle.dumps(tll.ContextualIndex(bank, device="cpu")).replace(b"\x8c\x03cpu", b"\x8c\x03xyz")
    with pytest.raises(tll.InvalidInputError, match="device='xyz'"):
        pickle.loads(data)


def test_a_vector_search_after_its_first_search() -> None:
    vectors, queries = torch.randn(5000, 32, generator=torch.Generator().manual_seed(0)), torch.eye(32)[:4]
    with search_settings(min_kernel_rows=1):
        search = tll.VectorSearch(vectors, "cpu", "int8", center=vectors.mean(0))
        expected = search.top_k(queries, 5)
        for again in (sent(search), copy.deepcopy(search)):
            assert torch.equal(again.top_k(queries, 5).rows, expected.rows)


def test_an_approximate_search() -> None:
    pytest.importorskip("faiss")
    vectors, queries = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0)), torch.eye(16)[:4]
    search = ApproximateSearch(vectors, "cpu", "float32", factory="IVF8,SQ8")
    search.faiss.nprobe = 3
    for again in (sent(search), copy.deepcopy(search)):
        assert again.faiss.nprobe == 3
        assert torch.equal(again.top_k(queries, 5).rows, search.top_k(queries, 5).rows)


def test_an_approximate_index(bank: tll.Bank) -> None:
    pytest.importorskip("faiss")
    index = tll.ContextualIndex(bank, HOOK, device="cpu", approximate="Flat")
    expected, data = index.search(torch.ones(256), 4), pickle.dumps(index)
    del index
    again = pickle.loads(data)
    assert again._is_approximate
    assert torch.equal(again.search(torch.ones(256), 4).rows, expected.rows)


def read_in_worker(
    index: tll.ContextualIndex, found: tll.SearchResult, hooks: tll.LatentLensHook
) -> tuple[tll.SearchResult, tll.LensResult]:
    """What a worker sends back: a search of its own, and the reading that came with the hooks."""
    assert found.index is hooks.index is index
    return index.search(torch.eye(256)[:3], 4, query_hook_name=HOOK, calibrate=True), hooks.result


def test_a_process_of_its_own(index: tll.ContextualIndex, found: tll.SearchResult, any_model: Any) -> None:
    hooks = tll.latentlens_hooks(index)
    any_model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
    with ProcessPoolExecutor(1, mp_context=process_context) as workers:
        back, reading = workers.submit(read_in_worker, index, found, hooks.hook).result()
    assert same_rows(back, found)
    assert back.index is reading.found[HOOK].index is index, "the index that is open here is found again"
    assert str(reading) == str(hooks.result)
