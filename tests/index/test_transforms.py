"""Each transform and the calibrated similarity, against float64 brute force over what the bank stores."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.vectors import unit

import tl_latentlens as tll
from tl_latentlens.search.geometry import Affine, HubSample, RowGeometry, hubness
from tl_latentlens.search.vectors import VectorSearch

NAMES = ("blocks.1.hook_resid_post", "blocks.4.hook_resid_post")
MOVING = ("center", "standardize", "remove_top", "csls")


def stored(index: tll.ContextualIndex, name: str) -> np.ndarray:
    return np.concatenate([np.asarray(bank.vectors(name)).astype(np.float64) for bank in index.banks])


def by_hand(transform: str, rows: np.ndarray) -> tuple[Any, Any]:
    """What a transform does to activations and to directions."""
    mean, std = rows.mean(0), rows.std(0)
    if transform == "standardize":
        return (lambda x: (x - mean) / std), (lambda v: v / std)
    if transform == "remove_top":
        top = np.linalg.svd(rows - mean, full_matrices=False)[2][: round(rows.shape[1] / 100)]
        return (lambda x: x - mean - (x - mean) @ top.T @ top), (lambda v: v - v @ top.T @ top)
    return (lambda x: x - mean), (lambda v: v)


def csls_offsets(rows: np.ndarray) -> np.ndarray:
    """Half the mean cosine of each row to its ten nearest others; all rows are the sample in so small a bank."""
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -np.inf)
    return np.sort(cosines, -1)[:, -10:].mean(-1) / 2


@pytest.fixture(scope="module")
def banks(any_model: Any, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[tll.Bank]:
    """Two banks of different texts: moments are pooled over them."""
    folder = tmp_path_factory.mktemp("transforms")
    parts = {"a.h5": texts, "b.h5": list(tll.load_corpus("demo", limit=12))}
    return [
        tll.build_bank(any_model, part, folder / name, hook_names=list(NAMES), dtype="float32", progress=False)
        for name, part in parts.items()
    ]


@pytest.mark.parametrize("asked", [NAMES[0], None])
@pytest.mark.parametrize("transform", MOVING)
def test_search_is_a_brute_force(banks: list[tll.Bank], transform: str, asked: str | None) -> None:
    index = tll.ContextualIndex(banks, device="cpu", transform=transform)
    generator = np.random.default_rng(0)
    queries = unit(stored(index, NAMES[0])[:5] + 0.02 * generator.standard_normal((5, 256)))
    found = index.search(queries, 7, query_hook_name=asked)
    scores = []
    for name in NAMES:
        rows = stored(index, name)
        activation, direction = by_hand(transform, rows)
        moved = by_hand(transform, stored(index, asked))[0](queries) if asked else direction(queries)
        compared = unit(activation(rows))
        offsets = csls_offsets(compared) if transform == "csls" else 0.0
        scores.append(unit(moved) @ compared.T - offsets)
    ranked = np.concatenate(scores, -1)
    best = np.argsort(-ranked, -1, kind="stable")[:, :7]
    np.testing.assert_array_equal(found.hook_ids.numpy(), best // index.n_rows)
    np.testing.assert_array_equal(found.rows.numpy(), best % index.n_rows)
    np.testing.assert_allclose(found.similarities.numpy(), np.take_along_axis(ranked, best, -1), atol=2e-5)


@pytest.mark.parametrize("transform", ["raw", *MOVING])
def test_chances_are_shares_of_the_bank(banks: list[tll.Bank], transform: str) -> None:
    """In a bank of fewer rows than the sample every row but the found one is a random activation."""
    index = tll.ContextualIndex(banks, device="cpu", transform=transform)
    queries = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    found = index.search(queries, 4, calibrate=True)
    for i in range(3):
        for j, neighbor in enumerate(found.neighbors()[i]):
            rows = stored(index, neighbor.hook_name)
            compared = rows if transform == "raw" else unit(by_hand(transform, rows)[0](rows))
            scores = np.delete(compared @ compared[neighbor.row], neighbor.row)
            if transform == "csls":
                scores = scores - csls_offsets(compared)[neighbor.row]
            expected = (1 + (scores >= neighbor.similarity - 1e-6).sum()) / (1 + len(scores))
            assert neighbor.chance == pytest.approx(expected, rel=1e-5)
            assert neighbor.chance == found.chances[i, j]


def test_chances_tell_activations_from_random_directions(any_model: Any, tmp_path: Path) -> None:
    texts = list(tll.load_corpus("demo", limit=300))
    bank = tll.build_bank(any_model, texts, tmp_path / "bank.h5", hook_names=NAMES[1], progress=False)
    index = tll.ContextualIndex(bank, device="cpu")
    rows = np.arange(0, bank.n_rows, bank.n_rows // 50)
    of_rows = index.search(np.asarray(bank.vectors(NAMES[1])[rows]).astype(np.float32), 2, calibrate=True).chances
    directions = torch.randn(50, 256, generator=torch.Generator().manual_seed(2))
    of_directions = index.search(directions, 2, calibrate=True).chances
    assert float((of_rows[:, 1] < 0.01).float().mean()) > 0.9
    assert float((of_directions < 0.01).float().mean()) < 0.1


def test_nothing_is_calibrated_unless_asked(index: tll.ContextualIndex) -> None:
    found = index.search(torch.ones(256), 2)
    assert found.chances is None
    assert {neighbor.chance for neighbor in found.neighbors()} == {None}


def test_a_dimension_that_never_varies_is_not_blown_up(any_model: Any, texts: list[str], tmp_path: Path) -> None:
    bank = tll.build_bank(any_model, texts, tmp_path / "relu.h5", hook_names="blocks.0.mlp.hook_post", progress=False)
    index = tll.ContextualIndex(bank, device="cpu", transform="standardize")
    query = np.asarray(bank.vectors("blocks.0.mlp.hook_post")[3]).astype(np.float32)
    found = index.search(query, 1, query_hook_name="blocks.0.mlp.hook_post")
    assert found.rows.tolist() == [3]
    assert float(found.similarities) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("storage", [torch.float16, torch.float32])
@pytest.mark.parametrize("hubs", [False, True])
def test_every_pass_gives_the_same_rows(storage: torch.dtype, dtype: str, hubs: bool) -> None:
    """Weights of very different sizes, removed components and hubs; ids equal a float64 brute force."""
    rng = np.random.default_rng(4)
    vectors = unit(rng.standard_normal((700, 48)) * np.geomspace(0.01, 1, 48) + 0.3)
    held = torch.from_numpy(vectors).to(storage)
    center, weight = torch.from_numpy(vectors.mean(0)), torch.from_numpy(1 / vectors.std(0))
    removed = torch.from_numpy(np.linalg.qr(rng.standard_normal((48, 3)))[0].T.copy())
    affine = Affine(center, weight, removed)
    search = VectorSearch(held, "cpu", dtype, **vars(affine), memory_budget=60_000)
    rows = (unit(held.double().numpy()) - center.numpy()) * weight.numpy()
    rows = unit(rows - rows @ removed.numpy().T @ removed.numpy())
    offsets = np.zeros(len(rows))
    if hubs:
        sampled = torch.arange(0, 700, 2)
        hub_sample = HubSample(search.normalized_rows(sampled)[0], sampled, 10)
        search = VectorSearch(held, "cpu", dtype, geometry=RowGeometry(affine, hubs=hub_sample), memory_budget=60_000)
        cosines = rows @ rows[sampled].T
        cosines[sampled, np.arange(len(sampled))] = -np.inf
        offsets = np.sort(cosines, -1)[:, -10:].mean(-1) / 2
    queries = rng.standard_normal((40, 48)) @ (np.eye(48) - removed.numpy().T @ removed.numpy())
    found = search.top_k(torch.from_numpy(queries), 10)
    scores = unit(queries) @ rows.T - offsets
    best = np.argsort(-scores, -1, kind="stable")[:, :10]
    np.testing.assert_allclose(found.similarities.numpy(), np.take_along_axis(scores, best, -1), atol=1e-6)
    gaps = np.diff(np.sort(scores, -1)[:, ::-1][:, :11], axis=-1).min(-1) < -1e-6
    np.testing.assert_array_equal(found.rows.numpy()[gaps], best[gaps])


def test_affine_and_its_transpose() -> None:
    generator = torch.Generator().manual_seed(3)
    x, q, center = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    removed = torch.linalg.qr(torch.randn(8, 2, generator=generator, dtype=torch.float64)).Q.T
    affine = Affine(center, torch.rand(8, generator=generator, dtype=torch.float64) + 0.1, removed)
    assert float(affine(x) @ q) == pytest.approx(float((x - center) @ affine.transposed(q)))
    assert torch.allclose(affine(x) - affine(2 * x), affine.linear(-x))
    assert float((removed @ affine(x)).abs().max()) < 1e-12


def test_hubness_of_fewer_rows_than_neighbors() -> None:
    rows = torch.eye(3)
    sampled = torch.arange(3)
    assert hubness(rows, rows, torch.arange(len(rows)), sampled, 10).tolist() == [0, 0, 0]
    assert hubness(rows, rows, None, sampled, 10).tolist() == pytest.approx([1 / 3] * 3)
