"""Builds that are stopped, killed, cut off from power and damaged in any order end as the file of an undisturbed build.

Every write of a build is taped, so that the file can be put back to what a kill or a power cut would have left of it.
"""

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from support.banks import NUMPY_DTYPES, TORCH_DTYPES, StopBuildError, activations, at_most, fill, give, make_record, make_rows

from tl_latentlens.bank import create as create_module
from tl_latentlens.bank import partial_file as partial_module
from tl_latentlens.bank.bank import Bank
from tl_latentlens.bank.batches import Batch
from tl_latentlens.bank.format import partial_path
from tl_latentlens.bank.head import DatasetPlace, read_head
from tl_latentlens.bank.writer import BankWriter
from tl_latentlens.errors import BankError
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.search.vectors import VectorSearch

PLAN = make_rows(16)
WIDTHS = {"blocks.0.hook_resid_post": 6, "blocks.1.attn.hook_z": 3, "blocks.1.hook_resid_post": 6}
ACTS = activations(PLAN, WIDTHS)
RECORD = make_record(PLAN, WIDTHS)
PAGE = 4096


# A tape of what a build does to its file


@dataclass(frozen=True)
class Write:
    """Bytes handed to the system, which are on the disk for certain after the next sync."""

    offset: int
    data: bytes


Event = Write | Literal["sync", "rename"]


@dataclass
class Tape:
    """The file before a build, and what the build did to it."""

    before: bytes
    events: list[Event] = field(default_factory=list)


@contextmanager
def taped(path: Path) -> Iterator[Tape]:
    """Tape the writes to `path`'s partial file; syncs reach no disk, which the tests do not need and saves their time.

    A partial file that the build creates comes into being as a whole: it is synced, then renamed.
    """
    partial, pwrite, rename = partial_path(path), os.pwrite, os.rename
    tape = Tape(partial.read_bytes() if partial.exists() else b"")
    image = bytearray(tape.before)

    def tape_write(descriptor: int, data: bytes | memoryview, offset: int) -> int:
        tape.events.append(Write(offset, bytes(data)))
        put(image, tape.events[-1])
        return pwrite(descriptor, data, offset)

    def tape_sync(descriptor: int) -> None:
        if image and stat.S_ISREG(os.fstat(descriptor).st_mode):
            there = os.pread(descriptor, len(image), 0)
            if there != image:  # something was written by other calls than pwrite
                differing = [i for i, (new, old) in enumerate(zip(there, image, strict=True)) if new != old]
                tape.events.append(Write(differing[0], there[differing[0] : differing[-1] + 1]))
                put(image, tape.events[-1])
        tape.events.append("sync")

    def tape_rename(old: Any, new: Any, **kwargs: Any) -> None:
        rename(old, new, **kwargs)
        if Path(new) == partial:
            assert tape.events == ["sync"]
            tape.before, tape.events[:] = partial.read_bytes(), []
            image[:] = tape.before
        elif Path(new) == path:
            tape.events.append("rename")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", tape_write)
        patch.setattr(os, "rename", tape_rename)
        patch.setattr(os, "fsync", tape_sync)
        patch.setattr(partial_module, "_fdatasync", tape_sync)
        yield tape


def left_by_kill(tape: Tape, at: int, torn: int = 0) -> bytes:
    """A process that ends leaves every write before: so many events, and so many bytes of the next one."""
    image = bytearray(tape.before)
    for event in tape.events[:at]:
        put(image, event)
    if at < len(tape.events) and isinstance(event := tape.events[at], Write):
        put(image, Write(event.offset, event.data[:torn]))
    return bytes(image)


def left_by_power_cut(tape: Tape, at: int, survives: Callable[[Write], list[Write]]) -> bytes:
    """A machine that ends leaves what was synced, and of the writes since then whatever `survives` says."""
    image = bytearray(tape.before)
    synced = max((i for i, event in enumerate(tape.events[:at]) if event == "sync"), default=0)
    for i, event in enumerate(tape.events[: at + 1]):
        for part in [event] if i < synced or not isinstance(event, Write) else survives(event):
            put(image, part)
    return bytes(image)


def put(image: bytearray, event: Event) -> None:
    if isinstance(event, Write):
        assert event.offset + len(event.data) <= len(image), "a build never makes its file longer"
        image[event.offset : event.offset + len(event.data)] = event.data


