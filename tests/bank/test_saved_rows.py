"""Blocks that are not full: what a stopped or killed build has of them is kept, and only what is missing is run again."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.banks import (
    HOOK_A,
    HOOK_B,
    WIDTHS,
    StopBuildError,
    activations,
    at_most,
    blocks_of,
    fill,
    give,
    journal,
    make_record,
    make_rows,
)

from tl_latentlens.bank import partial_file, writer
from tl_latentlens.bank.format import partial_path
from tl_latentlens.bank.writer import BankWriter
from tl_latentlens.corpus.plan import Plan

ONE_BLOCK = 1000  # batches of a block: more than there are


@pytest.fixture
def plan() -> Plan:
    return make_rows()


@pytest.fixture(params=["float16", "bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


def record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial.rows")


def stop(path: Path, plan: Plan, n_batches: int, **kwargs: Any) -> None:
    with blocks_of(ONE_BLOCK), pytest.raises(StopBuildError):
        fill(path, plan, batch_tokens=16, stop_after=n_batches, **kwargs)


def go_on(path: Path, plan: Plan, **kwargs: Any) -> list[list[int]]:
    """Build what is left; the rows of each batch that was run."""
    with blocks_of(ONE_BLOCK):
        return [batch.rows.tolist() for batch in fill(path, plan, batch_tokens=16, **kwargs)]


@pytest.fixture
def whole(tmp_path: Path, plan: Plan, dtype: str) -> tuple[bytes, list[list[int]]]:
    batches = go_on(tmp_path / "whole.h5", plan, dtype=dtype)
    return (tmp_path / "whole.h5").read_bytes(), batches


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_stopped_build_runs_only_the_batches_that_it_lacks(
    tmp_path: Path, plan: Plan, dtype: str, whole: tuple[bytes, list[list[int]]], n: int
) -> None:
    path, (expected, batches) = tmp_path / "a.h5", whole
    stop(path, plan, n, dtype=dtype)
    assert not journal(path).any(), "its only block is not done"
    assert go_on(path, plan, dtype=dtype) == batches[n:]
    assert path.read_bytes() == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5", "whole.h5"]


def test_stopped_again_and_again(tmp_path: Path, plan: Plan) -> None:
    path, batches = tmp_path / "a.h5", go_on(tmp_path / "whole.h5", plan)
    for _ in batches[1:]:
        stop(path, plan, 1)
    assert go_on(path, plan) == batches[-1:]
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_tokens_left_count_batches(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "a.h5"
    stop(path, plan, 4)
    with blocks_of(ONE_BLOCK), BankWriter.create(path, plan, make_record(plan), batch_tokens=16) as resumed:
        assert resumed.tokens_left == sum(batch.n_tokens for batch in resumed.batches()) < resumed.tokens_to_run


def test_a_row_counts_when_every_hook_name_has_it(tmp_path: Path, plan: Plan) -> None:
    path, acts = tmp_path / "a.h5", activations(plan)
    batches = go_on(tmp_path / "whole.h5", plan)
    with blocks_of(ONE_BLOCK), BankWriter.create(path, plan, make_record(plan), batch_tokens=16) as begun:
        first, second, third = [batch for _, batch in zip(range(3), begun.batches(), strict=False)]
        give(begun, first, acts)
        give(begun, second, acts, (HOOK_A,))
        give(begun, third, acts, (HOOK_B,))
    assert go_on(path, plan) == batches[1:]
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()


_CHILD = """
import sys, time
from pathlib import Path
from support.banks import activations, blocks_of, give, make_record, make_rows
from tl_latentlens.bank import writer as writer_module
writer_module.SAVE_SECONDS = 0
plan, path = make_rows(), Path(sys.argv[1])
acts = activations(plan)
with blocks_of(1000), writer_module.BankWriter.create(path, plan, make_record(plan), batch_tokens=16) as writer:
    for batch in writer.batches():
        give(writer, batch, acts)
        print(batch.rows[0], flush=True)
        time.sleep(0.1)
