"""The bank file, written: batches, resuming, refusing, and never a wrong file under the final name."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.banks import (
    HOOK_A,
    HOOK_B,
    INFO,
    NUMPY_DTYPES,
    TORCH_DTYPES,
    WIDTHS,
    StopBuildError,
    activations,
    at_most,
    fill,
    give,
    journal,
    make_record,
    make_rows,
)

from tl_latentlens.bank import create as create_module
from tl_latentlens.bank import partial_file as partial_module
from tl_latentlens.bank.bank import Bank
from tl_latentlens.bank.batches import Batch
from tl_latentlens.bank.format import BankMetadata, partial_path
from tl_latentlens.bank.head import DatasetPlace, Head, user_block_size
from tl_latentlens.bank.writer import BankWriter
from tl_latentlens.corpus.plan import Plan, PlanSettings, make_plan, prompts_from_lists
from tl_latentlens.errors import BankCorruptError, BankError, InvalidInputError


@pytest.fixture
def plan() -> Plan:
    return make_rows()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two or three batches of 16 tokens fill a block: it closes with the prompt that brings it to 16."""
    monkeypatch.setattr(create_module, "BATCHES_PER_BLOCK", 1)


# Batches


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[list[int]], list[list[bool]], PlanSettings]:
    lists = draw(st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=12))
    bos = draw(st.booleans())
    special = [[bos and i == 0 for i in range(len(tokens))] for tokens in lists]
    if not any(not s for row in special for s in row):
        lists, special = [*lists, [1, 2]], [*special, [False, False]]
    cap = draw(st.sampled_from([None, 1, 2]))
    kind = draw(st.sampled_from([{}, {"bidirectional": True}, {"repeat": True}]))
    return lists, special, PlanSettings(cap, draw(st.integers(0, 3)), **kind)


@settings(deadline=None, max_examples=60)
@given(
    corpus=corpora(),
    batch_tokens=st.integers(1, 30),
    block_batches=st.integers(1, 3),
    block_bytes=st.sampled_from([1, 100, 2**29]),
)
def test_batches_hold_every_row_once_in_padded_prompts(
    corpus: Any, batch_tokens: int, block_batches: int, block_bytes: int
) -> None:
    lists, special, of_plan = corpus
    plan = make_plan(prompts_from_lists(lists, special), of_plan)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(create_module, "BATCHES_PER_BLOCK", block_batches)
        patch.setattr(create_module, "MAX_BLOCK_BYTES", block_bytes)
        path = Path(folder) / "a.h5"
        acts = activations(plan)
        seen: Counter[int] = Counter()
        blocks: dict[int, set[int]] = {}
        run = 0
        with BankWriter.create(path, plan, make_record(plan), batch_tokens=batch_tokens) as writer:
            left = writer.tokens_left
            for batch in writer.batches():
                _check_batch(plan, batch, batch_tokens)
                seen.update(batch.rows.tolist())
                blocks.setdefault(batch.block, set()).update(batch.rows.tolist())
                run += batch.n_tokens
                give(writer, batch, acts)
        assert seen == Counter(range(plan.n_rows))
        assert run == left
        bank = Bank.open(path)
        assert blocks == {block: set(range(first, last)) for block, (first, last) in enumerate(bank.blocks())}
        for name in WIDTHS:
            unit = acts[name] / np.linalg.norm(acts[name], axis=1, keepdims=True)
            np.testing.assert_allclose(bank.vectors(name), unit, atol=1e-3)


def test_batches_end_where_prompts_are_much_shorter(tmp_path: Path) -> None:
    lengths = [200] * 3 + [100] * 7 + [95] * 5 + [20] * 10
    plan = make_plan(prompts_from_lists([[i] + [1] * (n - 1) for i, n in enumerate(lengths, 2)]), PlanSettings(None))
    with BankWriter.create(tmp_path / "a.h5", plan, make_record(plan), batch_tokens=2000) as writer:
        shapes = [tuple(batch.tokens.shape) for batch in writer.batches()]
    assert shapes == [(3, 200), (12, 100), (10, 20)]  # 600 tokens are enough to end with, 95 is near enough to 100
    with BankWriter.create(tmp_path / "b.h5", plan, make_record(plan), batch_tokens=8000) as writer:
        shapes = [tuple(batch.tokens.shape) for batch in writer.batches()]
    assert shapes == [(5, 200), (10, 100), (10, 20)]  # an eighth of the most are 1,000


