"""Builds killed at random moments: each goes on where it was, and ends as the very file of a build that nobody stopped.

    python tests/torture.py --kills 200 --seed 0

Every build is a forked child; SIGKILL ends it in a phase of `build_bank` drawn at random, and the same call follows until
one is left alone. Where a phase computes, the kill comes after a random share of its usual time. Where it writes, it is over
too soon for that: the child halts before a random one of its system calls, of which writes are cut into parts, and is killed
there. The seed decides all of this, yet not what the child's other thread has done by then, nor how punctual the machine is:
equal seeds kill at like moments, not at the same ones.

A killed process leaves to the system what it has written: power cuts, which lose that too, are not played here.
"""

import fcntl
import json
import os
import random
import select
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, wraps
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

# No threads but the main one: a forked child has no other.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import tl_latentlens as tll
from tl_latentlens.bank import build as build_module
from tl_latentlens.bank import create as create_module
from tl_latentlens.bank import lock as lock_module
from tl_latentlens.bank import partial_file as partial_module
from tl_latentlens.bank import writer as writer_module
from tl_latentlens.bank.datasets import JOURNAL
from tl_latentlens.bank.file import BankFile
from tl_latentlens.bank.partial_file import PartialFile
from tl_latentlens.bank.writer import BankWriter

HOOK_NAMES = ["blocks.0.hook_resid_post", "blocks.3.attn.hook_z", "blocks.5.hook_resid_post"]
BATCH_TOKENS, BLOCK_BATCHES = 128, 2
PATIENCE = 120.0  # seconds for one build
LONGEST_HALT = 0.05  # seconds in which the thread that did not halt goes on
# The queue holds two batches, one of an earlier batch is being stored, and one runs: older ones are in their blocks.
IN_FLIGHT = 4

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
class Aim:
    """Which moment to kill at.

    Attributes:
        phase: One of `PHASES`.
        entry: Which of the entries into it that the build is to make, in [0, 1): from the first to the last.
        share: How far into it, in [0, 1): of its usual time, or of its system calls.
        halt: Seconds between the halt at a system call and the kill.
        again: Kill a build that was killed before, rather than a new one.
    """

    phase: str
    entry: float
    share: float
    halt: float
    again: bool


@dataclass(frozen=True)
class Target:
    """The same in numbers.

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


@dataclass(frozen=True)
class Kill:
    """What came of one aim.

    Attributes:
        build: Number of the build.
        nth: How often this build had been killed before.
        aim: What it was to hit.
        late: The build had ended before.
        inside: The phase had not ended.
        n_done: Blocks in the journal after the kill; None where no `.partial` is there (or none any more).
        n_lost: Blocks that this run had begun and that are not in the journal.
        resumed: The next call went on from there.
        identical: The build's file came out as that of an uninterrupted one.
    """

    build: int
    nth: int
    aim: Aim
    late: bool
    inside: bool
    n_done: int | None
    n_lost: int
    resumed: bool = False
    identical: bool = False


@dataclass(frozen=True)
class Outcome:
    """The kills of a run, and all that was wrong, one line each."""

    kills: list[Kill]
    problems: list[str]
    n_blocks: int

    @property
    def landed(self) -> list[Kill]:
        """Those that ended a build before it ended itself."""
        return [kill for kill in self.kills if not kill.late]


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


class Reference:
    """The file of an uninterrupted build, and how often its phases are entered, how long they take and what they call."""

    def __init__(self, corpus: Corpus, folder: Path) -> None:
        path = folder / "reference" / "bank.h5"
        path.parent.mkdir()
        run = corpus.build(path)
        if run.error or not path.exists():
            raise RuntimeError(f"a build that nobody stopped failed: {run.error}")
        self.entries = Counter(event.phase for event in run.events if event.kind == "enter")
        self.points = Counter(event.phase for event in run.events if event.kind == "point")
        if never := [phase for phase in PHASES if not self.entries[phase]]:
            raise RuntimeError(f"no build enters {never}: the library has changed, and SEAMS has to follow it")
        self.seconds = {phase: run.seconds_in(phase) for phase in PHASES}
        self.data = path.read_bytes()
        self.file = BankFile(path)

    @cached_property
    def n_blocks(self) -> int:
        """Blocks of the bank."""
        return len(self.file.blocks())

    def journal(self, data: bytes) -> set[int]:
        """The blocks that are done in a `.partial`, whose datasets stand where they do in the finished file."""
        place = self.file.head.datasets[JOURNAL]
        return {block for block, done in enumerate(data[place.offset : place.offset + place.n_bytes]) if done}

    def differs(self, data: bytes, block: int) -> bool:
        """True where a block's vectors, norms or checksum in a `.partial` are not those of the reference."""
        first, last = self.file.blocks()[block]
        for name, width in self.file.widths.items():
            for kind, begin, end in (
                ("vectors", 2 * width * first, 2 * width * last),
                ("norms", 4 * first, 4 * last),
                ("checksums", 8 * block, 8 * block + 8),
            ):
                offset = self.file.head.datasets[f"hooks/{name}/{kind}"].offset
                if data[offset + begin : offset + end] != self.data[offset + begin : offset + end]:
                    return True
        return False


