"""The bank file, read: any HDF5 reader can, no changed byte passes, and the format stays what it was."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
import torch
from support.golden import (
    BOS,
    GOLDEN,
    INFO,
    MID,
    POST,
    TEXTS,
    TOKEN_BYTES,
    hand_made_activations,
    hand_made_plan,
    head_of,
    stored_in,
    write_bank,
)

from tl_latentlens.bank import head as bank_head
from tl_latentlens.bank.bank import Bank, Row
from tl_latentlens.bank.format import ModelRecord, partial_path
from tl_latentlens.bank.writer import BankWriter
from tl_latentlens.corpus.plan import PlanSettings, make_plan, prompts_from_lists
from tl_latentlens.errors import BankCorruptError, BankError, InvalidInputError, UnknownHookError
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.model.fingerprint import Fingerprint


@pytest.fixture(params=["bfloat16", "float16", "float32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_bank(tmp_path / "a.h5")
    return tmp_path / "a.h5"


@pytest.fixture
def made(path: Path) -> Bank:
    return Bank.open(path)


# Plain HDF5


def test_any_hdf5_reader_reads_it(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "a.h5"
    write_bank(path, dtype)
    bank = Bank.open(path)
    stored = {"float16": "float16", "bfloat16": "uint16", "float32": "float32"}[dtype]
    with h5py.File(path, "r") as file:
        assert head_of(path).datasets == stored_in(file)
        for name, width in ((POST, 4), (MID, 2)):
            group = file["hooks"][name]
            assert {key: (d.shape, str(d.dtype)) for key, d in group.items()} == {
                "vectors": ((10, width), stored),
                "norms": ((10,), "float32"),
                "checksums": ((len(list(bank.blocks())),), "uint64"),
                "mean": ((width,), "float64"),
                "std": ((width,), "float64"),
            }
            for dataset in group.values():
                assert dataset.chunks is None
                assert dataset.compression is None
                assert dataset.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
                assert dataset.id.get_offset() is not None
            assert dict(group["vectors"].attrs) == ({"bfloat16": True} if dtype == "bfloat16" else {})
            raw = group["vectors"][:]
            np.testing.assert_array_equal(raw.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else raw, bank.vectors(name))
            np.testing.assert_array_equal(group["norms"][:], bank.norms(name))
            np.testing.assert_array_equal(group["mean"][:], bank.mean(name))
            np.testing.assert_array_equal(group["std"][:], bank.std(name))
        assert str(file["tokens"].dtype) == "int32"
        assert file["tokens"][:].tolist() == [token for text in TEXTS for token in text]
        assert file["prompt_starts"][:].tolist() == [0, 4, 5, 10, 14]
        assert str(file["row_tokens"].dtype) == "int64"
        assert file["row_tokens"][:].tolist() == [1, 2, 3, 6, 7, 8, 9, 11, 12, 13]
        assert json.loads(file.attrs["dtype"]) == dtype
        assert json.loads(file.attrs["hook_names"]) == [POST, MID]
        assert json.loads(file.attrs["model"])["name"] == "tiny"


def test_vectors_are_unit_length_and_norms_are_kept(tmp_path: Path, dtype: str) -> None:
    write_bank(tmp_path / "a.h5", dtype)
    bank = Bank.open(tmp_path / "a.h5")
    acts = hand_made_activations()
    kinds = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
    for name, array in acts.items():
        vectors = bank.vectors(name)
        assert vectors.dtype == kinds[dtype]
        norms = np.linalg.norm(array, axis=1)
        np.testing.assert_array_equal(vectors.astype(np.float32), array / norms[:, None])
        np.testing.assert_array_equal(np.linalg.norm(vectors.astype(np.float64), axis=1), 1)
        np.testing.assert_array_equal(bank.norms(name), norms)
        np.testing.assert_allclose(bank.mean(name), (array / norms[:, None]).astype(np.float64).mean(0), atol=1e-15)
        np.testing.assert_allclose(bank.std(name), (array / norms[:, None]).astype(np.float64).std(0), atol=1e-15)
        assert bank.mean(name).dtype == bank.std(name).dtype == np.float64
        for rows in (slice(None), slice(2, 5), np.array([7, 0, 7])):
            given = bank.activations(name, rows)
            assert given.dtype == np.float32
            np.testing.assert_array_equal(given, vectors[rows].astype(np.float32) * norms[rows, None])
            np.testing.assert_allclose(given, array[rows], rtol=1e-6)
    assert bank.norms(MID)[-1] == 1_000_000, "past the range of float16"


def test_what_a_bank_says_of_itself(path: Path, made: Bank) -> None:
    plan = hand_made_plan()
    assert (made.n_rows, made.hook_names, made.dtype) == (10, (POST, MID), "bfloat16")
    assert (made.d(POST), made.d(MID)) == (4, 2)
    assert made.model_info == INFO
    assert made.plan_digest == plan.digest == made.plan.digest
    assert made.plan.settings == PlanSettings(None, 3)
    assert made.plan.n_prompts == 4
    assert set(made.versions) == {"tl-latentlens", "torch", "transformer-lens", "transformers", "h5py"}
    assert made.fingerprint.prompts == ((0, 1, 2), (0,))
    for name, array in hand_made_activations().items():
        np.testing.assert_array_equal(made.fingerprint.activations[name], array[:4])
    assert repr(made) == f"Bank({str(path)!r}: 10 rows, 2 hook names, tiny)"
    made.verify()


def test_path_with_a_tilde(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(path.parent))
    assert Bank.open("~/a.h5").path == path


def test_reading_changes_nothing(path: Path) -> None:
    before = path.read_bytes()
    with Bank.open(path) as bank:
        vectors, norms = bank.vectors(POST), bank.norms(POST)
        vectors[:] = 0
        norms[:] = 0
        bank.row(3).context()
    assert path.read_bytes() == before
    Bank.open(path).verify()


def test_reads_again_after_close(made: Bank) -> None:
    before = np.array(made.vectors(POST))
    made.close()
    np.testing.assert_array_equal(made.vectors(POST), before)
    assert made.row(0).token == "The"
    with made:
        made.verify()
    assert made.norms(MID)[0] == 100_000
    assert made.row(9).prompt_text == " 木  bank"


# Rows


def test_rows(made: Bank) -> None:
    expected = []
    for prompt, tokens in enumerate(TEXTS):
        expected += [(token, prompt, position) for position, token in enumerate(tokens) if position]
    found = [made.row(i) for i in range(made.n_rows)]
    assert [(row.token_id, row.prompt_index, row.position) for row in found] == expected
    assert [row.row for row in found] == list(range(10))
    assert [row.token for row in found[:3]] == ["The", " bank", " Flüsse"]
    assert found[2].prompt_tokens == ["<s>", "The", " bank", " Flüsse"]
    assert found[2].prompt_text == "The bank Flüsse"
    assert made.row(np.int64(2)) == found[2]


def test_characters_split_over_tokens_are_whole_in_the_text(made: Bank) -> None:
    row = made.row(6)
    assert row.prompt_text == "€\n bank"
    assert row.context() == "€  «bank»"
    assert [made.row(i).token for i in (3, 4)] == ["\ufffd", "\ufffd\ufffd"]
    assert "«" in made.row(3).context()


@pytest.mark.parametrize(
    ("row", "kwargs", "expected"),
    [
        (0, {}, "«The» bank Flüsse"),
        (1, {}, "The «bank» Flüsse"),
        (2, {"marks": ("[", "]")}, "The bank [Flüsse]"),
        (1, {"width": 2}, "…he «bank» F…"),
        (1, {"width": 7}, "The «bank» Flüsse"),
        (2, {"width": 3}, "…ank «Flüsse»"),
        (1, {"width": 0}, "… «bank»…"),
    ],
)
def test_context(made: Bank, row: int, kwargs: dict[str, Any], expected: str) -> None:
    assert made.row(row).context(**kwargs) == expected


@pytest.mark.parametrize("row", [5, 8])
def test_context_of_a_blank_token_is_the_text_itself(made: Bank, row: int) -> None:
    context = made.row(row).context(width=100)
    assert context.replace("«", "").replace("»", "").strip() == made.row(row).prompt_text.replace("\n", " ").strip()


@pytest.mark.parametrize("width", [0, 1, 5, 40, 500])
def test_context_of_a_long_prompt_is_cut_from_its_whole_text(made: Bank, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Only the tokens near a row are looked at; many of these are parts of characters, or no text."""
    ids = random.Random(0).choices([BOS, 1, 2, 4, 5, 7, 8], [3, 1, 1, 9, 9, 1, 1], k=600)
    monkeypatch.setattr(made, "_prompt", lambda _: np.array(ids, np.int32))
    for at in [*range(0, 600, 41), 599]:
        before, after = made.text(ids[:at]), made.text(ids[at + 1 :])
        start, end = ("…" * (len(text) > width) for text in (before, after))
        expected = f"{start}{before[max(0, len(before) - width) :]}[x]{after[:width]}{end}".strip()
        assert Row(0, 1, "x", at, 0, made).context(width, ("[", "]")) == expected


