"""Builds under a limit on the size of files, each in a fork of one process: `python -m support.limited_builds FOLDER`."""

import errno
import gc
import json
import os
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import tl_latentlens as tll
from support.banks import StopBuildError, blocks_of, fill, make_record
from support.disk import (
    PLAN,
    breaking,
    build,
    limited,
    say,
)
from tl_latentlens.bank import build as build_module
from tl_latentlens.bank.format import partial_path
from tl_latentlens.bank.head import read_head
from tl_latentlens.bank.writer import BankWriter
from tl_latentlens.corpus.plan import make_plan, prompts_from_lists
from tl_latentlens.errors import BankError


class Sizes(NamedTuple):
    """Where things stand in the finished file."""

    block: int
    vectors: int
    vectors_end: int
    size: int


LIMITS: dict[str, Callable[[Sizes], int]] = {
    "nothing": lambda at: 0,
    "100 bytes": lambda at: 100,
    "one byte short of the user block": lambda at: at.block - 1,
    "the user block": lambda at: at.block,
    "the HDF5 superblock": lambda at: at.block + 50,
    "some of the HDF5 metadata": lambda at: (at.block + at.vectors) // 2,
    "some of the vectors": lambda at: (at.vectors + at.vectors_end) // 2,
    "one byte too few": lambda at: at.size - 1,
    "enough": lambda at: at.size + 32_000,  # what is asked for holds some bytes to spare for each dataset
}


def case_create(folder: Path, at: Sizes) -> None:
    for name, limit in LIMITS.items():
        (folder / name).mkdir()
        limited(limit(at))
        try:
            build(folder / name)
        except BankError as error:
            say(error)
        limited(resource.RLIM_INFINITY)


def case_resume(folder: Path, at: Sizes) -> None:
    for name, limit in LIMITS.items():
        (folder / name).mkdir()
        with suppress(StopBuildError):
            fill(folder / name / "a.h5", PLAN, batch_tokens=16, stop_after=3)
        limited(limit(at))
        try:
            build(folder / name)
        except BankError as error:
            say(error)
        limited(resource.RLIM_INFINITY)


def case_create_unreserved(folder: Path, at: Sizes) -> None:
    """No space can be reserved, so that it is HDF5 which meets the limit."""
    vars(os).pop("posix_fallocate", None)
    case_create(folder, at)


def case_uncaught(folder: Path, at: Sizes) -> None:
    vars(os).pop("posix_fallocate", None)
    limited((at.block + at.vectors) // 2)
    build(folder)


def case_much_metadata(folder: Path, at: Sizes) -> None:
    """More than HDF5 keeps in memory: it reads back what it could not write."""
    vars(os).pop("posix_fallocate", None)
    plan = make_plan(prompts_from_lists([[1, 2, 3]]))
    record = make_record(plan, {f"blocks.{i}.hook_resid_post": 2 for i in range(800)})
    limited(1_000_000)
    try:
        BankWriter.create(folder / "a.h5", plan, record)
    except BankError as error:
        say(error)


def case_many_tokens(folder: Path, at: Sizes) -> None:
    """An array too long for HDF5's buffers, which it writes at once."""
    vars(os).pop("posix_fallocate", None)
    plan = make_plan(prompts_from_lists([[i % 100 for i in range(100_000)]]))
    for limit in (0, 10_000, 100_000, 400_000):
        limited(limit)
        try:
            BankWriter.create(folder / "a.h5", plan, make_record(plan))
        except BankError as error:
            say(error)


def case_errors_in_mid_run(folder: Path, at: Sizes) -> None:
    """The disk fails for good: at the first write, at a later one, and so on to the last; then at a sync."""
    for call, n_calls, step in (("pwrite", 200, 5), ("sync", 30, 1)):
        for n in range(0, n_calls, step):
            try:
                with breaking(call, n, errno.EIO):
                    fill(folder / "a.h5", PLAN, batch_tokens=16)
            except BankError:
                partial_path(folder / "a.h5").unlink()
                continue
            (folder / "a.h5").unlink()
            break
        else:
            say(f"{n_calls} calls of {call} were not enough")


CASES: dict[str, Callable[[Path, Sizes], None]] = {
    "create": case_create,
    "create, nothing reserved": case_create_unreserved,
    "resume": case_resume,
    "uncaught": case_uncaught,
    "much metadata": case_much_metadata,
    "many tokens": case_many_tokens,
    "errors in mid-run": case_errors_in_mid_run,
}


def serve(folder: Path) -> None:
    """Run each case in a fork of its own, which then ends as interpreters end; print what became of them as JSON."""
    (folder / "whole").mkdir()
    fill(folder / "whole" / "a.h5", PLAN, batch_tokens=16)
    with open(folder / "whole" / "a.h5", "rb") as file:
        head = read_head(file)
        vectors = head.datasets["hooks/blocks.0.hook_resid_post/vectors"]
        at = Sizes(head.size, vectors.offset, vectors.offset + vectors.n_bytes, file.seek(0, os.SEEK_END))
    ended = {}
    gc.freeze()  # what is there by now is not looked through again when each fork ends
    for name, case in CASES.items():
        home = folder / name
        home.mkdir()
        streams = [os.pipe(), os.pipe()]
        child = os.fork()
        if not child:
            for stream, (_, end) in enumerate(streams, 1):
                os.dup2(end, stream)
            case(home, at)
            return
        for _, end in streams:
            os.close(end)
        out, err = (os.fdopen(start).read() for start, _ in streams)
        ended[name] = {"home": str(home), "code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "out": out, "err": err}
    say(json.dumps(ended))


def build_within_a_limit(folder: Path) -> None:
    """Build a bank that is larger than a file may be, and print what came of it."""
    model = tll.load_demo_model()
    runs = []
    build_module.run_hooked = lambda *arguments: runs.append(arguments)
    limited(100_000)
    try:
        tll.build_bank(model, ["The river ran over its bank after the storm."] * 3, folder / "a.h5", progress=False)
    except BankError as error:
        say(error)
    say(f"{len(runs)} batches of the corpus were run")


if __name__ == "__main__":
    with blocks_of(1):
        serve(Path(sys.argv[1]))
