"""Builds killed at random moments: each goes on where it was, and ends as the very file of a build that nobody stopped.

    PYTHONPATH=tests python tests/attacks/torture.py --kills 200 --seed 0

Every build is a forked child; SIGKILL ends it in a phase of `build_bank` drawn at random, and the same call follows until
one is left alone. Where a phase computes, the kill comes after a random share of its usual time. Where it writes, it is over
too soon for that: the child halts before a random one of its system calls, of which writes are cut into parts, and is killed
there. The seed decides all of this, yet not what the child's other thread has done by then, nor how punctual the machine is:
equal seeds kill at like moments, not at the same ones.

A killed process leaves to the system what it has written: power cuts, which lose that too, are not played here.
"""

import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from support.killing import LONGEST_HALT, PHASES, TIMED, Corpus, Run, Target
from tqdm import tqdm

from tl_latentlens.bank.datasets import JOURNAL
from tl_latentlens.bank.file import BankFile

# The queue holds two batches, one of an earlier batch is being stored, and one runs: older ones are in their blocks.
IN_FLIGHT = 4


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
