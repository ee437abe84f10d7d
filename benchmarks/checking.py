"""What checking costs: opening a bank, loading it into an index with and without its checksums, from memory and from disk."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import tl_latentlens as tll
from benchmarks.measure import Settings, alternate, table
from tl_latentlens.bank.format import ModelRecord
from tl_latentlens.corpus.plan import Prompts
from tl_latentlens.model.fingerprint import Fingerprint
from tl_latentlens.model.info import ModelInfo

HOOK_NAMES = [f"blocks.{layer}.hook_resid_post" for layer in (3, 6, 9)]
INFO = ModelInfo("random", "none", 12, 768, 50257, 1024, "float32", False, "0" * 64)
D_MODEL = 768


def run(settings: Settings) -> str:
    """A table for a bank of 200 MB, or of 2 GB where large sizes are asked for."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank.h5"
        make_bank(path, (2000 if settings.large else 200) * 10**6 // (2 * D_MODEL * len(HOOK_NAMES)))
        size = path.stat().st_size
        calls = {
            "`Bank.open`": lambda: tll.Bank.open(path),
            "`ContextualIndex(bank, verify=False)`": lambda: tll.ContextualIndex(path, device="cpu", verify=False),
            "`ContextualIndex(bank)`": lambda: tll.ContextualIndex(path, device="cpu"),
        }
        warm = alternate(calls, settings.repeats)
        cold = alternate(calls, settings.repeats, before=lambda: forget(path))
    rows = [{"what": name, "in memory": warm[name], "from disk": cold[name]} for name in calls]
    reading = f"{size / warm[rows[-1]['what']].median / 1e9:,.1f} GB/s"
    return f"## Checking a bank of {size / 1e6:,.0f} MB\n\n{table(rows)}\n\nReading and checking in memory: {reading}."


def make_bank(path: Path, n_rows: int, hook_names: Sequence[str] = HOOK_NAMES, d_model: int = D_MODEL) -> None:
    """A bank of random unit vectors, in prompts of 32 tokens; each batch has those of the last with their numbers shifted."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 50257, (n_rows // 32, 32), dtype=np.int32)
    tokens[:, 0] = np.arange(len(tokens))  # so that no two prompts share a prefix
    starts = np.arange(0, tokens.size + 1, 32)
    plan = tll.make_plan(Prompts(tokens.ravel(), starts, np.zeros(tokens.size, bool)), tll.PlanSettings(None))
    texts = {int(i): str(i).encode() for i in np.unique(tokens)}
    known = Fingerprint(((1, 2),), {name: np.ones((2, d_model), np.float32) for name in hook_names})
    record = ModelRecord(INFO, dict.fromkeys(hook_names, d_model), known, texts)
    with tll.BankWriter.create(path, plan, record) as writer:
        vectors = torch.nn.functional.normalize(torch.randn(writer.batch_tokens, d_model), dim=-1).half()
        for batch in writer.batches():
            vectors = vectors.roll(1, -1)
            for name in hook_names:
                writer.write(name, batch, vectors[: len(batch.rows)], torch.ones(len(batch.rows)))


def forget(path: Path) -> None:
    """Drop a file from the system's cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
