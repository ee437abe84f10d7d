"""The partial file of a build: arrays and blocks written at their offsets, the journal, resuming, and the finished name.

`create` makes the file at its full size. A block is done when its bytes are on disk and its checksum stands in the journal.
Rows of blocks that are not full are saved too, and `saved_rows` records which. Nothing here knows batches or a model.
"""

import errno
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from tl_latentlens.bank.block_buffer import BlockBuffer
from tl_latentlens.bank.datasets import CHECKSUMS, JOURNAL, MEAN, NORMS, STD, VECTORS, hook_dataset
from tl_latentlens.bank.file import BankFile
from tl_latentlens.bank.format import block_checksum, partial_path
from tl_latentlens.bank.head import digest_of, read_head
from tl_latentlens.bank.moments import mean_and_std
from tl_latentlens.bank.saved_rows import SavedRows, read_record, remove_record, rows_checksum, write_record
from tl_latentlens.errors import BankCorruptError, BankError
from tl_latentlens.search.tensors import as_tensor

_fdatasync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


class PartialFile:
    """The partial file of one bank, open for writing; use it under the build lock.

    Attributes:
        path: Of the finished bank.
        file: The partial file as it can be read.
    """

    path: Path
    file: BankFile
    _descriptor: int

    def __init__(self, path: Path) -> None:
        """Open `path.partial`, after restoring its head where a build was stopped while it finished.

        Raises:
            BankError: It cannot be read or written, or is no bank.
            BankCorruptError: It is not what was written.
        """
        self.path = path
        partial = partial_path(path)
        with ExitStack() as opened:
            try:
                self._descriptor = os.open(partial, os.O_RDWR)
                opened.callback(os.close, self._descriptor)
                _restore_head(self._descriptor)
            except OSError as error:
                raise BankError(f"{partial} cannot be written: {error}") from error
            self.file = BankFile(partial)
            opened.pop_all()  # it stays open

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        os.close(self._descriptor)

    def write_block(self, block: int, buffer: BlockBuffer) -> None:
        """Write a full block, except for the rows that were saved before, and its checksums, and then the journal.

        Raises:
            BankError: Writing failed.
        """
        self._write_unsaved_rows(buffer)
        for name in buffer.vectors:
            vectors, norms = buffer.vectors[name][: buffer.n_rows], buffer.norms[name][: buffer.n_rows]
            self._write_array(hook_dataset(name, CHECKSUMS), np.uint64(block_checksum(vectors, norms)), block * 8)
        self._sync()  # the bytes first and the journal after them, which holds across a power cut too
        self._write_array(JOURNAL, np.uint8(1), block)

    def save_rows(self, buffers: Iterable[tuple[int, BlockBuffer]]) -> None:
        """Write the rows that blocks have so far, and then the record of them; rows that were saved before are left out.

        Raises:
            BankError: Writing failed.
        """
        saved = []
        for block, buffer in buffers:
            self._write_unsaved_rows(buffer)
            if runs := buffer.saved_runs():
                saved.append(SavedRows(block, runs, rows_checksum(buffer.vectors, buffer.norms, runs)))
        try:
            if saved:
                write_record(self.file.path, saved)
            else:
                remove_record(self.file.path)
        except OSError as error:
            raise self._write_error(error) from error

    def saved_blocks(self) -> Iterator[SavedRows]:
        """The saved rows of each unfinished block, as far as the file holds what was saved."""
        blocks, journal = self.file.blocks(), self.file.map(JOURNAL)
        for saved in read_record(self.file.path):
            if not 0 <= saved.block < len(blocks) or journal[saved.block] == 1:
                continue
            first_row, end_row = blocks[saved.block]
            bounds = [bound for run in saved.runs for bound in run]
            if not bounds or bounds != sorted(set(bounds)) or bounds[0] < 0 or bounds[-1] > end_row - first_row:
                continue
            vectors, norms = self._block_arrays(first_row, end_row)
            if rows_checksum(vectors, norms, saved.runs) == saved.checksum:
                yield saved

    def load_rows(self, saved: SavedRows, buffer: BlockBuffer) -> None:
        """Put saved rows into the buffer of their block."""
        vectors, norms = self._block_arrays(buffer.first_row, buffer.first_row + buffer.n_rows)
        for name in vectors:
            for first, end in saved.runs:
                rows = np.arange(first, end) + buffer.first_row
                buffer.put(name, rows, vectors[name][first:end], norms[name][first:end])
        buffer.mark_saved(saved.runs)

    def _block_arrays(self, first_row: int, end_row: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Vectors, in the dtype of the file, and norms of a block, by hook name."""
        vectors, norms = (
            {name: self.file.map(hook_dataset(name, part))[first_row:end_row] for name in self.file.widths}
            for part in (VECTORS, NORMS)
        )
        return vectors, norms

    def _write_unsaved_rows(self, buffer: BlockBuffer) -> None:
        """Write the rows of a block that are there to their places, and mark them as saved."""
        runs = buffer.unsaved_runs()
        for part, arrays in ((VECTORS, buffer.vectors), (NORMS, buffer.norms)):
            for name, array in arrays.items():
                for first, end in runs:
                    self._write_array(hook_dataset(name, part), array[first:end], (buffer.first_row + first) * array[0].nbytes)
        buffer.mark_saved(runs)

    def finish(self) -> None:
        """Verify the file, write means and deviations and the finished head, and rename it.

        Raises:
            BankCorruptError: Blocks do not match their checksums.
            BankError: Writing failed, or the bank's name is taken.
        """
        self.file.close()
        self._require_blocks()
        for name in self.file.widths:
            mean, std = mean_and_std(as_tensor(self.file.map_vectors(name)))
            self._write_array(hook_dataset(name, MEAN), mean, 0)
            self._write_array(hook_dataset(name, STD), std, 0)
        self._sync()
        self._write_finished_head()
        if self.path.exists():
            raise BankError(f"{self.path} appeared while it was being built; the new bank is complete in {self.file.path}")
        try:
            remove_record(self.file.path)
            self.file.path.rename(self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise self._write_error(error) from error

    def _require_blocks(self) -> None:
        """Read back what was written; blocks that do not match their checksums are taken off the journal."""
        hook_names = list(self.file.widths)
        with ThreadPoolExecutor() as threads:
            bad_of_hooks = threads.map(lambda name: list(self.file.bad_blocks(name)), hook_names)
            bad_blocks = sorted({block for bad in bad_of_hooks for block in bad})
        for block in bad_blocks:
            self._write_array(JOURNAL, np.uint8(0), block)
        if bad_blocks:
            self._sync()
            raise BankCorruptError(
                f"{self.file.path}: blocks {bad_blocks[:8]}{'…' if len(bad_blocks) > 8 else ''} do not match their checksums, "
                "so the disk or the memory is failing; the same call builds these blocks again"
            )

    def _write_finished_head(self) -> None:
        head = replace(self.file.head, complete=True)
        with self.file.open() as file:
            encoded = replace(head, digest=digest_of(file, head)).encode()
        # The second copy is written first: whichever of the two a kill or a power cut damages, the other is whole.
        for offset in (len(encoded), 0):
            self._write_at(offset, encoded)
            self._sync()

    def _write_array(self, dataset: str, array: np.ndarray | np.generic, offset: int) -> None:
        """Write an array `offset` bytes after the start of a dataset."""
        data = memoryview(np.ascontiguousarray(array)).cast("B")
        self._write_at(self.file.head.datasets[dataset].offset + offset, data)

    def _write_at(self, offset: int, data: memoryview | bytes) -> None:
        try:
            _write_whole(self._descriptor, data, offset)
        except OSError as error:
            raise self._write_error(error) from error

    def _sync(self) -> None:
        try:
            _fdatasync(self._descriptor)
        except OSError as error:
            raise self._write_error(error) from error

    def _write_error(self, error: OSError) -> BankError:
        partial = partial_path(self.path)
        return BankError(f"writing {partial} failed: {error}; finished blocks are kept, the same call goes on with the rest")


def _restore_head(descriptor: int) -> None:
    """Write the unfinished head again where a build was stopped while it wrote the finished one, or after that."""
    with open(descriptor, "rb", closefd=False) as file:
        try:
            try:
                head = read_head(file)
                if not head.complete:
                    return
            except BankCorruptError:
                head = read_head(file, copy=1)  # The second copy was finished before the first was begun.
            if head.complete:
                if digest_of(file, head) != head.digest:
                    return
                head = replace(head, complete=False)
                head = replace(head, digest=digest_of(file, head))
        except BankError:
            return  # opening the file will say what is wrong
    _write_whole(descriptor, head.encode(), 0)
    os.fsync(descriptor)


def _write_whole(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data`: one pwrite may write a part only."""
    while data:
        n_written = os.pwrite(descriptor, data, offset)
        data, offset = data[n_written:], offset + n_written


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
