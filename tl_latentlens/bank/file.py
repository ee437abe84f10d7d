"""A bank file on disk: its head, checked, and its arrays, memory-mapped from the very file that was checked.

The file may be finished or not. `bank` reads finished ones for users; `partial_file` writes unfinished ones.
"""

import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np

from tl_latentlens.bank.datasets import (
    BLOCK_STARTS,
    CHECKSUMS,
    FINGERPRINT_PROMPT_STARTS,
    FINGERPRINT_TOKENS,
    JOURNAL,
    MEAN,
    NORMS,
    PROMPT_STARTS,
    ROW_TOKENS,
    STD,
    TOKEN_BYTE_STARTS,
    TOKEN_BYTES,
    TOKEN_IDS,
    TOKENS,
    VECTORS,
    fingerprint_dataset,
    hook_dataset,
)
from tl_latentlens.bank.format import DTYPES, BankMetadata, block_checksum
from tl_latentlens.bank.head import Head, digest_of, read_head
from tl_latentlens.corpus.plan import Plan
from tl_latentlens.errors import BankCorruptError, BankError
from tl_latentlens.model.fingerprint import Fingerprint

_CHECKED_TOGETHER = 1 << 16  # So many numbers are checked while they are in the processor's cache.
# Without it Linux refuses to map privately what is larger than the machine's memory. Python knows its name since 3.13.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class BankFile:
    """One bank file, finished or not.

    Attributes:
        path: Of the file.
        head: As it was read when the file was opened.
        metadata: Model, plan and settings, from the head.
        widths: Hook name → width of its vectors, in the order of the bank.
    """

    path: Path
    head: Head
    metadata: BankMetadata
    widths: Mapping[str, int]
    _arrays: dict[str, np.ndarray]
    _mapping: mmap.mmap | None
    _identity: tuple[int, ...] | None

    def __init__(self, path: Path) -> None:
        """Read the head, compare the digest, and check that starts and rows ascend.

        Raises:
            BankError: Not a bank.
            BankCorruptError: The file is not what was written.
        """
        self.path = path
        self._arrays = {}
        self._mapping = None
        self._identity = None
        with self.open() as file:
            self.head = read_head(file)
            self._identity = self._identify(file)
            self._check_digest(file, self.head)
            for problem in self._problems(file):
                raise BankCorruptError(f"{problem}; copy the bank again or rebuild it")
        self.metadata = self.head.metadata
        shapes = {name: self.head.datasets[hook_dataset(name, VECTORS)].shape for name in self.metadata.hook_names}
        self.widths = MappingProxyType({name: shape[1] for name, shape in shapes.items()})

    @property
    def digest(self) -> str:
        """Of all that the file holds but vectors and norms, which its checksums cover."""
        return self.head.digest

    @property
    def first_prompt(self) -> int:
        """The prompt of the whole corpus that is prompt 0 of the file; 0 where it holds the whole."""
        return 0 if self.metadata.shard is None else self.metadata.shard.first_prompt

    @property
    def files(self) -> list["BankFile"]:
        """The file itself; see `BankFolder`."""
        return [self]

    def parts_of(self, hook_name: str) -> list[tuple[int, "BankFile"]]:
        """The files that hold a hook name, and the row at which each begins: this one."""
        return [(0, self)]

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file for reading; errors name it.

        Raises:
            BankError: It cannot be read, or another file took its place since.
        """
        try:
            with self.path.open("rb") as file:
                if self._identity is not None and self._identity != self._identify(file):
                    raise BankError("was changed or replaced since it was opened; open it again")
                yield file
        except (BankError, BankCorruptError) as error:
            raise type(error)(f"{self.path}: {error}") from error
        except OSError as error:
            raise BankError(f"{self.path} cannot be read: {error}") from error

    @property
    def is_in_place(self) -> bool:
        """True where the file at `path` is still the one that was opened."""
        try:
            with self.open():
                return True
        except BankError:
            return False

    def check(self) -> None:
        """Compare everything but vectors and norms with the digest in the head.

        Raises:
            BankCorruptError: They differ.
        """
        with self.open() as file:
            self._check_digest(file, read_head(file))

    def _check_digest(self, file: BinaryIO, head: Head) -> None:
        if digest_of(file, head) != self.head.digest:
            raise BankCorruptError(
                "metadata does not match its checksum; the file was cut or changed: copy the bank again or rebuild it"
            )

    def bad_blocks(self, hook_name: str) -> Iterator[int]:
        """The blocks of a hook name whose vectors and norms do not match their checksum; reads them all.

        The file is mapped anew, because `map` hands out private copies that a user may have written to.
        """
        with self.open() as file:
            mapping = _map_file(file)
        vectors, norms, expected = (self._view(mapping, hook_dataset(hook_name, part)) for part in (VECTORS, NORMS, CHECKSUMS))
        for block, (first, last) in enumerate(self.blocks()):
            if block_checksum(vectors[first:last], norms[first:last]) != int(expected[block]):
                yield block

    def blocks(self) -> list[tuple[int, int]]:
        """First row and end of each block."""
        return list(pairwise(self.map(BLOCK_STARTS).tolist()))

    @cached_property
    def plan(self) -> Plan:
        """The plan, its arrays memory-mapped."""
        tokens, starts, rows = (self.map(name) for name in (TOKENS, PROMPT_STARTS, ROW_TOKENS))
        return Plan(tokens, starts, rows, self.metadata.plan, self.metadata.n_truncated)

    @property
    def fingerprint(self) -> Fingerprint:
        """The stored prompts and activations by which the model is known again."""
        starts, tokens = self.map(FINGERPRINT_PROMPT_STARTS).tolist(), self.map(FINGERPRINT_TOKENS).tolist()
        prompts = tuple(tuple(tokens[start:end]) for start, end in pairwise(starts))
        activations = {name: np.array(self.map(fingerprint_dataset(name))) for name in self.widths}
        return Fingerprint(prompts, activations, self.metadata.n_heads)

    def map(self, name: str) -> np.ndarray:
        """Memory-map a dataset, copy on write, once."""
        if name not in self._arrays:
            with self.open() as file:
                self._mapping = self._mapping or _map_file(file)
            self._arrays[name] = self._view(self._mapping, name)
        return self._arrays[name]

    def map_vectors(self, hook_name: str) -> np.ndarray:
        """The vectors of a hook name, memory-mapped, in their own dtype (bfloat16 is stored as uint16)."""
        return self.map(hook_dataset(hook_name, VECTORS)).view(DTYPES[self.metadata.dtype][0])

    def map_norms(self, hook_name: str) -> np.ndarray:
        """The norms of a hook name, memory-mapped."""
        return self.map(hook_dataset(hook_name, NORMS))

    def moments(self, hook_name: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the vectors of a hook name, per dimension, float64."""
        return np.array(self.map(hook_dataset(hook_name, MEAN))), np.array(self.map(hook_dataset(hook_name, STD)))

    def map_token_bytes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The token ids of the corpus, where the bytes of each begin (and the end), and the bytes, memory-mapped."""
        return self.map(TOKEN_IDS), self.map(TOKEN_BYTE_STARTS), self.map(TOKEN_BYTES)

    def _view(self, mapping: mmap.mmap, name: str) -> np.ndarray:
        place = self.head.datasets[name]
        if not place.n_bytes:
            return np.empty(place.shape, place.dtype)
        return np.ndarray(place.shape, place.dtype, mapping, place.offset)

    def close(self) -> None:
        """Drop the memory maps."""
        self._arrays.clear()
        self._mapping = None
        self.__dict__.pop("plan", None)

    def _identify(self, file: BinaryIO) -> tuple[int, ...]:
        stat = os.fstat(file.fileno())
        return stat.st_dev, stat.st_ino, stat.st_size, *([stat.st_mtime_ns] if self.head.complete else [])

    def _problems(self, file: BinaryIO) -> Iterator[str]:
        """Problems that a right digest does not rule out in a file made to deceive: numbers out of order and missing blocks."""
        n_tokens, n_rows = (self.head.datasets[name].shape[0] for name in (TOKENS, ROW_TOKENS))
        n_bytes, n_fingerprint_tokens = (self.head.datasets[name].shape[0] for name in (TOKEN_BYTES, FINGERPRINT_TOKENS))
        for name, end, strictly in (
            (PROMPT_STARTS, n_tokens, False),
            (BLOCK_STARTS, n_rows, True),
            (TOKEN_BYTE_STARTS, n_bytes, False),
            (FINGERPRINT_PROMPT_STARTS, n_fingerprint_tokens, False),
        ):
            starts = self.map(name)
            if not self._ascends(file, name, strictly) or starts[0] != 0 or starts[-1] != end:
                yield f"{name} does not ascend from 0 to {end}"
        for name, size in ((ROW_TOKENS, n_tokens), (TOKEN_IDS, 2**31)):
            values = self.map(name)
            if not len(values) and self.head.metadata.shard:  # one without rows
                continue
            if not len(values) or not self._ascends(file, name, True) or values[0] < 0 or values[-1] >= size:
                yield f"{name} does not ascend within [0, {size})"
        if self.head.complete and not np.all(self.map(JOURNAL) == 1):
            yield "blocks are missing"

    def _ascends(self, file: BinaryIO, name: str, strictly: bool) -> bool:
        """True where no number is below the one before it; strictly: where each is above it.

        Numbers are compared, not subtracted: differences of the largest would overflow. They are read chunk by chunk, because
        pages of a memory map would stay in memory.
        """
        follows = np.greater if strictly else np.greater_equal
        place = self.head.datasets[name]
        size = np.dtype(place.dtype).itemsize
        for first in range(0, place.shape[0] - 1, _CHECKED_TOGETHER):
            file.seek(place.offset + first * size)
            chunk = np.frombuffer(file.read((_CHECKED_TOGETHER + 1) * size)[: place.n_bytes - first * size], place.dtype)
            if not follows(chunk[1:], chunk[:-1]).all():
                return False
        return True


def _map_file(file: BinaryIO) -> mmap.mmap:
    """The whole file, mapped copy on write. One mapping serves all arrays, because each holds a file descriptor."""
    if sys.platform == "win32":
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
