"""The attention heads that write the meaning of a word in its context."""

from typing import Any

import numpy as np
from einops import einsum

from tl_latentlens.directions.find.component_outputs import attention_at_end
from tl_latentlens.directions.find.component_runs import run_components, stack_rows
from tl_latentlens.directions.find.result import FindResult
from tl_latentlens.directions.find.word_in_context import N_NEIGHBORS
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.search.ambient import own_arithmetic


def find_heads(
    text: str,
    at: int | str,
    index: ContextualIndex,
    *,
    model: Any,
    hook_name: int | str | None = None,
    top_k: int = 10,
    seed: int = 0,
) -> FindResult:
    """The attention heads that write the meaning of a word in its context, the largest share first.

    As `find_features`; the components are the outputs z_h @ W_O[layer, h] of every head before the read activation. The
    model runs on up to 64 of the bank's prompts that hold the token, cut after it, and on as many of random rows. The shares
    of all heads, all neurons and the embedding add up to 1 (`parts`), since the residual stream is their sum. Only the output
    at the word itself counts, not what a head writes at other tokens.

    Args:
        text: The text. It is run up to the word.
        at: A position (BOS counted; negative: from the end), or a word: the last token that ends it.
        index: Holds the activation that is read.
        model: The bank's model.
        hook_name: The activation to read, blocks.L.hook_resid_pre, _mid or _post, or a layer in place of its
            hook_resid_post (3, or -1); None: the index's resid_post nearest to two thirds of the layers.
        top_k: Heads to return.
        seed: Seed of the sampled rows.

    Returns:
        A table with a line a head: layer, head, attends_to and attention (the token with the largest attention weight, and
        that weight, in [0, 1]), then the columns of `find_features` from `contribution` to `n_family`. Neighbors are those of
        the head's output at the word less its usual output.

    Raises:
        InvalidInputError: No such position or word; an activation outside the residual stream; a model that changes the
            outputs of heads or neurons before it adds them (Gemma 2's norms), or has none in a layer (mixtures of experts,
            state-space models).
        UnknownHookError: The index lacks the activation.
        ModelMismatchError: `model` is not the bank's.
    """
    runs = run_components(text, at, index, model, hook_name, seed)
    ranked = runs.rank_heads(top_k)
    table, all_z = ranked.table, runs.outputs.z
    layers, heads = np.divmod(ranked.places, all_z.shape[2])
    table.insert(0, "layer", layers)
    table.insert(1, "head", heads)
    pattern = attention_at_end(model, runs.word.tokens, len(all_z))
    if pattern is not None:
        largest = pattern[layers, heads].max(-1)
        table.insert(2, "attends_to", [runs.word.token_strings[pos] for pos in largest.indices.tolist()])
        table.insert(3, "attention", largest.values.numpy())
    excess_z = runs.excess(all_z)[layers, heads]
    out_weights = stack_rows(runs.weights.out_heads, layers.tolist(), heads.tolist())
    with own_arithmetic(full_products=True):
        excess_outputs = einsum(excess_z, out_weights, "head d_head, head d_head d_model -> head d_model")
    neighbors = index.for_directions.search(excess_outputs, N_NEIGHBORS, runs.word.hook_name)
    return FindResult("head", runs.word.meaning(index), table, runs.parts(), neighbors)
