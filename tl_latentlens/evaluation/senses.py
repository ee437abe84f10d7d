"""Sense accuracy: do the nearest labelled uses of an ambiguous word have the sense that the word has here?"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_latentlens.evaluation.labelled_uses import Uses
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.lens.lenses import embedding_lens, logit_lens
from tl_latentlens.model.activations import activations_at
from tl_latentlens.model.describe import model_device
from tl_latentlens.model.hook_points import in_residual_stream
from tl_latentlens.model.readout import readout_problem
from tl_latentlens.search.ambient import own_arithmetic
from tl_latentlens.statistics.measures import Measure, ReaderKey
from tl_latentlens.views.data import TokenReading

_N_LENS_TOKENS = 10  # Tokens of a lens by which two readings are compared.
_TIE_MARGIN = 1e-6  # Similarities no further apart than this are equal.


@dataclass(frozen=True, eq=False)
class _Questions:
    """The uses that are asked for their sense, and who may answer.

    Attributes:
        use_ids: The uses that are asked.
        is_candidate: For each of them, True at the uses whose sense is known: of the same word, labelled, another use.
    """

    use_ids: Int[np.ndarray, " questions"]
    is_candidate: Bool[np.ndarray, "questions uses"]


def activations_of_uses(
    model: Any, uses: Uses, hook_names: tuple[str, ...], progress: bool = False
) -> dict[str, Float[Tensor, "uses d"]]:
    """The activations at the word of each use: of the hook names, and of what enters the first block."""
    first_hook = layer_0_hook(model)
    others = [name for name in hook_names if name != first_hook]
    read = [*([first_hook] if first_hook else []), *others]
    return activations_at(model, uses.prompts, uses.positions, read, progress="labelled uses" if progress else None)


@own_arithmetic(full_products=True)
def votes_of_index(
    index: ContextualIndex, uses: Uses, activations: dict[str, Float[Tensor, "uses d"]], top_k: int
) -> dict[ReaderKey, Int[np.ma.MaskedArray, " questions"]]:
    """The sense of each question by its k nearest labelled uses, at each hook name of an index; masked: no answer.

    The weight of a vote is its similarity less that of the (k + 1)st nearest use.
    """
    votes = {}
    for hook_name in index.hook_names:
        units, offsets = index.transform_activations(hook_name, activations[hook_name])
        similarities = (units @ units.T - offsets).cpu().numpy()
        votes[ReaderKey(index.transform, hook_name)] = vote_of_nearest(uses, similarities, top_k)
    return votes


@own_arithmetic(full_products=True)
def votes_of_baselines(
    model: Any, uses: Uses, activations: dict[str, Float[Tensor, "uses d"]], top_k: int, progress: bool = False
) -> dict[ReaderKey, Int[np.ma.MaskedArray, " questions"]]:
    """The sense of each question by readers that need no bank; masked: no answer.

    "most frequent sense" gives each word's. "layer 0" compares what enters the first block: embedding and position. The logit
    lens and the embedding lens compare uses by their ten first tokens, and give no answer where two readings share none.
    """
    votes = {ReaderKey("most frequent sense"): most_frequent_sense(uses)}
    bar = tqdm(activations.items(), desc="other lenses", unit=" hook names", delay=2, disable=not progress)
    for hook_name, vectors in bar:
        if hook_name == layer_0_hook(model):
            units = torch.nn.functional.normalize(vectors, dim=-1)
            votes[ReaderKey("layer 0")] = vote_of_nearest(uses, (units @ units.T).numpy(), top_k)
        elif in_residual_stream(hook_name) and readout_problem(model) is None:
            for reader, lens in (("logit lens", logit_lens), ("embedding lens", embedding_lens)):
                reading = lens(model, vectors.to(model_device(model)), _N_LENS_TOKENS)
                votes[ReaderKey(reader, hook_name)] = vote_of_nearest(uses, _reading_similarity(reading), top_k, above=0)
    return votes


def layer_0_hook(model: Any) -> str | None:
    """The hook name of what enters the first block; None where the model has none."""
    return next((name for name in ("blocks.0.hook_resid_pre", "blocks.0.hook_in") if name in model.hook_dict), None)


_ABOUT = (
    "The nearest labelled uses of an ambiguous word vote for the sense that it has in a held-out sentence: the share of right "
    "answers, averaged over senses. most frequent sense: always the sense that most uses have; layer 0: embedding and position "
    "alone; logit lens and embedding lens: uses compared by the tokens that these read."
)


def sense_accuracy(uses: Uses, votes: dict[ReaderKey, Int[np.ma.MaskedArray, " questions"]]) -> Measure:
    """Recall of each sense, in [0, 1], by each reader; their mean is the macro recall. No answer is a wrong answer."""
    senses, sense_ids = np.unique(uses.senses[_questions(uses).use_ids], return_inverse=True)
    n_questions = np.bincount(sense_ids)
    recall = {
        key: np.bincount(sense_ids, (answers == senses[sense_ids]).filled(False)) / n_questions
        for key, answers in votes.items()
    }
    return Measure("sense accuracy", recall, "senses", kind="share", about=_ABOUT)


def vote_of_nearest(
    uses: Uses, similarities: Float[np.ndarray, "uses uses"], top_k: int, above: float = -np.inf
) -> Int[np.ma.MaskedArray, " questions"]:
    """The sense of each question by its `top_k` nearest candidates and those as near as the last of them.

    Masked where no candidate has a similarity above `above`.
    """
    questions = _questions(uses)
    is_candidate = questions.is_candidate
    scores = np.where(is_candidate, similarities[questions.use_ids], -np.inf)
    ordered = -np.sort(-scores, axis=1)
    kth, next_after = ordered[:, [min(top_k, scores.shape[1]) - 1]], ordered[:, [min(top_k, scores.shape[1] - 1)]]
    is_voter = is_candidate & (scores >= kth - _TIE_MARGIN) & (scores > above)
    lowest = np.where(is_candidate, scores, np.inf).min(1, keepdims=True)
    baseline = np.where(np.isfinite(next_after), next_after, lowest)
    weights = np.where(is_voter, np.maximum(np.where(is_voter, scores, 0) - baseline, 0) + _TIE_MARGIN, 0)
    return np.ma.array(_heaviest_sense(uses, weights), mask=~is_voter.any(1))


def most_frequent_sense(uses: Uses) -> Int[np.ma.MaskedArray, " questions"]:
    """The sense that most labelled uses of each question's word have, the first of equally frequent ones."""
    questions = _questions(uses)
    is_counted = questions.is_candidate
    # Where each use is asked in turn, it is counted too: without it another sense would be the most frequent one.
    is_counted[np.arange(len(questions.use_ids)), questions.use_ids] = ~uses.held_out[questions.use_ids]
    return np.ma.array(_heaviest_sense(uses, is_counted), mask=np.zeros(len(questions.use_ids), bool))


