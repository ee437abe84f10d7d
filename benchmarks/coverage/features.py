"""p-values of the AUROCs of SAE features that have nothing to do with their neighbors, by how often they are active."""

from itertools import pairwise

import numpy as np
import pandas as pd
import torch

import tl_latentlens as tll
from benchmarks.coverage.demo import demo_bank
from benchmarks.coverage.lines import UNIFORM, Line
from benchmarks.measure import Settings

TITLE = "Features of the embedded SAE with the decoder rows of others, share with p < 0.05"
_DENSITIES = (0, 0.005, 0.01, 0.04, 0.13, 1)
_DRAWS_OF_PERMUTATION = 250


def lines(settings: Settings) -> list[Line]:
    """By density and score. Most AUROCs of rare features are 0.5 exactly, so few of their p-values are small."""
    table = permuted(max(1, round(settings.draws / _DRAWS_OF_PERMUTATION)), settings.device)
    found = []
    for name in ("p_auroc", "p_auroc_same_token"):
        for low, high in pairwise(_DENSITIES):
            p = table.loc[(table["density"] > low) & (table["density"] <= high), name].to_numpy()
            wanted = UNIFORM if low else (0.0, UNIFORM[1])
            found.append(Line(f"{name}, density {low} to {high}", "10, 50", 0.05, float(np.mean(p < 0.05)), len(p), wanted))
    return found


def permuted(n: int, device: str) -> pd.DataFrame:
    """The tables of features whose decoder rows were permuted, n times."""
    sae = tll.load_sae("demo")
    index = tll.ContextualIndex(demo_bank(), sae.hook_name, device=device, transform="center")
    tables = []
    for seed in range(n):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(sae.W_dec)))
        tensors = {"W_dec": sae.W_dec[order], **sae.weights}
        if sae.b_dec is not None:
            tensors["b_dec"] = sae.b_dec
        wrong = tll.load_sae(tensors, hook_name=sae.hook_name)
        tables.append(tll.label_features(wrong, index, seed=seed, progress=False).table)
    return pd.concat(tables, ignore_index=True)