def pages(write: Write) -> list[Write]:
    """The parts of a write by the pages of the file that they lie in."""
    edges = [0, *range(PAGE - write.offset % PAGE, len(write.data), PAGE), len(write.data)]
    return [Write(write.offset + a, write.data[a:b]) for a, b in pairwise(edges)]


def renamed(tape: Tape, at: int) -> Literal["no", "perhaps", "yes"]:
    """Whether the file stands under its final name when the power goes."""
    if "rename" not in tape.events[:at]:
        return "no"
    return "yes" if "sync" in tape.events[tape.events.index("rename") : at] else "perhaps"


def moments(tape: Tape) -> st.SearchStrategy[int]:
    """Before any event; more often before one of the last, where a build has most to lose, or right before the rename."""
    n = len(tape.events)
    at = tape.events.index("rename") if "rename" in tape.events else n
    return st.one_of(st.integers(0, n), st.integers(max(0, n - 10), n), st.just(at))


# The file as it should be


@dataclass(frozen=True)
class Whole:
    """An undisturbed build: its bytes, and where things stand in them."""

    data: bytes
    places: dict[str, DatasetPlace]
    starts: list[int]
    batches: list[Batch]

    def blocks(self, image: bytes) -> set[int]:
        """The blocks that the journal of an unfinished file calls done."""
        at = self.places["journal"].offset
        return {block for block in range(len(self.starts) - 1) if image[at + block] == 1}

    def check_blocks(self, image: bytes) -> None:
        """What the journal calls done is on the disk, every byte of it."""
        for block in self.blocks(image):
            for name in WIDTHS:
                for part in ("vectors", "norms"):
                    place = self.places[f"hooks/{name}/{part}"]
                    row = place.n_bytes // place.shape[0]
                    span = slice(place.offset + row * self.starts[block], place.offset + row * self.starts[block + 1])
                    assert image[span] == self.data[span], f"block {block}: {name} {part}"
                at = self.places[f"hooks/{name}/checksums"].offset + 8 * block
                assert image[at : at + 8] == self.data[at : at + 8], f"block {block}: {name} checksums"


def build(path: Path, dtype: str = "float16", **kwargs: Any) -> list[Batch]:
    return fill(path, PLAN, acts=ACTS, record=RECORD, batch_tokens=16, dtype=dtype, **kwargs)


WHOLE: dict[str, Whole] = {}


def whole_of(dtype: str) -> Whole:
    if dtype not in WHOLE:
        with tempfile.TemporaryDirectory() as folder:
            batches = build(Path(folder) / "a.h5", dtype)
            with Bank.open(Path(folder) / "a.h5") as bank, (Path(folder) / "a.h5").open("rb") as file:
                starts = [first for first, _ in bank.blocks()] + [bank.n_rows]
                places = read_head(file).datasets
                file.seek(0)
                WHOLE[dtype] = Whole(file.read(), places, starts, batches)
    return WHOLE[dtype]


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(create_module, "BATCHES_PER_BLOCK", 1)
        yield


@pytest.fixture
def whole() -> Whole:
    return whole_of("float16")


def check_resumes(path: Path, image: bytes, whole: Whole) -> None:
    """From this partial file, the same call runs what the journal lacks and ends with the very bytes."""
    whole.check_blocks(image)
    partial_path(path).write_bytes(image)
    with taped(path):
        blocks = {batch.block for batch in build(path)}
    assert blocks == set(range(len(whole.starts) - 1)) - whole.blocks(image)
    assert path.read_bytes() == whole.data
    assert os.listdir(path.parent) == [path.name]
    path.unlink()


# Kills and power cuts, one by one


@pytest.fixture
def tape(tmp_path: Path, whole: Whole) -> Tape:
    with taped(tmp_path / "taped.h5") as tape:
        build(tmp_path / "taped.h5")
    assert (tmp_path / "taped.h5").read_bytes() == whole.data
    (tmp_path / "taped.h5").unlink()
    return tape


def test_tape_holds_every_change_to_the_file(tape: Tape, whole: Whole) -> None:
    assert left_by_kill(tape, len(tape.events)) == whole.data
    assert left_by_power_cut(tape, len(tape.events), lambda write: []) == whole.data
    assert renamed(tape, len(tape.events)) == "yes"
    assert len(whole.starts) > 4  # blocks and an end
    assert len(whole.data) == len(tape.before)


