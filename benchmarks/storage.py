"""What storage does to rankings: the order of the nearest rows in banks of each dtype, beside that of float32 activations."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

import tl_latentlens as tll
from benchmarks.measure import Settings, table

TEXTS = 1500  # the last ones of the corpus
QUERIES = 500
TOP_K = 11  # a row itself, and its ten nearest
LAYERS = 6


def run(settings: Settings) -> str:
    """A table with a line for each layer, transform and dtype."""
    model = tll.load_model(settings.model, device=settings.device)
    texts = list(tll.load_corpus(settings.corpus))[-TEXTS:]
    layers = np.unique(np.linspace(0, model.cfg.n_layers - 1, LAYERS).round().astype(int)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        banks = {
            dtype: tll.build_bank(model, texts, Path(folder) / f"{dtype}.h5", hook_names=layers, dtype=dtype, progress=False)
            for dtype in ("float32", "float16", "bfloat16")
        }
        lines = [line for transform in ("raw", "center") for line in order_lines(banks, transform, settings.device)]
        n_rows = banks["float32"].n_rows
    return f"## Order of the ten nearest, {settings.model}, {n_rows:,} rows, {QUERIES} queries\n\n{table(lines)}"


def order_lines(banks: dict[str, tll.Bank], transform: str, device: str) -> list[dict[str, Any]]:
    """How often each bank ranks a row's nearest rows otherwise than its float32 activation does in float64."""
    indices = {dtype: tll.ContextualIndex(bank, transform=transform, device=device) for dtype, bank in banks.items()}
    wide = banks["float32"]
    rows = np.linspace(0, wide.n_rows - 1, min(QUERIES, wide.n_rows)).round().astype(int)
    lines = []
    for name in wide.hook_names:
        units = _unit(np.asarray(wide.vectors(name)).astype(np.float64))
        truth = _nearest(_unit(units - units.mean(0)) if transform == "center" else units, rows)
        for dtype, index in indices.items():
            found = index.search(torch.from_numpy(units[rows]), TOP_K, name, query_hook_name=name).rows.cpu().numpy()
            itself = index.search(banks[dtype].activations(name, rows), 1, name, query_hook_name=name).rows.cpu().numpy()
            figures = {
                "order differs": f"{(found != truth).any(1).mean():.3f}",
                "set differs": f"{(np.sort(found) != np.sort(truth)).any(1).mean():.3f}",
                "stored row finds itself": f"{(itself[:, 0] == rows).mean():.3f}",
            }
            lines.append({"hook name": name, "transform": transform, "dtype": dtype, **figures})
    return lines


def _unit(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _nearest(units: Float[np.ndarray, "n d"], rows: Int[np.ndarray, " queries"]) -> Int[np.ndarray, "queries k"]:
    """The nearest rows of some rows, by products in float64."""
    parts = [np.argsort(-(units[some] @ units.T), axis=-1, kind="stable")[:, :TOP_K] for some in np.array_split(rows, 10)]
    return np.concatenate(parts)