"""


def test_a_killed_build_keeps_what_was_saved(tmp_path: Path, plan: Plan) -> None:
    path, batches = tmp_path / "a.h5", go_on(tmp_path / "whole.h5", plan)
    with subprocess.Popen([sys.executable, "-c", _CHILD, path], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        given = sum(1 for _ in zip(range(4), child.stdout, strict=False))
        child.kill()
    assert (child.returncode, given) == (-signal.SIGKILL, 4)
    left = go_on(path, plan)
    assert len(batches) - 4 <= len(left) <= len(batches) - 2  # the last one may not be saved, and the next one may be
    assert left == batches[len(batches) - len(left) :]
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_rows_are_saved_while_the_build_runs_and_written_once(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0)
    n_written, pwrite = 0, partial_file.os.pwrite

    def counted(descriptor: int, data: Any, offset: int) -> int:
        nonlocal n_written
        n_written += len(data)
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(partial_file.os, "pwrite", counted)
    path, acts = tmp_path / "a.h5", activations(plan)
    with blocks_of(ONE_BLOCK), BankWriter.create(path, plan, make_record(plan), batch_tokens=16) as writing:
        for batch in writing.batches():
            saved = len(json.loads(record_path(path).read_text())) if record_path(path).exists() else 0
            give(writing, batch, acts)
        with at_most(20):
            while not journal(path).all():
                pass
        rows = plan.n_rows * (sum(WIDTHS.values()) * 2 + len(WIDTHS) * 4)
        assert saved == 1
        assert n_written == rows + len(WIDTHS) * 8 + 1, "vectors and norms, checksums, the journal"
    assert not record_path(path).exists()


def cut(path: Path) -> None:
    text = record_path(path).read_text()
    record_path(path).write_text(text[: len(text) // 2])


def other_block(path: Path) -> None:
    saved = json.loads(record_path(path).read_text())
    record_path(path).write_text(json.dumps([[7, *rest] for _, *rest in saved]))


def more_rows(path: Path) -> None:
    saved = json.loads(record_path(path).read_text())
    record_path(path).write_text(json.dumps([[block, [[0, 10**6]], checksum] for block, _, checksum in saved]))


def rows_twice(path: Path) -> None:
    saved = json.loads(record_path(path).read_text())
    record_path(path).write_text(json.dumps([[block, runs + runs, checksum] for block, runs, checksum in saved]))


def no_list(path: Path) -> None:
    record_path(path).write_text('{"block": 0}')


def other_rows(path: Path) -> None:
    """A bit of a saved vector is not as it was written."""
    with partial_path(path).open("r+b") as file:
        data = bytearray(file.read())
        saved = activations(make_rows())[HOOK_A]
        unit = (saved / np.linalg.norm(saved, axis=1, keepdims=True)).astype(np.float16)
        runs = json.loads(record_path(path).read_text())[0][1]
        at = data.index(unit[runs[0][0]].tobytes())
        data[at] ^= 1
        file.seek(0)
        file.write(data)


@pytest.mark.parametrize("damage", [cut, other_block, more_rows, rows_twice, no_list, other_rows])
def test_a_record_that_does_not_fit_is_ignored(tmp_path: Path, plan: Plan, damage: Any) -> None:
    path, batches = tmp_path / "a.h5", go_on(tmp_path / "whole.h5", plan)
    stop(path, plan, 3)
    damage(path)
    assert go_on(path, plan) == batches
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert not record_path(path).exists()


def test_the_record_of_a_deleted_build_is_not_read(tmp_path: Path, plan: Plan) -> None:
    path, batches = tmp_path / "a.h5", go_on(tmp_path / "whole.h5", plan)
    stop(path, plan, 3)
    partial_path(path).unlink()
    assert go_on(path, plan) == batches
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5", "whole.h5"]
