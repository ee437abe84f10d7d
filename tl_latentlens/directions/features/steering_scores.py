"""Scores from adding a feature's direction to the model's stream: do the tokens of its neighbors become likelier?"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_latentlens.bank.bank import Bank
from tl_latentlens.directions.features.controls import draw_shuffled_decoders
from tl_latentlens.directions.features.selection import FeatureSelection
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.model.describe import model_device
from tl_latentlens.model.state import evaluating

_N_PROMPTS, _PROMPT_TOKENS = 4, 12
_N_NULLS = 100
_MAX_VECTORS = 32  # Directions of one run of the model.
_LOGIT_BYTES = 2**26  # Logits held at once, in bytes.
_NORM_SAMPLE_ROWS = 2000  # The median length of these rows is that of a typical activation.


@torch.no_grad()
def steering_scores(
    selection: FeatureSelection,
    index: ContextualIndex,
    model: Any,
    hook_name: str,
    neighbors: Int[np.ndarray, "f k"],
    written: Mapping[str, Callable[[Float[Tensor, "n d"]], Int[np.ndarray, "n k"]]],
    top_k: int,
    seed: int,
    progress: bool,
) -> dict[str, Float[np.ndarray, " f"] | float]:
    """The mean rank, in [0, 1], of the neighbors' tokens among all logits' changes, and of the tokens that follow them.

    Each direction is scaled to the length of a typical activation and added at the last token of some of the bank's prompts.
    The change of each token's logit is averaged over the prompts and turned into its rank in the vocabulary. `steered_null`
    and such are the means of 100 random features of the SAE with the neighbors, or the other tokens, of another one.

    Args:
        selection: The features.
        index: The rows.
        model: The bank's model.
        hook_name: Where the directions are added.
        neighbors: The neighbors of each.
        written: Name of a further score → gives the tokens of directions; -1: none.
        top_k: Neighbors of each null.
        seed: Seed of prompts and nulls.
        progress: Show a progress bar.
    """
    rng = np.random.default_rng((seed, 3))
    _, bank = index.bank_rows.of(hook_name)[0]
    tokens = _draw_prompts(bank, rng).to(model_device(model))
    n_nulls = _N_NULLS if len(selection.all_ids) > 1 and len(selection.ids) else 0
    nulls = draw_shuffled_decoders(selection, index, top_k, rng, n_nulls)
    rows = np.concatenate([neighbors, nulls.neighbors])
    directions = torch.cat([selection.directions, selection.decoder[nulls.feature_ids]])
    steps = _typical_length(bank, hook_name) * directions / directions.norm(dim=-1, keepdim=True)
    ids_of = {"steered": index.bank_rows.token_ids()[rows], "steered_next": index.bank_rows.token_ids(1)[rows]}
    sources = torch.cat([selection.directions, selection.decoder[nulls.other_ids]])
    ids_of |= {name: tokens_of(sources) for name, tokens_of in written.items()}
    ranks = {name: np.zeros(len(rows)) for name in ids_of}
    # Every step runs as many vectors, the last one too: the logits of one do not hang on how many run beside it.
    n_vectors = max(1, min(_MAX_VECTORS, _LOGIT_BYTES // (4 * model.cfg.d_vocab * tokens.numel())))
    run = _SteeredRun(model, hook_name, tokens, n_vectors)
    unsteered = replace(run, n_vectors=1).logits(steps.new_zeros(1, steps.shape[1]))
    with tqdm(total=len(steps), desc="steering", unit=" features", delay=2, disable=not progress) as bar:
        for first in range(0, len(steps), n_vectors):
            part = slice(first, min(first + n_vectors, len(steps)))
            vocabulary_ranks = _vocabulary_ranks((run.logits(steps[part]) - unsteered).mean(1))
            for name, ids in ids_of.items():
                ranks[name][part] = _mean_rank(vocabulary_ranks, ids[part])
            bar.update(part.stop - first)
    n_features = len(neighbors)
    columns: dict[str, Float[np.ndarray, " f"] | float] = {name: values[:n_features] for name, values in ranks.items()}
    return columns | {f"{name}_null": _nan_mean(values[n_features:]) for name, values in ranks.items()}


def _draw_prompts(bank: Bank, rng: np.random.Generator) -> Int[Tensor, "prompts pos"]:
    """The first tokens of some prompts, all of one length."""
    lengths = np.diff(bank.plan.prompt_starts)
    length = int(min(_PROMPT_TOKENS, lengths.max()))
    prompt_ids = rng.choice(np.flatnonzero(lengths >= length), _N_PROMPTS)
    return torch.from_numpy(np.array([bank.prompt(prompt_id)[:length] for prompt_id in prompt_ids]))


def _typical_length(bank: Bank, hook_name: str) -> float:
    return float(np.median(bank.norms(hook_name)[:_NORM_SAMPLE_ROWS]))


@dataclass(frozen=True, eq=False)
class _SteeredRun:
    """Runs prompts with vectors added to the activation of their last token.

    Attributes:
        tokens: The prompts, [prompts, pos].
        n_vectors: Vectors of each run; fewer are filled up with zeros.
    """

    model: Any
    hook_name: str
    tokens: Int[Tensor, "prompts pos"]
    n_vectors: int

    def logits(self, vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n prompts d_vocab"]:
        """The last token's logits of each prompt, once for each vector."""

        def add(activation: Tensor, hook: Any) -> Tensor:
            changed = activation.clone()
            filled = torch.nn.functional.pad(vectors, (0, 0, 0, self.n_vectors - len(vectors)))
            repeated = filled.to(activation).repeat_interleave(len(self.tokens), 0)
            changed[:, -1] += repeated.view(changed[:, -1].shape)
            return changed

        batch = self.tokens.repeat(self.n_vectors, 1)
        with evaluating(self.model):
            logits = self.model.run_with_hooks(batch, fwd_hooks=[(self.hook_name, add)], return_type="logits")
        return logits[:, -1].float().unflatten(0, (self.n_vectors, len(self.tokens)))[: len(vectors)]


def _vocabulary_ranks(changes: Float[Tensor, "n d_vocab"]) -> Float[np.ndarray, "n d_vocab"]:
    """The rank of each token's change, from 0 (lowest) to 1 (highest)."""
    return (changes.argsort(-1).argsort(-1).float() / (changes.shape[-1] - 1)).cpu().numpy()


def _mean_rank(ranks: Float[np.ndarray, "n d_vocab"], token_ids: Int[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
    """The mean rank of each line's tokens without -1 (no token follows); NaN where all are -1."""
    is_token = token_ids >= 0
    values = np.take_along_axis(ranks, np.maximum(token_ids, 0), 1)
    n_tokens = is_token.sum(-1)
    return np.where(is_token, values, 0).sum(-1) / np.where(n_tokens, n_tokens, np.nan)


def _nan_mean(values: Float[np.ndarray, " n"]) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan
