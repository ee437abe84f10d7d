"""Reading visual tokens by each lens, and judging what is read by the truth of the scenes in place of a judge."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import tl_latentlens as tll
from tl_latentlens.data.passages import COLORS as ALL_COLORS
from tl_latentlens.data.passages import SIZES, THINGS
from tl_latentlens.index.words import word_at_row
from tl_latentlens.lens.lenses import embedding_lens, logit_lens
from tl_latentlens.lens.result import TokenReading
from tl_latentlens.vision.scenes.connector import SceneModel
from tl_latentlens.vision.scenes.render import COLORS, SHAPES, Scenes

TOP_K, N_WORDS = 5, 8
_DEPTHS = (1, 2, 4, 8, 16, 24, 28, 29)
"""Blocks that have run where a model with more of them than eight is read."""
WORDS = (*COLORS, *SHAPES)
_PHRASES = (
    "a {0}", "the {0}", "{0}", "one {0} on the left", "{0} on the right", "a {0} in the middle", "There is a {0}.",
    "a {0} near the edge", "the {0} at the top", "a {0} and a {1}", "a {0} next to a {1}", "the {0} below the {1}",
    "We can see a {0}.", "a picture of a {0}", "the {0} in the corner", "a {0} above the {1}",
)  # fmt: skip


def hook_names(model: Any) -> list[str]:
    """The connector's output (`blocks.0.hook_resid_pre`), then the residual stream behind blocks: all of up to eight."""
    n_layers = model.cfg.n_layers
    layers = range(n_layers) if n_layers <= len(_DEPTHS) else [depth - 1 for depth in _DEPTHS if depth <= n_layers]
    return ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in layers)]


def region_phrases(n: int, rng: np.random.Generator) -> list[str]:
    """What people write of regions of pictures, as in the paper's corpus (Visual Genome): "a red circle next to a tall tree".

    Colors and things are those of the embedded model's training lists: 11 and 44, of which scenes have 10 and 11.
    """

    def thing() -> str:
        size = rng.choice(SIZES) + " " if rng.random() < 0.3 else ""
        return f"{size}{rng.choice(ALL_COLORS)} {rng.choice(THINGS)}"

    return [rng.choice(_PHRASES).format(thing(), thing()) for _ in range(n)]


@torch.no_grad()
def visual_activations(scene_model: SceneModel, scenes: Scenes) -> dict[str, Float[Tensor, "scene cell d_model"]]:
    """The residual stream at every patch, for each of `hook_names`; what follows the patches cannot matter."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook_function(activation: Tensor, hook: Any) -> None:
            found[name] = activation[:, 1:].detach().clone()

        return hook_function

    hooks = [(name, keep(name)) for name in hook_names(scene_model.model)]
    scene_model.run_with_hooks(scenes, fwd_hooks=hooks, return_type=None)
    return found


@dataclass(frozen=True, eq=False)
class Named:
    """Which of WORDS each of some patches is read as.

    Attributes:
        by_token: True where a word is the whole word that one of the top-5 tokens belongs to.
        by_context: True where the word stands anywhere in the text of one of the top-5; by the token lenses, which have no
            text, the same as `by_token`.
    """

    by_token: Bool[np.ndarray, "patch word"]
    by_context: Bool[np.ndarray, "patch word"]


class RowWords:
    """The words of an index's rows, looked up once."""

    def __init__(self, index: tll.ContextualIndex) -> None:
        """Of an index over one bank."""
        self.index = index
        self.token = lru_cache(None)(self._token)
        self.context = lru_cache(None)(self._context)

    def named(self, rows: Int[np.ndarray, "patch k"]) -> Named:
        """What patches are read as that have these rows for neighbors; subwords are merged to the words they stand in."""
        return Named(*(np.array([_any(map(of, one)) for one in rows.tolist()]) for of in (self.token, self.context)))

    def named_by_words(self, vectors: Float[Tensor, "patch d_model"]) -> Named:
        """What patches are read as by their nearest distinct words."""
        found = self.index.search_words(vectors, N_WORDS)
        named = np.array([_which([word.lower() for word in found.texts_of(i)]) for i in range(len(vectors))])
        return Named(named, named)

    def _token(self, row: int) -> Bool[np.ndarray, " word"]:
        return _which([word_at_row(self.index.row(row)).word])

    def _context(self, row: int) -> Bool[np.ndarray, " word"]:
        return _which(re.findall(r"[a-z]+", self.index.row(row).prompt_text.lower()))