def _check_batch(plan: Plan, batch: Batch, batch_tokens: int) -> None:
    starts = plan.prompt_starts
    prompts = [plan.tokens[a:b].tolist() for a, b in pairwise(starts)]
    place = {}
    for prompt, (start, end) in enumerate(pairwise(starts)):
        place.update({row: (prompt, at - start) for row, at in enumerate(plan.row_tokens.tolist()) if start <= at < end})
    n_prompts, width = batch.tokens.shape
    assert batch.tokens.shape == batch.attention_mask.shape
    assert batch.tokens.dtype == torch.int64
    assert batch.attention_mask.dtype == torch.bool
    assert n_prompts == 1 or n_prompts * width <= batch_tokens
    assert len(batch.rows) == len(batch.row_batch) == len(batch.row_pos)
    of_line: dict[int, set[int]] = {}
    for row, line, position in zip(batch.rows.tolist(), batch.row_batch.tolist(), batch.row_pos.tolist(), strict=True):
        prompt, expected = place[row]
        length = len(prompts[prompt]) - plan.settings.text_start
        assert position == expected + plan.settings.repeat * length
        of_line.setdefault(line, set()).add(prompt)
    assert sorted(of_line) == list(range(n_prompts)), "a prompt without rows was run"
    assert all(len(found) == 1 for found in of_line.values())
    assert len(set.union(*of_line.values())) == n_prompts, "a prompt was run twice"
    for line, (prompt,) in of_line.items():
        text = prompts[prompt][plan.settings.text_start :] if plan.settings.repeat else []
        whole = prompts[prompt] + text
        rows_of_prompt = [position + len(text) for p, position in place.values() if p == prompt]
        assert sorted(batch.row_pos[batch.row_batch == line].tolist()) == sorted(rows_of_prompt)
        length = len(whole) if plan.settings.bidirectional else max(rows_of_prompt) + 1
        assert batch.attention_mask[line].tolist() == [True] * length + [False] * (width - length)
        assert batch.tokens[line, :length].tolist() == whole[:length]
    assert batch.attention_mask.any(0).all(), "a column of nothing but padding"


def test_a_repeated_text_by_hand(tmp_path: Path) -> None:
    lists, special = [[0, 5, 6, 7], [0, 8]], [[True, False, False, False], [True, False]]
    plan = make_plan(prompts_from_lists(lists, special), PlanSettings(repeat=True))
    assert plan.row_tokens.tolist() == [1, 2, 3, 5], "each prompt is stored once"
    (batch,) = fill(tmp_path / "a.h5", plan)
    assert batch.tokens.tolist() == [[0, 5, 6, 7, 5, 6, 7], [0, 8, 8, 0, 0, 0, 0]]
    assert batch.attention_mask.sum(-1).tolist() == [7, 3]
    assert (batch.row_batch.tolist(), batch.row_pos.tolist()) == ([0, 0, 0, 1], [4, 5, 6, 2])
    assert batch.n_tokens == 10
    bank = Bank.open(tmp_path / "a.h5")
    assert (bank.plan.settings, bank.plan.digest) == (plan.settings, plan.digest)
    assert [bank.row(i).position for i in range(4)] == [1, 2, 3, 1]


def test_a_prompt_longer_than_a_batch_is_run_alone(tmp_path: Path) -> None:
    lists = [[1, 2], [3] * 40, [4, 5]]
    plan = make_plan(prompts_from_lists(lists), PlanSettings(None))
    shapes = [tuple(batch.tokens.shape) for batch in fill(tmp_path / "a.h5", plan, batch_tokens=8)]
    assert shapes == [(1, 40), (2, 2)]


def test_batches_go_to_the_device(tmp_path: Path, plan: Plan) -> None:
    with BankWriter.create(tmp_path / "a.h5", plan, make_record(plan)) as writer:
        batch = next(iter(writer.batches("meta")))
    assert {t.device.type for t in (batch.tokens, batch.attention_mask, batch.row_batch, batch.row_pos)} == {"meta"}