def test_activations_of_an_unknown_hook_name(made: Bank) -> None:
    with pytest.raises(UnknownHookError, match="has no hook name 'nope'"):
        made.activations("nope", slice(None))


@pytest.mark.parametrize("row", [-1, 10, 10**12])
def test_row_outside_the_bank(made: Bank, row: int) -> None:
    with pytest.raises(InvalidInputError, match=f"got row {row}; the bank has rows 0 to 9"):
        made.row(row)


@pytest.mark.parametrize("method", ["d", "vectors", "norms", "mean", "std"])
def test_unknown_hook_name(made: Bank, method: str) -> None:
    with pytest.raises(UnknownHookError, match=r"has no hook name 'nope'; it has \['blocks\.0\.hook_resid_post', 'blocks\.1"):
        getattr(made, method)("nope")


def test_verify_of_an_unknown_hook_name(made: Bank) -> None:
    with pytest.raises(UnknownHookError, match="has no hook name 'nope'"):
        made.verify(["nope"])


# No changed byte passes


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


def test_bank_of_a_later_version(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_of(path)
    monkeypatch.setattr(bank_head, "VERSION", 2)
    block = 2 * head.encode()
    monkeypatch.undo()
    with path.open("r+b") as file:
        file.write(block)
    with pytest.raises(BankError, match=r"a\.h5: is of bank version 2; this package reads up to 1: upgrade tl-latentlens"):
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


# What is no bank


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"no bank file at .*a\.h5$"):
        Bank.open(tmp_path / "a.h5")


