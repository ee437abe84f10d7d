"""The rows of unfinished blocks that a build has saved: a record beside the partial file, with a checksum.

A block counts when it is whole. On a slow model that takes minutes, so the rows that are there are written to their places
from time to time, and this record says which they are. `partial_file` writes the rows; a record that does not match them
is ignored, and the block is run again.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

Runs = list[tuple[int, int]]  # first place and end of each run of rows, within a block


@dataclass(frozen=True)
class SavedRows:
    """The saved rows of one unfinished block.

    Attributes:
        block: Number of the block.
        runs: Which of its rows.
        checksum: xxh3-64 over their vectors and norms, hook name by hook name.
    """

    block: int
    runs: Runs
    checksum: int


def record_path(partial: Path) -> Path:
    """The path of the record that belongs to a partial file."""
    return partial.with_name(partial.name + ".rows")


def write_record(partial: Path, saved: list[SavedRows]) -> None:
    """Replace the record; a kill leaves the old one or the new one.

    It is not synced: after a power cut, a record that does not match the file is ignored like any other.

    Raises:
        OSError: Writing failed.
    """
    fresh = _fresh_path(partial)
    fresh.write_text(json.dumps([[rows.block, rows.runs, rows.checksum] for rows in saved]), encoding="ascii")
    fresh.replace(record_path(partial))


def read_record(partial: Path) -> list[SavedRows]:
    """What the record says; nothing where there is none, or one that cannot be read."""
    try:
        lines = json.loads(record_path(partial).read_text(encoding="ascii"))
        return [SavedRows(int(block), [(int(a), int(b)) for a, b in runs], int(checksum)) for block, runs, checksum in lines]
    except (OSError, ValueError, TypeError):
        return []


def remove_record(partial: Path) -> None:
    """Take the record away, if there is one."""
    for path in (record_path(partial), _fresh_path(partial)):
        path.unlink(missing_ok=True)


def _fresh_path(partial: Path) -> Path:
    """The path of a record while it is written."""
    return partial.with_name(record_path(partial).name + ".new")


def rows_checksum(vectors: Mapping[str, np.ndarray], norms: Mapping[str, np.ndarray], runs: Runs) -> int:
    """xxh3-64 over the vectors and norms of these rows, hook name by hook name, run by run."""
    digest = xxhash.xxh3_64()
    for name in vectors:
        for array in (vectors[name], norms[name]):
            for first, end in runs:
                digest.update(np.ascontiguousarray(array[first:end]).view(np.uint8))
    return digest.intdigest()
