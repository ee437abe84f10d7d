"""Bank files made to deceive: their checksums fit, and what they claim does not. And what a test asks of them."""

import json
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from support.golden import GOLDEN, POST, head_of
from tl_latentlens.bank.bank import Bank
from tl_latentlens.bank.head import DatasetPlace, Head, digest_of, parse_head
from tl_latentlens.errors import BankCorruptError, BankError, LatentLensError

VECTORS = f"hooks/{POST}/vectors"
SIZE = 8192  # of the golden file's user block
INT64, INT32 = np.iinfo(np.int64).max, np.iinfo(np.int32).max
Json = Any


def record_of(path: Path) -> dict[str, Json]:
    return json.loads(path.read_bytes().partition(b"\n")[0])


def forge(path: Path, line: bytes, size: int = SIZE) -> None:
    """Write any line as both copies of the head, under a checksum that fits."""
    half = (line + b"\n" + xxhash.xxh3_64_hexdigest(line).encode() + b"\n").ljust(size // 2, b"\0")
    assert len(half) == size // 2
    with path.open("r+b") as file:
        file.write(2 * half)


def forge_record(path: Path, record: dict[str, Json]) -> None:
    """Write a head of any JSON; its digest fits where it describes a file at all. A long one moves the rest back."""
    size = max(SIZE, 2 << (len(json.dumps(record)) + 99).bit_length())
    if size > SIZE:
        path.write_bytes(b"\0" * (size - SIZE) + path.read_bytes())
        datasets = {name: [offset + size - SIZE, *rest] for name, (offset, *rest) in record["datasets"].items()}
        record = record | {"size": size, "datasets": datasets}
    with suppress(LatentLensError, KeyError, TypeError, ValueError, OSError), path.open("rb") as file:
        record = record | {"digest": digest_of(file, parse_head(json.dumps(record).encode()))}
    forge(path, json.dumps(record).encode(), size)


def refit(path: Path, head: Head | None = None) -> None:
    """Make the digest that of the file as it is now, and write both copies of the head."""
    head = parse_head(path.read_bytes().partition(b"\n")[0]) if head is None else head
    with path.open("r+b") as file:
        block = 2 * replace(head, digest=digest_of(file, head)).encode()
        file.seek(0)
        file.write(block)


def poke(path: Path, name: str, array: np.ndarray) -> None:
    """Write other numbers where a dataset stands, and refit."""
    place = head_of(path).datasets[name]
    assert (array.dtype.name, array.shape) == (place.dtype, place.shape)
    with path.open("r+b") as file:
        file.seek(place.offset)
        file.write(array.tobytes())
    refit(path)


def assemble(path: Path, arrays: dict[str, np.ndarray], empty: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A bank of one hook name without any HDF5 in it; `empty` datasets are holes in the file."""
    metadata = replace(head_of(GOLDEN).metadata, hook_names=(POST,))
    places, end = {}, SIZE
    everything = {name: (array.dtype.name, array.shape) for name, array in arrays.items()} | empty
    for name, (dtype, shape) in everything.items():
        places[name] = DatasetPlace(end, dtype, shape)
        end += -(-places[name].n_bytes // 64) * 64
    with path.open("wb") as file:
        file.truncate(end)
        for name, array in arrays.items():
            file.seek(places[name].offset)
            file.write(array.tobytes())
    refit(path, Head(SIZE, True, metadata, places))


def item_at(record: Json, keys: Sequence[str | int]) -> Json:
    for key in keys:
        record = record[key]
    return record


def put(record: Json, keys: Sequence[str | int], value: Json) -> None:
    item_at(record, keys[:-1])[keys[-1]] = value


# But for what the head says itself.
DAMAGED = r"a\.h5: (the head at the start of the file is damaged \((?!its (checksum|two|size))|the file is cut short: it has)"


def refused(path: Path, match: str, error: type[BankError] = BankCorruptError) -> None:
    """Not opened, with a message fit for a terminal, and with little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(error, match=match) as caught:
            Bank.open(path)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def refused_line(path: Path, line: bytes, match: str = DAMAGED, error: type[BankError] = BankCorruptError) -> None:
    forge(path, line)
    refused(path, match, error)


def refused_record(path: Path, record: Json, match: str = DAMAGED, error: type[BankError] = BankCorruptError) -> None:
    forge_record(path, record)
    refused(path, match, error)


def steps(bank: Bank) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Everything that can be read of an open bank."""
    yield "verify", bank.verify
    yield "fingerprint", lambda: repr(bank.fingerprint)
    yield "special", lambda: (bank.model_info, bank.versions, bank.plan_digest, bank.plan.settings, bank.blocks())
    for name in bank.hook_names:
        yield f"{name}/vectors", lambda name=name: bank.vectors(name).tobytes()
        yield f"{name}/norms", lambda name=name: bank.norms(name).tobytes()
        yield f"{name}/mean", lambda name=name: bank.mean(name).tobytes()
        yield f"{name}/std", lambda name=name: bank.std(name).tobytes()
    for i in range(bank.n_rows):
        yield f"context {i}", lambda i=i: bank.row(i).context()
        yield f"prompt {i}", lambda i=i: (bank.row(i).prompt_text, bank.row(i).prompt_tokens)


def read_all(path: Path) -> dict[str, Any]:
    with Bank.open(path) as bank:
        return {name: read() for name, read in steps(bank)}


def read_or_refuse(path: Path) -> None:
    """No other error than the package's, whatever is read."""
    with suppress(LatentLensError), Bank.open(path) as bank:
        for _, read in steps(bank):
            with suppress(LatentLensError):
                read()


def attribute_paths() -> list[tuple[str, ...]]:
    attributes = record_of(GOLDEN)["attributes"]
    inner = [(outer, key) for outer in ("model", "plan") for key in attributes[outer]]
    return [("attributes", *keys) for keys in [*((key,) for key in attributes), *inner]]


def renamed(record: dict[str, Json], old: str, new: str) -> dict[str, Json]:
    """The record of a bank whose hook name is another."""
    names = [new if name == old else name for name in record["attributes"]["hook_names"]]
    datasets = {}
    for name, place in record["datasets"].items():
        parts = name.split("/")
        parts[1:2] = [new] if parts[1:2] == [old] else parts[1:2]
        datasets["/".join(parts)] = place
    return record | {"attributes": record["attributes"] | {"hook_names": names}, "datasets": datasets}


def arrays_of_one_row() -> dict[str, np.ndarray]:
    return {
        "tokens": np.zeros(1, np.int32),
        "prompt_starts": np.array([0, 1]),
        "row_tokens": np.array([0]),
        "block_starts": np.array([0, 1]),
        "token_ids": np.zeros(1, np.int32),
        "token_bytes": np.frombuffer(b"x", np.uint8),
        "token_byte_starts": np.array([0, 1]),
        "journal": np.ones(1, np.uint8),
        "fingerprint/tokens": np.zeros(0, np.int32),
        "fingerprint/prompt_starts": np.array([0]),
        f"fingerprint/{POST}": np.zeros((0, 4), np.float32),
        f"hooks/{POST}/norms": np.ones(1, np.float32),
        f"hooks/{POST}/checksums": np.zeros(1, np.uint64),
        f"hooks/{POST}/mean": np.zeros(4),
        f"hooks/{POST}/std": np.zeros(4),
        f"hooks/{POST}/vectors": np.zeros((1, 4), np.uint16),
    }
