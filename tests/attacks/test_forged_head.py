"""Heads that lie about shapes, offsets, dtypes, names and sizes, under checksums that fit."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash
from support.forge import (
    SIZE,
    VECTORS,
    Json,
    attribute_paths,
    forge,
    forge_record,
    item_at,
    put,
    read_all,
    record_of,
    refit,
    refused,
    refused_line,
    refused_record,
    renamed,
)
from support.golden import GOLDEN, MID, POST, head_of

from tl_latentlens import cli
from tl_latentlens.bank.bank import Bank
from tl_latentlens.bank.head import MAX_USER_BLOCK
from tl_latentlens.cli.info import info
from tl_latentlens.cli.options import DataOptions
from tl_latentlens.errors import BankError

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


_SHARD = {"index": 1, "n": 2, "first_row": 5, "first_prompt": 0, "n_rows": 20, "n_prompts": 9, "plan_digest": "0" * 64}


@pytest.mark.parametrize(
    "change",
    [
        {"index": 2}, {"index": -1}, {"n": 0}, {"n": 10**18}, {"first_row": -1}, {"first_row": 11}, {"n_rows": 5},
        {"first_prompt": 9}, {"n_prompts": 0}, {"n": "2"}, {"n": 2.0}, {"index": None}, {"plan_digest": 5},
        {"plan_digest": "\x1b[31m"}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_shard_that_cannot_be(path: Path, change: dict[str, Json]) -> None:
    record = record_of(path)
    record["attributes"]["shard"] = _SHARD | change
    refused_record(path, record)
    record["attributes"]["shard"] = {key: value for key, value in _SHARD.items() if key not in change}
    if "more" not in change:
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


@pytest.mark.parametrize(
    "keys", [*attribute_paths(), ("attributes",), ("datasets",), ("complete",), ("digest",), ("size",)], ids="/".join
)
def test_a_key_of_the_head_missing_renamed_or_of_another_type(path: Path, keys: tuple[str, ...]) -> None:
    record = record_of(path)
    outer = item_at(record, keys[:-1])
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


TEXT_PATHS = [keys for keys in attribute_paths() if isinstance(item_at(record_of(GOLDEN), keys), str)]


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
    info(path, data=DataOptions())
    shown = capsys.readouterr().out
    assert shown.count(text) >= 5
    assert f" {text.replace('/', '')}  [10, 4]" in shown
