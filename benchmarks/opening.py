"""What opening costs: time and resident memory of `Bank.open`, of the first row, and of an index, each in a fresh process."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import typer

import tl_latentlens as tll
from benchmarks.checking import HOOK_NAMES, forget, make_bank
from benchmarks.measure import Settings, WrongResultError, peak_memory, reset_peak, table


@dataclass(frozen=True)
class Size:
    """A bank to make: its rows, its hook names and their width."""

    n_rows: int
    hook_names: list[str]
    d_model: int

    @property
    def n_bytes(self) -> int:
        """About the bytes of its file, two a number and some 24 a row."""
        return self.n_rows * (len(self.hook_names) * (2 * self.d_model + 4) + 24)


SMALL = [Size(10**9 // (2 * 768 * 3), HOOK_NAMES, 768)]
LARGE = [Size(10**10 // (2 * 768 * 3), HOOK_NAMES, 768), Size(20 * 10**6, HOOK_NAMES[:1], 16)]


def run(settings: Settings) -> str:
    """A table for a bank of 1 GB; where large sizes are asked for, of 10 GB and of 20 million rows."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in LARGE if settings.large else SMALL:
            if (free := shutil.disk_usage(folder).free) < 1.1 * size.n_bytes:
                typer.echo(f"no room for a bank of {size.n_bytes / 1e9:,.1f} GB: {folder} has {free / 1e9:,.1f} GB; set TMPDIR")
                continue
            path = Path(folder) / "bank.h5"
            make_bank(path, size.n_rows, size.hook_names, size.d_model)
            rows += measured(path, size, settings.repeats)
            path.unlink()
    return f"## Opening a bank\n\n{table(rows) if rows else 'There was no room for it.'}"


def measured(path: Path, size: Size, repeats: int) -> list[dict[str, Any]]:
    """One row of the table for each step, with the file in the system's cache and without."""
    warm, cold = ([probe(path, cold=cold) for _ in range(repeats)] for cold in (False, True))
    rows = f"{tll.Bank.open(path).n_rows:,} rows × {len(size.hook_names)} × {size.d_model}"
    return [
        {
            "bank": f"{path.stat().st_size / 1e9:,.2f} GB: {rows}",
            "step": step,
            "in memory": _milliseconds(warm, step),
            "from disk": _milliseconds(cold, step),
            "peak resident": f"+{max(run[step][1] for run in [*warm, *cold]) / 1e6:,.1f} MB",
        }
        for step in warm[0]
    ]


def probe(path: Path, *, cold: bool) -> dict[str, tuple[float, int]]:
    """Step → seconds, and peak resident bytes above the process after `import tl_latentlens`."""
    if cold:
        forget(path)
    command = [sys.executable, "-m", "benchmarks.opening", str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _milliseconds(runs: list[dict[str, tuple[float, int]]], step: str) -> str:
    times = [1e3 * run[step][0] for run in runs]
    return f"{median(times):,.3g} ms ({min(times):,.3g}–{max(times):,.3g})"


def _steps(path: Path) -> None:
    """What `probe` runs in its process; prints its result.

    Raises:
        WrongResultError: The row that was read is not the token that `make_bank` put there.
    """
    start = reset_peak()
    found: dict[str, tuple[float, int]] = {}

    def step(name: str, call: Callable[[], Any]) -> Any:
        reset_peak()
        began = time.perf_counter()
        result = call()
        found[name] = time.perf_counter() - began, peak_memory() - start
        return result

    bank = step("`Bank.open`", lambda: tll.Bank.open(path))
    at = bank.n_rows // 64 * 32  # the first of its prompt, whose token is the prompt's number
    context = step("a row with its context", lambda: bank.row(at).context())
    if not context.startswith(f"«{at // 32}»"):
        raise WrongResultError(f"row {at} reads {context!r}")
    step("`ContextualIndex(bank, verify=False)`", lambda: tll.ContextualIndex(bank, device="cpu", verify=False))
    typer.echo(json.dumps(found))


if __name__ == "__main__":
    _steps(Path(sys.argv[1]))