def test_kill_at_any_write_leaves_what_can_be_resumed(tmp_path: Path, tape: Tape, whole: Whole) -> None:
    for at, event in enumerate(tape.events[: tape.events.index("rename") + 1]):
        for torn in {0, 1, len(event.data) // 2, len(event.data) - 1} if isinstance(event, Write) else {0}:
            check_resumes(tmp_path / "a.h5", left_by_kill(tape, at, torn), whole)


@pytest.mark.parametrize("parts", ["all", "none", "begin", "end", "odd"])
def test_power_cut_at_any_write_leaves_what_can_be_resumed(tmp_path: Path, tape: Tape, whole: Whole, parts: str) -> None:
    """Of each write since the last sync: all is on the disk, nothing, its first bytes, its last ones; or every other write."""
    order = {id(event): i for i, event in enumerate(tape.events)}

    def survives(write: Write) -> list[Write]:
        half = len(write.data) // 2
        if parts == "begin":
            return [Write(write.offset, write.data[:half])]
        if parts == "end":
            return [Write(write.offset + half, write.data[half:])]
        return [write] if parts == "all" or (parts == "odd" and order[id(write)] % 2) else []

    for at in range(tape.events.index("rename") + 1):
        check_resumes(tmp_path / "a.h5", left_by_power_cut(tape, at, survives), whole)


def test_power_cut_within_a_head_leaves_what_can_be_resumed(tmp_path: Path, tape: Tape, whole: Whole) -> None:
    heads = [
        i for i, event in enumerate(tape.events) if isinstance(event, Write) and event.offset < len(event.data) * 2 <= 8192
    ]
    assert len(heads) == 2, "the head stands twice"
    for at in heads:
        head = tape.events[at]
        assert isinstance(head, Write)
        line = head.data.index(b"\n")
        flag = head.data.index(b"true")
        for cut in {1, 50, flag, flag + 1, flag + 4, 512, line - 1, line, line + 1, line + 9, line + 17, line + 18, 4095}:
            for survives in (
                lambda write, cut=cut: [Write(write.offset, write.data[:cut])],
                lambda write, cut=cut: [Write(write.offset + cut, write.data[cut:])],
            ):
                check_resumes(tmp_path / "a.h5", left_by_power_cut(tape, at, survives), whole)


@st.composite
def survivals(draw: st.DrawFn) -> Callable[[Write], list[Write]]:
    """Any part of any write: all of it, nothing, its first bytes, some of its pages."""

    def survives(write: Write) -> list[Write]:
        kind = draw(st.sampled_from(["all", "nothing", "bytes", "pages"]))
        if kind == "bytes":
            return [Write(write.offset, write.data[: draw(st.integers(0, len(write.data)))])]
        if kind == "pages":
            return [page for page in pages(write) if draw(st.booleans())]
        return [write] if kind == "all" else []

    return survives


@settings(
    deadline=None, max_examples=60, derandomize=True, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow]
)
@given(data=st.data(), n_cuts=st.integers(1, 3))
def test_power_cuts_one_after_the_other_end_in_the_same_file(data: st.DataObject, n_cuts: int) -> None:
    whole = whole_of("float16")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"
        for _ in range(n_cuts):
            with taped(path) as tape:
                build(path)
            assert path.read_bytes() == whole.data
            at = data.draw(moments(tape))
            image = left_by_power_cut(tape, at, data.draw(survivals()))
            stands = renamed(tape, at)
            if stands == "yes" or (stands == "perhaps" and data.draw(st.booleans())):
                assert image == whole.data
                return
            path.unlink()
            whole.check_blocks(image)
            partial_path(path).write_bytes(image)
        check_resumes(path, partial_path(path).read_bytes(), whole)


# Damage


def offsets(whole: Whole) -> st.SearchStrategy[int]:
    """Any byte of the file, or one near where something begins or ends."""
    size = len(whole.data)
    edges = {at for place in whole.places.values() for at in (place.offset, place.offset + place.n_bytes - 1)}
    edges |= {0, 60, 100, 4095, 4096, 4200, 8191, 8192, size - 1}
    return st.one_of(st.integers(0, size - 1), st.sampled_from(sorted(edges)))


