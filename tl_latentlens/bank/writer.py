"""Filling a bank: batches out, rows in, full blocks to the file in the background, and a finished bank at the end.

Rows come from `record`, or from a user's own loop. `batches` cuts the prompts into batches, `partial_file` owns the bytes on
disk. Nothing here knows a model.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.bank.background import BackgroundWrites
from tl_latentlens.bank.batches import Batch, BlockBatches
from tl_latentlens.bank.block_buffer import BlockBuffer
from tl_latentlens.bank.create import create_partial
from tl_latentlens.bank.datasets import BLOCK_STARTS, JOURNAL
from tl_latentlens.bank.differences import differences_from_call
from tl_latentlens.bank.format import DTYPES, ModelRecord, ShardRecord, partial_path
from tl_latentlens.bank.lock import build_lock
from tl_latentlens.bank.partial_file import PartialFile
from tl_latentlens.bank.settings import require_folder, require_settings
from tl_latentlens.corpus.paths import absolute_path
from tl_latentlens.corpus.plan import Plan
from tl_latentlens.errors import BankError, InvalidInputError, UnknownHookError

SAVE_SECONDS = 10.0  # At most about so long, the rows of a block that is not full stay in memory alone.


class BankWriter:
    """Fills `NAME.h5.partial` and renames it to `NAME.h5` when it is complete. A context manager.

    >>> with BankWriter.create("my.h5", plan, record) as writer:      # doctest: +SKIP
    ...     for batch in writer.batches():
    ...         model.run_with_hooks(batch.tokens, attention_mask=batch.attention_mask, return_type=None,
    ...                              fwd_hooks=bank_hooks(writer, batch))
    """

    path: Path
    plan: Plan
    dtype: str
    batch_tokens: int
    hook_names: tuple[str, ...]
    _partial: PartialFile
    _resources: ExitStack  # the lock and the open file
    _block_starts: Int[np.ndarray, " blocks_and_end"]
    _is_full: np.ndarray  # [blocks]: the block takes no more rows
    _batches: BlockBatches
    _buffers: dict[int, BlockBuffer]  # buffers of the blocks that have some of their rows
    _spare_buffers: list[BlockBuffer]
    _row_writes: BackgroundWrites  # rows that come from a GPU go to their buffers
    _block_writes: BackgroundWrites  # full blocks go to the file
    _rows_come_later: bool  # from a GPU: a thread waits for them and stores them
    _last_save: float  # of rows of a block that is not full, by time.monotonic

    def __init__(self, partial: PartialFile, resources: ExitStack) -> None:
        """Use `BankWriter.create`."""
        file = partial.file
        self.path = partial.path
        self.plan = file.plan
        self.dtype = file.metadata.dtype
        self.batch_tokens = file.metadata.batch_tokens
        self.hook_names = tuple(file.widths)
        self._partial = partial
        self._resources = resources
        self._block_starts = file.map(BLOCK_STARTS)
        self._is_full = np.array(file.map(JOURNAL)) == 1
        self._batches = BlockBatches(self.plan, self._block_starts, self.batch_tokens)
        self._buffers = {}
        self._spare_buffers = []
        self._row_writes = BackgroundWrites("bank-rows", max_pending=2 * len(self.hook_names))
        self._block_writes = BackgroundWrites("bank-writer", max_pending=1)
        self._rows_come_later = False
        self._last_save = time.monotonic()
        for saved in partial.saved_blocks():
            self._buffers[saved.block] = self._start_buffer(saved.block)
            partial.load_rows(saved, self._buffers[saved.block])

    @classmethod
    def create(
        cls,
        path: str | Path,
        plan: Plan,
        record: ModelRecord,
        *,
        dtype: str = "float16",
        batch_tokens: int = 4096,
        shard: ShardRecord | None = None,
    ) -> "BankWriter":
        """Create `path.partial` at its full size, or resume it where it was made for the same plan, model and settings.

        Args:
            path: Where the finished bank will stand.
            plan: The rows, from `plan_corpus` or `make_plan`.
            record: The model, from `record_model`.
            dtype: "float16", "bfloat16" or "float32".
            batch_tokens: Most tokens of one batch, padding included.
            shard: The place of `plan` in that of a whole bank, from `shard_of_plan`; None: it is the whole.

        Raises:
            BankError: `path` exists, the disk is too full, another process builds it, or the partial file is of another
                plan, model or setting (the message says which).
        """
        require_settings(dtype, batch_tokens)
        require_folder(path)
        path = absolute_path(path)
        with ExitStack() as resources:
            resources.enter_context(build_lock(path))
            if path.exists():
                raise BankError(f"{path} exists already; open it with Bank.open, or choose another path")
            if not partial_path(path).exists():
                create_partial(partial_path(path), plan, record, dtype, batch_tokens, shard)
            partial = PartialFile(path)
            resources.callback(partial.close)
            differences = differences_from_call(partial.file, plan, dtype, tuple(record.widths), record, shard)
            if differences:
                raise BankError(
                    f"{partial.file.path} cannot be resumed, it differs in {'; '.join(differences)}. Repeat the old call, "
                    "choose another path, or delete the file"
                )
            return cls(partial, resources.pop_all())

    def __reduce__(self) -> Any:
        """Refuse to be copied or sent: the lock of the build stays where it was taken."""
        raise InvalidInputError(
            "a BankWriter holds the lock and the open file of a build, and cannot be copied or sent to another process; write "
            "in the process that made it"
        )

    def __enter__(self) -> "BankWriter":
        """Return the writer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Finish a complete bank; keep an incomplete one, with the rows it has, for a later resume."""
        try:
            for writes in (self._row_writes, self._block_writes):
                writes.close()
            if kind is None:
                self._raise_finished_errors()
                if self._is_full.all():
                    self._partial.finish()
            if self._buffers:
                self._partial.save_rows(self._buffers.items())
        except BankError:
            if kind is None:  # else the first error is the one to show
                raise
        finally:
            self._resources.close()

    @property
    def tokens_to_run(self) -> int:
        """Tokens of all prompts that a build runs."""
        return sum(map(self._batches.n_tokens, range(len(self._is_full))))

    @property
    def tokens_left(self) -> int:
        """Tokens that are still to be run; fewer than `tokens_to_run` where a build is resumed."""
        blocks = np.flatnonzero(~self._is_full).tolist()
        in_begun_blocks = sum(batch.n_tokens for block in blocks if block in self._buffers for batch in self._left_of(block))
        return in_begun_blocks + sum(self._batches.n_tokens(block) for block in blocks if block not in self._buffers)

    def batches(self, device: torch.device | str | None = None) -> Iterator[Batch]:
        """The batches that remain, block by block, prompts of similar length together, on `device`.

        A batch ends early where the next prompts are much shorter: padding costs as much as tokens. Batches whose rows are
        there already are left out.
        """
        for block in np.flatnonzero(~self._is_full).tolist():
            for batch in self._left_of(block, device):
                yield batch
                self._save_when_due()

    def _left_of(self, block: int, device: torch.device | str | None = None) -> Iterator[Batch]:
        """The batches of a block without those whose rows are there, of every hook name."""
        for batch in self._batches.of(block, device):
            buffer = self._buffers.get(block)
            if buffer is None or not buffer.has(batch.rows):
                yield batch

    def write(self, hook_name: str, batch: Batch, vectors: Float[Tensor, "rows d"], norms: Float[Tensor, " rows"]) -> None:
        """Hand over a batch's unit vectors (already in the bank's dtype) and norms; a background thread writes full blocks.

        Raises:
            InvalidInputError: A shape that does not fit; a NaN, inf or zero activation, from a GPU of an earlier call.
            BankError: Writing failed.
        """
        self._raise_finished_errors()
        self._check_vectors(hook_name, batch, vectors)
        self._rows_come_later = vectors.is_cuda
        if vectors.is_cuda:
            copied = torch.cuda.Event()
            stream = torch.cuda.current_stream(vectors.device)
            vectors, norms = _to_pinned(vectors), _to_pinned(norms)
            copied.record(stream)
            self._row_writes.submit(self._store_when_copied, copied, hook_name, batch, vectors, norms)
        else:
            # No thread stores rows that are on the CPU: it would halt the threads of the model again and again.
            self._store(hook_name, batch, vectors.cpu(), norms.cpu())

    def _check_vectors(self, hook_name: str, batch: Batch, vectors: Tensor) -> None:
        widths = self._partial.file.widths
        if hook_name not in widths:
            raise UnknownHookError(f"the bank has no hook name {hook_name!r}; it has {list(self.hook_names)}")
        if vectors.dtype != (dtype := getattr(torch, self.dtype)):
            raise InvalidInputError(f"{hook_name}: got vectors of {vectors.dtype}, expected {dtype}; use vectors.to({dtype})")
        expected = (len(batch.rows), widths[hook_name])
        if tuple(vectors.shape) != expected:
            raise InvalidInputError(f"{hook_name}: got vectors of shape {tuple(vectors.shape)}, expected {expected}")

    def _raise_finished_errors(self) -> None:
        self._row_writes.raise_finished_errors()
        self._block_writes.raise_finished_errors()

    def _store_when_copied(self, copied: Any, hook_name: str, batch: Batch, vectors: Tensor, norms: Tensor) -> None:
        copied.synchronize()
        self._store(hook_name, batch, vectors, norms)

    def _store(self, hook_name: str, batch: Batch, vectors: Tensor, norms: Tensor) -> None:
        """Put a batch's rows in the buffer of their block, and hand on the block when they fill it."""
        self._require_directions(hook_name, batch, norms.numpy())
        block = batch.block
        if self._is_full[block]:
            return  # the batch was run again
        if block not in self._buffers:
            self._buffers[block] = self._start_buffer(block)
        buffer = self._buffers[block]
        buffer.put(hook_name, batch.rows, _as_stored(vectors), norms.numpy())
        if buffer.is_full:
            self._is_full[block] = True
            self._block_writes.submit(self._write_block, block, self._buffers.pop(block))

    def _require_directions(self, hook_name: str, batch: Batch, norms: Float[np.ndarray, " rows"]) -> None:
        # Numbers below the smallest normal one have lost digits.
        is_bad = ~np.isfinite(norms) | (norms < np.finfo(np.float32).tiny)
        if not is_bad.any():
            return
        row = int(batch.rows[np.flatnonzero(is_bad)[0]])
        prompt = int(self.plan.row_prompts[row])
        position = int(self.plan.row_tokens[row]) - int(self.plan.prompt_starts[prompt])
        prompt += self._partial.file.first_prompt
        raise InvalidInputError(
            f"{hook_name}: {int(is_bad.sum())} activations are NaN, inf or zero, the first at prompt {prompt}, position "
            f"{position} (norm {norms[is_bad][0]}); a bank holds directions, so check the model's dtype and weights, or "
            "leave this hook name out"
        )

    def _save_when_due(self) -> None:
        """Hand the rows of blocks that are not full to the thread that writes, where the last save is a while ago."""
        if time.monotonic() - self._last_save < SAVE_SECONDS:
            return
        self._last_save = time.monotonic()
        if self._rows_come_later:
            self._row_writes.submit(self._save)
        else:
            self._save()

    def _save(self) -> None:
        """Submit a save. The thread that stores rows calls it: a block that it fills later is written after the save."""
        self._block_writes.submit(self._partial.save_rows, list(self._buffers.items()))

    def _start_buffer(self, block: int) -> BlockBuffer:
        if self._spare_buffers:
            buffer = self._spare_buffers.pop()
        else:
            max_rows = int(np.diff(self._block_starts).max())
            buffer = BlockBuffer(self._partial.file.widths, np.dtype(DTYPES[self.dtype][1]), max_rows)
        buffer.start_block(int(self._block_starts[block]), int(self._block_starts[block + 1]))
        return buffer

    def _write_block(self, block: int, buffer: BlockBuffer) -> None:
        self._partial.write_block(block, buffer)
        self._spare_buffers.append(buffer)  # Memory that is held already takes no page faults.


def _as_stored(vectors: Tensor) -> np.ndarray:
    return vectors.view(torch.uint16).numpy() if vectors.dtype == torch.bfloat16 else vectors.numpy()


def _to_pinned(tensor: Tensor) -> Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
