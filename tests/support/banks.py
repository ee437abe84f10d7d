"""Banks made without a model: hand-made records, rows and activations."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
import torch

from tl_latentlens.bank import create
from tl_latentlens.bank.batches import Batch
from tl_latentlens.bank.format import ModelRecord, partial_path
from tl_latentlens.bank.writer import BankWriter
from tl_latentlens.corpus.plan import Plan, PlanSettings, make_plan, prompts_from_lists
from tl_latentlens.model.fingerprint import Fingerprint
from tl_latentlens.model.info import ModelInfo

HOOK_A, HOOK_B = "blocks.0.hook_resid_post", "blocks.1.attn.hook_z"
WIDTHS = {HOOK_A: 6, HOOK_B: 3}
TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
NUMPY_DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
INFO = ModelInfo("tiny", "HookedTransformer", 2, 6, 400, 64, "float32", False, "0" * 64)


@contextmanager
def blocks_of(n_batches: int, max_bytes: int | None = None) -> Iterator[None]:
    """Banks that are created inside have blocks of so many batches, and of so many bytes at most."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(create, "BATCHES_PER_BLOCK", n_batches)
        if max_bytes is not None:
            patch.setattr(create, "MAX_BLOCK_BYTES", max_bytes)
        yield


def make_record(plan: Plan, widths: dict[str, int] | None = None, info: ModelInfo = INFO, scale: float = 1.0) -> ModelRecord:
    """A model's record without a model: token i reads as its number, and 0 is special."""
    widths = WIDTHS if widths is None else widths
    rng = np.random.default_rng(5)
    activations = {name: scale * rng.standard_normal((3, width)).astype(np.float32) for name, width in widths.items()}
    texts = {int(i): f" {i}".encode() for i in np.unique(plan.tokens)}
    return ModelRecord(info, widths, Fingerprint(((0, 1), (0,)), activations), texts, (0,))


def make_rows(n_prompts: int = 24, longest: int = 9, **kwargs: Any) -> Plan:
    """Prompts of several lengths, BOS (0) first, a blank one among them."""
    rng = np.random.default_rng(1)
    lists = [[0, *rng.integers(1, 30, rng.integers(1, longest)).tolist()] for _ in range(n_prompts)]
    lists[2] = []
    special = [[i == 0 for i in range(len(tokens))] for tokens in lists]
    return make_plan(prompts_from_lists(lists, special), PlanSettings(**kwargs))


def activations(plan: Plan, widths: dict[str, int] | None = None) -> dict[str, np.ndarray]:
    """What the model would give at each row, long and short: the oracle of every test that fills a bank."""
    rng = np.random.default_rng(7)
    widths = WIDTHS if widths is None else widths
    return {
        n: (100 * rng.random((plan.n_rows, 1)) * rng.standard_normal((plan.n_rows, d))).astype(np.float32)
        for n, d in widths.items()
    }


def give(writer: BankWriter, batch: Batch, acts: dict[str, np.ndarray], names: tuple[str, ...] | None = None) -> None:
    """Hand the rows of a batch to the writer, for all hook names or some."""
    for name in writer.hook_names if names is None else names:
        rows = torch.from_numpy(acts[name][batch.rows])
        norms = torch.linalg.vector_norm(rows, dim=-1)
        writer.write(name, batch, (rows / norms[:, None]).to(TORCH_DTYPES[writer.dtype]), norms)


def fill(
    path: Path, plan: Plan, *, acts: dict[str, np.ndarray] | None = None, stop_after: int | None = None, **kwargs: Any
) -> list[Batch]:
    """Build a bank; raise Stop after so many batches. The batches it was given come back."""
    acts = activations(plan) if acts is None else acts
    record = kwargs.pop("record", None) or make_record(plan)
    done = []
    with BankWriter.create(path, plan, record, **kwargs) as writer:
        for batch in writer.batches():
            if len(done) == stop_after:
                raise StopBuildError
            give(writer, batch, acts)
            done.append(batch)
    return done


class StopBuildError(Exception):
    """An interruption of the user's loop."""


def stop_partial(path: Path, plan: Plan, complete: bool, batch_tokens: int = 16) -> None:
    """Leave a partial file: of a build stopped after three batches, or of one stopped right before its rename."""
    if complete:
        fill(path, plan, batch_tokens=batch_tokens)
        path.rename(partial_path(path))
        return
    with pytest.raises(StopBuildError):
        fill(path, plan, batch_tokens=batch_tokens, stop_after=3)


def journal(path: Path) -> np.ndarray:
    """Which blocks of an unfinished bank are done, read with plain h5py."""
    with h5py.File(partial_path(path), "r", locking=False) as file:
        return file["journal"][:].astype(bool)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Turn an endless loop into a failure."""

    def stop(*_: object) -> None:
        raise AssertionError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
