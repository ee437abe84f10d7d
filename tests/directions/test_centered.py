"""Directions are read by centered rows by default, against float64 brute force, without a second copy of the rows."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import TEXTS
from support.vectors import unit

import tl_latentlens as tll

pytestmark = pytest.mark.usefixtures("few_random_directions")

NAMES = ("blocks.1.hook_resid_post", "blocks.4.hook_resid_post")


def directions(n: int, d: int = 256) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(7))


def stored(index: tll.ContextualIndex, name: str) -> np.ndarray:
    return unit(np.concatenate([np.asarray(bank.vectors(name)).astype(np.float64) for bank in index.banks]))


def brute_force(index: tll.ContextualIndex, vectors: Any, k: int, names: Any = None, *, centered: bool = True) -> Any:
    """Hook ids, rows and cosines of the nearest rows, each less the mean of the rows of its hook name."""
    names = index.hook_names if names is None else names
    rows = [unit(stored(index, name) - centered * stored(index, name).mean(0)) for name in names]
    scores = unit(torch.as_tensor(vectors).double().numpy()) @ np.concatenate(rows).T
    best = np.argsort(-scores, -1, kind="stable")[:, :k]
    places = np.array([index.hook_names.index(name) for name in names])
    return places[best // index.n_rows], best % index.n_rows, np.take_along_axis(scores, best, -1)


def check(found: tll.SearchResult, expected: Any) -> None:
    hook_ids, rows, cosines = expected
    np.testing.assert_array_equal(found.hook_ids.cpu().numpy(), hook_ids)
    np.testing.assert_array_equal(found.rows.cpu().numpy(), rows)
    np.testing.assert_allclose(found.similarities.cpu().numpy(), cosines, atol=2e-5)


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def banks(any_model: Any, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> list[tll.Bank]:
    """Two banks of different texts, whose rows share one mean."""
    folder = tmp_path_factory.mktemp(request.param)
    parts = {"a.h5": TEXTS, "b.h5": list(tll.load_corpus("demo", limit=12))}
    settings: dict[str, Any] = {"hook_names": list(NAMES), "dtype": request.param, "progress": False}
    return [tll.build_bank(any_model, part, folder / name, **settings) for name, part in parts.items()]


@pytest.mark.parametrize("dtype", ["auto", "int8", "float32", "bfloat16"])
@pytest.mark.parametrize("narrowed", [None, NAMES[1]])
def test_neighbors_of_directions_are_a_brute_force(banks: list[tll.Bank], dtype: str, narrowed: str | None) -> None:
    index = tll.ContextualIndex(banks, device="cpu", dtype=dtype)
    vectors = directions(6) * torch.tensor([[1.0], [1e-3], [1e4], [1.0], [7.0], [0.2]])
    names = None if narrowed is None else [narrowed]
    found = tll.decode_directions(vectors, index, top_k=7, hook_name=narrowed, calibrate=False)
    check(found.positive, brute_force(index, vectors, 7, names))
    check(found.negative, brute_force(index, -vectors, 7, names))
    check(index.search(vectors, 7, narrowed), brute_force(index, vectors, 7, names, centered=False))


def test_the_rows_are_loaded_once(bank: tll.Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tll.ContextualIndex(bank, device="cpu")
    monkeypatch.setattr(tll.Bank, "verify", None)
    monkeypatch.setattr(tll.Bank, "vectors", None)
    centered = index.for_directions
    for name in index.hook_names:
        own, others = (one._searches[name].parts[0].search.rows.vectors for one in (index, centered))
        assert own.data_ptr() == others.data_ptr()
    assert centered is index.for_directions
    assert centered.for_directions is centered


def test_words_of_activations_stay_those_of_raw_rows(bank: tll.Bank) -> None:
    """Whichever of the two searched its words first."""
    names = list(bank.hook_names)
    vectors = np.asarray(bank.activations(names[-1], slice(0, 9)))

    def similarities(index: tll.ContextualIndex) -> np.ndarray:
        return index.search_words(vectors, 4, query_hook_name=names[-1]).similarities.numpy()

    alone = {
        transform: similarities(tll.ContextualIndex(bank, device="cpu", transform=transform)) for transform in ("raw", "center")
    }
    assert not np.allclose(alone["raw"], alone["center"])
    for is_centered_first in (False, True):
        index = tll.ContextualIndex(bank, device="cpu")
        pair = [(index, "raw"), (index.for_directions, "center")]
        for searched, transform in pair[::-1] if is_centered_first else pair:
            np.testing.assert_allclose(similarities(searched), alone[transform], atol=1e-5)


@pytest.mark.parametrize("transform", ["raw", "center", "standardize", "csls", "center_writing"])
def test_a_named_transform_holds_for_directions_too(bank: tll.Bank, transform: str) -> None:
    index = tll.ContextualIndex(bank, device="cpu", transform=transform)
    assert index.for_directions is index
    found = tll.decode_directions(directions(3), index, top_k=4, calibrate=False)
    assert found.transform == index.transform == transform
    assert torch.equal(found.positive.similarities, index.search(directions(3), 4).similarities)


def test_results_name_their_geometry(bank: tll.Bank, any_model: Any) -> None:
    sae = tll.load_sae("demo")
    for transform, named in (("auto", "center"), ("raw", "raw")):
        index = tll.ContextualIndex(bank, device="cpu", transform=transform)
        found = tll.decode_directions(directions(2), index, top_k=2)
        assert found.to_dataframe().attrs["transform"] == found.transform == named
        features = tll.label_features(sae, index, [1, 2, 3], progress=False)
        assert features.to_dataframe().attrs["transform"] == features.transform == named
        writers = tll.find_features("The river", -1, sae, index, model=any_model, top_k=2, label=False)
        assert writers.to_dataframe().attrs["transform"] == named
        assert writers.meaning.found.index.transform == named
        steer = tll.SteeringLens(directions(1)[0], index, NAMES[1], multiples=(1,), calibrate=True)
        for shown in (found, features, writers, steer.run(any_model, "The river")):
            assert f"({named})" in " ".join(str(shown).split()), type(shown).__name__
        assert f"({named})" in found._repr_html_()
        assert f"({named})" in features._repr_html_()


def test_features_and_writers_are_those_of_an_index_that_centers(bank: tll.Bank, any_model: Any) -> None:
    sae = tll.load_sae("demo")
    auto, center = (tll.ContextualIndex(bank, device="cpu", transform=transform) for transform in ("auto", "center"))
    tables = [tll.label_features(sae, index, range(20), progress=False).table for index in (auto, center)]
    assert tables[0].equals(tables[1])
    for find in (tll.find_heads, tll.find_neurons):
        frames = [find("The river", -1, index, model=any_model, hook_name=NAMES[1], top_k=3) for index in (auto, center)]
        assert frames[0].to_dataframe().equals(frames[1].to_dataframe())
    scores = [
        tll.SteeringLens(sae.W_dec[3], index, NAMES[1], multiples=(1,), calibrate=True).run(any_model, "The river").scores
        for index in (auto, center)
    ]
    assert scores[0] is not None
    assert scores[0].equals(scores[1])


def test_heads_are_centered_each_by_its_own_rows(any_model: Any, tmp_path: Path) -> None:
    name = "blocks.1.attn.hook_z"
    bank = tll.build_bank(any_model, TEXTS, tmp_path / "heads.h5", hook_names=name, progress=False)
    index = tll.ContextualIndex(bank, f"{name}[:]", device="cpu")
    head = index.hook_names[2]
    vectors = directions(3, index.d(head))
    found = tll.decode_directions(vectors, index, top_k=5, hook_name=head, calibrate=False)
    check(found.positive, brute_force(index, vectors, 5, [head]))


@pytest.mark.parametrize("state", [torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)])
def test_what_is_set_in_torch_at_the_first_direction_changes_nothing(bank: tll.Bank, state: Any) -> None:
    index = tll.ContextualIndex(bank, device="cpu")
    with state:
        first = tll.decode_directions(directions(3), index, top_k=4, calibrate=False)
    check(first.positive, brute_force(index, directions(3), 4))
    check(tll.decode_directions(directions(3), index, top_k=4, calibrate=False).positive, brute_force(index, directions(3), 4))


def test_results_of_directions_go_to_other_processes_and_are_copied(bank: tll.Bank) -> None:
    index = tll.ContextualIndex(bank, device="cpu")
    found = tll.decode_directions(directions(2), index, top_k=3)
    for again in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert again.transform == "center"
        assert again.positive.index is found.positive.index
        assert again.neighbors(1) == found.neighbors(1)
    index.check_model(tll.load_demo_model())


def test_a_model_is_checked_once_for_activations_and_directions(bank: tll.Bank, any_model: Any, monkeypatch: Any) -> None:
    index = tll.ContextualIndex(bank, device="cpu")
    index.check_model(any_model)
    monkeypatch.setattr("tl_latentlens.index.contextual.check_fingerprint", None)
    index.for_directions.check_model(any_model)


def test_a_random_direction_stands_beside_those_that_are_read(bank: tll.Bank) -> None:
    index = tll.ContextualIndex(bank, device="cpu")
    found = tll.decode_directions(directions(2), index, top_k=3)
    again = tll.decode_directions(directions(5), index, top_k=3)
    assert found.random is not None
    assert again.random is not None
    assert found.random.scores is not None
    assert list(found.random.ids) == ["random direction (for comparison)"]
    assert found.random.random is None
    assert found.random.to_dataframe().equals(again.random.to_dataframe()), "one seed, one direction"
    other = tll.decode_directions(directions(2), index, top_k=3, seed=1).random
    assert other is not None
    assert not torch.equal(other.positive.similarities, found.random.positive.similarities)
    assert found.random.scores.p.between(1 / 101, 1).all()
    assert found.random.transform == "center"
    assert tll.decode_directions(directions(2), index, top_k=3, calibrate=False).random is None
