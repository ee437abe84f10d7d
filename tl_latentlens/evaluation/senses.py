"""Sense accuracy: do the nearest labelled uses of an ambiguous word have the sense that the word has here?"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_latentlens.evaluation.labelled_uses import Uses
from tl_latentlens.evaluation.votes import most_frequent_sense, questions_of, vote_of_nearest
from tl_latentlens.evaluation.word_lists import N_WORDS, shared_words
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.lens.lenses import embedding_lens, logit_lens
from tl_latentlens.model.activations import activations_at
from tl_latentlens.model.describe import model_device
from tl_latentlens.model.hook_points import in_residual_stream
from tl_latentlens.model.readout import readout_problem
from tl_latentlens.search.ambient import own_arithmetic
from tl_latentlens.statistics.measures import Measure, ReaderKey


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
    lens and the embedding lens compare uses by the tokens that they share of their first twenty, and give no answer where
    two readings share none.
    """
    votes = {ReaderKey("most frequent sense"): most_frequent_sense(uses)}
    bar = tqdm(activations.items(), desc="other lenses", unit=" hook names", delay=2, disable=not progress)
    for hook_name, vectors in bar:
        if hook_name == layer_0_hook(model):
            units = torch.nn.functional.normalize(vectors, dim=-1)
            votes[ReaderKey("layer 0")] = vote_of_nearest(uses, (units @ units.T).numpy(), top_k)
        elif in_residual_stream(hook_name) and readout_problem(model) is None:
            for reader, lens in (("logit lens", logit_lens), ("embedding lens", embedding_lens)):
                reading = lens(model, vectors.to(model_device(model)), N_WORDS)
                votes[ReaderKey(reader, hook_name)] = vote_of_nearest(uses, shared_words(reading.token_ids), top_k, above=0)
    return votes


def layer_0_hook(model: Any) -> str | None:
    """The hook name of what enters the first block; None where the model has none."""
    return next((name for name in ("blocks.0.hook_resid_pre", "blocks.0.hook_in") if name in model.hook_dict), None)


_ABOUT = (
    "The nearest labelled uses of an ambiguous word vote for the sense that it has in a held-out sentence: the share of right "
    "answers, averaged over senses. most frequent sense: always the sense that most uses have; layer 0: embedding and position "
    "alone; logit lens and embedding lens: uses compared by how many of the first twenty tokens they share; other words: by "
    "how many of the twenty nearest other words; around: by the words around their nearest uses, of which many have none."
)


def sense_accuracy(uses: Uses, votes: dict[ReaderKey, Int[np.ma.MaskedArray, " questions"]]) -> Measure:
    """Recall of each sense, in [0, 1], by each reader; their mean is the macro recall. No answer is a wrong answer."""
    senses, sense_ids = np.unique(uses.senses[questions_of(uses).use_ids], return_inverse=True)
    n_questions = np.bincount(sense_ids)
    recall = {
        key: np.bincount(sense_ids, (answers == senses[sense_ids]).filled(False)) / n_questions
        for key, answers in votes.items()
    }
    return Measure("sense accuracy", recall, "senses", kind="share", about=_ABOUT)
