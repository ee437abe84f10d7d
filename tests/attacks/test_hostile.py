"""Bank files made to deceive: each is refused with an error of the package, or read exactly as its head says.

Checksums tell of damage and are no signature, so most files here carry checksums that fit: what they claim must do no harm.
"""

import ast
import copy
import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden import GOLDEN, MID, POST, head_of

import tl_latentlens as tll
from tl_latentlens import cli
from tl_latentlens.bank.bank import Bank
from tl_latentlens.bank.head import MAX_USER_BLOCK, DatasetPlace, Head, digest_of, parse_head
from tl_latentlens.errors import BankCorruptError, BankError, LatentLensError

VECTORS = f"hooks/{POST}/vectors"
SIZE = 8192  # of the golden file's user block
FUZZ = settings(max_examples=300, deadline=None, derandomize=True, database=None)
Json = Any


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return Path(shutil.copyfile(GOLDEN, tmp_path / "a.h5"))


# Files whose checksums fit


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


def _at(record: Json, keys: Sequence[str | int]) -> Json:
    for key in keys:
        record = record[key]
    return record


def put(record: Json, keys: Sequence[str | int], value: Json) -> None:
    _at(record, keys[:-1])[keys[-1]] = value


# What a test asks of them


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


@pytest.fixture(scope="module")
def original() -> dict[str, Any]:
    return read_all(GOLDEN)


# Tampering through HDF5


def _replace(file: h5py.File, put_there: Callable[[], Any]) -> None:
    file.move(VECTORS, "kept")  # its bytes stay where they are
    put_there()


def external_link(file: h5py.File, outside: Path) -> None:
    _replace(file, lambda: file.__setitem__(VECTORS, h5py.ExternalLink(str(outside), "/secret")))


def soft_link(file: h5py.File, outside: Path) -> None:
    _replace(file, lambda: file.__setitem__(VECTORS, h5py.SoftLink("/../../secret")))


def link_in_a_circle(file: h5py.File, outside: Path) -> None:
    file[f"hooks/{POST}/again"] = file["hooks"]


def virtual_dataset(file: h5py.File, outside: Path) -> None:
    layout = h5py.VirtualLayout((10, 4), "uint16")
    layout[:] = h5py.VirtualSource(str(outside), "secret", (10, 4))
    _replace(file, lambda: file.create_virtual_dataset(VECTORS, layout))


def external_storage(file: h5py.File, outside: Path) -> None:
    _replace(file, lambda: file.create_dataset(VECTORS, (10, 4), "uint16", external=[(str(outside), 0, 80)]))


def gzip(file: h5py.File, outside: Path) -> None:
    array = file[VECTORS][:]
    _replace(file, lambda: file.create_dataset(VECTORS, data=array, chunks=(5, 4), compression="gzip"))


def unknown_filter(file: h5py.File, outside: Path) -> None:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((10, 4))
    properties.set_filter(31337, h5py.h5z.FLAG_OPTIONAL, (1, 2, 3))
    space = h5py.h5s.create_simple((10, 4))
    _replace(file, lambda: h5py.h5d.create(file.id, VECTORS.encode(), h5py.h5t.NATIVE_UINT16, space, properties))
    file[VECTORS].id.write_direct_chunk((0, 0), b"nonsense", 0)


def resized(file: h5py.File, outside: Path) -> None:
    _replace(file, lambda: file.create_dataset(VECTORS, (1000, 4), "uint16", maxshape=(None, 4)))


def retyped(file: h5py.File, outside: Path) -> None:
    _replace(file, lambda: file.create_dataset(VECTORS, data=[b"text"] * 10, dtype=h5py.string_dtype()))


def attribute_changed(file: h5py.File, outside: Path) -> None:
    file.attrs["hook_names"] = json.dumps(["other"])


def thousands_of_attributes(file: h5py.File, outside: Path) -> None:
    for i in range(2000):
        file.attrs[f"a{i}"] = i


