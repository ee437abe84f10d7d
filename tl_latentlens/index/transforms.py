"""The geometry in which the vectors of a hook name are compared, fitted to its rows for each transform.

Activations of language models point mostly the same way (anisotropy), and a few dimensions or rows dominate cosines. Each
transform removes a part of that; `evaluate` measures which of them helps. The geometry itself is in `search.geometry`.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse.linalg import eigsh

from tl_latentlens.bank.bank import Bank
from tl_latentlens.index.rows import PlacedBank
from tl_latentlens.model.hook_points import in_residual_stream
from tl_latentlens.search.geometry import Affine, HubSample, RowGeometry
from tl_latentlens.search.tensors import as_tensor

TRANSFORMS = ("raw", "center", "standardize", "remove_top", "csls", "center_writing")
_DIMENSIONS_PER_COMPONENT = 100  # "remove_top" removes one principal component for so many dimensions
_COVARIANCE_ROWS = 8192  # rows from which the principal components are computed
_NULL_SAMPLE_ROWS = 4096  # rows that stand for random activations
_HUBNESS_NEIGHBORS = 10  # a row's hubness is the mean cosine to so many nearest rows of the sample, as in CSLS
_MIN_STD_SHARE = 1e-3  # a dimension that varies less than this share of the median is constant, and is not scaled up further


def fit_geometry(transform: str, banks: Sequence[PlacedBank], hook_name: str, device: torch.device) -> RowGeometry:
    """The geometry in which a transform compares the unit vectors of one hook name, from all its rows in some banks.

    - raw: vectors are compared as they are.
    - center: the mean of all rows is subtracted.
    - standardize: z-scores; the mean is subtracted, and each dimension is divided by its standard deviation.
    - remove_top: the mean and the d / 100 first principal components are removed ("all-but-the-top", Mu and Viswanath 2018,
      arXiv 1702.01417).
    - csls: as center; half a row's mean cosine to its ten nearest rows of a sample is subtracted from its similarities.
    - center_writing: each vector's own mean over d_model is subtracted, in the residual stream.

    Args:
        transform: One of `TRANSFORMS`.
        banks: The banks that hold the hook name.
        hook_name: The hook name, or that of a head.
        device: The device of the search.
    """
    if transform == "center_writing":
        return RowGeometry(removes_own_mean=in_residual_stream(hook_name))
    affine = Affine() if transform == "raw" else _fit_affine(transform, [bank for _, bank in banks], hook_name, device)
    geometry = RowGeometry(affine)
    return replace(geometry, hubs=_hub_sample(geometry, banks, hook_name, device)) if transform == "csls" else geometry


def null_sample_rows(banks: Sequence[PlacedBank]) -> list[Int[np.ndarray, " n"]]:
    """Evenly spaced rows of each bank that stand for random activations, at most about 4,096 in all."""
    return evenly_spaced_rows_of(banks, _NULL_SAMPLE_ROWS)


def evenly_spaced_rows_of(banks: Sequence[PlacedBank], n: int) -> list[Int[np.ndarray, " n"]]:
    """Evenly spaced rows of each bank, at most about n in all."""
    n_rows = sum(bank.n_rows for _, bank in banks)
    return [evenly_spaced_rows(bank.n_rows, max(1, n * bank.n_rows // n_rows)) for _, bank in banks]


def _hub_sample(geometry: RowGeometry, banks: Sequence[PlacedBank], hook_name: str, device: torch.device) -> HubSample:
    samples = null_sample_rows(banks)
    vectors = [as_tensor(bank.vectors_at(hook_name, rows)).to(device) for (_, bank), rows in zip(banks, samples, strict=True)]
    units = torch.cat([geometry.normalized(part) for part in vectors])
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
        weight = np.median(std) / np.maximum(std, _MIN_STD_SHARE * np.median(std)) if std.any() else np.ones_like(std)
        return Affine(center, torch.from_numpy(weight).to(device))
    if transform == "remove_top":
        return Affine(center, removed=torch.from_numpy(_top_components(banks, hook_name, mean)).to(device))
    return Affine(center)


def _top_components(banks: Sequence[Bank], hook_name: str, mean: Float[np.ndarray, " d"]) -> Float[np.ndarray, "m d"]:
    d, n_rows = len(mean), sum(bank.n_rows for bank in banks)
    covariance = np.zeros((d, d))
    for bank in banks:
        rows = evenly_spaced_rows(bank.n_rows, max(1, _COVARIANCE_ROWS * bank.n_rows // n_rows))
        vectors = np.asarray(bank.vectors_at(hook_name, rows)).astype(np.float64)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.finfo(np.float64).tiny)
        centered = vectors - mean
        covariance += centered.T @ centered
    n_components = min(max(1, round(d / _DIMENSIONS_PER_COMPONENT)), d - 1)
    values, components = eigsh(covariance, n_components, v0=np.ones(d)) if n_components else (np.zeros(0), np.zeros((d, 0)))
    return np.ascontiguousarray(components.T[values > 0])


def evenly_spaced_rows(n_rows: int, n: int) -> Int[np.ndarray, " n"]:
    """At most n row numbers, evenly spaced."""
    return np.unique(np.linspace(0, n_rows - 1, min(n, n_rows)).round().astype(np.int64))
