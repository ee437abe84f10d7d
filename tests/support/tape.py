"""A tape of what a build does to its file, so that the file can be put back to what a kill or a power cut leaves of it."""

import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import strategies as st

from support.banks import activations, fill, make_record, make_rows
from tl_latentlens.bank import partial_file as partial_module
from tl_latentlens.bank.bank import Bank
from tl_latentlens.bank.batches import Batch
from tl_latentlens.bank.format import partial_path
from tl_latentlens.bank.head import DatasetPlace, read_head
from tl_latentlens.errors import BankError

PLAN = make_rows(16)
WIDTHS = {"blocks.0.hook_resid_post": 6, "blocks.1.attn.hook_z": 3, "blocks.1.hook_resid_post": 6}
ACTS = activations(PLAN, WIDTHS)
RECORD = make_record(PLAN, WIDTHS)
PAGE = 4096


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

    def saved_rows(self, path: Path) -> set[tuple[int, str, int]]:
        """Block, hook name and row of what the record beside `path`'s partial file calls saved, where all of it is there."""
        record, partial = partial_path(path).with_name(f"{path.name}.partial.rows"), partial_path(path)
        if not record.exists() or not partial.exists():
            return set()
        image, found = partial.read_bytes(), set()
        for block, runs, _ in json.loads(record.read_text()):
            rows = [self.starts[block] + place for first, end in runs for place in range(first, end)]
            spans = [
                slice(place.offset + size * row, place.offset + size * (row + 1))
                for name in WIDTHS
                for place in (self.places[f"hooks/{name}/vectors"], self.places[f"hooks/{name}/norms"])
                for size in [place.n_bytes // place.shape[0]]
                for row in rows
            ]
            if block not in self.blocks(image) and all(image[span] == self.data[span] for span in spans):
                found |= {(block, name, row) for name in WIDTHS for row in rows}
        return found

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
    assert set(os.listdir(path.parent)) - {f"{path.name}.partial.rows"} == {f"{path.name}.partial"}
    partial_path(path).write_bytes(before)
    return False
