"""A file of JSON lines that remembers what was sent: appended to by one process at a time, readable after any kill."""

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tl_latentlens.errors import InvalidInputError

_FIRST_BYTES = b'{"key": "'  # every line of the file begins with them


@dataclass(frozen=True)
class LineKind:
    """What the lines of a file hold.

    Attributes:
        name: What a line is, for errors: "an answer".
        fields: The fields beside the key that are read.
    """

    name: str
    fields: tuple[str, ...]


@dataclass(frozen=True)
class StoredLines:
    """The content of a file.

    Attributes:
        by_key: Key → the fields of its last line.
        n_bytes: Length of the whole lines. A last line that a kill cut short is none and not counted.
    """

    by_key: Mapping[str, dict[str, Any]]
    n_bytes: int


def read_lines(path: Path, kind: LineKind) -> StoredLines:
    """The lines of a file; none where there is no file.

    Raises:
        InvalidInputError: The file holds something else.
    """
    *lines, last = (path.read_bytes() if path.exists() else b"").split(b"\n")
    by_key = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            by_key[record["key"]] = {name: record[name] for name in kind.fields}
        except (ValueError, LookupError, TypeError) as error:
            raise _foreign_line(path, number, kind) from error
    if not _FIRST_BYTES.startswith(last[: len(_FIRST_BYTES)]):
        raise _foreign_line(path, len(lines) + 1, kind)
    return StoredLines(by_key, sum(len(line) + 1 for line in lines))


class LineWriter:
    """Appends lines to a file; several threads may share it."""

    def __init__(self, file: BinaryIO) -> None:
        """For a file that is open at its end."""
        self._file, self._lock = file, threading.Lock()

    def append(self, key: str, record: Mapping[str, Any]) -> None:
        """Write one line, and return when it is on the disk.

        Where the disk is full or the power fails, a part of the line may stay behind, which `read_lines` leaves out.
        """
        self.append_all({key: record})

    def append_all(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Write some lines, by their keys, and return when they are on the disk."""
        if not records:
            return
        lines = [json.dumps({"key": key, **record}).encode() + b"\n" for key, record in records.items()]
        with self._lock:
            self._file.write(b"".join(lines))
            self._file.flush()
            os.fsync(self._file.fileno())


@contextmanager
def append_lines(path: Path, kind: LineKind) -> Iterator[tuple[LineWriter, StoredLines]]:
    """A writer for a file that no other process may write meanwhile, and the lines that the file has.

    Raises:
        InvalidInputError: Another process is writing the file, or it holds something else.
    """
    import fcntl

    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidInputError(f"{path} is being written by another process; wait for it, or give another file") from error
        stored = read_lines(path, kind)
        file.truncate(stored.n_bytes)
        yield LineWriter(file), stored


def _foreign_line(path: Path, line: int, kind: LineKind) -> InvalidInputError:
    return InvalidInputError(f"line {line} of {path} is not {kind.name}; take it out, or give another file")
