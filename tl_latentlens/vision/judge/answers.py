"""The file that keeps a judge's answers: JSON lines, appended to by one process at a time, readable after any kill."""

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
class StoredAnswers:
    """The content of a file of answers.

    Attributes:
        by_key: Key of a question → answer, input_tokens and output_tokens.
        n_bytes: Length of the whole lines. A last line that a kill cut short is no answer and not counted.
    """

    by_key: Mapping[str, dict[str, Any]]
    n_bytes: int


def read_answers(path: Path) -> StoredAnswers:
    """The answers in a file; none where there is no file.

    Raises:
        InvalidInputError: The file holds something else.
    """
    *lines, last = (path.read_bytes() if path.exists() else b"").split(b"\n")
    answers = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            answers[record["key"]] = {name: record[name] for name in ("answer", "input_tokens", "output_tokens")}
        except (ValueError, LookupError, TypeError) as error:
            raise _foreign_line(path, number) from error
    if not _FIRST_BYTES.startswith(last[: len(_FIRST_BYTES)]):
        raise _foreign_line(path, len(lines) + 1)
    return StoredAnswers(answers, sum(len(line) + 1 for line in lines))


class AnswerWriter:
    """Appends answers to a file; several threads may share it."""

    def __init__(self, file: BinaryIO) -> None:
        """For a file that is open at its end."""
        self._file, self._lock = file, threading.Lock()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line, and return when it is on the disk.

        Where the disk is full or the power fails, a part of the line may stay behind, which `read_answers` leaves out.
        """
        with self._lock:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())


@contextmanager
def append_answers(path: Path) -> Iterator[tuple[AnswerWriter, StoredAnswers]]:
    """A writer for a file that no other process may write meanwhile, and the answers that the file has.

    Raises:
        InvalidInputError: Another process is writing the file, or it holds something else than answers.
    """
    import fcntl

    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidInputError(f"{path} is being written by another process; wait for it, or give another file") from error
        stored = read_answers(path)
        file.truncate(stored.n_bytes)
        yield AnswerWriter(file), stored


def _foreign_line(path: Path, line: int) -> InvalidInputError:
    return InvalidInputError(f"line {line} of {path} is no judge's answer; take it out, or give another file")
