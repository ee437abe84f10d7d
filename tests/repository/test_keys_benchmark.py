"""The keys benchmark: planted objects are found by every task, and what holds nothing is judged at chance."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import benchmarks.keys as benchmark
from benchmarks.keys.report import ONE_MEAN, Figures
from benchmarks.keys.tasks import (
    Score,
    correspond,
    cosegment,
    distinct_objects,
    foreground,
    iou,
    phrase_ids,
    placed,
    propagate,
    refer,
    scenes_of,
)
from benchmarks.measure import Settings
from tl_latentlens.vision.scenes import encoder as encoder_module
from tl_latentlens.vision.scenes.connector import ConnectorSettings, SceneModel, caption_loss, new_connector
from tl_latentlens.vision.scenes.encoder import PatchEncoder, train_encoder
from tl_latentlens.vision.scenes.render import COLORS, GRID, SHAPES, draw_scenes

N, EACH, D = 40, 4, 48
N_PHRASES = len(COLORS) * len(SHAPES)


@pytest.fixture(scope="module")
def phrases() -> torch.Tensor:
    """A direction for each color with each shape, and nothing in common."""
    return torch.nn.functional.normalize(torch.randn(N_PHRASES, D, generator=torch.Generator().manual_seed(0)), dim=-1)


def planted(ids: np.ndarray, phrases: torch.Tensor, strength: float, seed: int = 0) -> torch.Tensor:
    """Noise, and at objects their direction."""
    noise = 0.1 * torch.randn(*ids.shape, D, generator=torch.Generator().manual_seed(seed))
    at = torch.from_numpy(ids)
    return noise + strength * phrases[at.clamp(min=0)] * (at >= 0)[..., None]


def two_scenes(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    objects = distinct_objects(N, EACH, rng)
    return placed(objects, GRID**2, rng), placed(objects, GRID**2, rng)


def close(values: np.ndarray, expected: float, atol: float = 0.08) -> bool:
    return abs(values.mean() - expected) < atol


def test_a_planted_foreground_is_found_and_shuffled_labels_are_chance() -> None:
    few, many = (draw_scenes(n, np.random.default_rng(n)).filled for n in (8, N))
    direction = torch.randn(D, generator=torch.Generator().manual_seed(1))
    noise = lambda shown: torch.randn(*shown.shape, D, generator=torch.Generator().manual_seed(shown.size))  # noqa: E731
    train, test = (noise(shown) + 3 * torch.from_numpy(shown)[..., None] * direction for shown in (few, many))
    score = foreground(train, few, test, many)
    assert score.right.mean() > 0.95
    assert score.null.mean() < 0.25
    nothing = foreground(noise(few), few, noise(many), many)
    assert nothing.right.mean() < 0.25


def test_iou_by_hand() -> None:
    found = np.array([[True, True, False], [False, False, False]])
    np.testing.assert_allclose(iou(found, np.array([[True, False, True], [False, False, False]])), [1 / 3, 0])


def test_planted_objects_correspond_and_carry_their_masks(phrases: torch.Tensor) -> None:
    source, target = two_scenes()
    vectors = planted(source, phrases, 3), planted(target, phrases, 3, seed=1)
    score = correspond(*vectors, source, target)
    assert score.right.min() == 1
    assert score.null.mean() < 0.3  # objects of another scene, which look like some object, or like none
    carried = propagate(*vectors, source, target)
    assert carried.right.mean() > 0.95
    assert carried.null.mean() < 0.3
    blind = planted(source, phrases, 0), planted(target, phrases, 0, seed=1)
    assert close(correspond(*blind, source, target).right, 1 / GRID**2)
    assert propagate(*blind, source, target).right.mean() < 0.1


def test_correspondence_is_that_of_a_brute_force(phrases: torch.Tensor) -> None:
    source, target = two_scenes(1)
    a, b = planted(source, phrases, 0.6), planted(target, phrases, 0.6, seed=1)
    expected = []
    for ids, others, x, y in zip(source, target, a.numpy(), b.numpy(), strict=True):
        hits = []
        for cell in np.flatnonzero(ids >= 0):
            hits.append(others[np.argmin([np.linalg.norm(x[cell] - one) for one in y])] == ids[cell])
        expected.append(np.mean(hits))
    np.testing.assert_allclose(correspond(a, b, source, target).right, expected)
    assert 0.2 < np.mean(expected) < 1


def test_planted_objects_are_referred_to(phrases: torch.Tensor) -> None:
    ids, _ = two_scenes(2)
    scenes = scenes_of(ids, np.random.default_rng(0))
    np.testing.assert_array_equal(phrase_ids(scenes), ids)
    score = refer(planted(ids, phrases, 3), phrases, scenes)
    assert score.right.min() == 1
    assert close(score.null, 1 / EACH, 0.1)  # any phrase is nearer to some object than to background
    assert close(refer(planted(ids, phrases, 0), phrases, scenes).right, 1 / GRID**2)


def test_an_object_that_scenes_share_is_segmented(phrases: torch.Tensor) -> None:
    groups, common = benchmark._groups(np.random.default_rng(0))
    assert ((groups == common).sum(1) == 1).all()
    assert ((groups >= 0).sum(1) == benchmark.EACH).all()
    by_group = (benchmark.GROUPS, benchmark.GROUP)
    truth = (groups == common).reshape(*by_group, -1)
    score = cosegment(planted(groups, phrases, 6).unflatten(0, by_group), truth)
    assert score.right.shape == (benchmark.GROUPS,)
    assert score.right.mean() > 0.5
    assert score.null.mean() < 0.1
    assert cosegment(planted(groups, phrases, 0).unflatten(0, by_group), truth).right.mean() < 0.15


@pytest.fixture
def scene_model(demo_model: Any) -> SceneModel:
    torch.manual_seed(0)
    return SceneModel(demo_model, PatchEncoder().eval().requires_grad_(False), new_connector(demo_model, 0), [])


def test_recorded_sites_are_those_of_the_run(scene_model: SceneModel) -> None:
    model, scenes = scene_model.model, draw_scenes(3, np.random.default_rng(0))
    with torch.no_grad():
        sites = benchmark.recorded(scene_model, scenes)
        projected = benchmark._projected(sites, model.cfg.d_head)
    assert len(sites) == model.cfg.n_layers * (3 + 2 * model.cfg.n_heads)
    assert sites["keys 3"].shape == (3, GRID**2, model.cfg.n_heads * model.cfg.d_head)
    attn = model.blocks[3]
    normed = attn.ln1(sites["residual 3"])
    expected = torch.einsum("npd,de->npe", normed, attn.attn.W_V[1].detach()) + attn.attn.b_V[1].detach()
    torch.testing.assert_close(sites["values 3[1]"], expected.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sites["values 3"].unflatten(-1, (4, -1))[:, :, 1], sites["values 3[1]"])
    assert projected["random projection 3"].shape == (3, GRID**2, model.cfg.d_head)
    prefixed = benchmark.recorded(scene_model, scenes, benchmark.phrase_tokens(model)[:3])
    assert prefixed["keys 3"].shape == sites["keys 3"].shape
    assert not torch.allclose(prefixed["keys 3"], sites["keys 3"], atol=1e-3)
    texts = benchmark.recorded_texts(model)
    cache = model.run_with_cache(model.to_tokens(" the red circle"))[1]["blocks.2.attn.hook_k"][0, -2:].flatten(1).mean(0)
    torch.testing.assert_close(texts["keys 2"][0], cache.detach(), atol=1e-4, rtol=1e-4)


def test_losses_are_those_of_the_training(scene_model: SceneModel) -> None:
    scenes = draw_scenes(3, np.random.default_rng(0))
    losses = benchmark.caption_losses(scene_model, scenes)
    ids = [benchmark._ids(scene_model.model, ". " + text) for text in _captions(scenes)]
    trained = caption_loss(scene_model, scenes, np.random.default_rng(0)).detach().split([len(one) for one in ids])
    np.testing.assert_allclose(losses, [one.mean() for one in trained], atol=0.05)  # which rounds to bfloat16


def _captions(scenes: Any) -> list[str]:
    rng = np.random.default_rng(0)
    return [benchmark.caption(scenes, scene, rng) for scene in range(len(scenes.colors))]


def test_the_lowest_of_each_head_are_blocked() -> None:
    values = torch.from_numpy(np.random.default_rng(0).random((36, 4)))
    mask = benchmark.lowest(values)
    assert mask.shape == (37, 4)
    assert mask.sum(0).tolist() == [6] * 4
    assert not mask[0].any()
    for head in range(4):
        assert values[mask[1:, head], head].max() < values[~mask[1:, head], head].min()


def test_a_best_head_is_judged_where_it_was_not_chosen() -> None:
    figures = Figures(1)
    lucky, good = np.array([1.0, 0.0] * 10), np.full(20, 0.9)
    for head, right in enumerate((lucky, good)):
        figures.add(ONE_MEAN, "referring", f"keys 0[{head}]", Score(right, right))
    head, mean = figures.best_head("referring", "keys 0")
    assert (head, mean.mean) == (0, 0.0)
    figures.add_loss("nothing", None, np.array([1.0, 2.0]))
    for add in (0.1, 0.3):
        figures.add_loss("random", 0, np.array([1.0, 2.0]) + add)
    assert figures.added_loss("random", 0).mean == pytest.approx(0.2)


def test_one_command_measures_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    for name, value in {"SEEDS": (0,), "SCENES": 4, "GROUPS": 2, "DRAWS": 1}.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(benchmark, "ConnectorSettings", lambda seed: ConnectorSettings(seed, 1, 2))
    monkeypatch.setattr(encoder_module, "train_encoder", lambda seed: train_encoder(seed, 1))
    text = benchmark.run(Settings(folder=tmp_path / "made", figure=tmp_path / "keys.svg"))
    assert "4 scenes of 1 seeds" in text
    assert "| keys, best head |" in text
    assert "| blocked: least spread |" in text
    assert "| another name |" in text
    assert (tmp_path / "keys.svg").read_text().startswith("<?xml")