def builds_though_damaged(path: Path, at: int, bit: int, dtype: str = "float16") -> bool:
    """A bit of the partial file is not as it was written: it is mended, or built again, or refused; never a wrong bank."""
    before = partial_path(path).read_bytes()
    damaged = bytearray(before)
    damaged[at] ^= 1 << bit
    partial_path(path).write_bytes(damaged)
    with taped(path):
        try:
            build(path, dtype)
            return True
        except BankError as error:
            said = str(error)
        if "the same call builds these blocks again" in said:
            build(path, dtype)
            return True
    assert said.startswith(f"{partial_path(path)}: ")
    # But for the first copy of the head, which may have been mended, the file is as it was.
    assert partial_path(path).read_bytes()[PAGE:] == damaged[PAGE:]
    assert os.listdir(path.parent) == [f"{path.name}.partial"]
    partial_path(path).write_bytes(before)
    return False


@settings(deadline=None, max_examples=80, derandomize=True, phases=[Phase.generate])
@given(data=st.data(), bit=st.integers(0, 7))
def test_damage_to_a_partial_file_is_mended_or_built_again_or_refused(data: st.DataObject, bit: int) -> None:
    whole = whole_of("float16")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"
        with taped(path) as tape:
            build(path)
        path.unlink()
        image = left_by_kill(tape, data.draw(moments(tape)))
        partial_path(path).write_bytes(image)
        if not builds_though_damaged(path, data.draw(offsets(whole)), bit):
            build(path)
        assert path.read_bytes() == whole.data


# Everything in any order


def stored_vectors(dtype: str) -> dict[str, np.ndarray]:
    """What a bank of `dtype` holds, in float64."""
    found = {}
    for name, rows in ACTS.items():
        tensor = torch.from_numpy(rows)
        unit = tensor / torch.linalg.vector_norm(tensor, dim=-1, keepdim=True)
        found[name] = unit.to(TORCH_DTYPES[dtype]).double().numpy()
    return found


def nearest(vectors: list[np.ndarray], query: np.ndarray, k: int) -> list[tuple[int, int]]:
    """(hook, row) by similarity, then hook, then row; brute force."""
    unit = (query / np.linalg.norm(query)).astype(np.float32).astype(np.float64)
    scores = [(part * unit).sum(-1).astype(np.float32) for part in vectors]
    ranked = sorted((-float(s), hook, row) for hook, part in enumerate(scores) for row, s in enumerate(part))
    return [(hook, row) for _, hook, row in ranked[:k]]


