"""The head of a bank file: a JSON line in the HDF5 user block that says what the file holds and where, under a checksum.

Banks are read by their head alone, never through the HDF5 library, so no link, filter, virtual dataset or parser defect
of HDF5 can be reached by a file that a stranger made. Everything in the head is checked before it is used: types, names,
shapes that fit each other, and offsets that lie inside the file. Nothing is allocated here but the head itself.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, BinaryIO, get_args, get_origin

import numpy as np
import xxhash

from tl_latentlens.bank.datasets import CHECKSUMS, JOURNAL, MEAN, NORMS, STD, VECTORS, dataset_spec, hook_dataset, n_datasets
from tl_latentlens.bank.format import DTYPES, FORMAT, MAX_SHARDS, VERSION, BankMetadata, ShardRecord
from tl_latentlens.corpus.plan import OPTIONAL_FIELDS, to_json_dict
from tl_latentlens.errors import BankCorruptError, BankError

_HEAD_START = re.compile(rb'\{"format": "%s", "version": ([1-9]\d{0,8}), "size": (\d{1,9}), ' % FORMAT.encode())
MIN_USER_BLOCK, MAX_USER_BLOCK = 1 << 13, 1 << 24  # In bytes. The largest holds some 8,000 hook names.
_HASH_BYTES = 1 << 18  # So many bytes are hashed while they are in the processor's cache.


@dataclass(frozen=True)
class DatasetPlace:
    """The place of a dataset in the file.

    Attributes:
        offset: Bytes from the start of the file.
        dtype: NumPy's name of it.
        shape: Length of each axis.
    """

    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Its size in the file."""
        size = np.dtype(self.dtype).itemsize
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class Head:
    """All that a bank file says before its arrays are read.

    Attributes:
        size: Bytes of the user block, in which the head stands twice.
        complete: False while the bank is being built.
        metadata: Model, plan and settings.
        datasets: Name → place, for every dataset.
        digest: xxh3-128 over the file without the user block and without `unhashed`, hex.
    """

    size: int
    complete: bool
    metadata: BankMetadata
    datasets: dict[str, DatasetPlace]
    digest: str = "0" * 32

    @property
    def unhashed(self) -> list[tuple[int, int]]:
        """(offset, size) of each dataset that the digest leaves out.

        Vectors and norms are under the checksums of their blocks. While the bank is built, all that still changes is left out.
        """
        parts = (VECTORS, NORMS) if self.complete else (VECTORS, NORMS, CHECKSUMS, MEAN, STD)
        names = [hook_dataset(name, part) for name in self.metadata.hook_names for part in parts]
        names += [] if self.complete else [JOURNAL]
        return sorted((self.datasets[name].offset, self.datasets[name].n_bytes) for name in names)

    def encode(self) -> bytes:
        """One half of the user block: a line of JSON, its checksum on a second line, zeros."""
        datasets = {name: [place.offset, place.dtype, place.shape] for name, place in self.datasets.items()}
        record = {"format": FORMAT, "version": VERSION, "size": self.size, "complete": self.complete, "digest": self.digest}
        line = json.dumps(record | {"attributes": to_json_dict(self.metadata), "datasets": datasets}).encode()
        return (line + b"\n" + xxhash.xxh3_64_hexdigest(line).encode() + b"\n").ljust(self.size // 2, b"\0")


def user_block_size(metadata: BankMetadata) -> int:
    """Bytes before the HDF5 data: a power of two with room for the head twice, wherever its datasets will stand.

    Raises:
        BankError: More hook names than a head can list.
    """
    spec = dataset_spec(metadata)
    datasets = {name: DatasetPlace(10**15, dtype, (10**15,) * len(axes)) for name, (dtype, axes) in spec.items()}
    size = max(MIN_USER_BLOCK, 2 << (len(Head(2, True, metadata, datasets).encode()) - 1).bit_length())
    if size > MAX_USER_BLOCK:
        raise BankError(f"got {len(metadata.hook_names)} hook names, more than one file can list: bank fewer in each")
    return size


def read_head(file: BinaryIO, copy: int = 0) -> Head:
    """The head of an open bank file, checked.

    Args:
        file: Opened for reading, in binary.
        copy: 0 for the first copy, by which banks are read; 1 for the second, from which a build goes on that was killed
            while it wrote the first.

    Raises:
        BankError: Not a bank, or of a newer version.
        BankCorruptError: The head is damaged, or describes a file that cannot be.
    """
    file.seek(0)
    start = _HEAD_START.match(file.read(4096))
    if start is None:
        raise BankError("is not a tl-latentlens bank, or its first bytes are damaged; `tl-latentlens build` makes banks")
    version, size = int(start[1]), int(start[2])
    if version > VERSION:
        raise BankError(f"is of bank version {version}; this package reads up to {VERSION}: upgrade tl-latentlens")
    file_size = file.seek(0, 2)
    if not MIN_USER_BLOCK <= size <= min(MAX_USER_BLOCK, file_size) or size & (size - 1):
        raise _damaged_head(f"its size {size} is no power of two from {MIN_USER_BLOCK} up to the file's {file_size} bytes")
    file.seek(0)
    block = file.read(size)
    half = block[size // 2 * copy : size // 2 * (copy + 1)]
    line, _, rest = half.partition(b"\n")
    if rest[:17] != xxhash.xxh3_64_hexdigest(line).encode() + b"\n" or rest[17:].strip(b"\0"):
        raise _damaged_head("its checksum does not match")
    head = parse_head(line)
    if head.size != size or (head.complete and not copy and block[: size // 2] != block[size // 2 :]):
        raise _damaged_head("its two copies differ")
    for problem in _problems(head, file_size):
        raise _damaged_head(problem)
    return head


def digest_of(file: BinaryIO, head: Head) -> str:
    """xxh3-128, hex, over all bytes after the user block except the head's `unhashed` regions, and over the file's size."""
    digest = xxhash.xxh3_128()
    size, start = file.seek(0, 2), head.size
    for offset, length in [*head.unhashed, (size, 0)]:
        file.seek(start)
        while start < offset and (chunk := file.read(min(_HASH_BYTES, offset - start))):
            digest.update(chunk)
            start += len(chunk)
        start = max(start, offset + length)
    digest.update(str(size).encode())
    return digest.hexdigest()


def _damaged_head(why: str) -> BankCorruptError:
    return BankCorruptError(f"the head at the start of the file is damaged ({why[:300]}); copy the bank again or rebuild it")


def parse_head(line: bytes) -> Head:
    """The head that a line of JSON describes: types and keys are checked here, the numbers are not.

    Raises:
        BankCorruptError: It describes no head.
    """
    try:
        record = json.loads(line.decode("ascii"))
        places = {name: _typed(DatasetPlace, dict(zip(("offset", "dtype", "shape"), place, strict=True)))
                  for name, place in record["datasets"].items()}  # fmt: skip
        head = Head(
            _typed(int, record["size"]),
            _typed(bool, record["complete"]),
            _typed(BankMetadata, record["attributes"]),
            places,
            _typed(str, record["digest"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError) as error:
        raise _damaged_head(f"{type(error).__name__}: {str(error)[:200]}") from error
    return head


def _typed(kind: Any, value: Any) -> Any:
    """A value of JSON as `kind`: a dataclass, tuple[X, ...], dict[str, X], X | None or a plain type."""
    if type(value) is kind and kind is not str:
        return value
    if isinstance(kind, UnionType) and value is not None and len(kinds := set(get_args(kind)) - {type(None)}) == 1:
        return _typed(kinds.pop(), value)
    if is_dataclass(kind):
        kinds = {field.name: field.type for field in fields(kind)}
        if not isinstance(value, dict) or not set(kinds) - set(OPTIONAL_FIELDS) <= set(value) <= set(kinds):
            raise ValueError(f"expected the keys {list(kinds)}")
        present = {name: _typed(field_kind, value[name]) for name, field_kind in kinds.items() if name in value}
        return kind(**present)  # type: ignore[operator]
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_typed(get_args(kind)[0], item) for item in value)
    if get_origin(kind) is dict and isinstance(value, dict):
        return {_typed(str, name): _typed(get_args(kind)[1], item) for name, item in value.items()}
    plain_kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if type(value) not in plain_kinds and not (value is None and type(None) in plain_kinds):
        raise ValueError(f"got {str(value)[:40]!r}, expected {kind}")
    if isinstance(value, str) and not value.isprintable():
        raise ValueError(f"got {value[:40]!r}, which no terminal should be given")
    return value


def _problems(head: Head, file_size: int) -> Iterator[str]:
    """Everything that is wrong with a head; only the first is sure, since each check relies on those before it."""
    yield from _metadata_problems(head)
    yield from _shape_problems(head)
    yield from _place_problems(head, file_size)


def _metadata_problems(head: Head) -> Iterator[str]:
    metadata, names = head.metadata, head.metadata.hook_names
    if metadata.dtype not in DTYPES:
        yield f"dtype {metadata.dtype!r}, expected one of {list(DTYPES)}"
    if not names or len(set(names)) != len(names) or not all(name and "/" not in name for name in names):
        yield "hook names that are empty, repeated or hold a slash"
    if metadata.batch_tokens < 1:
        yield f"batch_tokens {metadata.batch_tokens}"
    if (shard := metadata.shard) and not 0 <= shard.index < shard.n <= MAX_SHARDS:
        yield f"shard {shard.index} of {shard.n}"
    # The number is compared first, because the names of all datasets would take memory.
    if len(head.datasets) != (expected := n_datasets(len(names))):
        yield f"it lists {len(head.datasets)} datasets, expected {expected}"
    if set(head.datasets) != set(dataset_spec(metadata)):
        yield f"its datasets are not those of the hook names {list(names)}"


def _shape_problems(head: Head) -> Iterator[str]:
    axis_lengths: dict[str, int] = {}
    for name, (dtype, axes) in dataset_spec(head.metadata).items():
        place = head.datasets[name]
        if place.dtype != dtype or len(place.shape) != len(axes):
            yield f"{name} is {place.dtype} of {len(place.shape)} dimensions, expected {dtype} of {len(axes)}"
        if not all(0 <= number < 2**63 for number in (place.offset, *place.shape)):
            yield f"{name} has numbers that no file has"
        for axis, length in zip(axes, place.shape, strict=True):
            axis, _, n_more = axis.partition("+")
            length -= int(n_more or 0)
            if length < 0 or axis_lengths.setdefault(axis, length) != length:
                yield f"{name} has shape {place.shape}, which does not fit the other datasets"
    for name, n_heads in head.metadata.n_heads.items():
        if name not in head.metadata.hook_names or n_heads < 1 or axis_lengths[f"d of {name}"] % n_heads:
            yield f"{n_heads} heads of {name}, which its vectors do not have"
    yield from _count_problems(head.metadata.shard, axis_lengths)


def _count_problems(shard: ShardRecord | None, axis_lengths: Mapping[str, int]) -> Iterator[str]:
    """A bank has rows; a shard may have none, and its rows and prompts are among those of the whole."""
    n_rows, n_prompts, n_blocks = (axis_lengths[axis] for axis in ("rows", "prompts", "blocks"))
    if bool(n_rows) != bool(n_blocks) or not (n_rows or shard):
        yield "no rows"
    if shard and not (0 <= shard.first_row <= shard.n_rows - n_rows and 0 <= shard.first_prompt <= shard.n_prompts - n_prompts):
        yield f"rows from {shard.first_row} or prompts from {shard.first_prompt} on, which the whole bank does not have"


def _place_problems(head: Head, file_size: int) -> Iterator[str]:
    needed = max(place.offset + place.n_bytes for place in head.datasets.values())
    if needed > file_size:
        raise BankCorruptError(f"the file is cut short: it has {file_size:,} bytes of at least {needed:,}; copy the bank again")
    previous_end = head.size
    for name, place in sorted(head.datasets.items(), key=lambda item: (item[1].offset, item[1].n_bytes)):
        end = place.offset + place.n_bytes
        if place.offset % np.dtype(place.dtype).itemsize or place.offset < previous_end or end > file_size:
            yield f"{name} stands at {place.offset} to {end} in a file of {file_size} bytes"
        previous_end = max(previous_end, end)
