"""The bank file, read: any HDF5 reader can, no changed byte passes, and the format stays what it was."""

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
import torch

from tl_latentlens import bank_format as bank_module
from tl_latentlens.bank import Bank
from tl_latentlens.bank_format import (
    Fingerprint,
    ModelInfo,
    ModelRecord,
    encode_user_block,
    metadata_digest,
    partial_path,
    read_user_block,
)
from tl_latentlens.errors import BankCorruptError, BankError, InvalidInputError, UnknownHookError
from tl_latentlens.plan import Plan, PlanSettings, make_plan, prompts_from_lists
from tl_latentlens.writer import BankWriter

GOLDEN = Path(__file__).parent / "data" / "golden_v1.h5"
POST, MID = "blocks.0.hook_resid_post", "blocks.1.hook_resid_mid"
INFO = ModelInfo("tiny", "TransformerBridge", 2, 4, 300, 16, "bfloat16", True, "ab" * 32)
BOS, EURO = 0, "€".encode()
# The euro sign is three bytes, here in two tokens; the line break is a token of its own.
TOKEN_BYTES = {
    BOS: b"<s>",
    1: b"The",
    2: b" bank",
    3: " Flüsse".encode(),
    4: EURO[:1],
    5: EURO[1:],
    6: b"\n",
    7: " 木".encode(),
    8: b" ",
}
TEXTS = [[BOS, 1, 2, 3], [BOS], [BOS, 4, 5, 6, 2], [BOS, 7, 8, 2]]


def hand_made_plan() -> Plan:
    return make_plan(prompts_from_lists(TEXTS, [[i == 0 for i in range(len(t))] for t in TEXTS]), PlanSettings(None, 3))


def hand_made_activations() -> dict[str, np.ndarray]:
    """[10, 4] and [10, 2]; each a multiple of a vector of halves or of an axis, so exact in any dtype when normalised."""
    halves = np.array([[1 if (row >> bit) & 1 else -1 for bit in range(4)] for row in range(10)], np.float32)
    axes = np.eye(2, dtype=np.float32)[np.arange(10) % 2]
    scale = np.arange(1, 11, dtype=np.float32)[:, None]
    return {POST: halves * scale, MID: -axes * scale * 100000}


def write_bank(path: Path, dtype: str = "bfloat16") -> None:
    """A small bank of hand-made arrays; tests/data/golden_v1.h5 is `write_bank(path)` of the first release."""
    plan, acts = hand_made_plan(), hand_made_activations()
    known = Fingerprint(((BOS, 1, 2), (BOS,)), {name: array[:4] for name, array in acts.items()})
    record = ModelRecord(INFO, {name: array.shape[1] for name, array in acts.items()}, known, TOKEN_BYTES, (BOS,))
    kind = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    with BankWriter.create(path, plan, record, dtype=dtype, batch_tokens=1) as writer:
        for batch in writer.batches():
            for name, array in acts.items():
                rows = torch.from_numpy(array[batch.rows])
                norms = torch.linalg.vector_norm(rows, dim=-1)
                writer.write(name, batch, (rows / norms[:, None]).to(kind), norms)


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


def open_and_verify(path: Path) -> None:
    with Bank.open(path) as bank:
        bank.verify()


def test_every_changed_byte_is_found(path: Path) -> None:
    original = path.read_bytes()
    assert len(original) < 40_000
    missed = []
    with path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(original):
            file.seek(at)
            file.write(bytes([byte ^ (1 << at % 8)]))
            try:
                open_and_verify(path)
            except BankError:
                pass
            else:
                missed.append(at)
            file.seek(at)
            file.write(bytes([byte]))
    assert missed == []
    open_and_verify(path)


def test_every_bit_of_the_first_line_is_found(path: Path) -> None:
    original = path.read_bytes()
    end = original.index(b"\0") + 2
    for at in range(end):
        for bit in range(8):
            changed = bytearray(original[:4096])
            changed[at] ^= 1 << bit
            with path.open("r+b") as file:
                file.write(changed)
            with pytest.raises(BankError):
                Bank.open(path)


@pytest.mark.parametrize("end", [0, 1, 17, 100, 4095, 4096, 4097, 5000, 9000, -2000, -1000, -100, -8, -1])
def test_a_truncated_file_is_found(path: Path, end: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:end])
    with pytest.raises(BankError):
        Bank.open(path)


@pytest.mark.parametrize("tail", [b"\0", b"\0" * 4096, b"x"])
def test_a_longer_file_is_found(path: Path, tail: bytes) -> None:
    with path.open("ab") as file:
        file.write(tail)
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
    with pytest.raises(BankCorruptError, match=message):
        bank.verify()
    bank.verify([POST])


@pytest.mark.parametrize(
    "part",
    ["tokens", "row_tokens", "token_bytes", "journal", "fingerprint/tokens", f"hooks/{POST}/checksums", f"hooks/{POST}/mean"],
)
def test_changed_metadata_does_not_open(path: Path, part: str) -> None:
    with h5py.File(path, "r") as file:
        offset = file[part].id.get_offset()
    bank = Bank.open(path)
    change(path, offset)
    for check in (bank.verify, lambda: Bank.open(path)):
        with pytest.raises(BankCorruptError, match=r"metadata does not match its checksum; .*copy the bank again"):
            check()


def test_damaged_user_block_is_named(path: Path) -> None:
    change(path, 60)
    with pytest.raises(BankCorruptError, match="the user block at the start of the file is damaged"):
        Bank.open(path)
    change(path, 60)
    change(path, 4000)
    with pytest.raises(BankCorruptError, match="the user block at the start of the file is damaged"):
        Bank.open(path)


def test_bank_of_a_later_version(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = read_user_block(path)
    monkeypatch.setattr(bank_module, "VERSION", 2)
    block = encode_user_block(record["size"], True, record["unhashed"], record["digest"])
    monkeypatch.undo()
    with path.open("r+b") as file:
        file.write(block)
    with pytest.raises(BankError, match="bank version 2; this package reads up to 1: upgrade tl-latentlens"):
        Bank.open(path)


def test_hdf5_that_cannot_be_read_is_a_bank_error(path: Path) -> None:
    """Checksums that fit a file of nonsense: nothing HDF5 raises comes through."""
    record = read_user_block(path)
    size = record["size"]
    path.write_bytes(b"\0" * size + b"nonsense" * 100)
    block = encode_user_block(size, True, [], metadata_digest(path, size, []))
    with path.open("r+b") as file:
        file.write(block)
    with pytest.raises(BankCorruptError, match="cannot be read as HDF5"):
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
    with pytest.raises(BankError, match=r"a\.h5 is not a tl-latentlens bank; make one with build_bank"):
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


# The format


def test_golden_file_reads_as_ever() -> None:
    assert GOLDEN.stat().st_size <= 40_000
    assert GOLDEN.read_bytes().startswith(b'{"format": "tl-latentlens bank", "version": 1, "size": 4096, "complete": true, ')
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
