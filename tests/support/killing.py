"""Builds in forked children that report what they do and are killed there: the phases, the reporter, one run."""

import fcntl
import os
import select
import signal
import struct
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

# No threads but the main one: a forked child has no other.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import torch
from tqdm import tqdm

import tl_latentlens as tll
from tl_latentlens.bank import build as build_module
from tl_latentlens.bank import create as create_module
from tl_latentlens.bank import lock as lock_module
from tl_latentlens.bank import partial_file as partial_module
from tl_latentlens.bank import writer as writer_module
from tl_latentlens.bank.datasets import JOURNAL
from tl_latentlens.bank.partial_file import PartialFile
from tl_latentlens.bank.writer import BankWriter

HOOK_NAMES = ["blocks.0.hook_resid_post", "blocks.3.attn.hook_z", "blocks.5.hook_resid_post"]
BATCH_TOKENS, BLOCK_BATCHES = 128, 2
PATIENCE = 120.0  # seconds for one build
LONGEST_HALT = 0.05  # seconds in which the thread that did not halt goes on
# Phase, what enters it, and, where not each call does, which calls do. A phase within a phase is not counted to the outer.
SEAMS: list[tuple[str, Any, str, Callable[..., bool]]] = [
    ("anywhere", tll, "build_bank", lambda *_, **__: True),
    ("lock", lock_module, "_acquire", lambda *_: True),
    ("planning", build_module, "plan_corpus", lambda *_, **__: True),
    ("fingerprint", build_module, "record_model", lambda *_: True),
    ("creation", writer_module, "create_partial", lambda *_: True),
    ("model", build_module, "run_hooked", lambda *_: True),
    ("block", PartialFile, "write_block", lambda *_: True),
    ("journal", PartialFile, "_write_array", lambda _, dataset, *__: dataset == JOURNAL),
    ("verification", PartialFile, "_require_blocks", lambda *_: True),
    ("moments", partial_module, "mean_and_std", lambda *_: True),
    ("head, copy 2", PartialFile, "_write_at", lambda partial, offset, _: 0 < offset < partial.file.head.size),
    ("head, copy 1", PartialFile, "_write_at", lambda _, offset, __: offset == 0),
    ("rename", Path, "rename", lambda _, target: Path(target).suffix == ".h5"),
    ("folder", partial_module, "_sync_folder", lambda *_: True),
    ("unlock", Path, "unlink", lambda path, **_: path.suffix == ".lock"),
]
PHASES = [seam[0] for seam in SEAMS]
TIMED = {"anywhere", "planning", "fingerprint", "model", "verification", "moments"}  # those that compute
SYSTEM_CALLS = [
    *((os, name) for name in ("open", "write", "ftruncate", "pwrite", "fsync", "posix_fallocate") if hasattr(os, name)),
    (partial_module, "_fdatasync"),
    (fcntl, "flock"),
    (Path, "rename"),
    (Path, "unlink"),
    (create_module._HDF5Target, "write"),
]


@dataclass(frozen=True)
class Target:
    """A moment to kill at, in numbers.

    Attributes:
        phase: One of `PHASES`.
        number: Which entry into it.
        point: Before which of its system calls; None where the phase is timed.
        seconds: How long after that point, or after the entry.
    """

    phase: str
    number: int
    point: int | None
    seconds: float


class Event(NamedTuple):
    """What a child reports.

    Attributes:
        kind: "enter" or "leave" of a phase, "point" before each of its system calls and at its end, "batch" begun.
        phase: One of `PHASES`; of a batch, the one that follows.
        number: Which entry into the phase, or the batch's block.
        seconds: When, on the clock that all processes share.
    """

    kind: str
    phase: str
    number: int
    seconds: float

    @property
    def mark(self) -> tuple[str, str, int]:
        """The event without its time."""
        return self[:3]


