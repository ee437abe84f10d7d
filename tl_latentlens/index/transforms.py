"""In which geometry vectors are compared: what each transform does to a hook name's rows, and to queries.

Activations of language models point mostly the same way (anisotropy), and a few dimensions or rows dominate cosines. Each
transform takes something of that away; `evaluate` measures which of them helps.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse.linalg import eigsh

from tl_latentlens.bank.bank import Bank
from tl_latentlens.model.heads import head_of
from tl_latentlens.model.hook_points import in_residual_stream
from tl_latentlens.search.geometry import Affine, HubSample, RowGeometry
from tl_latentlens.search.tensors import as_tensor

TRANSFORMS = ("raw", "center", "standardize", "remove_top", "csls", "center_writing")
_COMPONENTS = 100  # dimensions for each top component that "remove_top" takes away
_SAMPLE_ROWS = 4096  # rows that stand for random activations
_HUBNESS_NEIGHBORS = 10  # nearest of them that say how much of a hub a row is, as in CSLS
_SAMPLE = 8192  # rows whose covariance has those components
_LEAST_STD = 1e-3  # of the median: what varies less is constant, and would be blown up


def fit(transform: str, banks: Sequence[tuple[int, Bank]], hook_name: str, device: torch.device) -> RowGeometry:
    """How a transform compares one hook name's unit vectors, from all its rows in some banks.

    - center: their mean taken away.
    - csls: as center, with half a row's mean cosine to its ten nearest of a sample subtracted from its similarities.
    - standardize: z-scores, the mean taken away and each dimension divided by its standard deviation.
    - remove_top: the mean and the d / 100 first principal components taken away ("all-but-the-top", Mu and Viswanath 2018,
      arXiv 1702.01417).
    - center_writing: each vector's own mean taken away, in the residual stream.
    - raw: nothing.

    Args:
        transform: One of `TRANSFORMS`.
        banks: First row in the index and bank, for each part of the rows.
        hook_name: Whose rows.
        device: Where they are searched.
    """
    if transform == "center_writing":
        return RowGeometry(removes_own_mean=in_residual_stream(hook_name))
    affine = Affine() if transform == "raw" else _fit_affine(transform, [bank for _, bank in banks], hook_name, device)
    geometry = RowGeometry(affine)
    return replace(geometry, hubs=_hub_sample(geometry, banks, hook_name, device)) if transform == "csls" else geometry


def sample_rows(banks: Sequence[tuple[int, Bank]]) -> list[Int[np.ndarray, " n"]]:
    """Evenly spread rows of each bank that stand for random activations; at most about 4,096 in all."""
    n_rows = sum(bank.n_rows for _, bank in banks)
    return [spread(bank.n_rows, max(1, _SAMPLE_ROWS * bank.n_rows // n_rows)) for _, bank in banks]


def _hub_sample(geometry: RowGeometry, banks: Sequence[tuple[int, Bank]], hook_name: str, device: torch.device) -> HubSample:
    samples = sample_rows(banks)
    vectors = [as_tensor(bank.vectors(hook_name)[rows]).to(device) for (_, bank), rows in zip(banks, samples, strict=True)]
    units = torch.cat([geometry.normalized(part, prenormalize=head_of(hook_name) is not None) for part in vectors])
    row_ids = np.concatenate([first + rows for (first, _), rows in zip(banks, samples, strict=True)])
    return HubSample(units, torch.from_numpy(row_ids).to(device), _HUBNESS_NEIGHBORS)


def _fit_affine(transform: str, banks: Sequence[Bank], hook_name: str, device: torch.device) -> Affine:
    rows = np.array([bank.n_rows for bank in banks])[:, None]
    means = np.stack([bank.mean(hook_name) for bank in banks])
    mean = (rows * means).sum(0) / rows.sum()
    center = torch.from_numpy(mean).to(device)
    if transform == "standardize":
        squares = np.stack([bank.std(hook_name) for bank in banks]) ** 2 + means**2
        std = np.sqrt(np.maximum((rows * squares).sum(0) / rows.sum() - mean**2, 0))
        weight = np.median(std) / np.maximum(std, _LEAST_STD * np.median(std)) if std.any() else np.ones_like(std)
        return Affine(center, torch.from_numpy(weight).to(device))
    if transform == "remove_top":
        return Affine(center, removed=torch.from_numpy(_top_components(banks, hook_name, mean)).to(device))
    return Affine(center)


def _top_components(banks: Sequence[Bank], hook_name: str, mean: Float[np.ndarray, " d"]) -> Float[np.ndarray, "m d"]:
    d, n_rows = len(mean), sum(bank.n_rows for bank in banks)
    covariance = np.zeros((d, d))
    for bank in banks:
        rows = spread(bank.n_rows, max(1, _SAMPLE * bank.n_rows // n_rows))
        vectors = np.asarray(bank.vectors(hook_name)[rows]).astype(np.float64)
        if head_of(hook_name) is not None:  # columns of unit vectors
            vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.finfo(np.float64).tiny)
        away = vectors - mean
        covariance += away.T @ away
    n = min(max(1, round(d / _COMPONENTS)), d - 1)
    values, components = eigsh(covariance, n, v0=np.ones(d)) if n else (np.zeros(0), np.zeros((d, 0)))
    return np.ascontiguousarray(components.T[values > 0])


def spread(n_rows: int, n: int) -> Int[np.ndarray, " n"]:
    """At most n row numbers, evenly spread."""
    return np.unique(np.linspace(0, n_rows - 1, min(n, n_rows)).round().astype(np.int64))
