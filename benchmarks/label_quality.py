"""Are labels true? Scores on held-out texts, beside those of SAEs that mean nothing, and shares on another corpus."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

import tl_latentlens as tll
from benchmarks.measure import Settings, table
from tl_latentlens.directions.features.sae import TensorSAE, encode
from tl_latentlens.statistics.intervals import share_of

EVERY = 97  # Every so many texts of another corpus make a bank on which labels are tried.
FIGURES = {
    "labelled": "labelled",
    "mixed": "mixed",
    "detection of labels": "detection",
    "detection of labels, top ten contexts": "top ten",
    "intruder": "intruder",
    "embedding": "embedding",
}


def run(settings: Settings) -> str:
    """A table with a line for each SAE, and one of the labels on every 97th text of `--corpus`, where that is not "demo".

    `--model` and `--sae` name another than the embedded one.
    """
    model, sae = tll.load_model(settings.model), tll.load_sae(settings.sae)
    with tempfile.TemporaryDirectory() as folder:
        bank = tll.build_bank(model, "demo", Path(folder) / "bank.h5", hook_names=sae.hook_name, progress=False)
        index = tll.ContextualIndex(bank, device=settings.device)
        saes = {"trained": sae, "decoder rows permuted": permuted(sae), "random weights": random_weights(sae, bank)}
        found = {name: tll.label_features(one, index, progress=False) for name, one in saes.items()}
        lines = table([_line(name, of) for name, of in found.items()])
        text = f"## Labels of the SAE {settings.sae} of {settings.model}, {bank.n_rows:,} rows\n\n{lines}"
        if settings.corpus == "demo":
            return text
        texts = list(tll.load_corpus(settings.corpus))[::EVERY]
        other = tll.build_bank(model, texts, Path(folder) / "other.h5", hook_names=sae.hook_name, progress=False)
        shares = found["trained"].shares_on(tll.ContextualIndex(other, device=settings.device), progress=False)
    return f"{text}\n\n{_on_other_corpus(shares, len(texts), found['trained'])}"


def permuted(sae: TensorSAE) -> TensorSAE:
    """The SAE with its decoder rows in another order: no feature writes what activates it."""
    order = torch.randperm(len(sae.W_dec), generator=torch.Generator().manual_seed(0))
    return replace(sae, W_dec=sae.W_dec[order])


def random_weights(sae: TensorSAE, bank: tll.Bank) -> TensorSAE:
    """Normal weights of the same norms, and thresholds with which each feature is active as often as the SAE's own."""
    generator = torch.Generator().manual_seed(0)
    encoder, decoder = sae.weights["W_enc"], sae.W_dec
    drawn = {
        "W_enc": normalize(torch.randn(encoder.shape, generator=generator), dim=0) * encoder.norm(dim=0),
        "W_dec": normalize(torch.randn(decoder.shape, generator=generator), dim=1) * decoder.norm(dim=1, keepdim=True),
    }
    rows = torch.from_numpy(bank.activations(str(sae.hook_name), slice(None)))
    density = (encode(sae, rows) > 0).float().mean(0)
    products = (rows - (0 if sae.b_dec is None else sae.b_dec)) @ drawn["W_enc"] + sae.weights["b_enc"]
    thresholds = [column.quantile(1 - float(share)) for column, share in zip(products.T, density, strict=True)]
    weights = {**sae.weights, "W_enc": drawn["W_enc"], "threshold": torch.stack(thresholds).clamp(min=0)}
    return replace(sae, W_dec=drawn["W_dec"], weights=weights)


def _line(name: str, result: tll.FeatureResult) -> dict[str, Any]:
    summary = result.summary().set_index("figure")
    figures = {short: f"{summary.loc[figure, 'mean']:.3f}" for figure, short in FIGURES.items()}
    living = int(summary.loc["labelled", "features"])
    return {"SAE": name, "living": living, **figures, "shuffled labels": f"{summary.loc['detection of labels', 'null']:.3f}"}


def _on_other_corpus(shares: Any, n_texts: int, result: tll.FeatureResult) -> str:
    kinds = result.table.set_index("feature")["label_kind"]
    known = shares[(shares["n_contexts"] > 0) & (shares["feature"].map(kinds) == "token")]
    lines = []
    for name in ("share", "share_of_activation"):
        half = share_of((known[name] >= 0.5).to_numpy(float))
        line = {"of": "(activation)⁵" if name == "share" else "activation", "labels that carry half": f"{half.mean:.3f}"}
        lines.append({**line, "95 %": f"{half.low:.3f} to {half.high:.3f}", "mean share": f"{known[name].mean():.3f}"})
    return f"## Labels that name tokens, on {n_texts:,} other texts ({len(known)} features)\n\n{table(lines)}"