@dataclass
class Build:
    """One bank, killed as often as it is told, then completed; what is wrong gathers in `problems`."""

    corpus: Corpus
    reference: Reference
    path: Path
    number: int
    kills: list[Kill] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    done: set[int] = field(default_factory=set)
    ended: bool = False

    @property
    def partial(self) -> Path:
        """Where the bank is built."""
        return self.path.with_name(self.path.name + ".partial")

    def entries_to_come(self, phase: str) -> int:
        """How often the next call will enter a phase; never where the bank is there."""
        if phase in ("model", "block", "journal"):
            return round(self.reference.entries[phase] * (1 - len(self.done) / self.reference.n_blocks))
        if self.path.exists() or (phase == "creation" and self.partial.exists()):
            return 0
        return self.reference.entries[phase]

    def kill(self, aim: Aim) -> bool:
        """Run the build up to an aim; False where it ended before, or failed."""
        number = int(aim.entry * self.entries_to_come(aim.phase))
        if aim.phase in TIMED:
            target = Target(aim.phase, number, None, aim.share * self.reference.seconds[aim.phase])
        else:
            target = Target(aim.phase, number, int(aim.share * self.reference.points[aim.phase]), aim.halt)
        run = self.corpus.build(self.path, target)
        self._check_call(run)
        if run.error:
            return False
        late = not run.killed
        if not late:
            self._check_killed(run)
        inside = not late and ("leave", aim.phase, number) not in [event.mark for event in run.events]
        lost = set(run.batch_blocks) - self.done
        n_done = len(self.done) if self.partial.exists() else None
        self.kills.append(Kill(self.number, len(self.kills), aim, late, inside, n_done, 0 if late else len(lost)))
        if late:
            self._check_ended(run)
        return not late

    def complete(self) -> None:
        """Let the build end, if it has not, and check the file."""
        if not self.ended and not self.problems:
            run = self.corpus.build(self.path)
            self._check_call(run)
            if not run.error:
                self._check_ended(run)
        identical = not self.problems
        self.kills = [replace(kill, identical=identical) for kill in self.kills]

    def _check_call(self, run: Run) -> None:
        """A call runs only the blocks that were not done, and fails never."""
        if run.error:
            self._wrong(f"the call failed:\n{run.error}")
        elif self.kills:
            self.kills[-1] = replace(self.kills[-1], resumed=True)
        if again := set(run.batch_blocks) & self.done:
            self._wrong(f"blocks {sorted(again)} were done and ran again")

    def _check_killed(self, run: Run) -> None:
        """What a kill left: a finished file, or a `.partial` whose journal is true and lacks only what was in flight."""
        names = {path.name.removeprefix(self.path.name) for path in self.path.parent.iterdir()}
        if (
            names - {"", ".partial", ".partial.new", ".lock"}
            or {"", ".partial"} <= names
            or {".partial", ".partial.new"} <= names
        ):
            self._wrong(f"the kill left {sorted(self.path.name + name for name in names)}")
        if self.path.exists():
            self.done = set(range(self.reference.n_blocks))
            if self.path.read_bytes() != self.reference.data:
                self._wrong(f"{self.path.name} is there after the kill and is not whole")
        data = self.partial.read_bytes() if self.partial.exists() else b""
        if data:
            before, self.done = self.done, self.reference.journal(data)
            if before - self.done:
                self._wrong(f"the journal lost blocks {sorted(before - self.done)}")
            if false := [block for block in sorted(self.done) if self.reference.differs(data, block)]:
                self._wrong(f"the journal has blocks {false}, whose bytes are not there")
        if old := set(run.batch_blocks[:-IN_FLIGHT]) - set(run.batch_blocks[-IN_FLIGHT:]) - self.done:
            self._wrong(f"blocks {sorted(old)} are lost, though {IN_FLIGHT} batches were begun since")

    def _check_ended(self, run: Run) -> None:
        """A call that was left alone: one file, the reference's, and every block that was not done has run."""
        self.ended = True
        if missing := set(range(self.reference.n_blocks)) - self.done - set(run.batch_blocks):
            self._wrong(f"blocks {sorted(missing)} were not done and did not run")
        names = sorted(path.name for path in self.path.parent.iterdir())
        if names != [self.path.name]:
            self._wrong(f"the build ended and left {names}")
        elif (data := self.path.read_bytes()) != self.reference.data:
            at = next((i for i, pair in enumerate(zip(data, self.reference.data, strict=False)) if pair[0] != pair[1]), None)
            self._wrong(f"the file differs from an uninterrupted build's at byte {at} of {len(data)}")

    def _wrong(self, what: str) -> None:
        history = ", ".join(f"{kill.aim.phase} ({kill.aim.entry:.2f}, {kill.aim.share:.2f})" for kill in self.kills) or "none"
        self.problems.append(f"build {self.number}, killed so far: {history}; {what}")


