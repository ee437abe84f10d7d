"""The partial file of a build: arrays and blocks written at their offsets, the journal, resuming, and the finished name.

`create` makes the file at its full size. A block is done when its bytes are on disk and its checksum stands in the journal.
Nothing here knows batches or a model.
"""

import errno
import os
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
        """Write a full block and its checksums, and then the journal.

        Raises:
            BankError: Writing failed.
        """
        for name in buffer.vectors:
            vectors, norms = buffer.vectors[name][: buffer.n_rows], buffer.norms[name][: buffer.n_rows]
            row_bytes = vectors.shape[1] * vectors.itemsize
            self._write_array(hook_dataset(name, VECTORS), vectors, buffer.first_row * row_bytes)
            self._write_array(hook_dataset(name, NORMS), norms, buffer.first_row * norms.itemsize)
            self._write_array(hook_dataset(name, CHECKSUMS), np.uint64(block_checksum(vectors, norms)), block * 8)
        self._sync()  # the bytes first and the journal after them, which holds across a power cut too
        self._write_array(JOURNAL, np.uint8(1), block)

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