def named_by_tokens(reading: TokenReading) -> Named:
    """What the logit or embedding lens reads; all of WORDS are single tokens of the embedded model and of SmolLM2."""
    strings = {token: _which([text.strip().lower()]) for token, text in reading.strings.items()}
    named = np.array([_any(strings[token] for token in tokens) for tokens in reading.token_ids.tolist()])
    return Named(named, named)


def _which(words: list[str]) -> Bool[np.ndarray, " word"]:
    return np.isin(WORDS, words)


def _any(each: Iterable[Bool[np.ndarray, " word"]]) -> Bool[np.ndarray, " word"]:
    return np.any(list(each), axis=0)


@dataclass(frozen=True, eq=False)
class Truth:
    """Patches and what they show.

    Attributes:
        scene: The scene of each patch.
        words: The true color and shape, indices into WORDS.
    """

    scene: Int[np.ndarray, " patch"]
    words: Int[np.ndarray, "patch 2"]

    @classmethod
    def of(cls, scenes: Scenes) -> "Truth":
        """The object patches of scenes, in the order of `scenes.filled`."""
        words = np.stack([scenes.colors, scenes.shapes + len(COLORS)], -1)
        return cls(scenes.filled.nonzero()[0], words[scenes.filled])

    def right(self, named: Bool[np.ndarray, "patch word"]) -> Float[np.ndarray, " scene"]:
        """Share of each scene's patches that are read as their own color or shape."""
        return self._by_scene(np.take_along_axis(named, self.words, 1).max(1))

    def of_kind(self, named: Bool[np.ndarray, "patch word"], kind: int) -> Float[np.ndarray, " scene"]:
        """Share of each scene's patches that are read as their own color (kind 0) or shape (1)."""
        return self._by_scene(np.take_along_axis(named, self.words[:, [kind]], 1)[:, 0])

    def shuffled(self, named: Bool[np.ndarray, "patch word"]) -> Float[np.ndarray, " scene"]:
        """The share, judged by objects of other scenes, averaged over all of them: what a reading of any scene would get."""
        fits = named[:, self.words[:, 0]] | named[:, self.words[:, 1]]
        others = self.scene[:, None] != self.scene
        return self._by_scene((fits & others).sum(1) / others.sum(1))

    def background(
        self, named: Bool[np.ndarray, "empty word"], scene: Int[np.ndarray, " empty"]
    ) -> Float[np.ndarray, " scene"]:
        """The share of background patches that are read as an object of their scene, averaged over its objects."""
        fits = named[:, self.words[:, 0]] | named[:, self.words[:, 1]]
        own = scene[:, None] == self.scene
        return np.array([fits[scene == one][:, self.scene == one].mean() for one in np.unique(self.scene) if own.any()])

    def _by_scene(self, values: np.ndarray) -> Float[np.ndarray, " scene"]:
        return np.bincount(self.scene, values) / np.bincount(self.scene)


@dataclass(frozen=True, eq=False)
class Reading:
    """Patches at one hook name, read by their contextual neighbors.

    Attributes:
        named: What they are read as.
        rows: The neighbors.
        hook_ids: Which hook name of the index each of them is of.
    """

    named: Named
    rows: Int[np.ndarray, "patch k"]
    hook_ids: Int[np.ndarray, "patch k"]


def read(vectors: Float[Tensor, "patch d_model"], words: RowWords, hook_names: list[str] | None = None) -> Reading:
    """Read patches by the nearest rows of all hook names of an index, or of some."""
    found = words.index.search(vectors, top_k=TOP_K, hook_names=hook_names)
    rows = found.rows.cpu().numpy()
    return Reading(words.named(rows), rows, found.hook_ids.cpu().numpy())


def read_tokens(model: Any, vectors: Float[Tensor, "patch d_model"]) -> dict[str, Named]:
    """The same patches by the lenses that read tokens."""
    lenses = {"logit lens": logit_lens, "embedding lens": embedding_lens}
    return {name: named_by_tokens(lens(model, vectors, TOP_K)) for name, lens in lenses.items()}
