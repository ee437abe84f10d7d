"""Rot: no changed, lost or swapped byte passes, and a file that changes while it is open is not read."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from support.golden import (
    BOS,
    MID,
    POST,
    head_of,
    write_bank,
)

from tl_latentlens.bank.bank import Bank
from tl_latentlens.errors import BankCorruptError, BankError
from tl_latentlens.index.contextual import ContextualIndex


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_bank(tmp_path / "a.h5")
    return tmp_path / "a.h5"


@contextmanager
def changed(path: Path, offset: int, data: bytes) -> Iterator[None]:
    """Other bytes in the file, in place; then the ones before."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        before = os.pread(descriptor, len(data), offset)
        os.pwrite(descriptor, data, offset)
        yield
        os.pwrite(descriptor, before, offset)
    finally:
        os.close(descriptor)


def index_of(path: Path, **kwargs: Any) -> ContextualIndex:
    return ContextualIndex(path, device="cpu", **kwargs)


def open_and_verify(path: Path) -> None:
    with Bank.open(path) as bank:
        bank.verify()


def finds(load: Callable[[Path], Any], path: Path) -> bool:
    """True where a damaged file is refused by name; any other exception comes through and fails the test."""
    try:
        load(path)
    except BankError as error:
        return str(path) in str(error)
    return False


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """One hook name: the fewest bytes to change."""
    write_bank(tmp_path / "small.h5", hook_names=[POST])
    return tmp_path / "small.h5"


def test_every_changed_byte_is_found_when_vectors_are_loaded(small: Path) -> None:
    original, bits = small.read_bytes(), random.Random(4)
    missed = []
    for at, byte in enumerate(original):
        with changed(small, at, bytes([byte ^ (1 << bits.randrange(8))])):
            if not finds(index_of, small):
                missed.append(at)
    assert missed == []
    assert small.read_bytes() == original
    index_of(small)


def test_every_changed_byte_of_vectors_and_norms_is_found_by_verify(path: Path) -> None:
    original, head = path.read_bytes(), head_of(path)
    passed = set()
    for name in (f"hooks/{hook}/{part}" for hook in (POST, MID) for part in ("vectors", "norms")):
        for at in range(head.datasets[name].offset, head.datasets[name].offset + head.datasets[name].n_bytes):
            for flip in (1, 128, 255):
                with changed(path, at, bytes([original[at] ^ flip])):
                    bank = Bank.open(path)  # looks at metadata only
                    if not finds(lambda _, bank=bank: bank.verify(), path):
                        passed.add((at, flip))
    assert passed == set()
    open_and_verify(path)


def test_every_changed_bit_of_the_head_is_found(small: Path) -> None:
    original = small.read_bytes()
    for at in range(original.index(b"\0") + 2):
        for bit in range(8):
            with changed(small, at, bytes([original[at] ^ (1 << bit)])):
                assert finds(Bank.open, small), (at, bit)


def test_every_shorter_file_is_found(small: Path) -> None:
    for size in reversed(range(small.stat().st_size)):
        os.truncate(small, size)
        assert finds(Bank.open, small), size


@pytest.mark.parametrize("sector", [512, 4096])
def test_every_lost_sector_is_found(path: Path, sector: int) -> None:
    original = path.read_bytes()
    n_lost = 0
    for start in range(0, len(original), sector):
        for lost in (b"\0" * sector, b"\xff" * sector, random.Random(start).randbytes(sector)):
            part = original[start : start + sector]
            if lost[: len(part)] != part:
                n_lost += 1
                with changed(path, start, lost[: len(part)]):
                    assert finds(index_of, path), start
    assert n_lost > 2 * len(original) // sector
    index_of(path)


@pytest.mark.parametrize("tail", [b"\0", b"\0" * 4096, b"x", b"\n"])
def test_a_longer_file_is_found(path: Path, tail: bytes) -> None:
    with path.open("ab") as file:
        file.write(tail)
    with pytest.raises(BankCorruptError, match=r"a\.h5: metadata does not match its checksum; .*copy the bank again"):
        Bank.open(path)


def test_swapped_blocks_are_found(tmp_path: Path) -> None:
    """Two blocks of equal size, in part, whole, and with their checksums."""
    path = tmp_path / "a.h5"
    write_bank(path, texts=[[BOS, BOS, BOS, 1, 2, 3, 4, 5], [BOS, BOS, BOS, 5, 4, 3, 2, 1]])
    assert Bank.open(path).blocks() == [(0, 5), (5, 10)]
    data, datasets = path.read_bytes(), head_of(path).datasets
    for names in (["vectors"], ["norms"], ["vectors", "norms"]):
        swapped = bytearray(data)
        for place in (datasets[f"hooks/{POST}/{name}"] for name in names):
            middle, end = place.offset + place.n_bytes // 2, place.offset + place.n_bytes
            swapped[place.offset : end] = data[middle:end] + data[place.offset : middle]
        path.write_bytes(swapped)
        Bank.open(path)
        with pytest.raises(BankCorruptError, match=rf"hook name '{POST}', block 0 \(rows 0 to 4\)"):
            index_of(path)
    place = datasets[f"hooks/{POST}/checksums"]  # swapped with their blocks: the digest knows
    swapped[place.offset : place.offset + 16] = data[place.offset + 8 : place.offset + 16] + data[place.offset :][:8]
    path.write_bytes(swapped)
    with pytest.raises(BankCorruptError, match="metadata does not match its checksum"):
        Bank.open(path)