@pytest.mark.parametrize("batch_tokens", [0, -1])
def test_batch_tokens_below_one_is_refused(tmp_path: Path, plan: Plan, batch_tokens: int) -> None:
    with at_most(2), pytest.raises(InvalidInputError, match=f"batch_tokens={batch_tokens}"):
        BankWriter.create(tmp_path / "a.h5", plan, make_record(plan), batch_tokens=batch_tokens)
    assert list(tmp_path.iterdir()) == []


# What was written


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize(("batches", "size"), [(8, 2**29), (1, 2**29), (8, 50)])
def test_bank_holds_what_was_given(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, dtype: str, batches: int, size: int
) -> None:
    monkeypatch.setattr(create_module, "BATCHES_PER_BLOCK", batches)
    monkeypatch.setattr(create_module, "MAX_BLOCK_BYTES", size)
    acts = activations(plan)
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


# Interrupted and resumed


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("k", [0, 1, 4, -1])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_interrupted_build_resumes_where_it_stood(tmp_path: Path, plan: Plan, k: int, dtype: str) -> None:
    whole, path = tmp_path / "whole.h5", tmp_path / "a.h5"
    batches = fill(whole, plan, batch_tokens=16, dtype=dtype)
    with pytest.raises(StopBuildError):
        fill(path, plan, batch_tokens=16, dtype=dtype, stop_after=k % len(batches))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5.partial", "whole.h5"]
    done = journal(path)
    assert done.sum() == len({b.block for b in batches[: k % len(batches)]} - {b.block for b in batches[k % len(batches) :]})
    resumed = fill(path, plan, batch_tokens=16, dtype=dtype)
    assert {batch.block for batch in resumed} == set(np.flatnonzero(~done))
    assert path.read_bytes() == whole.read_bytes()
    assert not partial_path(path).exists()


@pytest.mark.usefixtures("small_blocks")
def test_interrupted_again_and_again(tmp_path: Path, plan: Plan) -> None:
    batches = fill(tmp_path / "whole.h5", plan, batch_tokens=16)
    path, left = tmp_path / "a.h5", []
    for _ in range(2 * len(batches)):
        with BankWriter.create(path, plan, make_record(plan), batch_tokens=16) as writer:
            left.append(writer.tokens_left)
        try:
            fill(path, plan, batch_tokens=16, stop_after=4)
        except StopBuildError:
            continue
        break
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert left[0] == sum(b.n_tokens for b in batches)
    assert left == sorted(left, reverse=True)
    assert len(set(left)) > 3


def test_interrupted_between_two_hooks_of_a_batch(tmp_path: Path, plan: Plan) -> None:
    fill(tmp_path / "whole.h5", plan, batch_tokens=16)
    path, acts = tmp_path / "a.h5", activations(plan)

    def interrupted() -> None:
        with BankWriter.create(path, plan, make_record(plan), batch_tokens=16) as writer:
            give(writer, next(writer.batches()), acts, (HOOK_A,))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not journal(path).any()
    fill(path, plan, batch_tokens=16)
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()


@pytest.mark.usefixtures("small_blocks")
def test_a_forward_pass_run_again_after_an_error_leaves_a_right_bank(tmp_path: Path, plan: Plan) -> None:
    """Out of memory in the middle of a run, and the user's loop tries the batch once more."""
    fill(tmp_path / "whole.h5", plan, batch_tokens=16)
    acts, path = activations(plan), tmp_path / "a.h5"
    with BankWriter.create(path, plan, make_record(plan), batch_tokens=16) as writer:
        for batch in writer.batches():
            give(writer, batch, acts, (HOOK_A,))
            give(writer, batch, acts)
    bank, whole = Bank.open(path), Bank.open(tmp_path / "whole.h5")
    for name in WIDTHS:
        np.testing.assert_array_equal(bank.vectors(name), whole.vectors(name))


