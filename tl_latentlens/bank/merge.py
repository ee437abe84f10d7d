"""One bank file of a folder of shards or of files by hook name, or of both."""

from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from tl_latentlens.bank.bank import Bank
from tl_latentlens.bank.block_buffer import BlockBuffer
from tl_latentlens.bank.create import create_partial
from tl_latentlens.bank.datasets import JOURNAL
from tl_latentlens.bank.differences import differences_from_call
from tl_latentlens.bank.format import DTYPES, ModelRecord, partial_path
from tl_latentlens.bank.lock import build_lock
from tl_latentlens.bank.partial_file import PartialFile
from tl_latentlens.bank.settings import require_folder
from tl_latentlens.bank.token_bytes import TokenBytes
from tl_latentlens.corpus.paths import absolute_path
from tl_latentlens.errors import BankError


def merge_bank(folder: str | Path, path: str | Path, *, progress: bool = True) -> Bank:
    """Write the parts of a bank into one file; they are verified first, and stay as they are.

    Of shards, the file is byte for byte the one that a single process would have built. A merge that was interrupted leaves
    `path.partial`; the same call goes on with it.

    Args:
        folder: The folder of the parts.
        path: The bank file to make.
        progress: Show a progress bar.

    Returns:
        The merged bank.

    Raises:
        BankError: Parts lack, or are not of one bank; `path` exists; or the disk is too full.
        BankCorruptError: A part is not what was written.
    """
    require_folder(path)
    path = absolute_path(path)
    with Bank.open(folder) as bank:
        if path.exists():
            raise BankError(f"{path} exists already; choose another path, or delete the file")
        bank.verify(progress=progress)
        with build_lock(path):
            _merge(bank, path, progress)
    return Bank.open(path)


def _merge(bank: Bank, path: Path, progress: bool) -> None:
    metadata = bank.file.metadata
    record, starts = _record_of(bank), np.array([0, *(end for _, end in bank.blocks())])
    if not partial_path(path).exists():
        create_partial(
            partial_path(path),
            bank.plan,
            record,
            bank.dtype,
            metadata.batch_tokens,
            versions=metadata.versions,
            starts=starts,
        )
    partial = PartialFile(path)
    try:
        if differences := differences_from_call(partial.file, bank.plan, bank.dtype, bank.hook_names, record):
            raise BankError(
                f"{partial.file.path} is of another bank: {'; '.join(differences)}. Delete it, or choose another path"
            )
        blocks, journal = partial.file.blocks(), np.array(partial.file.map(JOURNAL))
        widths, dtype = partial.file.widths, np.dtype(DTYPES[bank.dtype][1])
        buffer = BlockBuffer(widths, dtype, max(end - first for first, end in blocks))
        left = np.flatnonzero(journal != 1).tolist()
        for block in tqdm(left, desc=path.name, unit=" blocks", disable=not progress):
            buffer.start_block(*blocks[block])
            rows = np.arange(*blocks[block])
            for name in widths:
                vectors = bank.vectors_at(name, slice(*blocks[block])).view(dtype)
                buffer.put(name, rows, vectors, bank.norms(name)[slice(*blocks[block])])
            partial.write_block(block, buffer)
        partial.finish()
    finally:
        partial.close()


def _record_of(bank: Bank) -> ModelRecord:
    """The record of its model that a bank holds."""
    metadata: Any = bank.file.metadata
    return ModelRecord(
        info=bank.model_info,
        widths=dict(bank.file.widths),
        fingerprint=bank.fingerprint,
        token_bytes=TokenBytes(bank.file),
        special_ids=metadata.special_ids,
        dropped_space=metadata.dropped_space,
        hooked=metadata.hooked,
    )