def draw_aims(seed: int) -> Iterator[Aim]:
    """Every phase in a random order, "anywhere" three times; then all of them again, …"""
    rng = random.Random(seed)
    deck = [*PHASES, "anywhere", "anywhere"]
    while True:
        for phase in rng.sample(deck, len(deck)):
            yield Aim(phase, rng.random(), rng.random(), LONGEST_HALT * rng.random(), rng.random() < 0.6)


def kills_of(n_kills: int, seed: int, folder: Path, *, n_texts: int = 300, progress: bool = False) -> Outcome:
    """Kill builds so many times, one after another, and complete each.

    Args:
        n_kills: Kills that end a build; those that come too late are tried again.
        seed: Decides the aims.
        folder: An empty one to build in; what went wrong stays there.
        n_texts: Of the demo corpus, from its start.
        progress: Show a progress bar.
    """
    corpus = Corpus(n_texts)
    reference = Reference(corpus, folder)
    aims = list(islice(draw_aims(seed), n_kills))[::-1]
    chance = random.Random(seed)
    kills, problems, number = [], [], 0
    with tqdm(total=n_kills, unit=" kills", disable=not progress) as bar:
        while aims and len(kills) < 4 * n_kills + 20:
            number += 1
            build = Build(corpus, reference, folder / f"build{number:04}" / "bank.h5", number)
            build.path.parent.mkdir()
            while not build.ended and not build.problems and aims and build.entries_to_come(aims[-1].phase):
                if build.kills and not aims[-1].again:
                    break
                if build.kill(aims[-1]):
                    aims.pop()
                    bar.update()
                else:
                    aims[-1] = replace(aims[-1], share=chance.random())
            build.complete()
            kills += build.kills
            problems += build.problems
            if not build.problems:
                shutil.rmtree(build.path.parent)
    if aims:
        problems.append(f"{len(aims)} aims were missed again and again, the first {aims[-1]}")
    return Outcome(kills, problems, reference.n_blocks)


def table_of(outcome: Outcome, seed: int, seconds: float) -> Table:
    """One line a phase, and their sum."""
    n_builds = len({kill.build for kill in outcome.kills})
    table = Table(
        title=f"{len(outcome.landed)} kills of {n_builds} builds of {outcome.n_blocks} blocks, seed {seed}, {seconds:.0f} s"
    )
    table.add_column("phase")
    for name in ("kills", "inside it", "too late", "blocks done", "most lost", "resumed", "identical"):
        table.add_column(name, justify="right")
    for phase in (*PHASES, "all"):
        of_phase = [kill for kill in outcome.kills if phase in ("all", kill.aim.phase)]
        landed = [kill for kill in of_phase if not kill.late]
        done = [kill.n_done for kill in landed if kill.n_done is not None]
        if phase == "all":
            table.add_section()
        table.add_row(
            phase,
            str(len(landed)),
            str(sum(kill.inside for kill in landed)),
            str(len(of_phase) - len(landed)),
            f"{min(done)}–{max(done)}" if done else "",
            str(max((kill.n_lost for kill in landed), default="")),
            str(sum(kill.resumed for kill in landed)),
            str(sum(kill.identical for kill in landed)),
        )
    return table


def main(
    kills: Annotated[int, typer.Option(help="Kills to make.")] = 200,
    seed: Annotated[int, typer.Option(help="Decides where they are aimed.")] = 0,
    texts: Annotated[int, typer.Option(help="Texts of the demo corpus.")] = 300,
    folder: Annotated[Path | None, typer.Option(help="Build here and keep what went wrong; default: a temporary one.")] = None,
    record: Annotated[Path | None, typer.Option(help="Write each kill to this JSON file.")] = None,
) -> None:
    """Kill builds at random moments and check that each ends as the file of an uninterrupted build."""
    begun = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 120)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary) if folder is None else folder
        work.mkdir(parents=True, exist_ok=True)
        if any(work.iterdir()):
            raise typer.BadParameter(f"{work} is not empty")
        outcome = kills_of(kills, seed, work, n_texts=texts, progress=True)
    if record is not None:
        record.write_text(json.dumps(asdict(outcome), indent=1))
    console.print(table_of(outcome, seed, time.monotonic() - begun))
    for problem in outcome.problems[:20]:
        console.print(f"WRONG: {problem}", markup=False, highlight=False)
    if outcome.problems:
        console.print(f"{len(outcome.problems)} things went wrong", style="bold red")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
