"""Partial files that were damaged: what can be built again is, the rest is refused, and none becomes a wrong bank."""

from itertools import product
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.banks import (
    HOOK_A,
    HOOK_B,
    fill,
    journal,
    make_rows,
    stop_partial,
)

from tl_latentlens.bank.bank import Bank
from tl_latentlens.bank.format import partial_path
from tl_latentlens.corpus.plan import Plan
from tl_latentlens.errors import BankCorruptError, BankError


@pytest.fixture
def plan() -> Plan:
    return make_rows()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("complete", "what"),
    # The journal and the checksums of a complete file are under the digest: damage there is refused, see below.
    [*product([False], ["vectors", "norms", "checksums", "journal"]), *product([True], ["vectors", "norms"])],
)
def test_a_block_that_changed_is_built_again_and_never_becomes_a_bank(
    tmp_path: Path, plan: Plan, complete: bool, what: str
) -> None:
    path, whole = tmp_path / "a.h5", tmp_path / "whole.h5"
    n_blocks = len({batch.block for batch in fill(whole, plan, batch_tokens=16)})
    stop_partial(path, plan, complete)
    if what == "journal":
        bad = n_blocks - 1
        flip(partial_path(path), offset_of(path, "journal") + bad)
    else:
        bad = 0
        flip(partial_path(path), offset_of(path, f"hooks/{HOOK_B}/{what}") + 1)
    with pytest.raises(
        BankCorruptError, match=rf"a\.h5\.partial: blocks \[{bad}\] do not .* same call builds these blocks again"
    ):
        fill(path, plan, batch_tokens=16)
    assert not path.exists()
    assert np.flatnonzero(~journal(path)).tolist() == [bad]
    assert {batch.block for batch in fill(path, plan, batch_tokens=16)} == {bad}
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.usefixtures("small_blocks")
def test_more_changed_blocks_than_are_worth_naming(tmp_path: Path, plan: Plan) -> None:
    path, whole = tmp_path / "a.h5", tmp_path / "whole.h5"
    n_blocks = len({batch.block for batch in fill(whole, plan, batch_tokens=8)})
    assert n_blocks > 9
    stop_partial(path, plan, complete=True, batch_tokens=8)
    with partial_path(path).open("r+b") as file:
        file.seek(offset_of(path, f"hooks/{HOOK_A}/norms"))
        file.write(bytes(4 * plan.n_rows))
    with pytest.raises(BankCorruptError, match=r"blocks \[0, 1, 2, 3, 4, 5, 6, 7\]… do not match"):
        fill(path, plan, batch_tokens=8)
    assert {batch.block for batch in fill(path, plan, batch_tokens=8)} == set(range(n_blocks))
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("complete", [False, True], ids=["building", "before the rename"])
@pytest.mark.parametrize("cut", [100, 1000, 4095])
def test_damaged_first_copy_of_the_head_is_mended(tmp_path: Path, plan: Plan, complete: bool, cut: int) -> None:
    path, whole = tmp_path / "a.h5", tmp_path / "whole.h5"
    fill(whole, plan, batch_tokens=16)
    stop_partial(path, plan, complete)
    flip(partial_path(path), cut)
    assert len(fill(path, plan, batch_tokens=16)) == 0 or not complete
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("complete", [False, True], ids=["building", "before the rename"])
@pytest.mark.parametrize("name", ["both heads", "tokens", "block_starts", "fingerprint/tokens"])
def test_damaged_partial_file_is_refused(tmp_path: Path, plan: Plan, name: str, complete: bool) -> None:
    path = tmp_path / "a.h5"
    stop_partial(path, plan, complete)
    for offset in [200, 200 + 4096] if name == "both heads" else [offset_of(path, name)]:
        flip(partial_path(path), offset)
    before = partial_path(path).read_bytes()
    with pytest.raises(BankCorruptError, match=r"a\.h5\.partial: .*(is damaged|metadata does not match).*rebuild it"):
        fill(path, plan, batch_tokens=16)
    assert partial_path(path).read_bytes() == before
    partial_path(path).unlink()
    fill(path, plan)
    Bank.open(path).verify()


@pytest.mark.parametrize("name", ["journal", f"hooks/{HOOK_A}/checksums", f"hooks/{HOOK_A}/mean", f"hooks/{HOOK_B}/std"])
def test_damage_to_what_a_complete_partial_file_says_is_refused(tmp_path: Path, plan: Plan, name: str) -> None:
    path = tmp_path / "a.h5"
    stop_partial(path, plan, complete=True)
    flip(partial_path(path), offset_of(path, name))
    with pytest.raises(BankCorruptError, match=r"a\.h5\.partial: metadata does not match"):
        fill(path, plan, batch_tokens=16)


def test_partial_file_of_another_kind_is_named_and_kept(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "a.h5"
    partial_path(path).write_bytes(b"mine")
    with pytest.raises(BankError, match=r"a\.h5\.partial: is not a tl-latentlens bank"):
        fill(path, plan)
    assert partial_path(path).read_bytes() == b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5.partial"]


def offset_of(path: Path, name: str) -> int:
    """Where a dataset of an unfinished bank begins, read with plain h5py."""
    with h5py.File(partial_path(path), "r", locking=False) as file:
        return file[name].id.get_offset()


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
