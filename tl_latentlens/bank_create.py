"""The bank file, created: every group, attribute and dataset at its final size, disk space reserved, before the model runs."""

import fcntl
import json
import os
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tl_latentlens.bank_format import DTYPES, ModelRecord, encode_user_block, metadata_digest, user_block_size
from tl_latentlens.errors import BankError
from tl_latentlens.plan import Plan, block_starts

_BLOCK_BATCHES = 8  # batches of one block; its prompts are sorted by length, so more of them means less padding
_BLOCK_BYTES = 512 * 2**20  # most bytes of vectors held in memory for one block
_PACKAGES = ("tl-latentlens", "torch", "transformer-lens", "transformers", "h5py")


def lock_file(descriptor: int, path: Path) -> None:
    """Take the one lock of a file; the system gives it back when its holder ends, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BankError(f"{path} is being built by another process; wait for it or choose another path") from error


def create_partial(partial: Path, plan: Plan, record: ModelRecord, dtype: str, batch_tokens: int) -> None:
    """Create under another name first, so that a `.partial` is always whole; what a killed creation left is replaced."""
    fresh = partial.with_name(partial.name + ".new")
    descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        lock_file(descriptor, fresh)
        try:
            _create_file(fresh, plan, record, dtype, batch_tokens)
            if not partial.exists():  # else another builder was faster; the lock on the partial file tells who goes on
                fresh.rename(partial)
        finally:
            fresh.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _create_file(path: Path, plan: Plan, record: ModelRecord, dtype: str, batch_tokens: int) -> None:
    bytes_a_row = sum(record.widths.values()) * np.dtype(DTYPES[dtype][1]).itemsize
    starts = block_starts(plan, _BLOCK_BATCHES * batch_tokens, max(1, _BLOCK_BYTES // bytes_a_row))
    needed, free = plan.n_rows * (bytes_a_row + 4 * len(record.widths)), shutil.disk_usage(path.parent).free
    no_space = f"no space for {path.name}: it needs {needed:,} bytes and {path.parent} has {free:,} free"
    if needed > free:
        raise BankError(no_space)
    used = np.unique(plan.tokens)
    texts = [record.token_bytes[int(i)] for i in used]
    size = user_block_size(len(record.widths))
    with h5py.File(path, "w", userblock_size=size, locking=False) as file:  # ours alone: its lock is held
        attributes = {
            "format_version": 1,
            "model": asdict(record.info),
            "plan": asdict(plan.settings),
            "plan_digest": plan.digest,
            "n_truncated": plan.n_truncated,
            "dtype": dtype,
            "batch_tokens": batch_tokens,
            "hook_names": list(record.widths),
            "special_ids": list(record.special_ids),
            "versions": {name: version(name) for name in _PACKAGES},
        }
        for key, value in attributes.items():
            file.attrs[key] = json.dumps(value)
        file["tokens"] = plan.tokens.astype(np.int32)
        file["prompt_starts"] = plan.prompt_starts.astype(np.int64)
        file["row_tokens"] = plan.row_tokens.astype(np.int64)
        file["block_starts"] = starts
        file["token_ids"] = used.astype(np.int32)
        file["token_bytes"] = np.frombuffer(b"".join(texts), np.uint8)
        file["token_byte_starts"] = np.cumsum([0, *map(len, texts)]).astype(np.int64)
        prompts = record.fingerprint.prompts
        file["fingerprint/tokens"] = np.array([t for prompt in prompts for t in prompt], np.int32)
        file["fingerprint/prompt_starts"] = np.cumsum([0, *map(len, prompts)]).astype(np.int64)
        n_blocks = len(starts) - 1
        _reserve(file, "journal", (n_blocks,), np.uint8)
        for name, width in record.widths.items():
            file[f"fingerprint/{name}"] = record.fingerprint.activations[name].astype(np.float32)
            _reserve(file, f"hooks/{name}/vectors", (plan.n_rows, width), DTYPES[dtype][1])
            _reserve(file, f"hooks/{name}/norms", (plan.n_rows,), np.float32)
            _reserve(file, f"hooks/{name}/checksums", (n_blocks,), np.uint64)
            for moment in ("mean", "std"):
                _reserve(file, f"hooks/{name}/{moment}", (width,), np.float64)
            if dtype == "bfloat16":
                file[f"hooks/{name}/vectors"].attrs["bfloat16"] = True
    with path.open("r+b") as raw:
        try:
            if hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(raw.fileno(), 0, path.stat().st_size)
        except OSError as error:
            raise BankError(no_space) from error
    _seal_empty(path, size)


def _seal_empty(path: Path, size: int) -> None:
    """Write the user block of a file whose vectors are still to come; its digest leaves out all that will change."""
    changing: list[tuple[int, int]] = []

    def note(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset) and (name == "journal" or name.startswith("hooks/")):
            changing.append((item.id.get_offset(), item.size * item.dtype.itemsize))

    with h5py.File(path, "r", locking=False) as file:
        file.visititems(note)
    digest = metadata_digest(path, size, changing)
    with path.open("r+b") as raw:
        raw.write(encode_user_block(size, False, changing, digest))
        os.fsync(raw.fileno())


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