class BankMachine(RuleBasedStateMachine):
    """A bank at one path, and what a user, a failing machine and a failing disk do to it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "a.h5"
        self.partial = partial_path(self.path)
        self.done: set[int] = set()
        self.given: set[tuple[int, str, int]] = set()
        self.writer: BankWriter | None = None
        self.finished = False
        self.stale = False

    @initialize(dtype=st.sampled_from(["float16", "bfloat16", "float32"]))
    def choose(self, dtype: str) -> None:
        self.dtype = dtype
        self.whole = whole_of(dtype)
        self.n_blocks = len(self.whole.starts) - 1
        self.vectors = stored_vectors(dtype)

    def create(self, **kwargs: Any) -> BankWriter:
        return BankWriter.create(self.path, PLAN, RECORD, **{"dtype": self.dtype, "batch_tokens": 16, **kwargs})

    # Building

    @precondition(lambda self: not self.writer and not self.finished)
    @rule(batch_tokens=st.sampled_from([16, 4096]), odd=st.booleans(), n=st.integers(0, 8))
    def start(self, batch_tokens: int, odd: bool, n: int) -> None:
        if not self.partial.exists():
            batch_tokens = 16  # a resumed build takes that of the file
            if odd:  # left by a build that was killed while it created its file
                (self.folder / "a.h5.partial.new").write_bytes(self.whole.data[:9000])
        elif odd:
            self.ask_for_something_else()
        self.taping = taped(self.path)
        self.tape = self.taping.__enter__()
        self.writer = self.create(batch_tokens=batch_tokens)
        self.batches = self.writer.batches()
        self.given.clear()
        self.stale = False
        left = [batch for batch in self.whole.batches if batch.block not in self.done]
        assert self.writer.tokens_left == sum(batch.n_tokens for batch in left)
        assert self.writer.tokens_to_run == sum(batch.n_tokens for batch in self.whole.batches)
        self.append(None, n, False)

    @precondition(lambda self: self.writer)
    @rule(
        names=st.one_of(st.none(), st.sets(st.sampled_from(list(WIDTHS)), min_size=1)), n=st.integers(1, 8), again=st.booleans()
    )
    def append(self, names: set[str] | None, n: int, again: bool) -> None:
        assert self.writer
        if again:  # as a loop does after an error that it caught
            self.settle()
            self.batches = self.writer.batches()
        for _ in range(n):
            batch = next(self.batches, None)
            if batch is not None:
                assert batch.block not in self.done
                self.give(batch, tuple(names or WIDTHS))

    def give(self, batch: Batch, names: tuple[str, ...]) -> None:
        assert self.writer
        give(self.writer, batch, ACTS, names)
        self.given.update((batch.block, name, row) for name in names for row in batch.rows.tolist())

    def settle(self) -> None:
        """Wait for the writer's thread, that a run of the test is like the one before it."""
        assert self.writer
        done = self.done | self.blocks_given()
        left = sum(batch.n_tokens for batch in self.whole.batches if batch.block not in done)
        with at_most(20):
            while self.writer.tokens_left != left:
                time.sleep(0.001)

    def blocks_given(self) -> set[int]:
        """The blocks of which every row of every hook name was handed over."""
        spans = enumerate(pairwise(self.whole.starts))
        wanted = [{(block, name, row) for name in WIDTHS for row in range(*span)} for block, span in spans]
        return {block for block in range(self.n_blocks) if wanted[block] <= self.given}

    @precondition(lambda self: self.writer)
    @rule(error=st.sampled_from([None, StopBuildError(), KeyboardInterrupt()]))
    def leave(self, error: BaseException | None) -> None:
        assert self.writer
        complete = self.done | self.blocks_given() == set(range(self.n_blocks))
        self.writer.__exit__(type(error) if error else None, error, None)
        self.end_session()
        if complete and error is None:
            self.is_finished()
        else:
            self.done |= self.blocks_given()

    @precondition(lambda self: self.writer)
    @rule()
    def finish(self) -> None:
        assert self.writer
        for batch in self.writer.batches():
            self.give(batch, tuple(WIDTHS))
        self.writer.__exit__(None, None, None)
        self.end_session()
        self.is_finished()

    def end_session(self) -> None:
        self.taping.__exit__(None, None, None)
        self.writer = None

    def is_finished(self) -> None:
        assert self.path.read_bytes() == self.whole.data
        self.finished = True

    @precondition(lambda self: self.writer)
    @rule(data=st.data(), power=st.booleans(), finishing=st.booleans())
    def kill(self, data: st.DataObject, power: bool, finishing: bool) -> None:
        """At any moment since the session began, the last ones included."""
        assert self.writer
        if finishing:
            for batch in self.writer.batches():
                self.give(batch, tuple(WIDTHS))
            self.writer.__exit__(None, None, None)
        else:
            self.writer.__exit__(StopBuildError, StopBuildError(), None)
        self.end_session()
        at = data.draw(moments(self.tape))
        if power:
            image = left_by_power_cut(self.tape, at, data.draw(survivals()))
        else:
            image = left_by_kill(self.tape, at, data.draw(st.integers(0, 5000)))
        if "rename" in self.tape.events[:at]:
            assert image == self.whole.data
            self.is_finished()
            return
        self.path.unlink(missing_ok=True)
        self.partial.write_bytes(image)
        (self.folder / "a.h5.lock").write_text("process 999999999 on elsewhere since 2001-01-01")
        self.stale = True
        self.whole.check_blocks(image)
        self.done = self.whole.blocks(image)

    def ask_for_something_else(self) -> None:
        before = self.partial.read_bytes()
        other = "float32" if self.dtype == "float16" else "float16"
        with pytest.raises(
            BankError, match=rf"cannot be resumed, .* dtype: the file has {self.dtype}, this call {other}\. Repeat"
        ):
            self.create(dtype=other)
        assert self.partial.read_bytes()[PAGE:] == before[PAGE:]  # the first copy of the head may have been mended

    @precondition(lambda self: not self.writer and not self.finished and self.partial.exists())
    @rule(data=st.data(), bit=st.integers(0, 7))
    def damage_the_partial_file(self, data: st.DataObject, bit: int) -> None:
        self.stale = False
        if builds_though_damaged(self.path, data.draw(offsets(self.whole)), bit, self.dtype):
            self.is_finished()

    # Reading

    @precondition(lambda self: self.finished)
    @rule()
    def read(self) -> None:
        with Bank.open(self.path) as bank:
            bank.verify()
            assert bank.hook_names == tuple(WIDTHS)
            for name, expected in self.vectors.items():
                found = bank.vectors(name)
                assert found.dtype == NUMPY_DTYPES[self.dtype]
                np.testing.assert_array_equal(found.astype(np.float64), expected)
                np.testing.assert_allclose(bank.norms(name), np.linalg.norm(ACTS[name], axis=1), rtol=1e-6)
                np.testing.assert_allclose(bank.mean(name), expected.mean(0), atol=1e-12)
                np.testing.assert_allclose(bank.std(name), expected.std(0), atol=1e-7)

    @precondition(lambda self: self.finished)
    @rule(seed=st.integers(0, 9), k=st.integers(1, 12), name=st.sampled_from(list(WIDTHS)))
    def search(self, seed: int, k: int, name: str) -> None:
        query = np.random.default_rng(seed).standard_normal(WIDTHS[name]).astype(np.float32)
        with Bank.open(self.path) as bank:
            found = VectorSearch(bank.vectors(name), "cpu").top_k(query, k)
            assert found.rows.tolist() == [row for _, row in nearest([self.vectors[name]], query, k)]
            index = ContextualIndex(bank, device="cpu")
            across = index.search(query, k)
        hooks = [hook for hook, width in WIDTHS.items() if width == WIDTHS[name]]
        places = zip([index.hook_names[i] for i in across.hook_ids.tolist()], across.rows.tolist(), strict=True)
        assert list(places) == [(hooks[hook], row) for hook, row in nearest([self.vectors[h] for h in hooks], query, k)]

    @precondition(lambda self: self.finished)
    @rule(data=st.data(), bit=st.integers(0, 7))
    def damage_the_bank(self, data: st.DataObject, bit: int) -> None:
        """Any bit of the file is under a checksum."""
        at = data.draw(offsets(self.whole))
        for _ in range(2):
            with self.path.open("r+b") as file:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1 << bit]))
            if byte == self.whole.data[at]:
                with pytest.raises(BankError, match=r"a\.h5: "):
                    verify(self.path)
        verify(self.path)

    @precondition(lambda self: self.finished)
    @rule()
    def delete(self) -> None:
        self.path.unlink()
        self.finished = False
        self.done.clear()

    # At any time

    @invariant()
    def no_file_is_left_over(self) -> None:
        expected = {"a.h5"} if self.finished else {"a.h5.partial"} & set(os.listdir(self.folder))
        expected |= {"a.h5.lock"} if self.writer or self.stale else set()
        assert set(os.listdir(self.folder)) == expected

    @invariant()
    def nobody_reads_an_unfinished_bank(self) -> None:
        if not self.finished:
            hint = "; a.h5.partial is there: the same build call resumes it" if self.partial.exists() else ""
            with pytest.raises(BankError) as caught:
                Bank.open(self.path)
            assert str(caught.value) == f"no bank file at {self.path}{hint}"

    @invariant()
    def nobody_else_builds(self) -> None:
        if self.writer or self.finished:
            message = "exists already; open it" if self.finished else f"is being built by process {os.getpid()} on "
            with pytest.raises(BankError, match=rf"a\.h5 {message}"):
                self.create()
            self.stale = False

    @invariant()
    def journal_is_true(self) -> None:
        if not self.writer and self.partial.exists():
            image = self.partial.read_bytes()
            assert self.whole.blocks(image) == self.done
            self.whole.check_blocks(image)

    def teardown(self) -> None:
        if self.writer:
            with suppress(BankError):
                self.writer.__exit__(StopBuildError, StopBuildError(), None)
            self.end_session()
        shutil.rmtree(self.folder)


def verify(path: Path) -> None:
    with Bank.open(path) as bank:
        bank.verify()


def test_bank_in_any_order_of_events() -> None:
    run_state_machine_as_test(
        BankMachine,
        settings=settings(
            deadline=None,
            max_examples=60,
            stateful_step_count=20,
            derandomize=True,
            phases=[Phase.generate],  # to shrink a failure would take minutes
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        ),
    )
