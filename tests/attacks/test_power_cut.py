"""Builds killed or cut off from power at any write, and damaged after that, end as the file of an undisturbed build."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.banks import blocks_of
from support.tape import (
    Tape,
    Whole,
    Write,
    build,
    builds_though_damaged,
    check_resumes,
    left_by_kill,
    left_by_power_cut,
    moments,
    offsets,
    renamed,
    survivals,
    taped,
    whole_of,
)

from tl_latentlens.bank.format import partial_path


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    with blocks_of(1):
        yield


@pytest.fixture
def whole() -> Whole:
    return whole_of("float16")


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
