"""What labelling a whole SAE costs: features of a synthetic SAE, one pass of its encoder over a bank, labels and nulls."""

import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tl_latentlens as tll
from benchmarks.measure import Settings, WrongResultError, measured, megabytes, table
from tl_latentlens.directions.features.sae import TensorSAE, encode

HOOK_NAME = "blocks.3.hook_resid_post"
ACTIVE = 32  # features a token
SIZES = ((2_000, 2_048), (14_000, 16_384))  # texts, features; the second where large


def run(settings: Settings) -> str:
    """A table with a line for each size; the larger one takes minutes."""
    model = tll.load_demo_model()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for n_texts, d_sae in SIZES if settings.large else SIZES[:1]:
            bank, sae, index = sized(model, settings, n_texts, d_sae, Path(folder))
            found = measured(lambda sae=sae, index=index: tll.label_features(sae, index, progress=False))
            check(found.result, sae, bank)
            labelled = float((found.result.table["label_kind"] == "token").mean())
            lines.append(
                {
                    "features": f"{d_sae:,}",
                    "rows": f"{bank.n_rows:,} × {bank.d(HOOK_NAME)}",
                    "time": f"{found.seconds:,.3g} s",
                    "peak memory": f"+{megabytes(found.peak_bytes)}",
                    "labels of tokens": f"{labelled:.0%}",
                }
            )
    return f"## Labelling an SAE\n\n{table(lines)}"


def sized(
    model: Any, settings: Settings, n_texts: int, d_sae: int, folder: Path
) -> tuple[tll.Bank, TensorSAE, tll.ContextualIndex]:
    """A bank of some texts, a synthetic SAE, and an index of the bank."""
    texts = list(islice(tll.load_corpus(settings.corpus), n_texts))
    path = folder / f"{d_sae}.h5"
    bank = tll.build_bank(model, texts, path, hook_names=HOOK_NAME, max_rows_per_token=None, progress=False)
    return bank, topk_sae(bank, d_sae), tll.ContextualIndex(bank, device=settings.device, transform="center")


def topk_sae(bank: tll.Bank, d_sae: int) -> TensorSAE:
    """Decoder rows near to rows of the bank, less their mean, with a tied TopK encoder."""
    rng = np.random.default_rng(0)
    rows = np.asarray(bank.vectors(HOOK_NAME)[rng.integers(0, bank.n_rows, d_sae)]).astype(np.float32)
    away = rows - bank.mean(HOOK_NAME).astype(np.float32) + 0.02 * rng.standard_normal(rows.shape, np.float32)
    decoder = torch.nn.functional.normalize(torch.from_numpy(away), dim=-1)
    weights = {"W_enc": decoder.T.contiguous(), "b_enc": torch.zeros(d_sae)}
    return TensorSAE(decoder, weights, "topk", HOOK_NAME, k=ACTIVE)


def check(result: tll.FeatureResult, sae: TensorSAE, bank: tll.Bank) -> None:
    """Densities and largest activations, against the encoder on all rows at once, for some features.

    Raises:
        WrongResultError: They differ.
    """
    features = result.table["feature"].to_numpy()[:: len(result.table) // 8]
    count, largest = np.zeros(len(features)), np.zeros(len(features))
    for first in range(0, bank.n_rows, 2000):
        part = slice(first, first + 2000)
        rows = np.asarray(bank.vectors(HOOK_NAME)[part]).astype(np.float32) * np.asarray(bank.norms(HOOK_NAME)[part])[:, None]
        acts = encode(sae, torch.tensor(rows))[:, features].numpy()
        count, largest = count + (acts > 0).sum(0), np.maximum(largest, acts.max(0))
    lines = result.table.set_index("feature").loc[features]
    same = np.allclose(lines["density"], count / bank.n_rows, atol=2 / bank.n_rows)
    if not same or not np.allclose(lines["max_activation"], largest, rtol=1e-4):
        raise WrongResultError("densities or largest activations are not those of the encoder")
