"""The MLP neurons that write the meaning of a word in its context."""

from typing import Any

import numpy as np
import torch

from tl_latentlens.directions.find.component_runs import run_components, stack_rows
from tl_latentlens.directions.find.result import FindResult
from tl_latentlens.directions.find.word_in_context import N_NEIGHBORS
from tl_latentlens.index.contextual import ContextualIndex


def find_neurons(
    text: str,
    at: int | str,
    index: ContextualIndex,
    *,
    model: Any,
    hook_name: int | str | None = None,
    top_k: int = 10,
    seed: int = 0,
) -> FindResult:
    """The MLP neurons that write the meaning of a word in its context, the largest share first.

    As `find_heads`; the components are the outputs post_i * W_out[layer, i] of every neuron before the read activation.
    `mlp.hook_post` is the input of W_out, in gated MLPs (Llama) too. There are thousands of neurons: at p_same_token = 0.05
    many stand by chance. p_family knows how many there are.

    Args:
        text: The text. It is run up to the word.
        at: A position (BOS counted; negative: from the end), or a word: the last token that ends it.
        index: Holds the activation that is read.
        model: The bank's model.
        hook_name: As in `find_heads`.
        top_k: Neurons to return.
        seed: Seed of the sampled rows.

    Returns:
        A table with a line a neuron: layer, neuron, activation, then the columns of `find_features` from `contribution` to
        `n_family`. Neighbors are those of W_out[layer, neuron], or of its opposite where the neuron is below its usual
        activation.

    Raises:
        InvalidInputError: As `find_heads`.
        UnknownHookError: The index lacks the activation.
        ModelMismatchError: `model` is not the bank's.
    """
    runs = run_components(text, at, index, model, hook_name, seed)
    ranked = runs.rank_neurons(top_k)
    table = ranked.table
    layers, neurons = np.divmod(ranked.places, runs.outputs.post.shape[2])
    table.insert(0, "layer", layers)
    table.insert(1, "neuron", neurons)
    table.insert(2, "activation", runs.outputs.post[layers, 0, neurons].numpy())
    is_below_usual = runs.excess(runs.outputs.post)[layers, neurons] < 0
    out_weights = stack_rows(runs.weights.out_neurons, layers.tolist(), neurons.tolist())
    added = out_weights * torch.where(is_below_usual, -1.0, 1.0)[:, None]
    neighbors = index.for_directions.search(added, N_NEIGHBORS, runs.word.hook_name)
    return FindResult("neuron", runs.word.meaning(index), table, runs.parts(), neighbors)