def change(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 64
    path.write_bytes(data)


@pytest.mark.parametrize("part", ["vectors", "norms"])
def test_a_changed_vector_is_named(path: Path, part: str) -> None:
    blocks = list(Bank.open(path).blocks())
    with h5py.File(path, "r") as file:
        dataset = file[f"hooks/{MID}/{part}"]
        change(path, dataset.id.get_offset() + dataset.nbytes - 1)
    bank = Bank.open(path)
    first, last = blocks[-1]
    message = rf"a\.h5: hook name '{MID}', block {len(blocks) - 1} \(rows {first} to {last - 1}\) does not match its checksum"
    for load in (bank.verify, lambda: index_of(path), lambda: ContextualIndex(bank, MID, "cpu")):
        with pytest.raises(BankCorruptError, match=message):
            load()
    bank.verify([POST])
    assert ContextualIndex(path, POST, "cpu").hook_names == (POST,)


def test_an_index_without_verification_takes_a_changed_vector(path: Path) -> None:
    place = head_of(path).datasets[f"hooks/{MID}/vectors"]
    assert index_of(path).search(np.array([1.0, 0.0])).similarities.max() == 0
    with changed(path, place.offset + 1, b"\x3f"):  # -1 in bfloat16 is 0xbf80
        with pytest.raises(BankCorruptError, match=rf"'{MID}', block 0"):
            index_of(path)
        found = index_of(path, verify=False).search(np.array([1.0, 0.0]))
        assert (found.similarities[0], found.rows[0], found.hook_ids[0]) == (1, 0, 1)


@pytest.mark.parametrize(
    "part",
    ["tokens", "row_tokens", "token_bytes", "journal", "fingerprint/tokens", f"hooks/{POST}/checksums", f"hooks/{POST}/mean"],
)
def test_changed_metadata_does_not_open(path: Path, part: str) -> None:
    with h5py.File(path, "r") as file:
        offset = file[part].id.get_offset()
    change(path, offset)
    with pytest.raises(BankCorruptError, match=r"metadata does not match its checksum; .*copy the bank again"):
        Bank.open(path)


def test_verify_reads_the_metadata_again(path: Path) -> None:
    """A disk that fails later changes no time of the file."""
    bank = Bank.open(path)
    times = path.stat()
    with changed(path, head_of(path).datasets["tokens"].offset, b"\7"):
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(BankCorruptError, match=r"metadata does not match its checksum; .*copy the bank again"):
            bank.verify()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    bank.verify()


def test_damaged_head_is_named(path: Path) -> None:
    half = head_of(path).size // 2
    for offset, why in (
        (70, r"its checksum does not match"),
        (half - 1, r"its checksum does not match"),
        (half, r"its two copies differ"),
        (2 * half - 1, r"its two copies differ"),
    ):
        change(path, offset)
        with pytest.raises(BankCorruptError, match=rf"a\.h5: the head at the start of the file is damaged \({why}\); copy the"):
            Bank.open(path)
        change(path, offset)
    Bank.open(path)


# A file that changes while it is open


def another_file(path: Path) -> None:
    """A bank of the same size and time under the same name."""
    times = path.stat()
    shutil.copy2(path, path.with_name("b.h5"))
    path.with_name("b.h5").rename(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def another_bank(path: Path) -> None:
    write_bank(path.with_name("b.h5"), "float32", hook_names=[MID, POST])
    path.with_name("b.h5").rename(path)


def other_bytes_in_place(path: Path) -> None:
    times = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))


def cut_in_place(path: Path) -> None:
    times = path.stat()
    os.truncate(path, times.st_size - 1)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def grown_in_place(path: Path) -> None:
    times = path.stat()
    os.truncate(path, times.st_size + 1)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("swap", [another_file, another_bank, other_bytes_in_place, cut_in_place, grown_in_place])
def test_a_file_changed_after_opening_is_not_read(path: Path, swap: Callable[[Path], None]) -> None:
    bank, verified = Bank.open(path), Bank.open(path)
    verified.verify()
    swap(path)
    for read in (
        lambda: bank.vectors(POST),
        lambda: bank.norms(MID),
        lambda: bank.mean(POST),
        lambda: bank.std(POST),
        lambda: bank.fingerprint,
        lambda: bank.plan,
        lambda: bank.verify(),
        lambda: ContextualIndex(bank, device="cpu"),
        lambda: ContextualIndex(verified, device="cpu", verify=False),
    ):
        with pytest.raises(BankError, match=r"a\.h5: was changed or replaced since it was opened; open it again"):
            read()


def test_what_was_mapped_stays_when_the_file_is_replaced(path: Path) -> None:
    bank = Bank.open(path)
    vectors, before = bank.vectors(POST), np.array(bank.vectors(POST))
    another_bank(path)
    np.testing.assert_array_equal(vectors, before)
    np.testing.assert_array_equal(bank.vectors(POST), before)
    assert Bank.open(path).dtype == "float32"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files by /proc")
def test_a_bank_keeps_one_file_open_however_many_hook_names(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    index = index_of(path)
    (bank,) = index.banks
    held = [bank.vectors(POST), bank.norms(POST), bank.vectors(MID), bank.norms(MID), bank.row(1).context()]
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    del index, held
    bank.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_deleted_after_opening(path: Path) -> None:
    bank = Bank.open(path)
    path.unlink()
    with pytest.raises(BankError, match=r"a\.h5 cannot be read: .*No such file"):
        bank.vectors(POST)