def huge_attribute(file: h5py.File, outside: Path) -> None:
    file[VECTORS].attrs["huge"] = np.zeros(60_000, np.uint8)


def attribute_not_utf8(file: h5py.File, outside: Path) -> None:
    kind = h5py.h5t.TypeID.copy(h5py.h5t.C_S1)
    kind.set_size(4)
    kind.set_cset(h5py.h5t.CSET_UTF8)
    del file.attrs["model"]
    attribute = h5py.h5a.create(file.id, b"model", kind, h5py.h5s.create(h5py.h5s.SCALAR))
    attribute.write(np.array(b"\xff\xfe{\x80", "S4"), kind)


TAMPERINGS = [
    external_link,
    soft_link,
    link_in_a_circle,
    virtual_dataset,
    external_storage,
    gzip,
    unknown_filter,
    resized,
    retyped,
    attribute_changed,
    thousands_of_attributes,
    huge_attribute,
    attribute_not_utf8,
]


@pytest.fixture(params=TAMPERINGS, ids=lambda tamper: tamper.__name__)
def tampered(request: pytest.FixtureRequest, path: Path) -> Path:
    """A bank changed through HDF5; what it leads to is a pipe, which blocks whoever opens it."""
    os.mkfifo(path.with_name("pipe"))
    with h5py.File(path, "r+") as file:
        request.param(file, path.with_name("pipe"))
    return path


def test_a_bank_changed_through_hdf5_is_refused(tampered: Path) -> None:
    refused(tampered, r"a\.h5: metadata does not match its checksum")


