"""Substitution: put a neighbor's activation in a token's place, let the model run on, and see how far its predictions move."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.evaluation.readings import Cells, random_rows
from tl_latentlens.model.activations import batches_by_length, prompts_as_run
from tl_latentlens.model.describe import is_bidirectional, model_device
from tl_latentlens.model.hook_points import in_residual_stream
from tl_latentlens.model.running import evaluating
from tl_latentlens.statistics.intervals import Measure

_AFTER = 4  # tokens that follow whose predictions are looked at too


def substitution(
    model: Any,
    cells: Cells,
    read: dict[tuple[str, str], Int[np.ndarray, "cells k"]],
    *,
    ranks: Sequence[int] = (1, 5),
    seed: int = 0,
    progress: bool = True,
) -> list[Measure]:
    """How far the model's next-token distributions move when a token's activation is replaced by a neighbor's.

    KL(as it was || replaced), in nats: for the prediction at the token, with the neighbor of each rank; and averaged over the
    up to four tokens after it. Beside it a random row, a random row of the same token, and, in the residual stream, a random
    row of the token whose embedding (row of W_E) is nearest to the activation. The row's own length is restored. A neighbor
    that the model cannot tell from the activation moves nothing.

    Args:
        model: The bank's model, causal.
        cells: The tokens that are replaced (`draw_cells`).
        read: (Reader, hook name) → each token's neighbors, nearest first, -1 where there is none (`neighbors_elsewhere`).
        ranks: Which neighbors, from 1.
        seed: Of the random rows.
        progress: Show a progress bar.

    Raises:
        InvalidInputError: An encoder, which predicts no next token.
    """
    if is_bidirectional(model):
        raise InvalidInputError("substitution asks for next-token distributions, which an encoder does not give")
    rng = np.random.default_rng(seed)
    alike, anything = random_rows(cells, 1, rng, cells.tokens_at(cells.rows)), random_rows(cells, 1, rng)
    at, after = ({rank: {} for rank in ranks} for _ in range(2))
    names = dict.fromkeys(name for _, name in read)
    for name in tqdm(names, desc="substitution", unit=" hook names", delay=2, disable=not progress):
        nulls = {"same token": alike[:, 0], "random": anything[:, 0]}
        if in_residual_stream(name):
            nulls["embedding"] = random_rows(cells, 1, rng, _nearest_embedding(model, cells, name))[:, 0]
        found = {reader: rows for (reader, at_name), rows in read.items() if at_name == name}
        rows = [*nulls.values(), *(one[:, rank - 1] for one in found.values() for rank in ranks)]
        kl = iter(np.moveaxis(_moved(model, cells, name, np.stack(rows, 1)), 1, 0))
        for reader in nulls:
            moved = next(kl)
            for rank in ranks:
                at[rank][reader, name], after[rank][reader, name] = moved.T
        for reader in found:
            for rank in ranks:
                at[rank][reader, name], after[rank][reader, name] = next(kl).T
    here = [Measure(f"KL of neighbor {rank} (nats)", at[rank], "tokens", lower_is_better=True) for rank in ranks]
    later = Measure(f"KL of neighbor {ranks[0]} on later tokens (nats)", after[ranks[0]], "tokens", lower_is_better=True)
    return [*here, later]


def _nearest_embedding(model: Any, cells: Cells, hook_name: str) -> Int[np.ndarray, " cells"]:
    """Of the tokens that have rows, the one whose input embedding is nearest to each cell's activation."""
    plan = cells.bank.plan
    having = np.unique(plan.tokens[plan.row_tokens])
    weight = torch.nn.functional.normalize(
        model.W_E.detach()[torch.from_numpy(having).long().to(model.W_E.device)].float(), dim=-1
    )
    activations = torch.from_numpy(cells.activations(hook_name)).to(weight)
    return having[torch.cat([(part @ weight.T).argmax(-1) for part in activations.split(256)]).cpu().numpy()]


@torch.no_grad()
def _moved(
    model: Any, cells: Cells, hook_name: str, rows: Int[np.ndarray, "cells readers"]
) -> Float[np.ndarray, "cells readers 2"]:
    """KL at each cell and after it for each row put in its place; NaN where there is no row (-1)."""
    plan, device = cells.bank.plan, model_device(model)
    own = plan.row_prompts[cells.rows]
    at = plan.row_tokens[cells.rows] - plan.prompt_starts[own]
    whole, at = prompts_as_run([cells.bank.prompt(prompt) for prompt in own.tolist()], at, plan.settings)
    prompts = [one[: pos + 1 + _AFTER] for one, pos in zip(whole, at.tolist(), strict=True)]
    moved = np.full((*rows.shape, 2), np.nan)
    for chosen, tokens, mask in batches_by_length(prompts, device):
        where = torch.from_numpy(at[chosen]).to(device)
        before = _log_probs(model, tokens, where)
        real = _window(mask, where)
        pairs = np.unique(np.stack([np.repeat(np.arange(len(chosen)), rows.shape[1]), rows[chosen].ravel()]), axis=1)
        pairs = pairs[:, pairs[1] >= 0]  # readers that found the same row share a run
        kl = np.empty((pairs.shape[1], 2))
        for first in range(0, len(kl), len(chosen)):
            part = slice(first, first + len(chosen))
            cell = torch.from_numpy(pairs[0, part]).to(device)
            put = torch.from_numpy(cells.bank.activations(hook_name, pairs[1, part])).to(device)
            after = _log_probs(model, tokens[cell], where[cell], hook_name, put)
            each = (before[cell].exp() * (before[cell] - after)).sum(-1).clamp(min=0) * real[cell]
            later = each[:, 1:].sum(-1) / real[cell, 1:].sum(-1)
            kl[part] = torch.stack([each[:, 0], later], -1).cpu().numpy()
        number = {pair: i for i, pair in enumerate(map(tuple, pairs.T.tolist()))}
        for i, cell in enumerate(chosen.tolist()):
            for reader, row in enumerate(rows[cell].tolist()):
                if row >= 0:
                    moved[cell, reader] = kl[number[i, row]]
    return moved


def _log_probs(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    where: Int[Tensor, " batch"],
    hook_name: str | None = None,
    put: Float[Tensor, "batch d"] | None = None,
) -> Float[Tensor, "batch window d_vocab"]:
    """Log-probabilities of the next token at a position and the four after it, another activation put there or not."""
    each = torch.arange(len(tokens), device=tokens.device)

    def replace(activation: Tensor, hook: Any) -> Tensor:
        assert put is not None
        changed = activation.clone()
        changed[each, where] = put.to(activation).view(len(put), *activation.shape[2:])
        return changed

    with evaluating(model):
        hooks = [] if hook_name is None else [(hook_name, replace)]
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")
    places = (where[:, None] + torch.arange(1 + _AFTER, device=tokens.device)).clamp(max=tokens.shape[1] - 1)
    return logits[each[:, None], places].float().log_softmax(-1)


def _window(mask: Bool[Tensor, "batch pos"], where: Int[Tensor, " batch"]) -> Float[Tensor, "batch window"]:
    """1 where a position of the window holds a token, else 0."""
    places = where[:, None] + torch.arange(1 + _AFTER, device=mask.device)
    padded = torch.nn.functional.pad(mask, (0, 1 + _AFTER))
    return padded.gather(1, places).float()
