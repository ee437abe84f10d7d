"""The bank file, written: it holds what was given, and what cannot be stored is refused by name."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.banks import (
    HOOK_A,
    HOOK_B,
    INFO,
    NUMPY_DTYPES,
    TORCH_DTYPES,
    WIDTHS,
    activations,
    blocks_of,
    fill,
    journal,
    make_record,
    make_rows,
)

from tl_latentlens.bank import partial_file as partial_module
from tl_latentlens.bank.bank import Bank
from tl_latentlens.bank.format import BankMetadata
from tl_latentlens.bank.head import DatasetPlace, Head, user_block_size
from tl_latentlens.bank.writer import BankWriter
from tl_latentlens.corpus.plan import Plan, PlanSettings, make_plan, prompts_from_lists
from tl_latentlens.errors import BankError, InvalidInputError


@pytest.fixture
def plan() -> Plan:
    return make_rows()


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize(("batches", "size"), [(8, 2**29), (1, 2**29), (8, 50)])
def test_bank_holds_what_was_given(tmp_path: Path, plan: Plan, dtype: str, batches: int, size: int) -> None:
    acts = activations(plan)
    with blocks_of(batches, size):
        fill(tmp_path / "a.h5", plan, dtype=dtype, batch_tokens=16)
    bank = Bank.open(tmp_path / "a.h5")
    bank.verify()
    assert (len(list(bank.blocks())) > 3) == ((batches, size) != (8, 2**29))
    for name, width in WIDTHS.items():
        rows = torch.from_numpy(acts[name])
        expected = (rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)).to(TORCH_DTYPES[dtype]).float().numpy()
        stored = bank.vectors(name)
        assert stored.dtype == NUMPY_DTYPES[dtype]
        assert stored.shape == (plan.n_rows, width)
        np.testing.assert_array_equal(stored.astype(np.float32), expected)
        np.testing.assert_allclose(bank.norms(name), np.linalg.norm(acts[name], axis=1), rtol=1e-6)
        np.testing.assert_allclose(bank.mean(name), stored.astype(np.float64).mean(0), atol=1e-12)
        np.testing.assert_allclose(bank.std(name), stored.astype(np.float64).std(0), atol=1e-7)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5"]


def test_mean_and_std_of_more_rows_than_one_step(tmp_path: Path) -> None:
    lists = [[int(i), int(j)] for i in range(100) for j in range(60)]
    plan = make_plan(prompts_from_lists(lists), PlanSettings(None))
    assert plan.n_rows > 4096
    fill(tmp_path / "a.h5", plan)
    bank = Bank.open(tmp_path / "a.h5")
    assert list(bank.blocks()) == [(0, plan.n_rows)]
    for name in WIDTHS:
        stored = bank.vectors(name).astype(np.float64)
        np.testing.assert_allclose(bank.mean(name), stored.mean(0), atol=1e-12)
        np.testing.assert_allclose(bank.std(name), stored.std(0), atol=1e-7)


def test_one_row_and_one_hook(tmp_path: Path) -> None:
    plan = make_plan(prompts_from_lists([[4]]))
    fill(tmp_path / "a.h5", plan, record=make_record(plan, {HOOK_A: 1}), acts={HOOK_A: np.array([[-3.0]], np.float32)})
    bank = Bank.open(tmp_path / "a.h5")
    assert (bank.vectors(HOOK_A).tolist(), bank.norms(HOOK_A).tolist(), bank.std(HOOK_A).tolist()) == ([[-1.0]], [3.0], [0.0])


def test_the_same_build_later_gives_the_same_bytes(tmp_path: Path, plan: Plan) -> None:
    fill(tmp_path / "a.h5", plan)
    time.sleep(1.1)  # HDF5 keeps times in whole seconds
    fill(tmp_path / "b.h5", plan)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


@pytest.mark.parametrize("n_hooks", [1, 2, 35, 36, 75, 76, 156, 400])
def test_user_block_has_room_for_every_hook_of_a_large_bank(n_hooks: int) -> None:
    names = tuple(f"blocks.{i}.hook_resid_post" for i in range(n_hooks))
    metadata = BankMetadata(INFO, PlanSettings(), "0" * 64, 0, "float16", 4096, names, tuple(range(100)), {"torch": "2.13.0"})
    size = user_block_size(metadata)
    assert size & (size - 1) == 0
    # A few hundred GB in all; token ids, bytes, blocks and prompts in their millions.
    parts = ("vectors", "norms", "checksums", "mean", "std")
    datasets = [*(f"hooks/{name}/{part}" for name in names for part in parts), *(f"fingerprint/{name}" for name in names)]
    datasets += "tokens prompt_starts row_tokens block_starts token_ids token_bytes token_byte_starts journal".split()
    datasets += ["fingerprint/tokens", "fingerprint/prompt_starts"]
    places = {name: DatasetPlace(345_678_901_234, "float32", (123_456_789, 16_384)) for name in datasets}
    for complete in (False, True):
        assert len(Head(size, complete, metadata, places).encode()) == size // 2


def test_bank_of_many_hooks(tmp_path: Path) -> None:
    plan = make_plan(prompts_from_lists([[1, 2, 3]]))
    widths = {f"blocks.{i}.hook_resid_post": 2 for i in range(120)}
    acts = activations(plan, widths)
    fill(tmp_path / "a.h5", plan, record=make_record(plan, widths), acts=acts)
    with Bank.open(tmp_path / "a.h5") as bank:
        bank.verify()
        assert bank.hook_names == tuple(widths)
        np.testing.assert_allclose(
            bank.norms("blocks.119.hook_resid_post"), np.linalg.norm(acts["blocks.119.hook_resid_post"], axis=1)
        )


def test_missing_folder_is_named(tmp_path: Path, plan: Plan) -> None:
    with pytest.raises(BankError, match=r"no folder .*nowhere to write a\.h5 in"):
        BankWriter.create(tmp_path / "nowhere" / "a.h5", plan, make_record(plan))


def test_unknown_dtype_is_named(tmp_path: Path, plan: Plan) -> None:
    with pytest.raises(InvalidInputError, match=r"got dtype='int8'; expected one of .*float16.*bfloat16.*float32"):
        BankWriter.create(tmp_path / "a.h5", plan, make_record(plan), dtype="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0])
def test_useless_activation_is_named_and_the_rest_kept(tmp_path: Path, plan: Plan, value: float) -> None:
    path, acts = tmp_path / "a.h5", activations(plan)
    row = plan.n_rows - 2
    prompt = int(np.searchsorted(plan.prompt_starts, plan.row_tokens[row], side="right")) - 1
    position = int(plan.row_tokens[row] - plan.prompt_starts[prompt])
    bad = {name: array.copy() for name, array in acts.items()}
    bad[HOOK_B][row] = value
    message = (
        rf"blocks\.1\.attn\.hook_z: 1 activations are NaN, inf or zero, the first at prompt {prompt}, position {position} "
    )
    with pytest.raises(InvalidInputError, match=message):
        fill(path, plan, acts=bad, batch_tokens=16)
    assert not path.exists()
    done = journal(path)
    assert 0 < done.sum() < len(done)
    resumed = fill(path, plan, acts=acts, batch_tokens=16)
    assert {batch.block for batch in resumed} == set(np.flatnonzero(~done))
    fill(tmp_path / "whole.h5", plan, batch_tokens=16)
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()


@pytest.mark.parametrize(("norm", "refused"), [(2.0**-126, False), (1.1e-38, True), (1e-40, True)])
def test_activation_too_short_for_float32_is_refused(tmp_path: Path, plan: Plan, norm: float, refused: bool) -> None:
    def build() -> None:
        with BankWriter.create(tmp_path / "a.h5", plan, make_record(plan)) as writer:
            for batch in writer.batches():
                for name, width in WIDTHS.items():
                    vectors = torch.full((len(batch.rows), width), width**-0.5, dtype=torch.float16)
                    writer.write(name, batch, vectors, torch.full((len(batch.rows),), norm))

    if not refused:
        build()
        assert np.all(Bank.open(tmp_path / "a.h5").norms(HOOK_A) == np.float32(norm))
        return
    with pytest.raises(
        InvalidInputError, match=rf"activations are NaN, inf or zero, the first at .* \(norm {np.float32(norm)}\)"
    ):
        build()
    assert not journal(tmp_path / "a.h5").any()


def test_wrong_shape_names_both(tmp_path: Path, plan: Plan) -> None:
    with pytest.raises(InvalidInputError, match=r"hook_z: got vectors of shape \(\d+, 4\), expected \(\d+, 3\)"):
        fill(tmp_path / "a.h5", plan, acts=activations(plan, {HOOK_A: 6, HOOK_B: 4}))


@pytest.mark.parametrize(
    ("dtype", "given"), [("bfloat16", torch.float32), ("float16", torch.bfloat16), ("float32", torch.bfloat16)]
)
def test_vectors_of_another_dtype_are_refused_or_converted(tmp_path: Path, plan: Plan, dtype: str, given: torch.dtype) -> None:
    path, acts = tmp_path / "a.h5", activations(plan)
    try:
        with BankWriter.create(path, plan, make_record(plan), dtype=dtype) as writer:
            for batch in writer.batches():
                for name in WIDTHS:
                    rows = torch.from_numpy(acts[name][batch.rows])
                    norms = torch.linalg.vector_norm(rows, dim=-1)
                    writer.write(name, batch, (rows / norms[:, None]).to(given), norms)
    except InvalidInputError:
        return
    unit = acts[HOOK_A] / np.linalg.norm(acts[HOOK_A], axis=1, keepdims=True)
    np.testing.assert_allclose(Bank.open(path).vectors(HOOK_A).astype(np.float32), unit, atol=1e-2)


def test_short_writes_are_continued(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "whole.h5", plan)
    pwrite = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(partial_module.os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7] if offset else data, offset))
        fill(tmp_path / "a.h5", plan)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
