"""What all benchmarks share: contestants timed in turns in one process, their memory, a table, and the machine's name."""

import ctypes
import gc
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "transformer-lens",
    "transformers",
    "numpy",
    "numba",
    "faiss-cpu",
    "faiss-gpu",
    "latentlens",
    "tl-latentlens",
)


@dataclass(frozen=True)
class Settings:
    """What the command line asks of each benchmark.

    Attributes:
        corpus: "demo" or a path, as `load_corpus` takes it.
        repeats: Timed runs of each contestant, after one to warm up.
        large: Also the sizes that take minutes or much memory.
        device: Where models and indices go.
        model: "demo", a folder or name that `load_model` takes, or a shape of random weights (see `build`).
        peak_flops: Of the device, for the share of it that is used; None: from a table of known devices.
        peer_python: The Python of an environment with latentlens; None: this one.
        figure: Where `growth`, `scenes` and `keys` draw their figures.
        folder: Where `scenes` and `keys` keep what they trained, and `evidence` its banks; None: below build.
        draws: Simulated cases of each line of `coverage`.
        sae: What `load_sae` takes, for `label_quality`.
        seeds: Trainings of `scenes`, each with scenes of its own.
    """

    corpus: str = "demo"
    repeats: int = 5
    large: bool = False
    device: str = "cpu"
    model: str = "demo"
    peak_flops: float | None = None
    peer_python: str | None = None
    figure: Path | None = None
    folder: Path | None = None
    draws: int = 1000
    sae: str = "demo"
    seeds: int = 3


class WrongResultError(Exception):
    """A contestant's result is wrong, so its time means nothing; the command fails."""


@dataclass(frozen=True)
class Measured:
    """One run. A contestant that ran in another process returns what was measured there.

    Attributes:
        seconds: Wall-clock time.
        peak_bytes: Most resident memory above what the process had before.
        peak_device_bytes: The same for CUDA memory; 0 without CUDA.
        result: What the call returned.
    """

    seconds: float
    peak_bytes: int
    peak_device_bytes: int = 0
    result: Any = None


@dataclass(frozen=True)
class Timing:
    """The timed runs of one contestant.

    Attributes:
        seconds: Wall-clock time of each run.
        peak_bytes, peak_device_bytes: The most of all runs, as in `Measured`.
        result: What the run to warm up returned.
    """

    seconds: tuple[float, ...]
    peak_bytes: int
    peak_device_bytes: int
    result: Any

    @property
    def median(self) -> float:
        """Median of the runs, in seconds."""
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        """Median and range."""
        unit, scale = ("s", 1) if self.median >= 1 else ("ms", 1e3)
        return f"{self.median * scale:,.3g} {unit} ({min(self.seconds) * scale:,.3g}–{max(self.seconds) * scale:,.3g})"


def alternate(
    contestants: dict[str, Callable[[], Any]], repeats: int, *, before: Callable[[], object] = lambda: None
) -> dict[str, Timing]:
    """Run each contestant once to warm up, then all in turns, so that a busy or throttled machine hits them alike.

    The first turn is for their memory and does not count for their times: freed memory goes back to the system before it.

    Args:
        contestants: Name → what is timed.
        repeats: How often each is timed.
        before: Called before each run but that to warm up, untimed.
    """
    results = {name: call() for name, call in contestants.items()}
    runs: dict[str, list[Measured]] = {name: [] for name in contestants}
    for turn in range(1 + repeats):
        for name, call in contestants.items():
            before()
            runs[name].append(replace(measured(call, memory=turn == 0), result=None))
    timings = {}
    for name, result in results.items():
        seconds = tuple(run.seconds for run in runs[name][1:])
        peak, device_peak = (max(getattr(run, field) for run in runs[name]) for field in ("peak_bytes", "peak_device_bytes"))
        timings[name] = Timing(seconds, peak, device_peak, result.result if isinstance(result, Measured) else result)
    return timings


def measured(call: Callable[[], Any], *, memory: bool = True) -> Measured:
    """Run once; with `memory`, also peak memory above what there was at the start, which makes short calls slower."""
    gc.collect()
    cuda = torch.cuda.is_available()
    on_device = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        on_device = torch.cuda.memory_allocated()
    before = reset_peak() if memory else 0
    start = time.perf_counter()
    result = call()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if isinstance(result, Measured):
        return result
    peak, device_peak = peak_memory() - before, torch.cuda.max_memory_allocated() - on_device if cuda else 0
    return Measured(seconds, peak, device_peak, result) if memory else Measured(seconds, 0, result=result)


def reset_peak() -> int:
    """Let the peak begin anew where the system can (Linux); what is resident now, in bytes."""
    if sys.platform != "linux":
        return peak_memory()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what earlier contestants freed would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_memory() -> int:
    """Peak resident memory of this process in bytes, on Linux since the last run began."""
    if sys.platform == "linux":
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def table(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table; floats get three digits."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[f"{value:,.3g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def megabytes(n_bytes: float) -> str:
    """Bytes for a table."""
    return f"{n_bytes / 1e6:,.0f} MB"


def environment() -> str:
    """The machine and the packages that a result was measured with, one a line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    cpu = f"{_cpu()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    lines = [f"CPU {cpu}; {memory / 1e9:,.0f} GB memory; GPU {gpu}"]
    return "\n".join([*lines, f"Python {platform.python_version()}, {', '.join(_versions(PACKAGES))}"])


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _versions(packages: Iterable[str]) -> Iterable[str]:
    for package in packages:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