def test_missing_file_beside_its_unfinished_bank(path: Path) -> None:
    path.rename(partial_path(path))
    with pytest.raises(BankError, match=r"no bank file at .*a\.h5; a\.h5\.partial is there: the same build call resumes it"):
        Bank.open(path)


def test_unfinished_bank(tmp_path: Path) -> None:
    plan, acts = hand_made_plan(), hand_made_activations()
    record = ModelRecord(INFO, {POST: 4}, Fingerprint(((0,),), {POST: acts[POST][:1]}), TOKEN_BYTES, (0,))
    with BankWriter.create(tmp_path / "a.h5", plan, record):
        pass
    with pytest.raises(BankError, match=r"a\.h5\.partial is an unfinished bank; run the same build call again"):
        Bank.open(tmp_path / "a.h5.partial")
    shutil.copy(tmp_path / "a.h5.partial", tmp_path / "b.h5")
    with pytest.raises(BankError, match=r"b\.h5 is an unfinished bank"):
        Bank.open(tmp_path / "b.h5")


@pytest.mark.parametrize("content", [b"", b"hello\n", "«\n".encode() * 3000, b"\x89HDF\r\n\x1a\n", b"\0" * 5000])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.h5").write_bytes(content)
    with pytest.raises(BankError, match=r"a\.h5: is not a tl-latentlens bank, or its first bytes are damaged"):
        Bank.open(tmp_path / "a.h5")