def test_no_link_or_filter_is_followed_and_hdf5_never_asked(
    tampered: Path, original: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refit(tampered)

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("HDF5 was asked")

    for module, name in ((h5py, "File"), (h5py.h5f, "open"), (h5py.h5d, "open"), (h5py.h5o, "open"), (h5py.h5g, "open")):
        monkeypatch.setattr(module, name, asked)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for the pipe"))
    signal.alarm(20)
    try:
        assert read_all(tampered) == original
        index = tll.ContextualIndex(tampered, device="cpu")
        found = index.search(torch.tensor([0.5, -0.5, 0.5, -0.5])).neighbors()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert found[0].similarity == 1
    assert found[0].context == Bank.open(GOLDEN).row(5).context()


def test_nothing_but_the_datasets_of_the_head_is_read(path: Path, original: dict[str, Any]) -> None:
    data = path.read_bytes()
    kept = bytearray(b"\xff" * len(data))
    for start, n_bytes in [(0, SIZE), *((place.offset, place.n_bytes) for place in head_of(path).datasets.values())]:
        kept[start : start + n_bytes] = data[start : start + n_bytes]
    path.write_bytes(kept)
    refused(path, "metadata does not match its checksum")
    refit(path)
    assert read_all(path) == original


def test_the_head_decides_what_is_read(path: Path) -> None:
    """Two datasets of one shape, exchanged in the head alone: read as it says, and the blocks' checksums tell."""
    bank, head = Bank.open(GOLDEN), head_of(path)
    norms = [f"hooks/{name}/norms" for name in (POST, MID)]
    refit(path, replace(head, datasets=head.datasets | dict(zip(norms, (head.datasets[n] for n in norms[::-1]), strict=True))))
    opened = Bank.open(path)
    assert opened.norms(POST).tolist() == bank.norms(MID).tolist()
    with pytest.raises(BankCorruptError, match="block 0"):
        opened.verify()
    with pytest.raises(BankCorruptError, match="block 0"):
        tll.ContextualIndex(path, device="cpu")


# Heads that lie

WRONG_NUMBERS = {
    "10^12": 10**12,
    "10^18": 10**18,
    "2^31": 2**31,
    "2^63-1": 2**63 - 1,
    "2^63": 2**63,
    "2^64+10": 2**64 + 10,
    "10^4000": 10**4000,
    "-1": -1,
    "-10^18": -(10**18),
    "-10^4000": -(10**4000),
    "float": 10.0,
    "1e300": 1e300,
    "NaN": math.nan,
    "Infinity": math.inf,
    "-Infinity": -math.inf,
    "true": True,
    "null": None,
    "text": "10",
    "list": [10],
    "object": {"10": 10},
}
SHAPES = [
    *((name, 0) for name in ("tokens", "prompt_starts", "row_tokens", "journal", VECTORS)),
    (VECTORS, 1),
    (f"fingerprint/{MID}", 1),
]
PAYLOAD = [f"hooks/{hook}/{part}" for hook in (POST, MID) for part in ("vectors", "norms")]
AXES = {
    "rows": [(name, 0) for name in ("row_tokens", *PAYLOAD)],
    "d": [(VECTORS, 1), (f"fingerprint/{POST}", 1), (f"hooks/{POST}/mean", 0), (f"hooks/{POST}/std", 0)],
    "tokens": [("tokens", 0)],
    "bytes": [("token_bytes", 0)],
}
SIZES = {f"{n:.0e}": n for n in (-1, 10**6, 10**12, 10**18, 2**61, 2**63, 2**64)}
SIZES |= {"4001 digits": 10**4000, "4300 digits": 10**4299}


@pytest.mark.parametrize("dataset", SHAPES, ids=str)
@pytest.mark.parametrize("value", WRONG_NUMBERS.values(), ids=WRONG_NUMBERS)
def test_a_shape_that_cannot_be(path: Path, dataset: tuple[str, int], value: Json) -> None:
    record = record_of(path)
    put(record, ["datasets", dataset[0], 2, dataset[1]], value)
    refused_record(path, record)


@pytest.mark.parametrize("axes", [["rows"], ["d"], ["tokens"], ["bytes"], ["rows", "d"], list(AXES)], ids=str)
@pytest.mark.parametrize("value", SIZES.values(), ids=SIZES)
def test_shapes_that_fit_each_other_but_not_the_file(path: Path, axes: list[str], value: int) -> None:
    record = record_of(path)
    for name, axis in (place for names in axes for place in AXES[names]):
        put(record, ["datasets", name, 2, axis], value)
    refused_record(path, record)


@pytest.mark.parametrize("shape", [[], [10], [10, 4, 1], [[10], 4], [40, 1], [4, 10], 40, "10", None, [[[[[]]]]]], ids=str)
def test_dimensions_that_are_not_those_of_vectors(path: Path, shape: Json) -> None:
    record = record_of(path)
    record["datasets"][VECTORS][2] = shape
    refused_record(path, record)


@pytest.mark.parametrize(
    "dtype",
    ["O", "object", "<U10", "S4", "V8", "void", "int64", "<i4", ">i4", "i4", "i", "float32", "complex128", "M8[s]", "i4,i4",
     "(2,)i4", "pickle", "", "\x1b[31m", "x" * 3000, "__import__('os')", "bool", "bfloat16",
     [["a", "<i4"]], {"names": ["a"], "formats": ["O"]}, 5, None, True],
    ids=lambda dtype: repr(dtype)[:12],
)  # fmt: skip
@pytest.mark.parametrize("name", ["tokens", VECTORS])
def test_a_dtype_that_is_not_the_dataset_s(path: Path, name: str, dtype: Json) -> None:
    record = record_of(path)
    record["datasets"][name][1] = dtype
    refused_record(path, record)


@pytest.mark.parametrize("name", ["tokens", "journal", VECTORS, f"hooks/{MID}/checksums"])
@pytest.mark.parametrize(
    "offset",
    [*WRONG_NUMBERS.values(), 0, 1, 64, SIZE - 64, -64, "after", "last", "unaligned", "on another", "into another"],
    ids=[*WRONG_NUMBERS, *"0 1 head head's-end -64 after last unaligned on into".split()],
)
def test_an_offset_where_nothing_can_stand(path: Path, name: str, offset: Json) -> None:
    record = record_of(path)
    datasets = record["datasets"]
    other = "tokens" if name != "tokens" else "row_tokens"
    named = {"after": path.stat().st_size, "last": path.stat().st_size - 1, "unaligned": datasets[name][0] + 1,
             "on another": datasets[other][0], "into another": datasets[other][0] + 8}  # fmt: skip
    if name == "journal" and offset in ("last", "unaligned"):
        pytest.skip("a byte may stand anywhere")
    datasets[name][0] = named.get(offset, offset) if isinstance(offset, str) else offset
    refused_record(path, record)


@pytest.mark.parametrize("name", list(record_of(GOLDEN)["datasets"]))
def test_a_dataset_left_out(path: Path, name: str) -> None:
    record = record_of(path)
    del record["datasets"][name]
    refused_record(path, record, "it lists 21 datasets, expected 22")


@pytest.mark.parametrize("name", ["more", "", "/tokens", "hooks/other/vectors", f"hooks/{POST}/more", "\x1b[31m"])
def test_a_dataset_too_many(path: Path, name: str) -> None:
    record = record_of(path)
    record["datasets"][name] = record["datasets"]["tokens"]
    refused_record(path, record, "it lists 23 datasets, expected 22")
    del record["datasets"]["tokens"]
    refused_record(path, record)


@pytest.mark.parametrize("place", [[], [14400], [14400, "int32"], [14400, "int32", [14], 0], {"offset": 14400}, "abc", 5, None])
def test_a_place_that_is_none(path: Path, place: Json) -> None:
    record = record_of(path)
    record["datasets"]["tokens"] = place
    refused_record(path, record)


def attribute_paths() -> list[tuple[str, ...]]:
    attributes = record_of(GOLDEN)["attributes"]
    inner = [(outer, key) for outer in ("model", "plan") for key in attributes[outer]]
    return [("attributes", *keys) for keys in [*((key,) for key in attributes), *inner]]


@pytest.mark.parametrize(
    "keys", [*attribute_paths(), ("attributes",), ("datasets",), ("complete",), ("digest",), ("size",)], ids="/".join
)
def test_a_key_of_the_head_missing_renamed_or_of_another_type(path: Path, keys: tuple[str, ...]) -> None:
    record = record_of(path)
    outer = _at(record, keys[:-1])
    value = outer.pop(keys[-1])
    line = json.dumps(record).encode()
    if keys == ("size",):
        refused_line(path, line, "is not a tl-latentlens bank", BankError)
        return
    refused_line(path, line)
    outer["\x1b[31m"] = value
    refused_line(path, json.dumps(record).encode())
    del outer["\x1b[31m"]
    for wrong in (1.5, math.nan, [None], [1.0], [[]], {"a": 1}, {"a": {"b": None}}, None, "text", 7, True, [True], ["a", 5]):
        fits = type(wrong) is type(value) and not isinstance(wrong, list)
        if fits or (type(wrong), keys[-1]) == (int, "max_rows_per_token"):
            continue
        outer[keys[-1]] = wrong
        refused_line(path, json.dumps(record).encode())


@pytest.mark.parametrize("inside", [("attributes",), ("attributes", "model"), ("attributes", "plan")], ids="/".join)
def test_an_attribute_too_many(path: Path, inside: tuple[str, ...]) -> None:
    record = record_of(path)
    put(record, [*inside, "more"], 1)
    refused_record(path, record, "expected the keys")


def renamed(record: dict[str, Json], old: str, new: str) -> dict[str, Json]:
    """The record of a bank whose hook name is another."""
    names = [new if name == old else name for name in record["attributes"]["hook_names"]]
    datasets = {}
    for name, place in record["datasets"].items():
        parts = name.split("/")
        parts[1:2] = [new] if parts[1:2] == [old] else parts[1:2]
        datasets["/".join(parts)] = place
    return record | {"attributes": record["attributes"] | {"hook_names": names}, "datasets": datasets}


BAD_NAMES = "|a/b|/|../../x|\x1b[31mred\x1b[0m|a\nb|a\0b|\r|\x7f|\x9b31m|\u202egnp.exe|\u2028|\ud800".split("|")


@pytest.mark.parametrize("name", [*BAD_NAMES, MID], ids=ascii)
def test_a_hook_name_that_is_none(path: Path, name: str) -> None:
    refused_record(path, renamed(record_of(path), POST, name))


@pytest.mark.parametrize("name", ["tokens", "prompt_starts"])
def test_a_hook_name_with_a_dataset_of_the_fingerprint_s_name(path: Path, name: str) -> None:
    """fingerprint/tokens would be two datasets."""
    record = renamed(record_of(path), POST, name)
    assert len(record["datasets"]) == 21
    refused_record(path, record)


def test_hook_names_may_be_of_any_script(path: Path, original: dict[str, Any]) -> None:
    forge_record(path, renamed(record_of(path), POST, "schicht.0.木"))
    assert Bank.open(path).hook_names == ("schicht.0.木", MID)
    assert Bank.open(path).row(1).context() == original["context 1"]


TEXT_PATHS = [keys for keys in attribute_paths() if isinstance(_at(record_of(GOLDEN), keys), str)]


@pytest.mark.parametrize("keys", TEXT_PATHS, ids="/".join)
@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "a\nb", "\ud800", "\u202e"], ids=ascii)
def test_no_text_of_the_head_can_write_to_a_terminal(path: Path, keys: tuple[str, ...], text: str) -> None:
    record = record_of(path)
    put(record, keys, text)
    refused_record(path, record)


