"""Creating a bank file before the model runs: every group, attribute and dataset at its final size, disk space reserved."""

import errno
import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Int

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
from tl_latentlens.bank.format import DTYPES, VERSION, BankMetadata, ModelRecord, ShardRecord
from tl_latentlens.bank.head import DatasetPlace, Head, digest_of, user_block_size
from tl_latentlens.bank.saved_rows import remove_record
from tl_latentlens.corpus.plan import Plan, block_starts, to_json_dict
from tl_latentlens.errors import BankError

# Batches of one block. Its prompts are sorted by length, so larger blocks need less padding: with 32, 5 % of short sentences.
BATCHES_PER_BLOCK = 32
MAX_BLOCK_BYTES = 2**30  # A block's vectors are held in memory until it is full.
_ALIGNMENT = 64  # Each dataset starts at a multiple of so many bytes.
_HDF5_BYTES = 1024  # HDF5 and the alignment add at most so many bytes to a dataset.
_PACKAGES = ("tl-latentlens", "torch", "transformer-lens", "transformers", "h5py")


def create_partial(
    partial: Path,
    plan: Plan,
    record: ModelRecord,
    dtype: str,
    batch_tokens: int,
    shard: ShardRecord | None = None,
    versions: dict[str, str] | None = None,
    starts: Int[np.ndarray, " blocks_and_end"] | None = None,
) -> None:
    """Create the partial file of a bank, or of a shard, whose part of the plan `plan` is.

    Args:
        partial: Its path.
        plan: Its rows.
        record: The model.
        dtype: How vectors are stored.
        batch_tokens: Most tokens of one batch.
        shard: The place of `plan` in that of the whole bank; None: it is the whole.
        versions: Package → version that ran the model; None: those that are installed.
        starts: The first row of each block, and the end; None: as `cut_blocks` says.

    It is made under another name and renamed, so that a `.partial` is always whole; what a killed creation left is replaced.

    Raises:
        BankError: No space; no file is left behind.
    """
    fresh = partial.with_name(partial.name + ".new")
    metadata = _metadata(plan, record, dtype, batch_tokens, shard, versions)
    starts = cut_blocks(plan, record.widths, dtype, batch_tokens) if starts is None else starts
    arrays = _known_arrays(plan, record, starts)
    empty_arrays = _empty_arrays(plan, record, dtype, len(starts) - 1)
    user_block = user_block_size(metadata)
    needed = _bytes_needed(metadata, arrays, empty_arrays)
    try:
        free = shutil.disk_usage(partial.parent).free
        if needed > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with _HDF5Target(fresh, "w+") as file:
            _allocate(file.fileno(), needed)  # A full disk, or a limit, shows here, before HDF5 has begun.
            os.ftruncate(file.fileno(), 0)  # HDF5 takes an empty file only.
            try:
                _write(file, user_block, metadata, arrays, empty_arrays)
            except (OSError, RuntimeError, KeyError, ValueError) as error:
                raise file.error or error from None  # HDF5 fails to read back what could not be written
        remove_record(partial)
        fresh.rename(partial)
    except OSError as error:
        raise _creation_error(partial, needed, error) from error
    finally:
        fresh.unlink(missing_ok=True)


def _creation_error(partial: Path, needed: int, error: OSError) -> BankError:
    name = partial.name.removesuffix(".partial")
    if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return BankError(f"{name} cannot be created: {error}")
    free = f"{partial.parent} has {shutil.disk_usage(partial.parent).free:,} free"
    limit = "; a limit on file sizes (ulimit -f) is lower" * (error.errno == errno.EFBIG)
    return BankError(f"no space for {name}: it needs {needed:,} bytes and {free} ({error.strerror}{limit})")


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


