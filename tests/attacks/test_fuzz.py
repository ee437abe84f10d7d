"""Any bytes: edited files, heads and numbers drawn at random are refused or read as before, and raise nothing else."""

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.forge import (
    INT32,
    INT64,
    SIZE,
    Json,
    forge,
    forge_record,
    item_at,
    put,
    read_all,
    read_or_refuse,
    record_of,
    refit,
)
from support.golden import GOLDEN, POST, head_of

from tl_latentlens.bank.head import parse_head
from tl_latentlens.errors import LatentLensError

FUZZ = settings(max_examples=300, deadline=None, derandomize=True, database=None)
INDICES = "tokens prompt_starts row_tokens block_starts token_ids token_byte_starts fingerprint/prompt_starts".split()


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
                del item_at(record, keys[:-1])[keys[-1]]
            elif kind == "add":
                put(record, [*keys, "more"], value)
            else:
                graft = copy.deepcopy(item_at(record, other)) if kind == "graft" else number
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
