"""The bank file, created: every group, attribute and dataset at its final size, disk space reserved, before the model runs."""

import errno
import io
import json
import os
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tl_latentlens.bank.format import DTYPES, Attributes, ModelRecord
from tl_latentlens.bank.head import Head, Stored, digest_of, user_block_size
from tl_latentlens.corpus.plan import Plan, as_record, block_starts
from tl_latentlens.errors import BankError

_BLOCK_BATCHES = 32  # of one block, whose prompts are sorted by length: the more, the less padding (5 % of short sentences)
_BLOCK_BYTES = 2**30  # most bytes of vectors held in memory for one block
_ALIGNMENT = 64  # of each dataset, in bytes
_HDF5_BYTES = 1024  # most that HDF5 and alignment add for a dataset
_PACKAGES = ("tl-latentlens", "torch", "transformer-lens", "transformers", "h5py")


def create_partial(partial: Path, plan: Plan, record: ModelRecord, dtype: str, batch_tokens: int) -> None:
    """Create under another name first, so that a `.partial` is always whole; what a killed creation left is replaced.

    Raises:
        BankError: No space; no file is left behind.
    """
    fresh = partial.with_name(partial.name + ".new")
    attributes = Attributes(
        record.info,
        plan.settings,
        plan.digest,
        plan.n_truncated,
        dtype,
        batch_tokens,
        tuple(record.widths),
        tuple(record.special_ids),
        {name: version(name) for name in _PACKAGES},
        {name: heads for name, heads in record.fingerprint.n_heads.items() if name in record.widths},
    )
    arrays = _arrays(plan, record, dtype, batch_tokens)
    empty = _empty_arrays(plan, record, dtype, len(arrays["block_starts"]) - 1)
    size = user_block_size(attributes)
    needed = size + sum(array.nbytes for array in arrays.values()) + _HDF5_BYTES * (len(arrays) + len(empty) + 10)
    needed += sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in empty.values())
    try:
        free = shutil.disk_usage(partial.parent).free
        if needed > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with _HDF5Target(fresh, "w+") as file:
            _allocate(file.fileno(), needed)  # so that a full disk, or a limit, shows before HDF5 has begun
            os.ftruncate(file.fileno(), 0)  # HDF5 takes an empty file only
            try:
                _write(file, size, attributes, arrays, empty)
            except (OSError, RuntimeError, KeyError, ValueError) as error:
                raise file.error or error from None  # HDF5 fails to read back what could not be written
        fresh.rename(partial)
    except OSError as error:
        name = partial.name.removesuffix(".partial")
        where = f"{partial.parent} has {shutil.disk_usage(partial.parent).free:,} free"
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            limit = "; a limit on file sizes (ulimit -f) is lower" * (error.errno == errno.EFBIG)
            raise BankError(f"no space for {name}: it needs {needed:,} bytes and {where} ({error.strerror}{limit})") from error
        raise BankError(f"{name} cannot be created: {error}") from error
    finally:
        fresh.unlink(missing_ok=True)


class _HDF5Target(io.FileIO):
    """A file for HDF5 to write, which never tells it of an error: HDF5 cannot close after one and crashes at exit."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        total = len(view)
        try:
            while view:
                view = view[super().write(view) :]
        except OSError as error:
            self.error = self.error or error
        return total

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0


def _arrays(plan: Plan, record: ModelRecord, dtype: str, batch_tokens: int) -> dict[str, np.ndarray]:
    """The datasets that are known before the model runs."""
    bytes_a_row = sum(record.widths.values()) * np.dtype(DTYPES[dtype][1]).itemsize
    used = np.unique(plan.tokens)
    texts = [record.token_bytes[int(i)] for i in used]
    prompts = record.fingerprint.prompts
    arrays = {
        "tokens": plan.tokens.astype(np.int32, copy=False),
        "prompt_starts": plan.prompt_starts.astype(np.int64, copy=False),
        "row_tokens": plan.row_tokens.astype(np.int64, copy=False),
        "block_starts": block_starts(plan, _BLOCK_BATCHES * batch_tokens, max(1, _BLOCK_BYTES // bytes_a_row)),
        "token_ids": used.astype(np.int32),
        "token_bytes": np.frombuffer(b"".join(texts), np.uint8),
        "token_byte_starts": np.cumsum([0, *map(len, texts)]).astype(np.int64),
        "fingerprint/tokens": np.array([t for prompt in prompts for t in prompt], np.int32),
        "fingerprint/prompt_starts": np.cumsum([0, *map(len, prompts)]).astype(np.int64),
    }
    return arrays | {f"fingerprint/{name}": record.fingerprint.activations[name].astype(np.float32) for name in record.widths}


def _empty_arrays(plan: Plan, record: ModelRecord, dtype: str, n_blocks: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of the datasets that the build fills."""
    empty: dict[str, tuple[tuple[int, ...], Any]] = {"journal": ((n_blocks,), np.uint8)}
    for name, width in record.widths.items():
        empty[f"hooks/{name}/vectors"] = ((plan.n_rows, width), DTYPES[dtype][1])
        empty[f"hooks/{name}/norms"] = ((plan.n_rows,), np.float32)
        empty[f"hooks/{name}/checksums"] = ((n_blocks,), np.uint64)
        for moment in ("mean", "std"):
            empty[f"hooks/{name}/{moment}"] = ((width,), np.float64)
    return empty


def _write(
    target: _HDF5Target,
    size: int,
    attributes: Attributes,
    arrays: dict[str, np.ndarray],
    empty: dict[str, tuple[tuple[int, ...], Any]],
) -> None:
    places: dict[str, Stored] = {}
    with h5py.File(target, "w", userblock_size=size, alignment_threshold=1, alignment_interval=_ALIGNMENT) as file:
        for key, value in {"format_version": 1, **as_record(attributes)}.items():
            file.attrs[key] = json.dumps(value)
        for name, array in arrays.items():
            file[name] = array
        for name, (shape, kind) in empty.items():
            _reserve(file, name, shape, kind)
            if attributes.dtype == "bfloat16" and name.endswith("/vectors"):
                file[name].attrs["bfloat16"] = True
        for name in (*arrays, *empty):
            dataset = h5py.h5d.open(file.id, name.encode())
            places[name] = Stored(dataset.get_offset() or size, dataset.dtype.name, dataset.shape)
    if target.error is not None:
        raise target.error
    _allocate(target.fileno(), target.seek(0, os.SEEK_END))
    head = Head(size, False, attributes, places)
    encoded = replace(head, digest=digest_of(target, head)).encode()
    target.seek(0)
    target.write(2 * encoded)
    if target.error is not None:
        raise target.error
    os.fsync(target.fileno())


def _allocate(descriptor: int, size: int) -> None:
    """Take the disk space now; where a file system cannot reserve (or the system has no such call), writing will show."""
    if hasattr(os, "posix_fallocate"):  # macOS has none
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def _reserve(file: h5py.File, name: str, shape: tuple[int, ...], dtype: Any) -> None:
    """A contiguous dataset whose place in the file is fixed now and whose bytes come later."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)  # else equal builds differ in the second they were made in
    group, _, leaf = name.rpartition("/")
    parent = file.require_group(group) if group else file
    kind, space = h5py.h5t.py_create(np.dtype(dtype), logical=True), h5py.h5s.create_simple(shape)
    h5py.h5d.create(parent.id, leaf.encode(), kind, space, properties)
