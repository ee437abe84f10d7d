"""The bank file, filled: block by block, resumed where it was left, verified and finished.

`bank_create` writes the HDF5 structure once, before the model runs; vectors then go straight to their offsets in the file.
A block counts as done when its bytes are on disk and its checksum stands in the journal. Arrays come in from
`hooks.record`; nothing here knows a model.
"""

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_latentlens.bank.create import create_partial
from tl_latentlens.bank.format import DTYPES, ModelRecord, block_checksum, partial_path
from tl_latentlens.bank.head import digest_of, read_head
from tl_latentlens.bank.layout import Layout
from tl_latentlens.bank.lock import build_lock
from tl_latentlens.corpus.plan import Plan
from tl_latentlens.errors import BankCorruptError, BankError, InvalidInputError, UnknownHookError
from tl_latentlens.search.vectors import as_tensor

Buffers = dict[str, tuple[np.ndarray, np.ndarray]]  # the vectors and norms of a block, for each hook name
_CACHED_NUMBERS = 2**17  # of 8 bytes, that a core's cache holds
_ALIKE = 0.9  # of the longest prompt of a batch: a shorter one begins the next, once there are enough in it
_ENOUGH = 256  # tokens, or an eighth of the most


@dataclass(frozen=True)
class Batch:
    """Prompts to run together, right-padded, and the rows among their tokens.

    Attributes:
        tokens: Token ids, [batch, pos].
        attention_mask: True at tokens, False at padding.
        rows: Row numbers in the bank, [n].
        row_batch: Where each row stands in the batch, [n].
        row_pos: Its position, [n].
        block: The bank's block that these rows belong to.
        n_tokens: Tokens without padding.

    Where the plan repeats, `tokens` hold each text twice and `row_pos` points into the second copy.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"]
    rows: Int[np.ndarray, " rows"]
    row_batch: Int[Tensor, " rows"]
    row_pos: Int[Tensor, " rows"]
    block: int
    n_tokens: int


class BankWriter:
    """Fills `NAME.h5.partial` and renames it to `NAME.h5` when it is complete. A context manager.

    >>> with BankWriter.create("my.h5", plan, record) as writer:      # doctest: +SKIP
    ...     for batch in writer.batches():
    ...         model.run_with_hooks(batch.tokens, attention_mask=batch.attention_mask, return_type=None,
    ...                              fwd_hooks=bank_hooks(writer, batch))
    """

    def __init__(self, path: Path, layout: Layout, descriptor: int, held: ExitStack) -> None:
        """Use `BankWriter.create`."""
        self.path = path
        self.plan = layout.plan
        self.dtype = layout.attributes.dtype
        self.batch_tokens = layout.attributes.batch_tokens
        self.hook_names = tuple(layout.widths)
        self._layout = layout
        self._descriptor = descriptor
        self._held = held
        self._starts = layout.map("block_starts")
        self._full = np.array(layout.map("journal")) == 1  # blocks that take no more rows
        self._buffers: dict[int, Buffers] = {}
        self._missing: dict[int, dict[str, np.ndarray]] = {}
        self._n_missing: dict[int, int] = {}
        self._spare: list[Buffers] = []
        self._storing = ThreadPoolExecutor(1, thread_name_prefix="bank-rows")  # rows that come from a GPU
        self._pending: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="bank-writer")  # writes full blocks
        self._committing: Future[None] | None = None

    @classmethod
    def create(
        cls, path: str | Path, plan: Plan, record: ModelRecord, *, dtype: str = "float16", batch_tokens: int = 4096
    ) -> "BankWriter":
        """Create `path.partial` at its full size, or resume it where it was made for the same plan, model and settings.

        Args:
            path: Where the finished bank will stand.
            plan: The rows, from `plan_corpus` or `make_plan`.
            record: The model, from `record_model`.
            dtype: "float16", "bfloat16" or "float32".
            batch_tokens: Most tokens of one batch, padding included.

        Raises:
            BankError: `path` exists, the disk is too full, another process builds it, or the partial file is of another
                plan, model or setting (the message says which).
        """
        path = Path(path).expanduser()
        require_settings(dtype, batch_tokens)
        require_folder(path)
        partial = partial_path(path)
        with ExitStack() as held:
            held.enter_context(build_lock(path))
            if path.exists():
                raise BankError(f"{path} exists already; open it with Bank.open, or choose another path")
            if not partial.exists():
                create_partial(partial, plan, record, dtype, batch_tokens)
            try:
                descriptor = os.open(partial, os.O_RDWR)
                held.callback(os.close, descriptor)
                _mend_head(descriptor)
            except OSError as error:
                raise BankError(f"{partial} cannot be written: {error}") from error
            layout = Layout(partial)
            held.callback(layout.close)
            differing = layout.differences(plan, dtype, tuple(record.widths), record)
            if differing:
                raise BankError(
                    f"{partial} cannot be resumed, it differs in {'; '.join(differing)}. Repeat the old call, choose another "
                    "path, or delete the file"
                )
            return cls(path, layout, descriptor, held.pop_all())

    def __enter__(self) -> "BankWriter":
        """Return the writer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Finish a complete bank; keep an incomplete one for a later resume."""
        try:
            for pool in (self._storing, self._pool):
                pool.shutdown()
            if kind is None:
                self._settle(lambda: True, wait=True)
                if self._full.all():
                    self._finish()
        finally:
            self._held.close()

    @property
    def tokens_to_run(self) -> int:
        """Tokens of all prompts that a build runs."""
        return self._tokens_of(range(len(self._full)))

    @property
    def tokens_left(self) -> int:
        """Those that are still to be run; fewer where a build is resumed."""
        return self._tokens_of(np.flatnonzero(~self._full).tolist())

    def _tokens_of(self, blocks: Iterable[int]) -> int:
        return sum(int(self._run_lengths(self._block_prompts(block)).sum()) for block in blocks)

    def batches(self, device: torch.device | str | None = None) -> Iterator[Batch]:
        """The batches that remain, block by block, prompts of like length together, on `device`.

        A batch ends early where the next prompts are much shorter: padding costs as much as tokens.
        """
        for block in np.flatnonzero(~self._full).tolist():
            prompts = self._block_prompts(block)
            lengths = self._run_lengths(prompts)
            order = np.argsort(-lengths, kind="stable")
            prompts, lengths = prompts[order], lengths[order]
            first = 0
            while first < len(prompts):
                longest = int(lengths[first])
                count = max(1, self.batch_tokens // longest)
                alike = int(np.searchsorted(-lengths[first:], -_ALIKE * longest, "right"))
                count = min(count, max(alike, -(-max(_ENOUGH, self.batch_tokens // 8) // longest)))
                yield self._batch(block, prompts[first : first + count], lengths[first : first + count], device)
                first += count

    def write(self, hook_name: str, batch: Batch, vectors: Float[Tensor, "rows d"], norms: Float[Tensor, " rows"]) -> None:
        """Hand over a batch's unit vectors (already in the bank's dtype) and norms; a background thread writes full blocks.

        Raises:
            InvalidInputError: A shape that does not fit; a NaN, inf or zero activation, from a GPU of an earlier call.
            BankError: Writing failed.
        """
        self._settle(lambda: self._pending[0].done())
        if hook_name not in self._layout.widths:
            raise UnknownHookError(f"the bank has no hook name {hook_name!r}; it has {list(self.hook_names)}")
        if vectors.dtype != (dtype := getattr(torch, self.dtype)):
            raise InvalidInputError(f"{hook_name}: got vectors of {vectors.dtype}, expected {dtype}; use vectors.to({dtype})")
        expected = (len(batch.rows), self._layout.widths[hook_name])
        if tuple(vectors.shape) != expected:
            raise InvalidInputError(f"{hook_name}: got vectors of shape {tuple(vectors.shape)}, expected {expected}")
        if vectors.is_cuda:
            ready = torch.cuda.Event()
            stream = torch.cuda.current_stream(vectors.device)
            vectors, norms = _to_pinned(vectors), _to_pinned(norms)
            ready.record(stream)
            self._settle(lambda: len(self._pending) >= 2 * len(self.hook_names))
            self._pending.append(self._storing.submit(self._store_when, ready, hook_name, batch, vectors, norms))
        else:
            # The rows are put in their places here: on a CPU, a thread that did would halt those of the model again and again.
            self._store(hook_name, batch, vectors.cpu(), norms.cpu())

    def _block_prompts(self, block: int) -> Int[np.ndarray, " prompts"]:
        return np.unique(self.plan.row_prompts[self._starts[block] : self._starts[block + 1]])

    def _run_lengths(self, prompts: Int[np.ndarray, " prompts"]) -> Int[np.ndarray, " prompts"]:
        starts, ends = self.plan.prompt_starts[prompts], self.plan.prompt_starts[prompts + 1]
        if self.plan.settings.bidirectional:
            return ends - starts
        last = self.plan.row_tokens[np.searchsorted(self.plan.row_tokens, ends) - 1]
        return last + 1 - starts + self.plan.shifts(prompts)  # a causal model need not run past a prompt's last row

    def _batch(self, block: int, prompts: np.ndarray, lengths: np.ndarray, device: torch.device | str | None) -> Batch:
        columns = np.arange(int(lengths.max()))
        mask = columns < lengths[:, None]
        starts, ends = self.plan.prompt_starts[prompts], self.plan.prompt_starts[prompts + 1]
        shifts = self.plan.shifts(prompts)
        again = columns >= (ends - starts)[:, None]  # the second copy, where the plan repeats
        tokens = np.zeros(mask.shape, np.int64)
        tokens[mask] = self.plan.tokens[(starts[:, None] + columns - again * shifts[:, None])[mask]]
        first = np.searchsorted(self.plan.row_tokens, starts)
        count = np.searchsorted(self.plan.row_tokens, ends) - first
        row_batch = np.repeat(np.arange(len(prompts)), count)
        rows = np.arange(len(row_batch)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
        row_pos = self.plan.row_tokens[rows] - starts[row_batch] + shifts[row_batch]
        tensors = (_to_device(array, device) for array in (tokens, mask, row_batch, row_pos))
        tokens_t, mask_t, row_batch_t, row_pos_t = tensors
        return Batch(tokens_t, mask_t, rows, row_batch_t, row_pos_t, block, int(lengths.sum()))

    def _settle(self, while_: Callable[[], bool], *, wait: bool = False) -> None:
        """Take note of what the threads did, first come first; what failed stays, and fails again."""
        while self._pending and while_():
            self._pending[0].result()
            self._pending.popleft()
        if self._committing is not None and (wait or self._committing.done()):
            self._committing.result()

    def _store_when(self, ready: Any, hook_name: str, batch: Batch, vectors: Tensor, norms: Tensor) -> None:
        ready.synchronize()
        self._store(hook_name, batch, vectors, norms)

    def _store(self, hook_name: str, batch: Batch, vectors: Tensor, norms: Tensor) -> None:
        """Put a batch's rows in their places, and hand on the block that they fill once the one before it is written."""
        lengths = norms.numpy()
        bad = ~np.isfinite(lengths) | (lengths < np.finfo(np.float32).tiny)  # smaller numbers have lost their digits
        if bad.any():
            row = int(batch.rows[np.flatnonzero(bad)[0]])
            at = int(self.plan.row_tokens[row])
            prompt = int(self.plan.row_prompts[row])
            raise InvalidInputError(
                f"{hook_name}: {int(bad.sum())} activations are NaN, inf or zero, the first at prompt {prompt}, position "
                f"{at - int(self.plan.prompt_starts[prompt])} (norm {lengths[bad][0]}); a bank holds directions, so check the "
                "model's dtype and weights, or leave this hook name out"
            )
        if self._full[batch.block]:
            return  # a batch that was run again
        first, last = (int(row) for row in self._starts[batch.block : batch.block + 2])
        if batch.block not in self._buffers:
            self._buffers[batch.block] = self._spare.pop() if self._spare else self._new_buffers()
            self._missing[batch.block] = {name: np.ones(last - first, bool) for name in self.hook_names}
            self._n_missing[batch.block] = (last - first) * len(self.hook_names)
        at = batch.rows - first
        block_vectors, block_norms = self._buffers[batch.block][hook_name]
        block_vectors[at] = _as_stored(vectors)
        block_norms[at] = lengths
        missing = self._missing[batch.block][hook_name]
        self._n_missing[batch.block] -= int(missing[at].sum())
        missing[at] = False
        if not self._n_missing[batch.block]:
            self._full[batch.block] = True
            del self._missing[batch.block], self._n_missing[batch.block]
            if self._committing is not None:
                self._committing.result()
            self._committing = self._pool.submit(self._commit, batch.block, self._buffers.pop(batch.block))

    def _new_buffers(self) -> Buffers:
        most, stored = int(np.diff(self._starts).max()), DTYPES[self.dtype][1]
        return {
            name: (np.empty((most, width), stored), np.empty(most, np.float32)) for name, width in self._layout.widths.items()
        }

    def _commit(self, block: int, buffers: Buffers) -> None:
        first, last = (int(row) for row in self._starts[block : block + 2])
        for name, (all_vectors, all_norms) in buffers.items():
            vectors, norms = all_vectors[: last - first], all_norms[: last - first]
            self._put(f"hooks/{name}/vectors", vectors, first * vectors.shape[1] * vectors.itemsize)
            self._put(f"hooks/{name}/norms", norms, first * norms.itemsize)
            self._put(f"hooks/{name}/checksums", np.uint64(block_checksum(vectors, norms)), block * 8)
        self._sync()  # the bytes first, the journal after them, also across a power cut
        self._put("journal", np.uint8(1), block)
        self._spare.append(buffers)  # memory that is held already takes no page faults

    def _put(self, name: str, array: np.ndarray | np.generic, offset: int) -> None:
        self._write_at(self._layout.head.datasets[name].offset + offset, memoryview(np.ascontiguousarray(array)).cast("B"))

    def _write_at(self, offset: int, data: memoryview | bytes) -> None:
        try:
            _write_whole(self._descriptor, data, offset)
        except OSError as error:
            raise self._failed(error) from error

    def _sync(self) -> None:
        try:
            _fdatasync(self._descriptor)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> BankError:
        partial = partial_path(self.path)
        return BankError(f"writing {partial} failed: {error}; finished blocks are kept, the same call goes on with the rest")

    def _finish(self) -> None:
        self._layout.close()
        self._require_whole()
        for name in self.hook_names:
            mean, std = _moments(as_tensor(self._layout.map_vectors(name)))
            self._put(f"hooks/{name}/mean", mean, 0)
            self._put(f"hooks/{name}/std", std, 0)
        self._sync()
        head = replace(self._layout.head, complete=True)
        with self._layout.open() as file:
            block = replace(head, digest=digest_of(file, head)).encode()
        # The second copy first: whichever of the two a kill or a power cut damages, the other is whole.
        for offset in (len(block), 0):
            self._write_at(offset, block)
            self._sync()
        if self.path.exists():
            raise BankError(f"{self.path} appeared while it was being built; the new bank is complete in {self._layout.path}")
        try:
            self._layout.path.rename(self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise self._failed(error) from error

    def _require_whole(self) -> None:
        """Read back what was written; blocks that are not as they were given are taken off the journal."""
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda name: list(self._layout.bad_blocks(name)), self.hook_names)
            bad = sorted({block for blocks in found for block in blocks})
        for block in bad:
            self._put("journal", np.uint8(0), block)
        if bad:
            self._sync()
            raise BankCorruptError(
                f"{self._layout.path}: blocks {bad[:8]}{'…' if len(bad) > 8 else ''} do not match their checksums, so the disk "
                "or the memory is failing; the same call builds these blocks again"
            )


