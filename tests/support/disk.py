"""Disks that fail: errors of the system, limits on the size of files, and what the messages say of them."""

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.banks import activations, fill, give, journal, make_record, make_rows
from tl_latentlens.bank import partial_file as partial_module
from tl_latentlens.bank.writer import BankWriter

PLAN = make_rows(12)
LOWER_LIMIT = r"(; a limit on file sizes \(ulimit -f\) is lower)?"
NO_SPACE = rf"^no space for {{}}: it needs ([\d,]+) bytes and (.+) has ([\d,]+) free \({{}}{LOWER_LIMIT}\)$"
FAILED = r"^writing .+/a\.h5\.partial failed: .*{}.*; finished blocks are kept, the same call goes on with the rest$"


def failing(error: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    return fail


def say(text: object) -> None:
    sys.stdout.write(f"{text}\n")


def limited(size: int) -> None:
    """From here on a longer file is 'File too large', as on a full disk, to this process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def build(folder: Path) -> None:
    with BankWriter.create(folder / "a.h5", PLAN, make_record(PLAN), batch_tokens=16) as writer:
        for batch in writer.batches():
            give(writer, batch, activations(PLAN))


def number(text: str) -> int:
    return int(text.replace(",", ""))


def check_goes_on(path: Path, whole: bytes) -> None:
    """The same call runs the blocks that the journal lacks, and ends with the file of an undisturbed build."""
    done = journal(path)
    assert {batch.block for batch in fill(path, PLAN, batch_tokens=16)} == set((~done).nonzero()[0].tolist())
    assert path.read_bytes() == whole
    assert [p.name for p in path.parent.iterdir()] == ["a.h5"]


@contextmanager
def breaking(call: str, n: int, error: int) -> Iterator[list[int]]:
    """After n calls, this call of the writer fails for good."""
    owner, name = (partial_module, "_fdatasync") if call == "sync" else (partial_module.os, call)
    before, calls = getattr(owner, name), []

    def count(*arguments: Any) -> Any:
        calls.append(len(calls))
        if len(calls) > n:
            raise OSError(error, os.strerror(error))
        return before(*arguments)

    setattr(owner, name, count)
    try:
        yield calls
    finally:
        setattr(owner, name, before)


def whole_file(folder: Path, whole: bytes) -> Path:
    (folder / "whole.h5").write_bytes(whole)
    return folder / "whole.h5"
