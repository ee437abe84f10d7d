"""The head of a bank file: a JSON line in the HDF5 user block that says what the file holds and where, under a checksum.

Banks are read by their head alone, never through the HDF5 library, so no link, filter, virtual dataset or parser defect
of HDF5 can be reached by a file that a stranger made. Everything in the head is checked before it is used: types, names,
shapes that fit each other, and offsets that lie inside the file. Nothing is allocated here but the head itself.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, BinaryIO, get_args, get_origin

import numpy as np
import xxhash

from tl_latentlens.bank.format import DTYPES, FORMAT, VERSION, Attributes
from tl_latentlens.corpus.plan import LATER_SETTINGS, as_record
from tl_latentlens.errors import BankCorruptError, BankError

_START = re.compile(rb'\{"format": "%s", "version": ([1-9]\d{0,8}), "size": (\d{1,9}), ' % FORMAT.encode())
_SMALLEST, _LARGEST = 1 << 13, 1 << 24  # the largest holds some 8,000 hook names
_HASH_BYTES = 1 << 18  # hashed while they are in the processor's cache
_PAYLOAD = ("vectors", "norms")  # of each hook name: under block checksums, all the rest under the digest


@dataclass(frozen=True)
class Stored:
    """Where a dataset stands: bytes from the start of the file, and what they are."""

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
    """Everything that is known of a bank file before its arrays are looked at.

    Attributes:
        size: Bytes of the user block, in which the head stands twice.
        complete: False while the bank is being built.
        attributes: Model, plan and settings.
        datasets: Name → place, for every dataset.
        digest: xxh3-128 over the file without the user block and without `unhashed`, hex.
    """

    size: int
    complete: bool
    attributes: Attributes
    datasets: dict[str, Stored]
    digest: str = "0" * 32

    @property
    def unhashed(self) -> list[tuple[int, int]]:
        """(offset, size) of what the digest leaves out: vectors and norms; while building, all that changes."""
        kinds = (*_PAYLOAD, *(() if self.complete else ("checksums", "mean", "std")))
        names = [f"hooks/{name}/{kind}" for name in self.attributes.hook_names for kind in kinds]
        names += [] if self.complete else ["journal"]
        return sorted((self.datasets[name].offset, self.datasets[name].n_bytes) for name in names)

    def encode(self) -> bytes:
        """One half of the user block: a line of JSON, its checksum on a second line, zeros."""
        datasets = {name: [place.offset, place.dtype, place.shape] for name, place in self.datasets.items()}
        record = {"format": FORMAT, "version": VERSION, "size": self.size, "complete": self.complete, "digest": self.digest}
        line = json.dumps(record | {"attributes": as_record(self.attributes), "datasets": datasets}).encode()
        return (line + b"\n" + xxhash.xxh3_64_hexdigest(line).encode() + b"\n").ljust(self.size // 2, b"\0")


def user_block_size(attributes: Attributes) -> int:
    """Bytes before the HDF5 data: a power of two with room for the head twice, wherever its datasets will stand.

    Raises:
        BankError: More hook names than a head can list.
    """
    datasets = {name: Stored(10**15, dtype, (10**15,) * len(axes)) for name, (dtype, axes) in _spec(attributes).items()}
    size = max(_SMALLEST, 2 << (len(Head(2, True, attributes, datasets).encode()) - 1).bit_length())
    if size > _LARGEST:
        raise BankError(f"got {len(attributes.hook_names)} hook names, more than one file can list: bank fewer in each")
    return size


def read_head(file: BinaryIO, copy: int = 0) -> Head:
    """The head of an open bank file, checked.

    Args:
        file: Opened for reading, in binary.
        copy: Which of the two: 0, by which banks are read, or 1, from which a build that was killed while it wrote the
            first goes on.

    Raises:
        BankError: Not a bank, or of a newer version.
        BankCorruptError: The head is damaged, or describes a file that cannot be.
    """
    file.seek(0)
    start = _START.match(file.read(4096))
    if start is None:
        raise BankError("is not a tl-latentlens bank, or its first bytes are damaged; `tl-latentlens build` makes banks")
    version, size = int(start[1]), int(start[2])
    if version > VERSION:
        raise BankError(f"is of bank version {version}; this package reads up to {VERSION}: upgrade tl-latentlens")
    file_size = file.seek(0, 2)
    if not _SMALLEST <= size <= min(_LARGEST, file_size) or size & (size - 1):
        raise _damaged(f"its size {size} is no power of two from {_SMALLEST} up to the file's {file_size} bytes")
    file.seek(0)
    block = file.read(size)
    half = block[size // 2 * copy : size // 2 * (copy + 1)]
    line, _, rest = half.partition(b"\n")
    if rest[:17] != xxhash.xxh3_64_hexdigest(line).encode() + b"\n" or rest[17:].strip(b"\0"):
        raise _damaged("its checksum does not match")
    head = _parse(line)
    if head.size != size or (head.complete and not copy and block[: size // 2] != block[size // 2 :]):
        raise _damaged("its two copies differ")
    _check_datasets(head, file_size)
    return head


def digest_of(file: BinaryIO, head: Head) -> str:
    """xxh3-128 over all bytes behind the user block, but for the head's `unhashed` regions, and over the file's size."""
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


def _damaged(why: str) -> BankCorruptError:
    return BankCorruptError(f"the head at the start of the file is damaged ({why[:300]}); copy the bank again or rebuild it")


def _parse(line: bytes) -> Head:
    try:
        record = json.loads(line.decode("ascii"))
        places = {name: _typed(Stored, dict(zip(("offset", "dtype", "shape"), place, strict=True)))
                  for name, place in record["datasets"].items()}  # fmt: skip
        head = Head(
            _typed(int, record["size"]),
            _typed(bool, record["complete"]),
            _typed(Attributes, record["attributes"]),
            places,
            _typed(str, record["digest"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError) as error:
        raise _damaged(f"{type(error).__name__}: {str(error)[:200]}") from error
    return head


def _typed(kind: Any, value: Any) -> Any:
    """A value of JSON as `kind`: a dataclass, tuple[X, ...], dict[str, X], X | None or a plain type."""
    if type(value) is kind and kind is not str:
        return value
    if is_dataclass(kind):
        wanted = {field.name: field.type for field in fields(kind)}
        if not isinstance(value, dict) or not set(wanted) - set(LATER_SETTINGS) <= set(value) <= set(wanted):
            raise ValueError(f"expected the keys {list(wanted)}")
        return kind(**{name: _typed(of, value[name]) for name, of in wanted.items() if name in value})  # type: ignore[operator]
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_typed(get_args(kind)[0], item) for item in value)
    if get_origin(kind) is dict and isinstance(value, dict):
        return {_typed(str, name): _typed(get_args(kind)[1], item) for name, item in value.items()}
    plain = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if type(value) not in plain and not (value is None and type(None) in plain):
        raise ValueError(f"got {str(value)[:40]!r}, expected {kind}")
    if isinstance(value, str) and not value.isprintable():
        raise ValueError(f"got {value[:40]!r}, which no terminal should be given")
    return value


def _spec(attributes: Attributes) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Every dataset's dtype and axes; axes of one name have one length."""
    vectors = np.dtype(DTYPES[attributes.dtype][1]).name
    spec: dict[str, tuple[str, tuple[str, ...]]] = {
        "tokens": ("int32", ("tokens",)),
        "prompt_starts": ("int64", ("prompts+1",)),
        "row_tokens": ("int64", ("rows",)),
        "block_starts": ("int64", ("blocks+1",)),
        "token_ids": ("int32", ("ids",)),
        "token_bytes": ("uint8", ("bytes",)),
        "token_byte_starts": ("int64", ("ids+1",)),
        "journal": ("uint8", ("blocks",)),
        "fingerprint/tokens": ("int32", ("fingerprint tokens",)),
        "fingerprint/prompt_starts": ("int64", ("fingerprint prompts+1",)),
    }
    for name in attributes.hook_names:
        spec[f"fingerprint/{name}"] = ("float32", ("fingerprint tokens", f"d of {name}"))
        spec[f"hooks/{name}/vectors"] = (vectors, ("rows", f"d of {name}"))
        spec[f"hooks/{name}/norms"] = ("float32", ("rows",))
        spec[f"hooks/{name}/checksums"] = ("uint64", ("blocks",))
        spec[f"hooks/{name}/mean"] = spec[f"hooks/{name}/std"] = ("float64", (f"d of {name}",))
    return spec