class Reporter:
    """In the child: reports through a pipe what the build does, and halts it at the target.

    Without a target it reports the points of the first entry into each phase, from which targets are chosen.
    """

    _record = struct.Struct("<BBId")
    _kinds = ("enter", "leave", "point", "batch")

    def __init__(self, pipe: int, target: Target | None) -> None:
        self._pipe = pipe
        self._target = target
        self._write = os.write  # the system's own
        self._entered: Counter[str] = Counter()
        self._n_points = 0
        self._open = threading.local()

    def install(self) -> None:
        """Wrap the library's functions, for good: the child ends with the build."""
        for owner, name in SYSTEM_CALLS:
            self._watch_call(owner, name)
        for phase, owner, name, counts in SEAMS:
            self._watch_phase(phase, owner, name, counts)
        batches = BankWriter.batches

        def reported(writer: BankWriter, *args: Any) -> Iterator[Any]:
            for batch in batches(writer, *args):
                self._tell("batch", "model", batch.block)
                yield batch

        BankWriter.batches = reported

    def _watch_call(self, owner: Any, name: str) -> None:
        call = getattr(owner, name)

        @wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._pass_point() and name == "pwrite":
                file, data, offset = args
                return call(file, data[: max(256, len(data) // 4)], offset)  # the system may write a part
            return call(*args, **kwargs)

        setattr(owner, name, watched)

    def _watch_phase(self, phase: str, owner: Any, name: str, counts: Callable[..., bool]) -> None:
        call = getattr(owner, name)

        @wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not counts(*args, **kwargs):
                return call(*args, **kwargs)
            outer, now = getattr(self._open, "phase", None), (phase, self._entered[phase])
            self._open.phase = now
            self._entered[phase] += 1
            self._tell("enter", *now)
            try:
                result = call(*args, **kwargs)
                self._pass_point(last=True)
                return result
            finally:
                self._tell("leave", *now)
                self._open.phase = outer

        setattr(owner, name, watched)

    def _pass_point(self, *, last: bool = False) -> bool:
        """Where the thread is in the entry that is looked at, say so or halt, and be True."""
        phase, number = getattr(self._open, "phase", None) or ("anywhere", 0)
        target = self._target
        if phase in TIMED or (number if target is None else (phase, number) != (target.phase, target.number)):
            return False
        if target is None:
            self._tell("point", phase, number)
        elif self._n_points == target.point or last:
            self._tell("point", phase, number)
            time.sleep(PATIENCE)
        self._n_points += 1
        return True

    def _tell(self, kind: str, phase: str, number: int) -> None:
        record = self._record.pack(self._kinds.index(kind), PHASES.index(phase), number, time.monotonic())
        self._write(self._pipe, record)

    @classmethod
    def read(cls, pipe: int, until: float) -> list[Event] | None:
        """In the parent: the events that came since; [] where the child has ended, None where none came by `until`."""
        if not select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
            return None
        data = os.read(pipe, 512 * cls._record.size)  # whole records: each is written at once
        records = cls._record.iter_unpack(data)
        return [Event(cls._kinds[kind], PHASES[phase], number, seconds) for kind, phase, number, seconds in records]


@dataclass(frozen=True)
class Run:
    """One child: what it reported, and whether it was killed.

    Attributes:
        events: In order.
        killed: SIGKILL ended it.
        error: What it printed where it ended with an error; else empty.
    """

    events: list[Event]
    killed: bool
    error: str

    @property
    def batch_blocks(self) -> list[int]:
        """The block of each batch that it began."""
        return [event.number for event in self.events if event.kind == "batch"]

    def seconds_in(self, phase: str) -> float:
        """How long the first entry of a phase took."""
        entered, left = (
            next(event.seconds for event in self.events if event.mark == (kind, phase, 0)) for kind in ("enter", "leave")
        )
        return left - entered


class Corpus:
    """The model, the texts and the settings of every build."""

    def __init__(self, n_texts: int) -> None:
        torch.set_num_threads(1)
        tqdm.monitor_interval = 0  # a thread would be lost in the children
        create_module.BATCHES_PER_BLOCK = BLOCK_BATCHES
        self.model = tll.load_demo_model()
        self.texts = list(tll.load_corpus("demo", limit=n_texts))
        tll.record_model(self.model, tll.plan_corpus(self.model, self.texts[:8]), HOOK_NAMES)  # what starts slowly has started

    def build(self, path: Path, target: Target | None = None) -> Run:
        """Call `build_bank` in a child, and kill it at the target or let it end.

        Args:
            path: Of the bank.
            target: Where to kill; None: nowhere.
        """
        reading, writing = os.pipe()
        log = path.parent.with_suffix(".log")
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            self._child(path, log, Reporter(writing, target))
        os.close(writing)
        until = time.monotonic() + PATIENCE
        events: list[Event] = []
        try:
            while some := Reporter.read(reading, until):
                events += some
                if target is None:
                    continue
                mark = ("enter" if target.point is None else "point", target.phase, target.number)
                if hits := [event.seconds for event in some if event.mark == mark]:
                    time.sleep(max(0.0, hits[0] + target.seconds - time.monotonic()))
                    break
        finally:
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
        while more := Reporter.read(reading, until):
            events += more
        os.close(reading)
        if some is None:
            return Run(events, True, f"it was not done after {PATIENCE:.0f} s; the last it did was {events[-1:]}")
        code = os.waitstatus_to_exitcode(status)  # negative: the signal that ended it
        printed = log.read_text(errors="replace").strip()[-2000:] if log.exists() else ""
        return Run(events, code == -signal.SIGKILL, "" if code in (0, -signal.SIGKILL) else f"exit code {code}\n{printed}")

    def _child(self, path: Path, log: Path, reporter: Reporter) -> None:
        code = 1
        try:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            reporter.install()
            tll.build_bank(
                self.model, self.texts, path, hook_names=HOOK_NAMES, batch_tokens=BATCH_TOKENS, progress=False
            ).close()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
