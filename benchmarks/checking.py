"""What checking costs: opening a bank, loading it into an index with and without its checksums, from memory and from disk.

Run: `python benchmarks/checking.py --megabytes 2000`
"""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import tl_latentlens as tll
from tl_latentlens.bank_format import Fingerprint, ModelInfo, ModelRecord

HOOK_NAMES = [f"blocks.{layer}.hook_resid_post" for layer in (3, 6, 9)]
INFO = ModelInfo("random", "none", 12, 768, 50257, 1024, "float32", False, "0" * 64)


def make_bank(path: Path, n_rows: int, d_model: int) -> None:
    """A bank of random unit vectors, in prompts of 32 tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 50257, (n_rows // 32, 32))
    tokens[:, 0] = np.arange(len(tokens))  # so that no two prompts share a prefix
    plan = tll.make_plan(tll.prompts_from_lists(tokens.tolist()), tll.PlanSettings(None))
    texts = {int(i): str(i).encode() for i in np.unique(tokens)}
    known = Fingerprint(((1, 2),), {name: np.ones((2, d_model), np.float32) for name in HOOK_NAMES})
    record = ModelRecord(INFO, dict.fromkeys(HOOK_NAMES, d_model), known, texts)
    with tll.BankWriter.create(path, plan, record) as writer:
        for batch in writer.batches():
            vectors = torch.nn.functional.normalize(torch.randn(len(batch.rows), d_model), dim=-1).half()
            for name in HOOK_NAMES:
                writer.write(name, batch, vectors, torch.ones(len(batch.rows)))


def seconds(call: Callable[[], object], repeats: int, before: Callable[[], None] = lambda: None) -> float:
    """Median over `repeats` calls."""
    times = []
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(
    megabytes: Annotated[int, typer.Option(help="size of the vectors, in MB")] = 2000,
    d_model: Annotated[int, typer.Option(help="width of the vectors")] = 768,
    repeats: Annotated[int, typer.Option(help="medians are over this many")] = 5,
    folder: Annotated[Path | None, typer.Option(help="where to make the bank; default: the system's temporary folder")] = None,
) -> None:
    """Make a bank, time it, print a table."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        path = Path(work) / "bank.h5"
        make_bank(path, megabytes * 10**6 // (2 * d_model * len(HOOK_NAMES)), d_model)
        size = path.stat().st_size

        def forget() -> None:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        machine = f"{platform.machine()}, torch {torch.__version__}"
        table = Table(title=f"bank of {size / 1e6:,.0f} MB, {machine}, medians of {repeats}")
        for column in ("what", "in memory", "from disk"):
            table.add_column(column)
        calls: dict[str, Callable[[], object]] = {
            "Bank.open": lambda: tll.Bank.open(path),
            "ContextualIndex, verify=False": lambda: tll.ContextualIndex(path, device="cpu", verify=False),
            "ContextualIndex": lambda: tll.ContextualIndex(path, device="cpu"),
        }
        for name, call in calls.items():
            call()
            times = seconds(call, repeats), seconds(call, repeats, forget)
            reads_all = name == "ContextualIndex"
            table.add_row(name, *(f"{t * 1e3:,.1f} ms" + f", {size / t / 1e9:,.1f} GB/s" * reads_all for t in times))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
