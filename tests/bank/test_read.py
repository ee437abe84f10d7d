"""A finished bank, read: by any HDF5 reader, by row, by head; and files that are no bank."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
from support.golden import (
    BOS,
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
from tl_latentlens.corpus.plan import PlanSettings
from tl_latentlens.errors import BankError, InvalidInputError, UnknownHookError
from tl_latentlens.model.fingerprint import Fingerprint
from tl_latentlens.views.context import end_of_text, start_of_text


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
        before, after = end_of_text(before, before[max(0, len(before) - width) :]), start_of_text(after, after[:width])
        expected = f"{start}{before}[x]{after}{end}".strip()
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


def test_bank_of_a_later_version(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_of(path)
    monkeypatch.setattr(bank_head, "VERSION", 2)
    block = 2 * head.encode()
    monkeypatch.undo()
    with path.open("r+b") as file:
        file.write(block)
    with pytest.raises(BankError, match=r"a\.h5: is of bank version 2; this package reads up to 1: upgrade tl-latentlens"):
        Bank.open(path)


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
    with pytest.raises(BankError, match="no bank file in the folder"):
        Bank.open(tmp_path)