def require_settings(dtype: str, batch_tokens: int | None) -> None:
    """Check how a bank is to be written.

    Raises:
        InvalidInputError: An unknown dtype, or `batch_tokens` below 1.
    """
    if dtype not in DTYPES:
        raise InvalidInputError(f"got dtype={dtype!r}; expected one of {list(DTYPES)}")
    if batch_tokens is not None and batch_tokens < 1:
        raise InvalidInputError(f"got batch_tokens={batch_tokens}; expected at least 1")


def require_folder(path: Path) -> None:
    """Check that the folder of a bank to be written is there.

    Raises:
        BankError: It is not.
    """
    if not path.parent.is_dir():
        raise BankError(f"no folder {path.parent} to write {path.name} in; create it first")


_fdatasync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


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


def _mend_head(descriptor: int) -> None:
    """Where a build was stopped while it wrote the finished head, or after that, put the unfinished one back to go on from."""
    with open(descriptor, "rb", closefd=False) as file:
        try:
            try:
                head = read_head(file)
                if not head.complete:
                    return
            except BankCorruptError:
                head = read_head(file, copy=1)  # which was finished before the first was begun
            if head.complete:
                if digest_of(file, head) != head.digest:
                    return
                head = replace(head, complete=False)
                head = replace(head, digest=digest_of(file, head))
        except BankError:
            return  # opening it will say what is wrong
    _write_whole(descriptor, head.encode(), 0)
    os.fsync(descriptor)


def _write_whole(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    """pwrite, which may write a part only."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _moments(vectors: Float[Tensor, "rows d"]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per dimension in float64, a few rows at a time.

    Sums are of differences to the first row, so that a dimension that never changes has a deviation of exactly zero.
    """
    origin = vectors[0].double()
    total, squares = torch.zeros_like(origin), torch.zeros_like(origin)
    for part in vectors.split(max(1, _CACHED_NUMBERS * torch.get_num_threads() // vectors.shape[1])):
        apart = part.double().sub_(origin)
        total += apart.sum(0)
        squares += apart.square_().sum(0)
    shift = total / len(vectors)
    return (origin + shift).numpy(), (squares / len(vectors) - shift**2).clamp(min=0).sqrt().numpy()


def _as_stored(vectors: Tensor) -> np.ndarray:
    return vectors.view(torch.uint16).numpy() if vectors.dtype == torch.bfloat16 else vectors.numpy()


def _to_device(array: np.ndarray, device: torch.device | str | None) -> Tensor:
    tensor = torch.from_numpy(array)
    if device is None or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # a copy from pageable memory would wait for the model


def _to_pinned(tensor: Tensor) -> Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