@pytest.mark.parametrize("userblock", [0, 4096])
def test_other_hdf5_file(tmp_path: Path, userblock: int) -> None:
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=userblock) as file:
        file["tokens"] = np.arange(5)
    with pytest.raises(BankError, match="is not a tl-latentlens bank"):
        Bank.open(tmp_path / "a.h5")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="no bank file at"):
        Bank.open(tmp_path)


# Heads


HEADS = "blocks.0.attn.hook_z"


def bank_of_heads(path: Path, n_heads: dict[str, int]) -> None:
    plan = make_plan(prompts_from_lists([list(range(6))]))
    rows = np.random.default_rng(0).standard_normal((6, 6))
    known = Fingerprint(((0,),), {HEADS: rows[:1]}, n_heads)
    with BankWriter.create(path, plan, ModelRecord(INFO, {HEADS: 6}, known, dict.fromkeys(range(6), b"a"))) as writer:
        for batch in writer.batches():
            norms = np.linalg.norm(rows, axis=1)
            units = torch.from_numpy(rows / norms[:, None]).half()
            writer.write(HEADS, batch, units[batch.rows], torch.from_numpy(norms[batch.rows]).float())


def test_heads_are_columns(tmp_path: Path) -> None:
    bank_of_heads(tmp_path / "heads.h5", {HEADS: 3})
    with Bank.open(tmp_path / "heads.h5") as bank, h5py.File(tmp_path / "heads.h5") as file:
        assert json.loads(file.attrs["n_heads"]) == {HEADS: 3}
        assert (bank.n_heads(HEADS), bank.d(HEADS), bank.d(f"{HEADS}[2]")) == (3, 6, 2)
        assert bank.head_names(f"{HEADS}[:]") == [f"{HEADS}[{head}]" for head in range(3)]
        assert bank.head_names(HEADS) == [HEADS]
        np.testing.assert_array_equal(bank.vectors(f"{HEADS}[1]"), bank.vectors(HEADS)[:, 2:4])
        assert bank.vectors(f"{HEADS}[1]").base is not None  # no copy
        np.testing.assert_array_equal(bank.norms(f"{HEADS}[1]"), bank.norms(HEADS))
        some = np.arange(bank.n_rows)[::-2]
        np.testing.assert_array_equal(bank.activations(f"{HEADS}[1]", some), bank.activations(HEADS, some)[:, 2:4])
        units = bank.vectors(HEADS)[:].astype(np.float64).reshape(-1, 3, 2)
        units /= np.linalg.norm(units, axis=-1, keepdims=True)
        for head in range(3):
            np.testing.assert_allclose(bank.mean(f"{HEADS}[{head}]"), units[:, head].mean(0), atol=1e-12)
            np.testing.assert_allclose(bank.std(f"{HEADS}[{head}]"), units[:, head].std(0), atol=1e-7)
        with pytest.raises(UnknownHookError, match=r"has heads 0 to 2 in the bank"):
            bank.vectors(f"{HEADS}[3]")


def test_a_bank_without_head_counts(tmp_path: Path) -> None:
    bank_of_heads(tmp_path / "old.h5", {})
    with Bank.open(tmp_path / "old.h5") as bank, h5py.File(tmp_path / "old.h5") as file:
        assert "n_heads" not in file.attrs
        assert bank.n_heads(HEADS) == 1
        assert bank.vectors(HEADS).shape[1] == 6
        with pytest.raises(UnknownHookError, match=r"knows no heads of 'blocks.0.attn.hook_z'.*; use .*, or rebuild the bank"):
            bank.vectors(f"{HEADS}[0]")