def test_a_batch_written_twice_does_not_stand_for_another(tmp_path: Path) -> None:
    plan = make_plan(prompts_from_lists([[1, 2], [3, 4]]), PlanSettings(None))
    acts, path = activations(plan), tmp_path / "a.h5"
    with BankWriter.create(path, plan, make_record(plan), batch_tokens=2) as writer:
        first, second = list(writer.batches())
        assert first.block == second.block
        give(writer, first, acts)
        give(writer, first, acts)
    assert not path.exists(), "the second batch was never given"
    fill(path, plan, batch_tokens=2)
    np.testing.assert_allclose(Bank.open(path).norms(HOOK_A), np.linalg.norm(acts[HOOK_A], axis=1), rtol=1e-6)


@pytest.mark.usefixtures("small_blocks")
def test_loop_left_early_keeps_the_partial_file(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "a.h5"
    with BankWriter.create(path, plan, make_record(plan), batch_tokens=16) as writer:
        for batch in writer.batches():
            if batch.block == 2:
                break
            give(writer, batch, activations(plan))
    assert not path.exists()
    assert journal(path).tolist() == [True] * 2 + [False] * (len(journal(path)) - 2)


@pytest.mark.usefixtures("small_blocks")
def test_build_stopped_before_the_rename_is_finished_by_the_next(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "a.h5"
    fill(path, plan)
    expected = path.read_bytes()
    path.rename(partial_path(path))
    assert fill(path, plan) == []
    assert path.read_bytes() == expected


def test_leftover_of_a_build_killed_while_creating_is_replaced(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "a.h5"
    (tmp_path / "a.h5.partial.new").write_bytes(b"half a file")
    fill(path, plan)
    Bank.open(path).verify()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5"]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("complete", "what"),
    # The journal and the checksums of a complete file are under the digest: damage there is refused, see below.
    [*product([False], ["vectors", "norms", "checksums", "journal"]), *product([True], ["vectors", "norms"])],
)
def test_a_block_that_changed_is_built_again_and_never_becomes_a_bank(
    tmp_path: Path, plan: Plan, complete: bool, what: str
) -> None:
    path, whole = tmp_path / "a.h5", tmp_path / "whole.h5"
    n_blocks = len({batch.block for batch in fill(whole, plan, batch_tokens=16)})
    stop_partial(path, plan, complete)
    if what == "journal":
        bad = n_blocks - 1
        flip(partial_path(path), offset_of(path, "journal") + bad)
    else:
        bad = 0
        flip(partial_path(path), offset_of(path, f"hooks/{HOOK_B}/{what}") + 1)
    with pytest.raises(
        BankCorruptError, match=rf"a\.h5\.partial: blocks \[{bad}\] do not .* same call builds these blocks again"
    ):
        fill(path, plan, batch_tokens=16)
    assert not path.exists()
    assert np.flatnonzero(~journal(path)).tolist() == [bad]
    assert {batch.block for batch in fill(path, plan, batch_tokens=16)} == {bad}
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.usefixtures("small_blocks")
def test_more_changed_blocks_than_are_worth_naming(tmp_path: Path, plan: Plan) -> None:
    path, whole = tmp_path / "a.h5", tmp_path / "whole.h5"
    n_blocks = len({batch.block for batch in fill(whole, plan, batch_tokens=8)})
    assert n_blocks > 9
    stop_partial(path, plan, complete=True, batch_tokens=8)
    with partial_path(path).open("r+b") as file:
        file.seek(offset_of(path, f"hooks/{HOOK_A}/norms"))
        file.write(bytes(4 * plan.n_rows))
    with pytest.raises(BankCorruptError, match=r"blocks \[0, 1, 2, 3, 4, 5, 6, 7\]… do not match"):
        fill(path, plan, batch_tokens=8)
    assert {batch.block for batch in fill(path, plan, batch_tokens=8)} == set(range(n_blocks))
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("complete", [False, True], ids=["building", "before the rename"])
@pytest.mark.parametrize("cut", [100, 1000, 4095])
def test_damaged_first_copy_of_the_head_is_mended(tmp_path: Path, plan: Plan, complete: bool, cut: int) -> None:
    path, whole = tmp_path / "a.h5", tmp_path / "whole.h5"
    fill(whole, plan, batch_tokens=16)
    stop_partial(path, plan, complete)
    flip(partial_path(path), cut)
    assert len(fill(path, plan, batch_tokens=16)) == 0 or not complete
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("complete", [False, True], ids=["building", "before the rename"])
@pytest.mark.parametrize("name", ["both heads", "tokens", "block_starts", "fingerprint/tokens"])
def test_damaged_partial_file_is_refused(tmp_path: Path, plan: Plan, name: str, complete: bool) -> None:
    path = tmp_path / "a.h5"
    stop_partial(path, plan, complete)
    for offset in [200, 200 + 4096] if name == "both heads" else [offset_of(path, name)]:
        flip(partial_path(path), offset)
    before = partial_path(path).read_bytes()
    with pytest.raises(BankCorruptError, match=r"a\.h5\.partial: .*(is damaged|metadata does not match).*rebuild it"):
        fill(path, plan, batch_tokens=16)
    assert partial_path(path).read_bytes() == before
    partial_path(path).unlink()
    fill(path, plan)
    Bank.open(path).verify()


@pytest.mark.parametrize("name", ["journal", f"hooks/{HOOK_A}/checksums", f"hooks/{HOOK_A}/mean", f"hooks/{HOOK_B}/std"])
def test_damage_to_what_a_complete_partial_file_says_is_refused(tmp_path: Path, plan: Plan, name: str) -> None:
    path = tmp_path / "a.h5"
    stop_partial(path, plan, complete=True)
    flip(partial_path(path), offset_of(path, name))
    with pytest.raises(BankCorruptError, match=r"a\.h5\.partial: metadata does not match"):
        fill(path, plan, batch_tokens=16)


def test_partial_file_of_another_kind_is_named_and_kept(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "a.h5"
    partial_path(path).write_bytes(b"mine")
    with pytest.raises(BankError, match=r"a\.h5\.partial: is not a tl-latentlens bank"):
        fill(path, plan)
    assert partial_path(path).read_bytes() == b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5.partial"]


def stop_partial(path: Path, plan: Plan, complete: bool, batch_tokens: int = 16) -> None:
    """Leave a partial file: of a build stopped after three batches, or of one stopped right before its rename."""
    if complete:
        fill(path, plan, batch_tokens=batch_tokens)
        path.rename(partial_path(path))
        return
    with pytest.raises(StopBuildError):
        fill(path, plan, batch_tokens=batch_tokens, stop_after=3)


def offset_of(path: Path, name: str) -> int:
    """Where a dataset of an unfinished bank begins, read with plain h5py."""
    with h5py.File(partial_path(path), "r", locking=False) as file:
        return file[name].id.get_offset()


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


# Another process

_CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import support.banks as t
from tl_latentlens.bank import create as create_module
from tl_latentlens.bank.writer import BankWriter
create_module.BATCHES_PER_BLOCK = 1
plan = t.make_rows()
acts = t.activations(plan)
with BankWriter.create({path!r}, plan, t.make_record(plan), batch_tokens=16) as writer:
    for batch in writer.batches():
        t.give(writer, batch, acts)
        time.sleep(0.05)
        done = int(t.journal(Path({path!r})).sum())
        print(done, flush=True)
        if done >= 3:
            t.give(writer, batch, acts, (t.HOOK_A,))
            time.sleep(600)
"""


@pytest.mark.usefixtures("small_blocks")
def test_killed_process_is_resumed_byte_for_byte(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "a.h5"
    code = _CHILD.format(tests=str(Path(__file__).parents[1]), path=str(path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= 3:
                break
        else:
            pytest.fail("the child ended before its third block")
        before = partial_path(path).read_bytes()
        with pytest.raises(BankError, match=rf"a\.h5 is being built by process {child.pid} on "):
            fill(path, plan, batch_tokens=16)
        assert partial_path(path).read_bytes() == before
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert (tmp_path / "a.h5.lock").exists(), "the child was killed, so it left its lock"
    done = journal(path)
    assert 3 <= done.sum() < len(done)
    resumed = fill(path, plan, batch_tokens=16)
    assert {batch.block for batch in resumed} == set(np.flatnonzero(~done))
    fill(tmp_path / "whole.h5", plan, batch_tokens=16)
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()


# Refused


def other_cap(plan: Plan) -> dict[str, Any]:
    return {"plan": make_rows(max_rows_per_token=1)}


def more_texts(plan: Plan) -> dict[str, Any]:
    return {"plan": make_rows(25)}


def other_token(plan: Plan) -> dict[str, Any]:
    return {"plan": replace(plan, tokens=np.r_[plan.tokens[:-1], 31].astype(np.int32))}


def other_seed(plan: Plan) -> dict[str, Any]:
    return {"plan": replace(plan, settings=PlanSettings(seed=9))}


def other_model(plan: Plan) -> dict[str, Any]:
    return {"record": make_record(plan, info=replace(INFO, name="another", d_model=12))}


def other_hooks(plan: Plan) -> dict[str, Any]:
    return {"record": make_record(plan, {HOOK_A: 6, "blocks.1.hook_resid_post": 3})}


def other_width(plan: Plan) -> dict[str, Any]:
    return {"record": make_record(plan, {HOOK_A: 6, HOOK_B: 4})}


def other_weights(plan: Plan) -> dict[str, Any]:
    return {"record": make_record(plan, scale=1.5)}


def other_prompts(plan: Plan) -> dict[str, Any]:
    record = make_record(plan)
    return {"record": replace(record, fingerprint=replace(record.fingerprint, prompts=((0, 2), (0,))))}


def other_dtype(plan: Plan) -> dict[str, Any]:
    return {"dtype": "bfloat16"}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            other_cap,
            r"in plan settings: the file has \{'max_rows_per_token': 50\}, this call \{'max_rows_per_token': 1\}\. Repeat",
        ),
        (other_seed, r"differs in plan settings: the file has \{'seed': 0\}, this call \{'seed': 9\}\. Repeat"),
        (
            more_texts,
            r"differs in corpus: the file has 24 texts of \d+ tokens, this call 25 texts of \d+ tokens\. Repeat",
        ),
        (other_token, r"differs in corpus or its tokens: the file has \w{64}, this call \w{64}\. Repeat"),
        (
            other_model,
            r"in model: the file has \{'name': 'tiny', 'd_model': 6\}, this call \{'name': 'another', 'd_model': 12\}\. Repeat",
        ),
        (
            other_hooks,
            r"differs in hook names: the file has .*blocks\.1\.attn\.hook_z.* this call .*blocks\.1\.hook_resid_post",
        ),
        (other_width, r"differs in widths: the file has .*hook_z': 3.* this call .*hook_z': 4"),
        (other_weights, r"differs in the model's activations: other weights under the same name\. Repeat"),
        (
            other_prompts,
            r"differs in the fingerprint prompts: the file has \(\(0, 1\), \(0,\)\), this call \(\(0, 2\), \(0,\)\)",
        ),
        (other_dtype, r"differs in dtype: the file has float16, this call bfloat16"),
    ],
)
def test_other_settings_do_not_resume(tmp_path: Path, plan: Plan, change: Any, message: str) -> None:
    path = tmp_path / "a.h5"
    with pytest.raises(StopBuildError):
        fill(path, plan, batch_tokens=16, stop_after=2)
    before = partial_path(path).read_bytes()
    arguments = {"plan": plan, "record": make_record(plan), **change(plan)}
    with pytest.raises(BankError, match=message) as caught:
        BankWriter.create(path, batch_tokens=16, **arguments)
    assert str(partial_path(path)) in str(caught.value)
    assert partial_path(path).read_bytes() == before
    fill(path, plan, batch_tokens=16)
    Bank.open(path).verify()


@pytest.mark.usefixtures("small_blocks")
def test_resume_keeps_the_batches_of_the_file(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "a.h5"
    with pytest.raises(StopBuildError):
        fill(path, plan, batch_tokens=16, stop_after=2)
    fill(path, plan, batch_tokens=4096)
    fill(tmp_path / "whole.h5", plan, batch_tokens=16)
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_existing_path_is_refused(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "a.h5"
    path.write_text("mine")
    with pytest.raises(BankError, match=r"a\.h5 exists already; open it with Bank\.open"):
        BankWriter.create(path, plan, make_record(plan))
    assert path.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


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