def _check_datasets(head: Head, file_size: int) -> None:
    for problem in _problems(head, file_size):
        raise _damaged(problem)


def _problems(head: Head, file_size: int) -> Iterator[str]:
    attributes = head.attributes
    names = attributes.hook_names
    if attributes.dtype not in DTYPES:
        yield f"dtype {attributes.dtype!r}, expected one of {list(DTYPES)}"
    if not names or len(set(names)) != len(names) or not all(name and "/" not in name for name in names):
        yield "hook names that are empty, repeated or hold a slash"
    if attributes.batch_tokens < 1:
        yield f"batch_tokens {attributes.batch_tokens}"
    if len(head.datasets) != (expected := 10 + 6 * len(names)):  # before the memory that a spec of them takes
        yield f"it lists {len(head.datasets)} datasets, expected {expected}"
    spec = _spec(attributes)
    if set(head.datasets) != set(spec):
        yield f"its datasets are not those of the hook names {list(names)}"
    lengths: dict[str, int] = {}
    for name, (dtype, axes) in spec.items():
        place = head.datasets[name]
        if place.dtype != dtype or len(place.shape) != len(axes):
            yield f"{name} is {place.dtype} of {len(place.shape)} dimensions, expected {dtype} of {len(axes)}"
        if not all(0 <= number < 2**63 for number in (place.offset, *place.shape)):
            yield f"{name} has numbers that no file has"
        for axis, length in zip(axes, place.shape, strict=True):
            axis, _, more = axis.partition("+")
            length -= int(more or 0)
            if length < 0 or lengths.setdefault(axis, length) != length:
                yield f"{name} has shape {place.shape}, which does not fit the other datasets"
    for name, heads in attributes.n_heads.items():
        if name not in names or heads < 1 or lengths[f"d of {name}"] % heads:
            yield f"{heads} heads of {name}, which its vectors do not have"
    if not lengths["rows"] or not lengths["blocks"]:
        yield "no rows"
    whole = max(place.offset + place.n_bytes for place in head.datasets.values())
    if whole > file_size:
        raise BankCorruptError(f"the file is cut short: it has {file_size:,} bytes of at least {whole:,}; copy the bank again")
    end = head.size
    for name, place in sorted(head.datasets.items(), key=lambda item: (item[1].offset, item[1].n_bytes)):
        if place.offset % np.dtype(place.dtype).itemsize or place.offset < end or place.offset + place.n_bytes > file_size:
            yield f"{name} stands at {place.offset} to {place.offset + place.n_bytes} in a file of {file_size} bytes"
        end = max(end, place.offset + place.n_bytes)