def cut_blocks(plan: Plan, widths: Mapping[str, int], dtype: str, batch_tokens: int) -> Int[np.ndarray, " blocks_and_end"]:
    """The first row of each block of a bank, and the end.

    Args:
        plan: Its rows.
        widths: Hook name → width of its vectors.
        dtype: How they are stored.
        batch_tokens: Most tokens of one batch.
    """
    row_bytes = sum(widths.values()) * np.dtype(DTYPES[dtype][1]).itemsize
    return block_starts(plan, BATCHES_PER_BLOCK * batch_tokens, max(1, MAX_BLOCK_BYTES // row_bytes))


def _metadata(
    plan: Plan,
    record: ModelRecord,
    dtype: str,
    batch_tokens: int,
    shard: ShardRecord | None,
    versions: dict[str, str] | None,
) -> BankMetadata:
    return BankMetadata(
        model=record.info,
        plan=plan.settings,
        plan_digest=plan.digest,
        n_truncated=plan.n_truncated,
        dtype=dtype,
        batch_tokens=batch_tokens,
        hook_names=tuple(record.widths),
        special_ids=tuple(record.special_ids),
        dropped_space=record.dropped_space,
        versions=versions or {name: version(name) for name in _PACKAGES},
        hooked=tuple(record.hooked),
        n_heads={name: n_heads for name, n_heads in record.fingerprint.n_heads.items() if name in record.widths},
        shard=shard,
    )


def _known_arrays(plan: Plan, record: ModelRecord, starts: Int[np.ndarray, " blocks_and_end"]) -> dict[str, np.ndarray]:
    """The datasets that are known before the model runs."""
    token_ids = np.unique(plan.tokens)
    token_bytes = [record.token_bytes[int(token_id)] for token_id in token_ids]
    prompts = record.fingerprint.prompts
    arrays = {
        TOKENS: plan.tokens.astype(np.int32, copy=False),
        PROMPT_STARTS: plan.prompt_starts.astype(np.int64, copy=False),
        ROW_TOKENS: plan.row_tokens.astype(np.int64, copy=False),
        BLOCK_STARTS: starts,
        TOKEN_IDS: token_ids.astype(np.int32),
        TOKEN_BYTES: np.frombuffer(b"".join(token_bytes), np.uint8),
        TOKEN_BYTE_STARTS: np.cumsum([0, *map(len, token_bytes)]).astype(np.int64),
        FINGERPRINT_TOKENS: np.array([token for prompt in prompts for token in prompt], np.int32),
        FINGERPRINT_PROMPT_STARTS: np.cumsum([0, *map(len, prompts)]).astype(np.int64),
    }
    known = record.fingerprint.activations
    return arrays | {fingerprint_dataset(name): known[name].astype(np.float32) for name in record.widths}


def _empty_arrays(plan: Plan, record: ModelRecord, dtype: str, n_blocks: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of the datasets that the build fills."""
    empty_arrays: dict[str, tuple[tuple[int, ...], Any]] = {JOURNAL: ((n_blocks,), np.uint8)}
    for name, width in record.widths.items():
        empty_arrays[hook_dataset(name, VECTORS)] = ((plan.n_rows, width), DTYPES[dtype][1])
        empty_arrays[hook_dataset(name, NORMS)] = ((plan.n_rows,), np.float32)
        empty_arrays[hook_dataset(name, CHECKSUMS)] = ((n_blocks,), np.uint64)
        for part in (MEAN, STD):
            empty_arrays[hook_dataset(name, part)] = ((width,), np.float64)
    return empty_arrays


def bytes_of_bank(plan: Plan, record: ModelRecord, dtype: str, batch_tokens: int) -> int:
    """Most bytes of the file of a bank; see `create_partial` for the arguments."""
    starts = cut_blocks(plan, record.widths, dtype, batch_tokens)
    metadata = _metadata(plan, record, dtype, batch_tokens, None, None)
    return _bytes_needed(metadata, _known_arrays(plan, record, starts), _empty_arrays(plan, record, dtype, len(starts) - 1))


def _bytes_needed(
    metadata: BankMetadata, arrays: dict[str, np.ndarray], empty_arrays: dict[str, tuple[tuple[int, ...], Any]]
) -> int:
    """Most bytes of the file: the head, attributes, datasets, and HDF5's own metadata."""
    n_bytes = user_block_size(metadata) + len(json.dumps(to_json_dict(metadata)))
    n_bytes += sum(array.nbytes for array in arrays.values()) + _HDF5_BYTES * (len(arrays) + len(empty_arrays) + 10)
    return n_bytes + sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in empty_arrays.values())


def _write(
    target: _HDF5Target,
    user_block: int,
    metadata: BankMetadata,
    arrays: dict[str, np.ndarray],
    empty_arrays: dict[str, tuple[tuple[int, ...], Any]],
) -> None:
    """Write the HDF5 structure, reserve the disk space, and write the head twice into the user block."""
    places: dict[str, DatasetPlace] = {}
    with h5py.File(target, "w", userblock_size=user_block, alignment_threshold=1, alignment_interval=_ALIGNMENT) as file:
        for key, value in {"format_version": VERSION, **to_json_dict(metadata)}.items():
            file.attrs[key] = json.dumps(value)
        for name, array in arrays.items():
            file[name] = array
        for name, (shape, kind) in empty_arrays.items():
            _reserve(file, name, shape, kind)
            if metadata.dtype == "bfloat16" and name.endswith(f"/{VECTORS}"):
                file[name].attrs["bfloat16"] = True
        for name in (*arrays, *empty_arrays):
            dataset = h5py.h5d.open(file.id, name.encode())
            has_place = dataset.shape and min(dataset.shape) > 0  # one without numbers has none of its own
            offset = dataset.get_offset() if has_place else user_block
            places[name] = DatasetPlace(offset or user_block, dataset.dtype.name, dataset.shape)
    if target.error is not None:
        raise target.error
    _allocate(target.fileno(), target.seek(0, os.SEEK_END))
    head = Head(user_block, False, metadata, places)
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
