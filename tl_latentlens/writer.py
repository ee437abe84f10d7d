"""The bank file, filled: block by block, resumed where it was left, verified and finished.

`bank_create` writes the HDF5 structure once, before the model runs; vectors then go straight to their offsets in the file.
A block counts as done when its bytes are on disk and its checksum stands in the journal. Arrays come in from
`hooks.record`; nothing here knows a model.
"""

import os
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_latentlens.bank import Bank
from tl_latentlens.bank_create import create_partial, lock_file
from tl_latentlens.bank_format import (
    DTYPES,
    Layout,
    ModelInfo,
    ModelRecord,
    block_checksum,
    encode_user_block,
    metadata_digest,
    partial_path,
    read_user_block,
)
from tl_latentlens.errors import BankError, InvalidInputError, UnknownHookError
from tl_latentlens.plan import Plan


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

    def __init__(self, path: Path, layout: Layout, descriptor: int) -> None:
        """Use `BankWriter.create`."""
        self.path = path
        self.plan = layout.plan
        self.dtype = layout.dtype
        self.hook_names = tuple(layout.widths)
        self._layout = layout
        self._descriptor = descriptor
        self._starts = layout.map("block_starts")
        self._done = np.array(layout.map("journal"), bool)
        self._buffers: dict[int, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
        self._missing: dict[tuple[int, str], np.ndarray] = {}
        self._failure: BaseException | None = None
        self._queue: queue.Queue[tuple[str, Batch, Tensor, Tensor, Any] | None] = queue.Queue(2 * len(self.hook_names))
        self._thread = threading.Thread(target=self._drain, name="bank-writer", daemon=True)
        self._thread.start()

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
        if dtype not in DTYPES:
            raise InvalidInputError(f"got dtype={dtype!r}; expected one of {list(DTYPES)}")
        if batch_tokens < 1:
            raise InvalidInputError(f"got batch_tokens={batch_tokens}; expected at least 1")
        if path.exists():
            raise BankError(f"{path} exists already; open it with Bank.open, or choose another path")
        if not path.parent.is_dir():
            raise BankError(f"no folder {path.parent} to write {path.name} in; create it first")
        partial = partial_path(path)
        if not partial.exists():
            create_partial(partial, plan, record, dtype, batch_tokens)
        descriptor = os.open(partial, os.O_RDWR)
        try:
            lock_file(descriptor, partial)
            layout = Layout(partial)
            _require_same(partial, layout, plan, record, dtype)
            return cls(path, layout, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def __enter__(self) -> "BankWriter":
        """Return the writer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Finish a complete bank; keep an incomplete one for a later resume."""
        try:
            self._stop(raise_failure=kind is None)
            if kind is None and self._done.all():
                self._finish()
        finally:
            os.close(self._descriptor)
            self._layout.close()

    @property
    def tokens_to_run(self) -> int:
        """Tokens of all prompts that a build runs."""
        return self._tokens_of(range(len(self._done)))

    @property
    def tokens_left(self) -> int:
        """Those that are still to be run; fewer where a build is resumed."""
        return self._tokens_of(np.flatnonzero(~self._done).tolist())

    def _tokens_of(self, blocks: Iterable[int]) -> int:
        return sum(int(self._run_lengths(self._block_prompts(block)).sum()) for block in blocks)

    def batches(self, device: torch.device | str | None = None) -> Iterator[Batch]:
        """The batches that remain, block by block, prompts of like length together, on `device`."""
        for block in np.flatnonzero(~self._done).tolist():
            prompts = self._block_prompts(block)
            lengths = self._run_lengths(prompts)
            order = np.argsort(-lengths, kind="stable")
            prompts, lengths = prompts[order], lengths[order]
            first = 0
            while first < len(prompts):
                count = max(1, self._layout.batch_tokens // int(lengths[first]))
                yield self._batch(block, prompts[first : first + count], lengths[first : first + count], device)
                first += count

    def write(self, hook_name: str, batch: Batch, vectors: Float[Tensor, "rows d"], norms: Float[Tensor, " rows"]) -> None:
        """Hand over a batch's unit vectors (already in the bank's dtype) and norms; a background thread writes them.

        Raises:
            InvalidInputError: A shape that does not fit, or (from an earlier call) a NaN, inf or zero activation.
            BankError: Writing failed.
        """
        self._raise_failure()
        if hook_name not in self._layout.widths:
            raise UnknownHookError(f"the bank has no hook name {hook_name!r}; it has {list(self.hook_names)}")
        if vectors.dtype != (dtype := getattr(torch, self.dtype)):
            raise InvalidInputError(f"{hook_name}: got vectors of {vectors.dtype}, expected {dtype}; use vectors.to({dtype})")
        expected = (len(batch.rows), self._layout.widths[hook_name])
        if tuple(vectors.shape) != expected:
            raise InvalidInputError(f"{hook_name}: got vectors of shape {tuple(vectors.shape)}, expected {expected}")
        ready = None
        if vectors.is_cuda:
            ready = torch.cuda.Event()
            stream = torch.cuda.current_stream(vectors.device)
            vectors, norms = _to_pinned(vectors), _to_pinned(norms)
            ready.record(stream)
        elif vectors.device.type != "cpu":
            vectors, norms = vectors.cpu(), norms.cpu()
        self._queue.put((hook_name, batch, vectors, norms, ready))

    def _block_prompts(self, block: int) -> Int[np.ndarray, " prompts"]:
        return np.unique(self.plan.row_prompts[self._starts[block] : self._starts[block + 1]])

    def _run_lengths(self, prompts: Int[np.ndarray, " prompts"]) -> Int[np.ndarray, " prompts"]:
        starts, ends = self.plan.prompt_starts[prompts], self.plan.prompt_starts[prompts + 1]
        if self.plan.settings.bidirectional:
            return ends - starts
        last = self.plan.row_tokens[np.searchsorted(self.plan.row_tokens, ends) - 1]
        return last + 1 - starts  # a causal model need not run past a prompt's last row

    def _batch(self, block: int, prompts: np.ndarray, lengths: np.ndarray, device: torch.device | str | None) -> Batch:
        columns = np.arange(int(lengths.max()))
        mask = columns < lengths[:, None]
        starts = self.plan.prompt_starts[prompts]
        tokens = np.zeros(mask.shape, np.int64)
        tokens[mask] = self.plan.tokens[(starts[:, None] + columns)[mask]]
        first = np.searchsorted(self.plan.row_tokens, starts)
        count = np.searchsorted(self.plan.row_tokens, self.plan.prompt_starts[prompts + 1]) - first
        row_batch = np.repeat(np.arange(len(prompts)), count)
        rows = np.arange(len(row_batch)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
        row_pos = self.plan.row_tokens[rows] - starts[row_batch]
        tensors = (_to_device(array, device) for array in (tokens, mask, row_batch, row_pos))
        tokens_t, mask_t, row_batch_t, row_pos_t = tensors
        return Batch(tokens_t, mask_t, rows, row_batch_t, row_pos_t, block, int(lengths.sum()))

    def _drain(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._failure is None:
                try:
                    self._store(*item)
                except BaseException as error:
                    self._failure = error

    def _store(self, hook_name: str, batch: Batch, vectors: Tensor, norms: Tensor, ready: Any) -> None:
        if ready is not None:
            ready.synchronize()
        lengths = norms.numpy()
        bad = ~np.isfinite(lengths) | (lengths == 0)
        if bad.any():
            row = int(batch.rows[np.flatnonzero(bad)[0]])
            at = int(self.plan.row_tokens[row])
            prompt = int(self.plan.row_prompts[row])
            raise InvalidInputError(
                f"{hook_name}: {int(bad.sum())} activations are NaN, inf or zero, the first at prompt {prompt}, position "
                f"{at - int(self.plan.prompt_starts[prompt])} (norm {lengths[bad][0]}); a bank holds directions, so check the "
                "model's dtype and weights, or leave this hook name out"
            )
        if self._done[batch.block]:
            return  # a batch that was run again
        first, last = self._starts[batch.block : batch.block + 2]
        if batch.block not in self._buffers:
            stored = DTYPES[self.dtype][1]
            self._buffers[batch.block] = {
                name: (np.empty((last - first, width), stored), np.empty(last - first, np.float32))
                for name, width in self._layout.widths.items()
            }
            self._missing.update({(batch.block, name): np.ones(last - first, bool) for name in self.hook_names})
        block_vectors, block_norms = self._buffers[batch.block][hook_name]
        block_vectors[batch.rows - first] = _as_stored(vectors)
        block_norms[batch.rows - first] = lengths
        self._missing[batch.block, hook_name][batch.rows - first] = False
        if not any(self._missing[batch.block, name].any() for name in self.hook_names):
            self._commit(batch.block)

    def _commit(self, block: int) -> None:
        first = int(self._starts[block])
        for name, (vectors, norms) in self._buffers.pop(block).items():
            self._put(f"hooks/{name}/vectors", vectors, first * vectors.shape[1] * vectors.itemsize)
            self._put(f"hooks/{name}/norms", norms, first * norms.itemsize)
            self._put(f"hooks/{name}/checksums", np.uint64(block_checksum(vectors, norms)), block * 8)
        _sync(self._descriptor)  # the bytes first, the journal after them, also across a power cut
        self._put("journal", np.uint8(1), block)
        self._done[block] = True

    def _put(self, name: str, array: np.ndarray | np.generic, offset: int) -> None:
        data = memoryview(np.ascontiguousarray(array)).cast("B")
        start = self._layout.region(name)[0] + offset
        try:
            while data:
                written = os.pwrite(self._descriptor, data, start)
                data, start = data[written:], start + written
        except OSError as error:
            raise BankError(
                f"writing {partial_path(self.path)} failed: {error}; finished blocks are kept, resume later"
            ) from error

    def _stop(self, *, raise_failure: bool) -> None:
        self._queue.put(None)
        self._thread.join()
        if raise_failure:
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _finish(self) -> None:
        partial = partial_path(self.path)
        self._layout.close()
        Bank(partial, self._layout).verify()
        for name in self.hook_names:
            mean, std = _moments(self._layout.map(f"hooks/{name}/vectors").view(DTYPES[self.dtype][0]), self._starts)
            self._put(f"hooks/{name}/mean", mean, 0)
            self._put(f"hooks/{name}/std", std, 0)
        _sync(self._descriptor)
        size = read_user_block(partial)["size"]
        unhashed = _payload(self._layout)
        block = encode_user_block(size, True, unhashed, metadata_digest(partial, size, unhashed))
        os.pwrite(self._descriptor, block, 0)
        os.fsync(self._descriptor)
        if self.path.exists():
            raise BankError(f"{self.path} appeared while it was being built; the new bank is complete in {partial}")
        partial.rename(self.path)


_sync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


def _payload(layout: Layout) -> list[tuple[int, int]]:
    return [layout.region(f"hooks/{name}/{part}") for name in layout.widths for part in ("vectors", "norms")]


def _moments(vectors: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per dimension in float64, a few rows at a time."""
    total, squares = np.zeros(vectors.shape[1]), np.zeros(vectors.shape[1])
    for first, last in pairwise(starts):
        for row in range(int(first), int(last), 4096):
            part = vectors[row : min(row + 4096, int(last))].astype(np.float64)
            total += part.sum(0)
            squares += np.square(part).sum(0)
    mean = total / len(vectors)
    return mean, np.sqrt(np.maximum(squares / len(vectors) - mean**2, 0))


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


def _different_fields(there: ModelInfo, here: ModelInfo) -> tuple[dict[str, Any], dict[str, Any]]:
    theirs, ours = asdict(there), asdict(here)
    names = [name for name in theirs if theirs[name] != ours[name]]
    return {name: theirs[name] for name in names}, {name: ours[name] for name in names}


def _require_same(partial: Path, layout: Layout, plan: Plan, record: ModelRecord, dtype: str) -> None:
    pairs = {
        "plan (corpus, tokens or settings)": (layout.plan_digest, plan.digest),
        "model": _different_fields(layout.model, record.info),
        "hook names": (dict(layout.widths), record.widths),
        "dtype": (layout.dtype, dtype),
    }
    differing = [f"{what}: the file has {there}, this call {here}" for what, (there, here) in pairs.items() if there != here]
    if not differing:
        stored = Bank(partial, layout).fingerprint
        if stored.prompts != record.fingerprint.prompts:
            differing = ["the fingerprint prompts"]
        else:
            for name, theirs in stored.activations.items():
                ours = record.fingerprint.activations[name]
                scale = float(np.nanmax(np.abs(theirs), initial=0))
                if not np.allclose(theirs, ours, rtol=1e-2, atol=1e-2 * scale, equal_nan=True):
                    differing.append(f"the model's activations at {name}: other weights")
    if differing:
        raise BankError(f"{partial} cannot be resumed, it differs in {'; '.join(differing)}. Delete it or choose another path")
