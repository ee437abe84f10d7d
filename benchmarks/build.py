"""What a build costs beside the model's own work, and against latentlens."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tl_latentlens as tll
from benchmarks.bare_forward import MAX_ROWS_PER_TOKEN, batches_of, forward
from benchmarks.measure import Measured, Settings, Timing, WrongResultError, alternate, megabytes, table
from benchmarks.models import known_peak_flops, load_benchmark_model, n_parameters_met
from benchmarks.once import in_a_new_process
from benchmarks.shapes import SHAPES
from tl_latentlens.model.loading import DEMO_MODEL
from tl_latentlens.model.running import run_hooked


def run(settings: Settings) -> str:
    """Tables for the first 2,000 texts of the corpus, or 20,000 where large."""
    model = load_benchmark_model(settings)
    texts = list(islice(tll.load_corpus(settings.corpus), 20_000 if settings.large else 2_000))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank.h5"

        def build() -> None:
            path.unlink(missing_ok=True)
            tll.build_bank(model, texts, path, max_rows_per_token=MAX_ROWS_PER_TOKEN, progress=False)

        build()
        with tll.Bank.open(path) as bank:
            check(model, bank)
            names, n_rows = list(bank.hook_names), bank.n_rows
            batch_tokens = bank.file.metadata.batch_tokens
        batches = batches_of(model, texts, Path(folder) / "batches.h5", names, batch_tokens)
        n_tokens = sum(batch.n_tokens for batch in batches)
        contestants: dict[str, Callable[[], Any]] = {
            "bare forward": lambda: forward(model, batches, names[-1]),
            "`build_bank`": build,
            "of it, planning": lambda: tll.plan_corpus(model, texts, max_rows_per_token=MAX_ROWS_PER_TOKEN),
        }
        with peer(settings, texts, names, folder) as other:
            if other is not None:
                contestants["latentlens"] = other
            timings = alternate(contestants, settings.repeats)
        first: list[dict[str, Any]] = []
        if settings.model == "demo" and settings.device == "cpu":
            calls = {name: partial(in_a_new_process, name, texts, Path(folder)) for name in ("bare", "build")}
            runs = alternate(calls, settings.repeats)
            names_of = {
                "bare": "bare forward, the first thing in a process",
                "build": "`build_bank`, the first thing in a process",
            }
            first = [{"what": names_of[name], "time": run, **ratio(run, runs["bare"])} for name, run in runs.items()]
    head = f"## Building a bank: {len(texts):,} texts, {n_tokens:,} tokens to run, {n_rows:,} rows × {len(names)} hook names"
    padded = sum(batch.tokens.numel() for batch in batches) / n_tokens - 1
    notes = [f"Padding: {padded:.1%} of the tokens, in the bare forward pass too."]
    if "latentlens" in timings:
        notes.append(f"latentlens keeps {timings['latentlens'].result:,} rows a layer.")
    elif has_peer(settings):
        notes.append("latentlens is not installed: no comparison (--peer-python).")
    tables = [table(rows_of(timings, settings, model, names, n_tokens)), *([table(first)] if first else [])]
    return "\n\n".join([head, *tables, " ".join(notes)])


def rows_of(
    timings: dict[str, Timing], settings: Settings, model: Any, names: list[str], n_tokens: int
) -> list[dict[str, Any]]:
    """One row of the table for each contestant."""
    rows = []
    peak_flops = settings.peak_flops or known_peak_flops(settings.device)
    for name, timing in timings.items():
        row: dict[str, Any] = {
            "what": name,
            "time": timing,
            **ratio(timing, timings["bare forward"]),
        }
        if settings.device != "cpu":
            row["peak GPU memory"] = megabytes(timing.peak_device_bytes)
        if peak_flops is not None:
            used = 2 * n_parameters_met(model, names) * n_tokens / timing.median / peak_flops
            row["MFU"] = "" if name == "of it, planning" else f"{used:.1%}"
        rows.append(row)
    return rows


def ratio(timing: Timing, bare: Timing) -> dict[str, str]:
    """Time beside the bare forward pass, and memory."""
    return {"of bare forward": f"{timing.median / bare.median:.3f}", "peak memory": megabytes(timing.peak_bytes)}


def check(model: Any, bank: tll.Bank) -> None:
    """Compare the rows of a few prompts, spread over the bank, with the model's activations for each prompt alone.

    Raises:
        WrongResultError: They differ by more than padding and rounding do.
    """
    plan, seen = bank.plan, {}
    # Of unit vectors. bfloat16 rounds otherwise in a batch than alone, the more the deeper the model; other rows are 1 apart.
    tolerance = 1e-3 if bank.model_info.dtype == "float32" else 0.25
    hooks = [
        (name, lambda activation, hook, name=name: seen.update({name: activation[0].flatten(1)})) for name in bank.hook_names
    ]
    for row in np.linspace(0, bank.n_rows - 1, 20).astype(int):
        at, start = plan.row_tokens[row], plan.prompt_starts[plan.row_prompts[row]]
        tokens = torch.tensor(plan.tokens[start : at + 1][None].astype(np.int64), device=next(model.parameters()).device)
        run_hooked(model, tokens, None, hooks)
        for name in bank.hook_names:
            expected = torch.nn.functional.normalize(seen[name][-1].float(), dim=0).cpu().numpy()
            if np.linalg.norm(bank.vectors(name)[row].astype(np.float32) - expected) > tolerance:
                raise WrongResultError(f"row {row} of {name} is not what the model gives for its prompt")


def has_peer(settings: Settings) -> bool:
    """True where latentlens can be given the same weights."""
    return settings.model == "demo" or settings.model in SHAPES


@contextmanager
def peer(settings: Settings, texts: list[str], names: list[str], folder: str) -> Iterator[Callable[[], Measured] | None]:
    """Builds by latentlens, of the same weights, texts and layers, in a process of its own; None where it is missing.

    Its layer i is our `blocks.{i - 1}.hook_resid_post`, but for the last, which it takes behind the final norm.
    """
    if not has_peer(settings) or (settings.peer_python is None and find_spec("latentlens") is None):
        yield None
        return
    corpus = Path(folder) / "texts.json"
    corpus.write_text(json.dumps(texts))
    layers = ",".join(str(int(name.split(".")[1]) + 1) for name in names)
    command = [settings.peer_python or sys.executable, "-m", "benchmarks.peer_latentlens", settings.model, str(DEMO_MODEL)]
    command += [
        settings.device,
        str(corpus),
        layers,
        str(MAX_ROWS_PER_TOKEN),
        str(torch.get_num_threads()),
        str(Path(folder) / "peer"),
    ]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        requests, answers = process.stdin, process.stdout

        def build() -> Measured:
            requests.write("build\n")
            requests.flush()
            return Measured(**json.loads(answers.readline()))

        yield build
        requests.close()
