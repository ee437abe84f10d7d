"""The scenes benchmark: images show their truth, a killed training goes on, and planted readings are judged right."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange

import benchmarks.scenes as benchmark
import tl_latentlens as tll
from benchmarks.measure import Settings
from benchmarks.scenes.reading import WORDS, RowWords, Truth, hook_names, read, read_tokens, visual_activations
from tl_latentlens.data.scenes import train as train_module
from tl_latentlens.vision.scenes import connector as connector_module
from tl_latentlens.vision.scenes import encoder as encoder_module
from tl_latentlens.vision.scenes import loading as loading_module
from tl_latentlens.vision.scenes.connector import (
    ConnectorSettings,
    SceneModel,
    caption_accuracy,
    caption_loss,
    new_connector,
    run_embeddings,
    train_connector,
    with_bos,
)
from tl_latentlens.vision.scenes.encoder import PatchEncoder, train_encoder
from tl_latentlens.vision.scenes.loading import load_scene_model, save_scene_model
from tl_latentlens.vision.scenes.render import COLORS, GRID, OBJECTS, PATCH, RGB, SHAPES, Scenes, _render, caption, draw_scenes


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes(60, np.random.default_rng(0))


@pytest.fixture
def encoder() -> PatchEncoder:
    torch.manual_seed(0)
    return PatchEncoder().eval().requires_grad_(False)


def test_a_scene_shows_what_its_truth_says(scenes: Scenes) -> None:
    assert scenes.images.shape == (60, GRID * PATCH, GRID * PATCH, 3)
    assert scenes.images.min() >= 0
    assert scenes.images.max() <= 1
    counts = scenes.filled.sum(1)
    assert (counts.min(), counts.max()) == OBJECTS
    np.testing.assert_array_equal(scenes.filled, scenes.shapes >= 0)
    patches = rearrange(scenes.images, "n (r h) (c w) rgb -> n (r c) (h w) rgb", h=PATCH, w=PATCH)
    np.testing.assert_array_less(patches[~scenes.filled].std((1, 2)), 0.04)  # background: gray, but for the noise
    objects = patches[scenes.filled]
    ground = np.median(np.concatenate([objects[:, :PATCH], objects[:, -PATCH:]], 1), 1, keepdims=True)
    furthest = np.abs(objects - ground).sum(-1).argsort(1)[:, -6:]  # pixels that are paint without any ground
    paint = np.median(np.take_along_axis(objects, furthest[..., None], 1), 1)
    nearest = np.linalg.norm(paint[:, None] - np.array(list(RGB.values())), axis=-1).argmin(1)
    assert (nearest == scenes.colors[scenes.filled]).mean() > 0.95


def test_shapes_are_told_apart_by_their_pixels() -> None:
    rng = np.random.default_rng(1)
    shapes = np.full((1, GRID**2), -1)
    shapes[0, : len(SHAPES)] = np.arange(len(SHAPES))
    images = [_render(np.where(shapes >= 0, 0, -1), shapes, rng) for _ in range(80)]
    patches = rearrange(np.concatenate(images), "n (r h) (c w) rgb -> n (r c) (h w) rgb", h=PATCH, w=PATCH)
    red = patches[:, : len(SHAPES), :, 0] - patches[:, : len(SHAPES), :, 1]
    train, test = red[:60], red[60:]
    apart = np.linalg.norm(test[:, :, None, None] - train, axis=-1).min(2)  # of each patch to the nearest one of each shape
    assert (apart.argmin(-1) == np.arange(len(SHAPES))).mean() > 0.8


def test_a_caption_tells_all_objects_in_reading_order(scenes: Scenes) -> None:
    for scene in range(20):
        text = caption(scenes, scene, np.random.default_rng(scene))
        cells = np.flatnonzero(scenes.filled[scene])
        told = [f"{COLORS[scenes.colors[scene, c]]} {SHAPES[scenes.shapes[scene, c]]}" for c in cells]
        assert told == scenes.objects(scene)
        assert {scenes.words(scene, cell) for cell in np.flatnonzero(~scenes.filled[scene])} == {""}
        places = [text.lower().index(f" {words}" if place else words) for place, words in enumerate(told)]
        assert len(set(told)) < len(told) or places == sorted(places)
        assert text[0].isupper()


def test_scenes_depend_on_the_seed_alone() -> None:
    first, again, other = (draw_scenes(3, np.random.default_rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.images, again.images)
    assert not np.array_equal(first.colors, other.colors)


def test_an_encoder_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "_BATCH", 8)
    encoder, accuracy = train_encoder(0, 60)
    assert accuracy > 3 / (len(COLORS) * len(SHAPES))
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_the_shipped_model_is_read_at_every_layer(demo_model: Any, tmp_path: Path) -> None:
    scene_model = load_scene_model(demo_model)
    scenes = draw_scenes(10, np.random.default_rng(11))
    assert caption_accuracy(scene_model, scenes, scenes, np.random.default_rng(0)) > 0.8
    texts = [text for text in tll.load_corpus("demo") if any(word in text.lower() for word in WORDS)][::8]
    names = hook_names(demo_model)
    bank = tll.build_bank(demo_model, texts, tmp_path / "text.h5", hook_names=names, progress=False)
    words, activations = RowWords(tll.ContextualIndex(bank)), visual_activations(scene_model, scenes)
    for name in names:
        named, truth = read(activations[name][torch.from_numpy(scenes.filled)], words).named.by_token, Truth.of(scenes)
        assert truth.right(named).mean() > 0.6, name
        assert truth.shuffled(named).mean() < 0.4, name


def test_what_is_trained_is_saved_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_module.settings_of("demo", 3) == ConnectorSettings(3)
    monkeypatch.setattr(train_module, "settings_of", lambda _, seed: ConnectorSettings(seed, 1, 2))
    monkeypatch.setattr(encoder_module, "train_encoder", lambda seed: train_encoder(seed, 1))
    train_module.main(tmp_path / "made", tmp_path / "out", seed=4)
    model = tll.load_demo_model()
    made, _ = train_module.trained(model, tmp_path / "made", ConnectorSettings(4, 1, 2))
    found, scenes = load_scene_model(model, tmp_path / "out"), draw_scenes(2, np.random.default_rng(0))
    torch.testing.assert_close(found.visual_tokens(scenes), made.visual_tokens(scenes), rtol=0, atol=0)
    assert found.losses == pytest.approx(made.losses, abs=1e-4)
    assert len(tll.load_demo_vlm().losses) == ConnectorSettings().steps


def test_embeddings_run_as_tokens_do(demo_model: Any) -> None:
    tokens = demo_model.to_tokens("A small red circle above a blue square.")
    torch.testing.assert_close(run_embeddings(demo_model, demo_model.W_E[tokens]), demo_model(tokens), atol=1e-4, rtol=0)


def test_a_killed_training_goes_on_as_if_nothing_had_been(
    demo_model: Any, encoder: PatchEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ConnectorSettings(seed=3, steps=4, batch=2)
    before = demo_model.W_E.detach().clone()
    whole = train_connector(demo_model, encoder, tmp_path / "whole.pt", settings)
    steps = iter(range(10))

    def killed(*args: Any) -> torch.Tensor:
        if next(steps) == 2:
            raise KeyboardInterrupt
        return caption_loss(*args)

    path = tmp_path / "killed.pt"
    with monkeypatch.context() as patch:
        patch.setattr(connector_module, "caption_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            train_connector(demo_model, encoder, path, settings, every=1)
    assert len(torch.load(path, weights_only=True)["losses"]) == 2
    resumed = train_connector(demo_model, encoder, path, settings)
    assert resumed.losses == whole.losses
    for name, weight in whole.connector.state_dict().items():
        torch.testing.assert_close(resumed.connector.state_dict()[name], weight, rtol=0, atol=0)
    assert not torch.equal(weight, new_connector(demo_model, 3).state_dict()[name])
    torch.testing.assert_close(demo_model.W_E.detach(), before, rtol=0, atol=0)
    with pytest.raises(tll.InvalidInputError, match=r"killed\.pt holds a training with .*'steps': 4.*delete it"):
        train_connector(demo_model, encoder, path, ConnectorSettings(seed=3, steps=5, batch=2))


def test_visual_tokens_are_as_long_as_embeddings_and_see_their_patch_alone_in_the_loss(
    demo_model: Any, encoder: PatchEncoder, scenes: Scenes
) -> None:
    scene_model = SceneModel(demo_model, encoder, new_connector(demo_model, 0), [])
    tokens = scene_model.visual_tokens(scenes)
    lengths = torch.linalg.vector_norm(tokens, dim=-1)
    torch.testing.assert_close(lengths, demo_model.W_E.norm(dim=-1).median().expand(lengths.shape), rtol=0.01, atol=0)
    few = draw_scenes(3, np.random.default_rng(2))
    expected = []
    for scene, shown in enumerate(scene_model.visual_tokens(few)):
        rng = np.random.default_rng(0)
        text = [caption(few, i, rng) for i in range(3)][scene]
        ids = torch.tensor(demo_model.tokenizer(". " + text, add_special_tokens=False)["input_ids"])
        log_probs = run_embeddings(demo_model, with_bos(demo_model, shown[None], ids[None])).log_softmax(-1)[0]
        expected.append(-log_probs[GRID**2 : -1].gather(1, ids[:, None])[:, 0])
    loss = caption_loss(scene_model, few, np.random.default_rng(0))
    torch.testing.assert_close(loss, torch.cat(expected), atol=0.15, rtol=0)  # the training rounds to bfloat16
    assert caption_accuracy(scene_model, few, few, np.random.default_rng(0)) < 0.5


@pytest.fixture(scope="module")
def phrases_index(any_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tll.ContextualIndex:
    texts = ["a red circle and a tall tree", "the blue star", "Pink hats", "nothing of the kind is here"]
    path = tmp_path_factory.mktemp("scenes") / "phrases.h5"
    return tll.ContextualIndex(tll.build_bank(any_model, texts, path, hook_names=hook_names(any_model), progress=False))


def test_rows_are_named_by_whole_words_and_by_their_text(phrases_index: tll.ContextualIndex) -> None:
    words = RowWords(phrases_index)
    rows = {phrases_index.row(row).prompt_text[:8] + phrases_index.row(row).token: row for row in range(phrases_index.n_rows)}
    named = words.named(
        np.array([[rows["a red ci circle"]], [rows["the blue blue"]], [rows["a red ci tall"]], [rows["nothing  kind"]]])
    )
    of = lambda which: [{WORDS[i] for i in np.flatnonzero(one)} for one in which]  # noqa: E731
    assert of(named.by_token) == [{"circle"}, {"blue"}, set(), set()]
    assert of(named.by_context) == [{"red", "circle"}, {"blue", "star"}, {"red", "circle"}, set()]
    pieces = [row for row in range(phrases_index.n_rows) if phrases_index.row(row).prompt_text == "Pink hats"][:2]
    assert phrases_index.row(pieces[0]).token != "Pink"  # the word is of two tokens there
    assert of(words.named(np.array(pieces)[:, None]).by_token) == [{"pink"}, {"pink"}]


def test_a_planted_reading_is_judged_right(any_model: Any, phrases_index: tll.ContextualIndex) -> None:
    bank, name = phrases_index.banks[0], "blocks.2.hook_resid_post"
    rows = [r for r in range(bank.n_rows) if bank.row(r).token in (" circle", " star", " kind")]
    vectors = torch.tensor(np.asarray(bank.vectors(name)[rows]).astype(np.float32))
    found = phrases_index.search(vectors, top_k=1, hook_names=name)
    assert found.rows[:, 0].tolist() == rows
    words = np.array(
        [[WORDS.index(color), WORDS.index(shape)] for color, shape in [("red", "oval"), ("red", "star"), ("pink", "ring")]]
    )
    named = RowWords(phrases_index).named(np.array(rows)[:, None])
    truth = Truth(np.array([0, 0, 1]), words)
    np.testing.assert_allclose(truth.right(named.by_token), [0.5, 0.0])  # circle is no oval, star is one
    np.testing.assert_allclose(truth.right(named.by_context), [1.0, 0.0])
    reading = read(vectors, RowWords(phrases_index))
    assert reading.rows.shape == (3, 5)
    assert (reading.named.by_context >= reading.named.by_token).all()
    lens = read_tokens(any_model, any_model.W_E[[any_model.tokenizer.encode(" pink")[-1]]])["embedding lens"]
    assert lens.by_token[0, WORDS.index("pink")]


def test_nulls_are_those_of_a_brute_force() -> None:
    rng = np.random.default_rng(0)
    scene = np.array([0, 0, 0, 1, 1, 2])
    words = np.stack([rng.integers(0, len(COLORS), 6), rng.integers(len(COLORS), len(WORDS), 6)], 1)
    named, truth = rng.random((6, len(WORDS))) < 0.3, Truth(scene, words)
    hit = np.array([[named[i, words[j]].any() for j in range(6)] for i in range(6)])
    right = [np.mean([hit[i, i] for i in range(6) if scene[i] == s]) for s in range(3)]
    others = [[hit[i, j] for j in range(6) if scene[j] != scene[i]] for i in range(6)]
    shuffled = [np.mean([np.mean(others[i]) for i in range(6) if scene[i] == s]) for s in range(3)]
    np.testing.assert_allclose(truth.right(named), right)
    np.testing.assert_allclose(truth.shuffled(named), shuffled)
    empty = np.array([0, 1, 2, 2])
    own = [np.mean([hit[i, j] for i in range(4) if empty[i] == s for j in range(6) if scene[j] == s]) for s in range(3)]
    np.testing.assert_allclose(truth.background(named[:4], empty), own)


def test_activations_are_those_of_the_run(demo_model: Any, encoder: PatchEncoder) -> None:
    scene_model = SceneModel(demo_model, encoder, new_connector(demo_model, 0), [])
    few = draw_scenes(2, np.random.default_rng(0))
    found = visual_activations(scene_model, few)
    tokens = scene_model.visual_tokens(few)
    assert list(found) == hook_names(demo_model)
    positions = found["blocks.0.hook_resid_pre"] - tokens
    torch.testing.assert_close(positions[0], positions[1], atol=1e-5, rtol=0)
    last = found["blocks.5.hook_resid_post"]
    logits = run_embeddings(demo_model, with_bos(demo_model, tokens))[:, 1:]
    torch.testing.assert_close(demo_model.ln_final(last) @ demo_model.W_U + demo_model.b_U, logits, atol=1e-3, rtol=0)


def test_one_command_measures_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(benchmark, "SCENES", 4)
    monkeypatch.setattr(benchmark, "settings_of", lambda _, seed: ConnectorSettings(seed, 1, 2))
    monkeypatch.setattr(encoder_module, "train_encoder", lambda seed: train_encoder(seed, 1))
    texts = [f"There is a {color} {shape}." for color in COLORS for shape in SHAPES][::2]
    monkeypatch.setattr(benchmark, "corpora", lambda _: {"10.0%": texts[:11], "100.0%": texts, "sentences": texts[::2]})
    settings = Settings(folder=tmp_path / "made", figure=tmp_path / "scenes.svg", seeds=1)
    first = benchmark.run(settings)
    assert "| LatentLens |" in first
    assert "| distinct words |" in first
    assert "4 scenes of 1 seeds" in first
    assert (tmp_path / "scenes.svg").read_text().startswith("<?xml")
    again = benchmark.run(settings)  # from what the folder holds
    assert again.rsplit("\n", 1)[0] == first.rsplit("\n", 1)[0]


def test_weights_in_float16_give_nearly_the_same_visual_tokens(
    demo_model: Any, encoder: PatchEncoder, scenes: Scenes, tmp_path: Path
) -> None:
    scene_model = SceneModel(demo_model, encoder, new_connector(demo_model, 0), [])
    (tmp_path / "training.json").write_text('{"losses": []}')
    sizes = []
    for dtype, tolerance in ((torch.float32, 0.0), (torch.float16, 3e-3)):
        save_scene_model(scene_model, tmp_path, dtype)
        sizes.append((tmp_path / "weights.safetensors").stat().st_size)
        tokens, expected = load_scene_model(demo_model, tmp_path).visual_tokens(scenes), scene_model.visual_tokens(scenes)
        assert tokens.dtype == torch.float32
        assert float((tokens - expected).norm() / expected.norm()) <= tolerance
    assert sizes[1] < 0.6 * sizes[0]


def test_a_connector_is_of_a_model_of_its_width(demo_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(tll.InvalidInputError, match=r"got a model of width 256; expected the one .* of width 576"):
        load_scene_model(demo_model, loading_module.scenes_folder("smollm2"))
    with pytest.raises(tll.InvalidInputError, match="got model='gpt2'; connectors come with 'demo' and 'smollm2'"):
        tll.load_demo_vlm(model="gpt2")
    asked = []
    monkeypatch.setattr(loading_module, "load_model", lambda name, kind: asked.append((name, kind)) or demo_model)
    with pytest.raises(tll.InvalidInputError, match="of width 576"):
        tll.load_demo_vlm(model="smollm2")
    assert tll.load_demo_vlm("bridge").model is demo_model
    assert asked == [("smollm2", None), ("demo", "bridge")]
