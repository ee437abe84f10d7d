"""Arrays that lie, under checksums that fit, and files that ask for much memory."""

import json
import math
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.forge import INT32, INT64, arrays_of_one_row, assemble, forge, poke, read_all, read_or_refuse, record_of, refused
from support.fresh import run_fresh
from support.golden import MID, POST, head_of

import tl_latentlens as tll
from tl_latentlens.bank.bank import Bank
from tl_latentlens.bank.head import MAX_USER_BLOCK
from tl_latentlens.errors import BankCorruptError, BankError

ROWS = [1, 2, 3, 6, 7, 8, 9, 11, 12, 13]


@pytest.mark.parametrize(
    ("name", "dtype", "values"),
    [
        ("prompt_starts", "int64", [1, 4, 5, 10, 14]),
        ("prompt_starts", "int64", [0, 4, 5, 10, 13]),
        ("prompt_starts", "int64", [0, 4, 5, 10, 15]),
        ("prompt_starts", "int64", [0, 10, 5, 4, 14]),
        ("prompt_starts", "int64", [0, -1, 5, 10, 14]),
        ("prompt_starts", "int64", [0, INT64, 5, 10, 14]),
        ("prompt_starts", "int64", [0, 4, 5, INT64, 14]),
        ("prompt_starts", "int64", [-INT64, 4, 5, 10, 14]),
        ("prompt_starts", "int64", [0] * 5),
        ("row_tokens", "int64", ROWS[::-1]),
        ("row_tokens", "int64", [*ROWS[:-1], 14]),
        ("row_tokens", "int64", [*ROWS[:-1], INT64]),
        ("row_tokens", "int64", [-1, *ROWS[1:]]),
        ("row_tokens", "int64", [1, 1, *ROWS[2:]]),
        ("row_tokens", "int64", [1, INT64, *ROWS[2:]]),
        ("row_tokens", "int64", [*ROWS[:5], INT64, *ROWS[6:]]),
        ("row_tokens", "int64", [INT64, *ROWS[1:]]),
        ("row_tokens", "int64", [INT64] * 9 + [13]),
        ("block_starts", "int64", [0, 0, 10]),
        ("block_starts", "int64", [0, 10, 10]),
        ("block_starts", "int64", [0, 7, 11]),
        ("block_starts", "int64", [0, 11, 10]),
        ("block_starts", "int64", [0, -1, 10]),
        ("block_starts", "int64", [0, INT64, 10]),
        ("block_starts", "int64", [1, 7, 10]),
        ("token_byte_starts", "int64", [0, 3, 6, 11, 20, 19, 22, 23, 27, 28]),
        ("token_byte_starts", "int64", [0, 3, 6, 11, 19, 20, 22, 23, 27, 29]),
        ("token_byte_starts", "int64", [1, 3, 6, 11, 19, 20, 22, 23, 27, 28]),
        ("token_byte_starts", "int64", [0, INT64, 6, 11, 19, 20, 22, 23, 27, 28]),
        ("token_ids", "int32", [0, 1, 1, 3, 4, 5, 6, 7, 8]),
        ("token_ids", "int32", [8, 7, 6, 5, 4, 3, 2, 1, 0]),
        ("token_ids", "int32", [-1, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("token_ids", "int32", [0, INT32, 2, 3, 4, 5, 6, 7, 8]),
        ("fingerprint/prompt_starts", "int64", [0, 3, 5]),
        ("fingerprint/prompt_starts", "int64", [0, 5, 4]),
        ("fingerprint/prompt_starts", "int64", [1, 3, 4]),
        ("fingerprint/prompt_starts", "int64", [0, -3, 4]),
        ("journal", "uint8", [1, 0]),
        ("journal", "uint8", [0, 0]),
        ("journal", "uint8", [2, 1]),
        ("journal", "uint8", [255, 255]),
    ],
    ids=lambda value: str(value).replace(" ", "")[:40],
)
def test_numbers_that_do_not_ascend_or_leave_their_range(path: Path, name: str, dtype: str, values: list[int]) -> None:
    poke(path, name, np.array(values, dtype))
    what = "blocks are missing" if name == "journal" else f"{name} does not ascend"
    refused(path, rf"a\.h5: {what}.*; copy the bank again or rebuild it")


@pytest.mark.parametrize("token", [250, -1, INT32, -INT32 - 1])
def test_a_token_without_a_text(path: Path, original: dict[str, Any], token: int) -> None:
    tokens = np.array(Bank.open(path).plan.tokens)
    tokens[2] = token
    poke(path, "tokens", tokens)
    bank = Bank.open(path)
    bank.verify()
    for read in (lambda: bank.row(1), lambda: bank.row(0).context(), lambda: bank.row(2).prompt_text):
        with pytest.raises(BankCorruptError, match=rf"a\.h5 holds no text for token id {token}; rebuild it"):
            read()
    assert bank.row(9).context() == original["context 9"]
    found = tll.ContextualIndex(bank, POST, device="cpu").search(bank.vectors(POST)[1].astype(np.float32), 1)
    with pytest.raises(BankCorruptError, match="holds no text"):
        found.neighbors()


@pytest.mark.parametrize("text", [b"\xff" * 28, b"\0" * 28, b"\xed\xa0\x80" * 9 + b"\xf0", b"\n" * 28], ids=ascii)
def test_texts_that_are_no_text(path: Path, text: bytes) -> None:
    poke(path, "token_bytes", np.frombuffer(text, np.uint8))
    bank = Bank.open(path)
    for row in range(bank.n_rows):
        assert "\n" not in bank.row(row).context()
        bank.row(row).prompt_text.encode()


def test_a_file_of_one_row_and_no_hdf5(tmp_path: Path) -> None:
    assemble(tmp_path / "a.h5", arrays_of_one_row(), {})
    read_or_refuse(tmp_path / "a.h5")
    assert Bank.open(tmp_path / "a.h5").row(0).token == "x"


@pytest.mark.parametrize(
    "less",
    [
        {"tokens": 0, "prompt_starts": [0]},
        {"tokens": 0, "prompt_starts": [0, 0]},
        {"prompt_starts": []},
        {"prompt_starts": [0]},
        {"block_starts": []},
        {"block_starts": [0], "journal": 0, f"hooks/{POST}/checksums": 0},
        {"row_tokens": [], f"hooks/{POST}/norms": 0, f"hooks/{POST}/vectors": (0, 4), "block_starts": [0, 0]},
        {"token_ids": 0, "token_byte_starts": [0], "token_bytes": 0},
        {"token_ids": 0, "token_byte_starts": [], "token_bytes": 0},
        {"token_byte_starts": [], "token_ids": 0},
        {"fingerprint/prompt_starts": []},
    ],
    ids=str,
)
def test_arrays_with_nothing_in_them(tmp_path: Path, less: dict[str, Any]) -> None:
    arrays = arrays_of_one_row()
    for name, values in less.items():
        kind = arrays[name].dtype
        arrays[name] = np.array(values, kind) if isinstance(values, list) else np.zeros(values, kind)
    assemble(tmp_path / "a.h5", arrays, {})
    refused(tmp_path / "a.h5", r"a\.h5: .*; copy the bank again or rebuild it")


@pytest.mark.parametrize("fill", [math.nan, math.inf, 0.0, 3e38])
def test_numbers_that_no_build_writes(path: Path, fill: float) -> None:
    for name in (f"hooks/{POST}/mean", f"hooks/{MID}/std"):
        poke(path, name, np.full(head_of(path).datasets[name].shape, fill))
    name = f"fingerprint/{POST}"
    poke(path, name, np.full(head_of(path).datasets[name].shape, fill, np.float32))
    read_all(path)


# Nothing large is allocated


def test_a_terabyte_of_holes_costs_nothing(tmp_path: Path) -> None:
    rows, d = 2**19, 2**20
    path = tmp_path / "a.h5"
    arrays = arrays_of_one_row() | {
        "tokens": np.zeros(rows, np.int32),
        "prompt_starts": np.array([0, rows]),
        "row_tokens": np.arange(rows),
        "block_starts": np.array([0, rows]),
        f"fingerprint/{POST}": np.zeros((0, d), np.float32),
    }
    of_d = ("float64", (d,))
    holes = {"norms": ("float32", (rows,)), "mean": of_d, "std": of_d, "vectors": ("uint16", (rows, d))}
    empty = {f"hooks/{POST}/{name}": place for name, place in holes.items()}
    arrays = {name: array for name, array in arrays.items() if name not in empty}
    try:
        assemble(path, arrays, empty)
    except OSError as error:
        pytest.skip(f"no holes of this size here: {error}")
    assert path.stat().st_size > 2**40
    tracemalloc.start()
    try:
        bank = Bank.open(path)
        vectors = bank.vectors(POST)
        assert bank.row(5).token == "x"
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
    assert vectors.shape == (rows, d)
    assert vectors[-1, -1] == 0


def open_all(folder: Path, n_bytes: int) -> None:
    """Open every bank of a folder with so many bytes of memory beside what is in use."""
    import resource

    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + n_bytes, -1))
    for path in sorted(folder.glob("*.h5")):
        try:
            Bank.open(path)
            sys.stdout.write(f"{path.stem} opened\n")
        except BankError:
            sys.stdout.write(f"{path.stem} refused\n")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_heads_that_ask_for_much_are_refused_in_little_memory(path: Path, tmp_path: Path) -> None:
    """The largest heads there are, in 512 MB beside what is in use."""
    size, record = MAX_USER_BLOCK, record_of(path)
    fill = {"lists": b"[[[[]]]],", "names": b"", "datasets": b"", "holes": b""}
    start = json.dumps(record | {"size": size})[:-1].encode()
    folder = tmp_path / "large"
    folder.mkdir()
    for name, part in fill.items():
        line = start + b', "more": [' + part * ((size // 2 - len(start) - 100) // len(part)) + b"0]}" if part else b""
        if name == "names":
            names = ",".join(f'"{i:x}"' for i in range(size // 20))
            line = start.replace(json.dumps([POST, MID]).encode(), f"[{names}]".encode()) + b"}"
        if name == "datasets":
            places = ",".join(f'"{i:x}":[0,"",[]]' for i in range(size // 200))
            line = start.replace(b'"datasets": {', f'"datasets": {{{places}, '.encode()) + b"}"
        with (folder / f"{name}.h5").open("wb") as file:
            file.truncate(size + 2**15)
            file.write(start + b"}" if name == "holes" else b"")
        if line:
            forge(folder / f"{name}.h5", line, size)
    ended = run_fresh(open_all, folder, 2**29, cwd=folder)
    assert ended.code == 0, ended.err[-2000:]
    assert ended.out.split("\n")[:-1] == [f"{name} refused" for name in sorted(fill)]
