"""How a search grows: time and memory of the ten nearest against rows, and against queries, in a memory-mapped file."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import typer

from benchmarks.measure import Measured, Settings, Timing, alternate, measured, megabytes, table
from benchmarks.search import TOP_K, brute_force, require_same_rows
from tl_latentlens.search.tensors import as_tensor
from tl_latentlens.search.vectors import VectorSearch

D = 256
QUERIES, ROWS = 64, 10**5  # while the other of the two grows
CHECKED = 4  # queries
BLOCK = 10**5


def run(settings: Settings) -> str:
    """A table, up to a million rows and 1,000 queries, or ten times as many; the figure where one is asked for.

    Where the disk is too small for the rows, as many as fit.
    """
    rows = [round(10 ** (4 + i / 2)) for i in range(7 if settings.large else 5)]
    counts = [1, 4, 16, 64, 256, 1000, *([3200, 10_000] if settings.large else [])]
    with tempfile.TemporaryDirectory() as folder:
        free = shutil.disk_usage(folder).free
        if (fitting := [n for n in rows if 2.2 * D * n < free]) != rows:
            typer.echo(f"{folder} has {free / 1e9:,.1f} GB: no room for {rows[-1]:,} rows; set TMPDIR")
        path = Path(folder) / "vectors"
        write_units(path, fitting[-1])
        by_rows = [point(path, n, QUERIES, settings) for n in fitting]
        by_queries = [point(path, ROWS, n, settings) for n in counts]
    slopes = [slope(by_rows, "rows", ROWS), slope(by_queries, "queries", 256)]
    if settings.figure is not None:
        draw(by_rows, by_queries, settings.figure)
    note = (
        f"Slopes of log time on log size: {slopes[0]:.2f} from {ROWS:,} rows on, {slopes[1]:.2f} from 256 queries on. "
        "Memory counts the pages of the file that are read."
    )
    lines = [
        {
            "rows": f"{p.rows:,}",
            "queries": f"{p.queries:,}",
            "time": p.timing,
            "memory": megabytes(memory(p.timing)),
            "first search": f"{p.first.seconds:,.3g} s",
            "its memory": megabytes(memory(p.first)),
        }
        for p in (*by_rows, *by_queries)
    ]
    return f"## Growth of a search, top-{TOP_K} of rows × {D}, float16\n\n{table(lines)}\n\n{note}"


def write_units(path: Path, n: int) -> None:
    """Random unit vectors [n, D], float16; each block has those of the last with their numbers shifted."""
    block = torch.nn.functional.normalize(torch.randn(BLOCK, D, generator=torch.Generator().manual_seed(0)), dim=-1).half()
    with path.open("wb") as file:
        for first in range(0, n, BLOCK):
            block = block.roll(1, -1)
            block[: n - first].numpy().tofile(file)


@dataclass(frozen=True)
class Point:
    """What one size took.

    Attributes:
        rows, queries: The size.
        timing: Of searches after the first.
        first: The first search, which makes the int8 codes.
    """

    rows: int
    queries: int
    timing: Timing
    first: Measured


def point(path: Path, n_rows: int, n_queries: int, settings: Settings) -> Point:
    """Measure one size; checks the rows that are found."""
    stored = np.memmap(path, np.float16, "r", shape=(n_rows, D))
    queries = torch.randn(n_queries, D, generator=torch.Generator().manual_seed(1)).to(settings.device)
    search = VectorSearch(stored, settings.device)
    first = measured(lambda: search.top_k(queries, TOP_K))
    timing = alternate({"": lambda: search.top_k(queries, TOP_K).rows.cpu().numpy()}, settings.repeats)[""]
    rows, some, found = as_tensor(stored), queries[:CHECKED].cpu(), timing.result[:CHECKED]
    require_same_rows(rows, some, found, brute_force(rows, some), "a brute force in float32", 1e-6)
    return Point(n_rows, n_queries, timing, first)


def slope(points: Sequence[Point], field: str, first: int) -> float:
    """Exponent with which time grows, from a size on: 1 is in proportion."""
    x, y = zip(*((getattr(p, field), p.timing.median) for p in points if getattr(p, field) >= first), strict=True)
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def draw(by_rows: Sequence[Point], by_queries: Sequence[Point], path: Path) -> None:
    """Time and memory against rows and against queries, on logarithmic axes; the file's ending says which format."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    kinds = ("rows", by_rows, f"rows, at {QUERIES} queries"), ("queries", by_queries, f"queries, at {ROWS:,} rows")
    for (above, below), (field, points, label) in zip(axes.T, kinds, strict=True):
        sizes = np.array([getattr(p, field) for p in points])
        medians = [p.timing.median for p in points]
        spread = np.array([(p.timing.median - min(p.timing.seconds), max(p.timing.seconds) - p.timing.median) for p in points])
        above.errorbar(sizes, medians, spread.T, marker="o", capsize=3, label="time of a search, median and range")
        above.plot(sizes, medians[-1] * sizes / sizes[-1], "--", color="gray", label="in proportion to the last")
        below.plot(sizes, [memory(p.first) / 1e6 for p in points], "s-", color="C1", label="the first search, with its codes")
        below.plot(sizes, [memory(p.timing) / 1e6 for p in points], "o-", color="C0", label="a later one")
        below.set_xlabel(label)
    for axis in axes.flat:
        axis.set(xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak memory, MB")
    for axis in axes[:, 0]:
        axis.legend(loc="upper left", fontsize="small")
    figure.suptitle(f"The {TOP_K} nearest of rows × {D}, float16 in a memory-mapped file")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def memory(run: Measured | Timing) -> int:
    """Peak bytes above the start, on the GPU where there are more."""
    return max(run.peak_bytes, run.peak_device_bytes)