@pytest.mark.parametrize("n_heads", [{HEADS: 4}, {HEADS: 0}, {"other": 1}])
def test_head_counts_that_cannot_be(tmp_path: Path, n_heads: dict[str, int]) -> None:
    bank_of_heads(tmp_path / "heads.h5", {HEADS: 3})
    head = head_of(tmp_path / "heads.h5")
    encoded = replace(head, metadata=replace(head.metadata, n_heads=n_heads)).encode()
    with (tmp_path / "heads.h5").open("r+b") as file:
        file.write(2 * encoded)
    with pytest.raises(BankCorruptError, match=r"heads of (blocks.0.attn.hook_z|other), which its vectors do not have"):
        Bank.open(tmp_path / "heads.h5")


# The format


def test_golden_file_reads_as_ever() -> None:
    data = GOLDEN.read_bytes()
    assert len(data) < 60_000
    start = b'{"format": "tl-latentlens bank", "version": 1, "size": 8192, "complete": true, "digest": "'
    assert data.startswith(start + head_of(GOLDEN).digest.encode() + b'", "attributes": {"model": {"name": "tiny", ')
    assert data[:4096] == data[4096:8192]
    assert data[8192:].startswith(b"\x89HDF\r\n\x1a\n")
    with Bank.open(GOLDEN) as bank:
        bank.verify()
        assert (bank.n_rows, bank.hook_names, bank.dtype, bank.model_info) == (10, (POST, MID), "bfloat16", INFO)
        assert bank.plan.settings == PlanSettings(None, 3, False)
        assert bank.plan.row_tokens.tolist() == [1, 2, 3, 6, 7, 8, 9, 11, 12, 13]
        assert bank.plan_digest == "8217e0efbc79c2f5d374b539e9791e6f4971fb35707e56c49de07fb85ff4906d"
        assert list(bank.blocks()) == [(0, 7), (7, 10)]
        assert bank.vectors(POST)[5].tolist() == [0.5, -0.5, 0.5, -0.5]
        assert bank.vectors(MID)[:2].tolist() == [[-1, 0], [0, -1]]
        assert bank.norms(POST).tolist() == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
        assert bank.norms(MID)[-1] == 1e6
        assert bank.mean(MID).tolist() == [-0.5, -0.5]
        assert bank.std(MID).tolist() == [0.5, 0.5]
        assert bank.fingerprint.prompts == ((0, 1, 2), (0,))
        assert bank.fingerprint.activations[POST][1].tolist() == [2, -2, -2, -2]
        row = bank.row(1)
        assert (row.token_id, row.token, row.position, row.prompt_index, row.prompt_text) == (
            2,
            " bank",
            2,
            0,
            "The bank Flüsse",
        )
        assert bank.row(6).prompt_text == "€\n bank"


def test_banks_written_today_are_laid_out_as_the_golden_file(path: Path) -> None:
    def structure(file: h5py.File) -> dict[str, Any]:
        found: dict[str, Any] = {key: json.loads(value) for key, value in file.attrs.items() if key != "versions"}
        file.visititems(
            lambda name, item: (
                found.update({name: (str(item.dtype), item[:].tolist(), dict(item.attrs))})
                if isinstance(item, h5py.Dataset)
                else None
            )
        )
        return found

    with h5py.File(GOLDEN, "r") as golden, h5py.File(path, "r") as today:
        assert structure(today) == structure(golden)
        assert stored_in(golden) == head_of(GOLDEN).datasets
    assert b"repeat" not in path.read_bytes()[:8192], "what a plain plan does not use is not recorded"
    then, now = head_of(GOLDEN), head_of(path)
    assert replace(now.metadata, versions={}) == replace(then.metadata, versions={})
    assert list(now.datasets) == list(then.datasets)
