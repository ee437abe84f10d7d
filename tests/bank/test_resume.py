"""Builds that are interrupted, killed or asked for something else: the same call resumes them, another is refused."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.banks import (
    HOOK_A,
    HOOK_B,
    INFO,
    WIDTHS,
    StopBuildError,
    activations,
    fill,
    give,
    journal,
    make_record,
    make_rows,
)

from tl_latentlens.bank.bank import Bank
from tl_latentlens.bank.format import partial_path
from tl_latentlens.bank.writer import BankWriter
from tl_latentlens.corpus.plan import Plan, PlanSettings, make_plan, prompts_from_lists
from tl_latentlens.errors import BankError


@pytest.fixture
def plan() -> Plan:
    return make_rows()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("k", [0, 1, 4, -1])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_interrupted_build_resumes_where_it_stood(tmp_path: Path, plan: Plan, k: int, dtype: str) -> None:
    whole, path = tmp_path / "whole.h5", tmp_path / "a.h5"
    batches = fill(whole, plan, batch_tokens=16, dtype=dtype)
    with pytest.raises(StopBuildError):
        fill(path, plan, batch_tokens=16, dtype=dtype, stop_after=k % len(batches))
    assert {p.name for p in tmp_path.iterdir()} - {"a.h5.partial.rows"} == {"a.h5.partial", "whole.h5"}
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


_CHILD = """
import sys, time
from pathlib import Path
from support.banks import HOOK_A, activations, blocks_of, give, journal, make_record, make_rows
from tl_latentlens.bank.writer import BankWriter
plan, path = make_rows(), Path(sys.argv[1])
acts = activations(plan)
with blocks_of(1), BankWriter.create(path, plan, make_record(plan), batch_tokens=16) as writer:
    for batch in writer.batches():
        give(writer, batch, acts)
        time.sleep(0.05)
        done = int(journal(path).sum())
        print(done, flush=True)
        if done >= 3:
            give(writer, batch, acts, (HOOK_A,))
            time.sleep(600)
"""


@pytest.mark.usefixtures("small_blocks")
def test_killed_process_is_resumed_byte_for_byte(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "a.h5"
    with subprocess.Popen([sys.executable, "-c", _CHILD, path], stdout=subprocess.PIPE, text=True) as child:
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