def _heaviest_sense(uses: Uses, weights: Float[np.ndarray, "questions uses"]) -> Int[np.ndarray, " questions"]:
    """The sense with the largest sum of weights, the first of equal ones."""
    return (weights @ np.eye(uses.senses.max() + 1)[uses.senses]).argmax(1)


def _questions(uses: Uses) -> _Questions:
    use_ids = np.flatnonzero(uses.held_out) if uses.held_out.any() else np.arange(len(uses.words))
    is_candidate = (uses.words[use_ids][:, None] == uses.words) & ~uses.held_out
    is_candidate[np.arange(len(use_ids)), use_ids] = False
    return _Questions(use_ids, is_candidate)


def _reading_similarity(reading: TokenReading) -> Float[np.ndarray, "uses uses"]:
    """Cosine of each pair of readings, as vectors of scores over the vocabulary."""
    _, token_places = np.unique(reading.token_ids, return_inverse=True)
    token_places = token_places.reshape(reading.token_ids.shape)
    scores = np.zeros((len(token_places), token_places.max() + 1), np.float32)
    np.put_along_axis(scores, token_places, reading.scores.clip(0), 1)
    scores /= np.maximum(np.linalg.norm(scores, axis=1, keepdims=True), 1e-12)
    return scores @ scores.T
