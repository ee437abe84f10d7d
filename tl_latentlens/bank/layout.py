"""A bank file on disk: its head, checked, and its arrays, memory-mapped from the very file that was checked."""

import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np

from tl_latentlens.bank.format import DTYPES, Attributes, ModelRecord, block_checksum
from tl_latentlens.bank.head import Head, digest_of, read_head
from tl_latentlens.corpus.plan import Plan
from tl_latentlens.errors import BankCorruptError, BankError
from tl_latentlens.model.fingerprint import Fingerprint

_CHECK_ROWS = 1 << 16  # numbers looked at together, in the processor's cache
# Without it Linux refuses to map privately what is larger than the machine's memory. Python knows its name since 3.13.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class Layout:
    """Where everything stands in one bank file, finished or not."""

    def __init__(self, path: Path) -> None:
        """Read the head, compare the digest, and check that starts and rows ascend.

        Raises:
            BankError: Not a bank.
            BankCorruptError: The file is not what was written.
        """
        self.path = path
        self._maps: dict[str, np.ndarray] = {}
        self._mapped: mmap.mmap | None = None
        self._identity: tuple[int, ...] | None = None
        with self.open() as file:
            self.head: Head = read_head(file)
            self._identity = self._identify(file)
            self._check(file, self.head)
            for problem in self._problems(file):
                raise BankCorruptError(f"{problem}; copy the bank again or rebuild it")
        self.attributes: Attributes = self.head.attributes
        self.widths = MappingProxyType(
            {name: self.head.datasets[f"hooks/{name}/vectors"].shape[1] for name in self.attributes.hook_names}
        )

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

    def check(self) -> None:
        """Compare everything but vectors and norms with the digest in the head.

        Raises:
            BankCorruptError: They differ.
        """
        with self.open() as file:
            self._check(file, read_head(file))

    def _check(self, file: BinaryIO, head: Head) -> None:
        if digest_of(file, head) != self.head.digest:
            raise BankCorruptError(
                "metadata does not match its checksum; the file was cut or changed: copy the bank again or rebuild it"
            )

    def bad_blocks(self, hook_name: str) -> Iterator[int]:
        """The blocks of a hook name whose vectors and norms do not match their checksum; reads them all.

        They are mapped anew: `map` hands out private copies that a user may have written to.
        """
        with self.open() as file:
            mapped = _map_file(file)
        vectors, norms, expected = (
            self._view(mapped, f"hooks/{hook_name}/{part}") for part in ("vectors", "norms", "checksums")
        )
        for block, (first, last) in enumerate(self.blocks()):
            if block_checksum(vectors[first:last], norms[first:last]) != int(expected[block]):
                yield block

    def blocks(self) -> list[tuple[int, int]]:
        """First row and end of each block."""
        return list(pairwise(self.map("block_starts").tolist()))

    @cached_property
    def plan(self) -> Plan:
        """The plan, its arrays memory-mapped."""
        tokens, starts, rows = (self.map(name) for name in ("tokens", "prompt_starts", "row_tokens"))
        return Plan(tokens, starts, rows, self.attributes.plan, self.attributes.n_truncated)

    @property
    def fingerprint(self) -> Fingerprint:
        """The stored prompts and activations by which the model is known again."""
        starts, tokens = self.map("fingerprint/prompt_starts").tolist(), self.map("fingerprint/tokens").tolist()
        prompts = tuple(tuple(tokens[a:b]) for a, b in pairwise(starts))
        known = {name: np.array(self.map(f"fingerprint/{name}")) for name in self.widths}
        return Fingerprint(prompts, known, self.attributes.n_heads)

    def differences(self, plan: Plan, dtype: str, hook_names: Sequence[str], record: ModelRecord | None = None) -> list[str]:
        """What of the file is not as a call asks for, one line each; empty where the file is of this very call.

        Args:
            plan: The rows that the call would build.
            dtype: How it would store them.
            hook_names: For which activations.
            record: The model of the call; None: not compared here.
        """
        attributes, there = self.attributes, self.plan
        found: list[str] = []

        def compare(what: str, theirs: Any, ours: Any) -> None:
            if theirs != ours:
                found.append(f"{what}: the file has {theirs}, this call {ours}")

        compare("plan settings", *_different_fields(there.settings, plan.settings))
        compare("corpus", *(f"{p.n_prompts:,} texts of {len(p.tokens):,} tokens" for p in (there, plan)))
        if not found:
            compare("corpus or its tokens", attributes.plan_digest, plan.digest)
        compare("hook names", list(attributes.hook_names), list(hook_names))
        compare("dtype", attributes.dtype, dtype)
        if record is not None:
            compare("model", *_different_fields(attributes.model, record.info))
        if record is not None and not found:
            compare("widths", dict(self.widths), record.widths)
            stored = self.fingerprint
            compare("the fingerprint prompts", stored.prompts, record.fingerprint.prompts)
            agree = not found and all(stored.agrees(record.fingerprint, name, record.info.dtype) for name in self.widths)
            if not found and not agree:
                found.append("the model's activations: other weights under the same name")
        return found

    def map(self, name: str) -> np.ndarray:
        """Memory-map a dataset, copy on write, once."""
        if name not in self._maps:
            with self.open() as file:
                self._mapped = self._mapped or _map_file(file)
            self._maps[name] = self._view(self._mapped, name)
        return self._maps[name]

    def map_vectors(self, hook_name: str) -> np.ndarray:
        """The vectors of a hook name, memory-mapped, in their own dtype (bfloat16 is stored as uint16)."""
        return self.map(f"hooks/{hook_name}/vectors").view(DTYPES[self.attributes.dtype][0])

    def _view(self, mapped: mmap.mmap, name: str) -> np.ndarray:
        place = self.head.datasets[name]
        if not place.n_bytes:
            return np.empty(place.shape, place.dtype)
        return np.ndarray(place.shape, place.dtype, mapped, place.offset)

    def close(self) -> None:
        """Drop the memory maps."""
        self._maps.clear()
        self._mapped = None
        self.__dict__.pop("plan", None)

    def _identify(self, file: BinaryIO) -> tuple[int, ...]:
        found = os.fstat(file.fileno())
        return found.st_dev, found.st_ino, found.st_size, *([found.st_mtime_ns] if self.head.complete else [])

    def _problems(self, file: BinaryIO) -> Iterator[str]:
        n_tokens, n_rows = (self.head.datasets[name].shape[0] for name in ("tokens", "row_tokens"))
        n_bytes, n_known = (self.head.datasets[name].shape[0] for name in ("token_bytes", "fingerprint/tokens"))
        for name, first, last, step in (
            ("prompt_starts", 0, n_tokens, 0),
            ("block_starts", 0, n_rows, 1),
            ("token_byte_starts", 0, n_bytes, 0),
            ("fingerprint/prompt_starts", 0, n_known, 0),
        ):
            starts = self.map(name)
            if not self._ascends(file, name, step) or starts[0] != first or starts[-1] != last:
                yield f"{name} does not ascend from {first} to {last}"
        for name, size, step in (("row_tokens", n_tokens, 1), ("token_ids", 2**31, 1)):
            values = self.map(name)
            if not len(values) or not self._ascends(file, name, step) or values[0] < 0 or values[-1] >= size:
                yield f"{name} does not ascend within [0, {size})"
        if self.head.complete and not np.all(self.map("journal") == 1):
            yield "blocks are missing"

    def _ascends(self, file: BinaryIO, name: str, step: int) -> bool:
        """True where each number is at least `step`, 0 or 1, above the one before it; sums of the largest would overflow.

        They are read piece by piece: pages of a map would stay in memory.
        """
        apart = np.greater if step else np.greater_equal
        place = self.head.datasets[name]
        size = np.dtype(place.dtype).itemsize
        for first in range(0, place.shape[0] - 1, _CHECK_ROWS):
            file.seek(place.offset + first * size)
            part = np.frombuffer(file.read((_CHECK_ROWS + 1) * size)[: place.n_bytes - first * size], place.dtype)
            if not apart(part[1:], part[:-1]).all():
                return False
        return True


def _map_file(file: BinaryIO) -> mmap.mmap:
    """The whole file, copy on write: one mapping, for each holds a file descriptor as long as it lives."""
    if sys.platform == "win32":
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE)


def _different_fields(there: Any, here: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    theirs, ours = asdict(there), asdict(here)
    names = [name for name in theirs if theirs[name] != ours[name]]
    return {name: theirs[name] for name in names}, {name: ours[name] for name in names}
