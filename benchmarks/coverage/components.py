"""`beats_null` of find_*: how often the first component beats it along a word's own meaning, and along another word's."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

import tl_latentlens as tll
from benchmarks.coverage.demo import demo_bank, demo_model
from benchmarks.coverage.lines import Line
from benchmarks.measure import Settings
from tl_latentlens.directions.features.sae import encode, nonzero_features
from tl_latentlens.directions.find.component_ranking import RankedComponents
from tl_latentlens.directions.find.component_runs import ComponentRuns, run_components
from tl_latentlens.directions.find.features import rank_features
from tl_latentlens.directions.find.word_in_context import WordInContext

TITLE = "First lines of find_* that beat their null, by number of contrast uses"
_UNRELATED = (0.0, 0.10)
_KINDS = ("features", "heads", "neurons")
_USES = {"6 to 18": (6, 19), "19 or more": (19, 10**6)}
_MAX_WORDS = 137
_OTHERS = 10  # meanings of other words that are tried with each word


def lines(settings: Settings) -> list[Line]:
    """Shares along another word's meaning, and along the word's own, of the embedded model's labelled words."""
    n_words = min(_MAX_WORDS, settings.draws // 7)
    found = []
    for kind in _KINDS:
        for what, n_others, wanted in (("another word's", _OTHERS, _UNRELATED), ("its own", 0, None)):
            beats = first_lines(kind, n_words, n_others)
            for uses, (low, high) in _USES.items():
                those = beats[(beats[:, 0] >= low) & (beats[:, 0] < high), 1]
                found.append(Line(f"{kind}, meaning: {what}", uses, 0.05, float(those.mean()), len(those), wanted))
    return found


def first_lines(kind: str, n_words: int, n_others: int) -> np.ndarray:
    """For each word, its contrast uses and whether its first component beats the null: along its own meaning, or along others'.

    Args:
        kind: "features", "heads" or "neurons".
        n_words: Words, each in a held-out sentence of its own.
        n_others: Meanings of other words tried with each; 0: its own.

    Returns:
        [cases, 2]
    """
    words, rng = runs_of_words(n_words), np.random.default_rng(0)
    cases = []
    for runs in words:
        others = [other for other in words if other.word.tokens[-1] != runs.word.tokens[-1]]
        chosen = [others[i] for i in rng.permutation(len(others))[:n_others]] if n_others else [runs]
        for other in chosen:
            ranked = _first(kind, replace(runs, word=_along(runs.word, other.word.direction)))
            cases.append((len(runs.word.contrast_rows), bool(ranked.table["beats_null"].iloc[0])))
    return np.array(cases)


def _along(word: WordInContext, direction: torch.Tensor) -> WordInContext:
    """The word with another direction, turned so that the word has more of it than its contrast uses, as of its own."""
    strength = float((word.activation - word.usual) @ direction)
    sign = 1 if strength > 0 else -1
    return replace(word, direction=sign * direction, strength=sign * strength)


def _first(kind: str, runs: ComponentRuns) -> RankedComponents:
    if kind != "features":
        return (runs.rank_heads if kind == "heads" else runs.rank_neurons)(1)
    sae = _sae()
    active = torch.from_numpy(np.flatnonzero((encode(sae, runs.word.activation[None])[0] != 0).numpy() & nonzero_features(sae)))
    return rank_features(runs.word, runs.others, sae, _index(), active, 1)


@lru_cache(1)
def _index() -> tll.ContextualIndex:
    return tll.ContextualIndex(demo_bank(), _sae().hook_name, device="cpu", transform="center")


@lru_cache(1)
def _sae() -> Any:
    return tll.load_sae("demo")


@lru_cache(1)
def runs_of_words(n_words: int) -> list[ComponentRuns]:
    """Runs of the embedded model on held-out sentences of the labelled words."""
    senses = tll.load_senses("demo")
    held_out = senses[senses["held_out"]].head(n_words)
    pairs = zip(held_out["text"], held_out["word"], strict=True)
    return [run_components(text, word, _index(), demo_model(), None, 0) for text, word in pairs]
