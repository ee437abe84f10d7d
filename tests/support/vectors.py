"""Rows, queries and a brute force in float64 that searches of vectors are checked against."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from tl_latentlens.search.error_bounds import UNIT_LENGTH_TOLERANCE
from tl_latentlens.search.tensors import DTYPES
from tl_latentlens.search.topk import TopK

STORAGE = [torch.float16, torch.bfloat16, torch.float32]
PASSES = ["auto", "int8", *DTYPES]
BUDGETS = [1, 300, 1000, 7000, 2**20]
KINDS = ["gaussian", "duplicates", "equal", "cluster", "integers"]
every_way = pytest.mark.usefixtures("way")
quick = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def to_float64(vectors: torch.Tensor | np.ndarray) -> np.ndarray:
    return vectors.double().cpu().numpy() if isinstance(vectors, torch.Tensor) else np.asarray(vectors).astype(np.float64)


def unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def compared_rows(vectors: torch.Tensor | np.ndarray, center: torch.Tensor | None = None, normalize: bool = True) -> np.ndarray:
    """The rows of length 1 that a query is multiplied with; before they are centered, unit rows lose what rounding added."""
    rows = to_float64(vectors)
    if not normalize:
        return rows
    return unit(rows if center is None else unit_up_to_rounding(vectors) - to_float64(center))


def unit_up_to_rounding(vectors: torch.Tensor | np.ndarray) -> np.ndarray:
    """Rows of length 1 where all of them are, up to the rounding of their type; else as they are."""
    rows, dtype = to_float64(vectors), vectors.dtype if isinstance(vectors, torch.Tensor) else torch.float16
    deviation = np.abs(np.linalg.norm(rows, axis=-1) - 1)
    return unit(rows) if (deviation <= UNIT_LENGTH_TOLERANCE[dtype]).all() else rows


def brute_force(rows: np.ndarray, queries: torch.Tensor | np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Similarities in float64, rounded to float32 once; sorted by (-similarity, row)."""
    units = unit(to_float64(queries)).astype(np.float32).astype(np.float64)
    scores = np.stack([(rows * query).sum(-1) for query in units.reshape(-1, rows.shape[1])])
    scores = scores.round(15).astype(np.float32)  # products that cancel leave 1e-17 in one order of summing, and 0 in another
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
    shape = (*units.shape[:-1], order.shape[1])
    return np.take_along_axis(scores, order, -1).clip(-1, 1).reshape(shape), order.reshape(shape)


def check(found: TopK, rows: np.ndarray, queries: torch.Tensor | np.ndarray, k: int) -> None:
    similarities, ids = brute_force(rows, queries, k)
    assert found.similarities.dtype == torch.float32
    assert found.rows.dtype == torch.int64
    np.testing.assert_array_equal(found.rows.cpu().numpy(), ids)
    np.testing.assert_allclose(found.similarities.cpu().numpy(), similarities, rtol=0, atol=1.2e-7)
    assert float(found.similarities.abs().max()) <= 1


def make_rows(kind: str, n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "duplicates":  # many more equal rows than the search keeps candidates
        return rng.standard_normal((3, d))[rng.integers(0, 3, n)]
    if kind == "equal":
        return np.repeat(rng.standard_normal((1, d)), n, 0)
    if kind == "cluster":  # nearer to each other than half precision can tell
        return rng.standard_normal((1, d)) + 1e-3 * rng.standard_normal((n, d))
    if kind == "integers":  # exact ties between different rows, and rows of length zero
        return rng.integers(-1, 2, (n, d)).astype(float)
    return rng.standard_normal((n, d))


def make_queries(q: int, rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    queries = rng.standard_normal((q, rows.shape[1]))
    near = rows[rng.integers(0, len(rows), q)]
    own = (np.arange(q) % 2 == 1) & (np.linalg.norm(near, axis=-1) > 0)
    queries[own] = near[own]  # every other query is a row itself
    return torch.from_numpy(queries).float()


def queries_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


def without_means(rows: np.ndarray) -> np.ndarray:
    return rows - rows.mean(-1, keepdims=True)


def check_without_means(
    found: TopK, vectors: torch.Tensor, queries: torch.Tensor, k: int, center: torch.Tensor | None = None
) -> None:
    """Against float64; only rows that agree to its own rounding may stand for one another."""
    rows = unit_up_to_rounding(vectors)
    left = without_means(rows) - (0 if center is None else to_float64(center))
    something = np.linalg.norm(left, axis=-1) > 1e-6 * np.linalg.norm(rows, axis=-1)
    units = unit(without_means(to_float64(queries))).astype(np.float32).astype(np.float64)
    scores = units @ (unit(left) * something[:, None]).T
    order = np.argsort(-scores.astype(np.float32), axis=-1, kind="stable")[:, :k]
    ids = found.rows.numpy()
    assert ids.shape == order.shape
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    ours, best = np.take_along_axis(scores, ids, -1), np.take_along_axis(scores, order, -1)
    assert (np.abs(ours - best)[ids != order] < 1e-13).all()
    np.testing.assert_allclose(found.similarities.numpy(), ours.clip(-1, 1), rtol=0, atol=1.2e-7)
    assert (found.similarities[~torch.from_numpy(something)[found.rows]] == 0).all()
