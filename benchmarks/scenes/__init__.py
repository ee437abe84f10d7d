"""The claim of LatentLens, judged by ground truth: `python -m benchmarks scenes [--model smollm2] [--figure scenes.svg]`.

Scenes are rendered, a small vision encoder is trained on their labels, and a connector on their captions, with encoder and
language model frozen (`tl_latentlens.vision.scenes`); three lenses read the visual tokens (`reading`, `report`). Of another
model than the embedded one shares of the corpus are left out.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

import tl_latentlens as tll
from benchmarks.measure import Settings
from benchmarks.scenes.reading import RowWords, hook_names, region_phrases, visual_activations
from benchmarks.scenes.report import WHOLE, Figures, draw, tables
from tl_latentlens.data.scenes.train import checkpoint_folder, settings_of, trained
from tl_latentlens.vision.scenes.connector import SceneModel, caption_accuracy, new_connector
from tl_latentlens.vision.scenes.render import draw_scenes

SCENES = 100  # that each seed's model is read on
PHRASES = 12_000
SHARES = (0.001, 0.01, 0.1, 1.0)  # of the corpus
HELD_OUT = 10**6  # no training step has this number


def run(settings: Settings) -> str:
    """Train what the folder does not hold yet, read held-out scenes, and tell what came out."""
    start = time.perf_counter()
    folder = settings.folder or checkpoint_folder(settings.model)
    folder.mkdir(parents=True, exist_ok=True)
    model = tll.load_model(settings.model)
    texts_of = corpora(settings.corpus)
    if settings.model != "demo":
        texts_of = {WHOLE: texts_of[WHOLE]}
    indices = {name: _index(model, texts, folder / f"{name}.h5") for name, texts in texts_of.items()}
    figures = Figures(hook_names(model), {name: index.n_rows for name, index in indices.items()})
    words = {name: RowWords(index) for name, index in indices.items()}
    for seed in range(settings.seeds):
        scene_model, accuracy = trained(model, folder, settings_of(settings.model, seed))
        measure(scene_model, accuracy, seed, words, figures)
    if settings.figure is not None:
        draw(figures, settings.figure)
    minutes = (time.perf_counter() - start) / 60
    return f"{tables(figures)}\n\n{minutes:.1f} minutes in all, less what {folder} held already."


def corpora(sentences: str) -> dict[str, list[str]]:
    """The corpus (sentences and region phrases, shuffled), shares of it, and the sentences without the phrases."""
    rng = np.random.default_rng(0)
    plain = list(tll.load_corpus(sentences))
    texts = [*plain, *region_phrases(PHRASES, rng)]
    texts = [texts[i] for i in rng.permutation(len(texts))]
    return {**{f"{share:.1%}": texts[: round(share * len(texts))] for share in SHARES}, "sentences": plain}


def _index(model: Any, texts: Sequence[str], path: Path) -> tll.ContextualIndex:
    bank = tll.build_bank(model, texts, path, hook_names=hook_names(model), max_rows_per_token=None)
    return tll.ContextualIndex(bank)


def measure(scene_model: SceneModel, accuracy: float, seed: int, words: dict[str, RowWords], figures: Figures) -> None:
    """Read the held-out scenes of a seed with each index and add what is found."""
    rng = np.random.default_rng((seed, HELD_OUT))
    scenes, others = draw_scenes(SCENES, rng), draw_scenes(SCENES, rng)
    accuracies = [caption_accuracy(scene_model, scenes, seen, np.random.default_rng(seed)) for seen in (scenes, others)]
    figures.add_training(seed, accuracy, scene_model.losses, *accuracies)
    untrained = SceneModel(scene_model.model, scene_model.encoder, new_connector(scene_model.model, seed), [])
    activations, without = visual_activations(scene_model, scenes), visual_activations(untrained, scenes)
    for name, row_words in tqdm(words.items(), desc=f"reading, seed {seed}"):
        figures.add_readings(name, scene_model.model, scenes, activations, row_words, rng)
    figures.add_untrained(scenes, without, words[WHOLE])