@pytest.mark.parametrize("versions", [{"a": "\x1b[31m"}, {"\x1b[31m": "1"}, {"a": 1}, {"a": None}, {"\ud800": "1"}], ids=ascii)
def test_versions_that_are_none(path: Path, versions: Json) -> None:
    record = record_of(path)
    record["attributes"]["versions"] = versions
    refused_record(path, record)


@pytest.mark.parametrize("size", [0, 1, 4096, 8191, 8193, 12288, 24576, 2**15, 2**20, 2**27, 999_999_999])
def test_a_user_block_of_no_size(path: Path, size: int) -> None:
    """Not a power of two, too small, or larger than the file."""
    record = record_of(path) | {"size": size}
    line = json.dumps(record).encode()
    half = line + b"\n" + xxhash.xxh3_64_hexdigest(line).encode() + b"\n"
    data = bytearray(path.read_bytes())
    for at in (0, size // 2):
        if 0 < at < len(data) or not at:
            data[at : at + len(half)] = half
    path.write_bytes(data)
    refused(path, rf"is damaged \(its size {size} is no power of two from 8192 up to the file's {len(data)} bytes\)")


def test_a_user_block_too_large_to_be_read(path: Path) -> None:
    line = json.dumps(record_of(path) | {"size": 2 * MAX_USER_BLOCK}).encode()
    os.truncate(path, 8 * MAX_USER_BLOCK)
    with path.open("r+b") as file:
        file.write(line + b"\n" + xxhash.xxh3_64_hexdigest(line).encode() + b"\n")
    refused(path, rf"is damaged \(its size {2 * MAX_USER_BLOCK} is no power of two")


@pytest.mark.parametrize("size", ["-8192", "8192.0", "1e4", '"8192"', "10000000000", "true", "[8192]", "0x2000"])
def test_a_user_block_whose_size_is_no_number(path: Path, size: str) -> None:
    forge(path, path.read_bytes().partition(b"\n")[0].replace(b'"size": 8192', b'"size": ' + size.encode()))
    refused(path, "is not a tl-latentlens bank", BankError)


def test_a_user_block_of_two_sizes(path: Path) -> None:
    forge(path, json.dumps(record_of(path)).encode().replace(b'"complete"', b'"size": 16384, "complete"', 1))
    refused(path, "its two copies differ")


@pytest.mark.parametrize("version", [2, 999_999_999])
def test_a_version_that_is_not_this_one(path: Path, version: int) -> None:
    record = record_of(path) | {"version": version}
    refused_record(path, record, f"is of bank version {version}; this package reads up to 1", BankError)


@pytest.mark.parametrize("version", ["0", "00", "01", "-1", "1.0", "10000000000", '"1"', "true", "null"])
def test_a_version_that_is_no_number(path: Path, version: str) -> None:
    forge(path, path.read_bytes().partition(b"\n")[0].replace(b'"version": 1', b'"version": ' + version.encode()))
    refused(path, "is not a tl-latentlens bank", BankError)


def test_a_bank_that_says_it_is_unfinished(path: Path) -> None:
    refit(path, replace(head_of(path), complete=False))
    refused(path, "is an unfinished bank", BankError)


@pytest.mark.parametrize("digest", ["", "0" * 32, "x", "g" * 32])
def test_a_digest_that_does_not_fit(path: Path, digest: str) -> None:
    forge(path, json.dumps(record_of(path) | {"digest": digest}).encode())
    refused(path, "metadata does not match its checksum")


START = b'{"format": "tl-latentlens bank", "version": 1, "size": 8192, '


@pytest.mark.parametrize(
    "rest",
    [
        b"",
        b"}",
        b'"complete": true}',
        b'"complete": true, "attributes": {}, "datasets": {}, "digest": ""}',
        b'"complete": true, "attributes": [], "datasets": [], "digest": ""}',
        b'"complete": true, "attributes": null, "datasets": null, "digest": ""}',
        b'"complete": true, ' + b'"a": ' * 3,
        b'"a": ' + b"[" * 3900 + b"}",
        b'"a": ' + b"[" * 1900 + b"]" * 1900 + b"}",
        b'"a": ' + b'{"a":' * 600 + b"1" + b"}" * 601,
        b'"a": ' + b"9" * 3900 + b"}",
        b'"a": 1e999999999999}',
        b'"a": "\xff\xfe\x80"}',
        '"a": "ä"}'.encode(),
        b'"a": "\xed\xa0\x80"}',
        b'"a": "\\ud800"}',
        b'"a": "\\udc00\\ud800"}',
        b'"a": "\t"}',
        b'"a": "\0"}',
        b'"a": 1}\r',
        b'"a": 1} {}',
        b'"a": 0x10}',
        b'"a": NaN}',
        b'"a": __import__("os")}',
    ],
    ids=lambda rest: ascii(rest)[:30],
)
def test_a_line_that_is_no_head(path: Path, rest: bytes) -> None:
    refused_line(path, START + rest)


@pytest.mark.parametrize(
    "line",
    [b"[1, 2]", b"5", b"null", b"[]", b'"text"', b"{}", b"", b"[" * 3000, b"\xff", b'{"format": "other"}'],
    ids=lambda line: ascii(line)[:20],
)
def test_a_line_that_is_no_object(path: Path, line: bytes) -> None:
    refused_line(path, line, "is not a tl-latentlens bank", BankError)


def test_keys_twice(path: Path, original: dict[str, Any]) -> None:
    """The last one counts, for the checks as for the reading."""
    line = json.dumps(record_of(path)).encode()
    forge(path, line.replace(b'"complete": true', b'"complete": 5, "complete": true'))
    assert read_all(path) == original
    refused_line(path, line.replace(b'"complete": true', b'"complete": true, "complete": 5'), "is damaged")
    twice = line.replace(b'"tokens": [', b'"tokens": [-64, "O", [1000000000000000]], "tokens": [')
    forge(path, twice)
    assert read_all(path) == original


def test_copies_that_differ(path: Path) -> None:
    data = bytearray(path.read_bytes())
    record = record_of(path)
    record["attributes"]["n_truncated"] = 99
    forge(path, json.dumps(record).encode())
    other = path.read_bytes()[: SIZE // 2]
    for copies in (data[: SIZE // 2] + other, other + data[: SIZE // 2]):
        path.write_bytes(copies + data[SIZE:])
        refused(path, "its two copies differ")


# Arrays that lie

INT64, INT32 = np.iinfo(np.int64).max, np.iinfo(np.int32).max
ROWS = [1, 2, 3, 6, 7, 8, 9, 11, 12, 13]
INDICES = "tokens prompt_starts row_tokens block_starts token_ids token_byte_starts fingerprint/prompt_starts".split()


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


LIMITED = """
import resource, sys
from pathlib import Path
from tl_latentlens.bank.bank import Bank
from tl_latentlens.errors import BankError
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + int(sys.argv[2]), -1))
for path in sorted(Path(sys.argv[1]).glob("*.h5")):
    try:
        Bank.open(path)
        print(path.stem, "opened")
    except BankError as error:
        print(path.stem, "refused")
"""


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
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, str(folder), str(2**29)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:-1] == [f"{name} refused" for name in sorted(fill)]


# What is printed


@pytest.mark.parametrize("text", ["[/nope]", "[bold]x", "[link=http://x.example]y[/link]", "\\[x]"])
def test_a_head_does_not_style_or_stop_the_command_line(
    path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = renamed(record_of(path), POST, text.replace("/", ""))
    record["attributes"]["model"] |= {"name": text, "class_name": text, "dtype": text}
    record["attributes"]["versions"] = {text: text}
    forge_record(path, record)
    monkeypatch.setattr(cli.console, "width", 300)
    cli.info(path)
    shown = capsys.readouterr().out
    assert shown.count(text) >= 5
    assert f" {text.replace('/', '')}  [10, 4]" in shown


# No pickle


def package_files() -> list[Path]:
    return sorted(Path(tll.__file__).parent.rglob("*.py"))


def test_the_package_never_unpickles() -> None:
    unsafe = {"pickle", "_pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle", "pandas.io.pickle"}
    assert len(package_files()) > 20
    for path in package_files():
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Call):
                called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert called not in ("eval", "exec"), (path, node.lineno)
                assert not called.endswith("read_pickle"), (path, node.lineno)
                assert keywords.get("allow_pickle", "False") == "False", (path, node.lineno)
                if called == "torch.load":
                    assert keywords.get("weights_only") == "True", (path, node.lineno)
            assert not {name.partition(".")[0] for name in names} & unsafe, (path, node.lineno)


class _Touches:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickled_file_is_no_bank_and_is_not_unpickled(tmp_path: Path) -> None:
    mark, path = tmp_path / "unpickled", tmp_path / "a.h5"
    saved, array = io.BytesIO(), io.BytesIO()
    torch.save(_Touches(mark), saved)
    np.save(array, np.array([_Touches(mark)], object), allow_pickle=True)
    for data in (pickle.dumps(_Touches(mark)), pickle.dumps(_Touches(mark), 0), saved.getvalue(), array.getvalue()):
        path.write_bytes(data)
        for load in (Bank.open, lambda path: tll.ContextualIndex(path, device="cpu")):
            with pytest.raises(BankError, match=r"a\.h5: is not a tl-latentlens bank"):
                load(path)
        path.write_bytes(GOLDEN.read_bytes()[:SIZE] + data.ljust(2**15, b"\0"))
        refused(path, "metadata does not match its checksum")
        refit(path)
        read_or_refuse(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(_Touches(mark)))
    assert mark.exists()


# Any bytes


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "a.h5"


def _edit(data: bytearray, kind: str, at: int, length: int, noise: bytes) -> None:
    at %= len(data) + 1
    if kind == "change":
        data[at : at + len(noise)] = noise[: len(data) - at]
    elif kind == "delete":
        del data[at : at + length]
    elif kind == "repeat":
        data[at:at] = data[at : at + length]
    elif kind == "insert":
        data[at:at] = noise
    else:
        del data[at:]


EDITS = st.lists(
    st.tuples(
        st.sampled_from("change change delete repeat insert cut".split()),
        st.one_of(st.integers(0, 2100), st.integers(0, 30_000)),
        st.sampled_from([1, 2, 8, 64, 512, 4096]),
        st.binary(min_size=1, max_size=16),
    ),
    min_size=1,
    max_size=3,
)


@FUZZ
@given(edits=EDITS)
def test_any_edited_file_is_refused_or_reads_as_before(scratch: Path, original: dict[str, Any], edits: list[Any]) -> None:
    data = bytearray(GOLDEN.read_bytes())
    for edit in edits:
        _edit(data, *edit)
    scratch.write_bytes(data)
    with suppress(LatentLensError):
        assert read_all(scratch) == original


@FUZZ
@given(edits=EDITS)
def test_any_edited_file_with_fitting_checksums_raises_nothing_else(scratch: Path, edits: list[Any]) -> None:
    data = bytearray(GOLDEN.read_bytes())
    for edit in edits:
        _edit(data, *edit)
    scratch.write_bytes(data)
    line = bytes(data).partition(b"\n")[0]
    if len(line) > SIZE // 2 - 18:
        return
    forge(scratch, line)
    with suppress(LatentLensError, KeyError, TypeError, ValueError, OSError):  # the line may be no head
        refit(scratch, parse_head(line))
    read_or_refuse(scratch)


def _paths(value: Json, keys: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*keys, key)
        yield from _paths(item, (*keys, key))


HEAD_PATHS = list(_paths(record_of(GOLDEN)))
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 8, 64, 8192, 28_176, 2**31, 2**63 - 1, 2**63, 10**18, 10**4000]),
    st.integers(0, 440).map(lambda n: 64 * n),
    st.integers(0, 40),
    st.integers(),
)
TEXTS = st.one_of(st.text(max_size=6), st.sampled_from(["float32", "uint16", POST]))
VALUES = st.recursive(
    st.one_of(NUMBERS, st.none(), st.booleans(), st.floats(), TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
CHANGES = st.lists(
    st.tuples(st.sampled_from(HEAD_PATHS), st.sampled_from(["replace", "number", "graft", "delete", "add"]), VALUES, NUMBERS,
              st.sampled_from(HEAD_PATHS)),
    min_size=1,
    max_size=4,
)  # fmt: skip


@FUZZ
@given(changes=CHANGES)
def test_any_head_with_fitting_checksums_raises_nothing_else(scratch: Path, changes: list[Any]) -> None:
    record = record_of(GOLDEN)
    for keys, kind, value, number, other in changes:
        with suppress(KeyError, IndexError, TypeError):  # an earlier change took it away
            if kind == "delete":
                del _at(record, keys[:-1])[keys[-1]]
            elif kind == "add":
                put(record, [*keys, "more"], value)
            else:
                graft = copy.deepcopy(_at(record, other)) if kind == "graft" else number
                put(record, keys, value if kind == "replace" else graft)
    scratch.write_bytes(GOLDEN.read_bytes())
    if len(json.dumps(record)) < SIZE // 2 - 18:
        forge_record(scratch, record)
        read_or_refuse(scratch)


@FUZZ
@given(
    pokes=st.lists(
        st.tuples(
            st.one_of(st.sampled_from(INDICES), st.sampled_from(sorted(record_of(GOLDEN)["datasets"]))),
            st.integers(0, 13),
            st.sampled_from([INT64, INT32, -1, -INT64 - 1]) | st.integers(0, 15),
        ),
        min_size=1,
        max_size=2,
    )
)
def test_any_numbers_with_fitting_checksums_raise_nothing_else(scratch: Path, pokes: list[tuple[str, int, int]]) -> None:
    data = bytearray(GOLDEN.read_bytes())
    for name, at, number in pokes:
        place = head_of(GOLDEN).datasets[name]
        size = np.dtype(place.dtype).itemsize
        start = place.offset + at * size % place.n_bytes
        data[start : start + size] = number.to_bytes(8, "little", signed=True)[:size]
    scratch.write_bytes(data)
    refit(scratch)
    read_or_refuse(scratch)
