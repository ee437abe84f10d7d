"""Substitution: how far a model's predictions move when a neighbor's activation replaces a token's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.evaluation.held_out import HeldOutRows, random_rows_in_other_prompts
from tl_latentlens.model.activations import batches_by_length, prompts_as_run
from tl_latentlens.model.describe import model_device
from tl_latentlens.model.direction import is_bidirectional
from tl_latentlens.model.hook_points import in_residual_stream
from tl_latentlens.model.state import evaluating
from tl_latentlens.search.ambient import own_arithmetic
from tl_latentlens.statistics.measures import Measure, ReaderKey

_N_LATER_TOKENS = 4  # Tokens after the replaced one whose predictions are compared too.
_EMBEDDING_BATCH = 256
_ABOUT = (
    "How far the model's prediction of the next token moves (KL divergence, in nats) when the neighbor's activation takes the "
    "place of the token's own; 0: not at all. same token: another row of the token; random: any row; embedding: a row of the "
    "token whose input embedding is nearest to the activation."
)


@dataclass(frozen=True, eq=False)
class PredictionShift:
    """KL divergences (nats) of predictions after a substitution from those before it; NaN where no row was given.

    Attributes:
        at_token: Of the prediction at the replaced token.
        later: The mean over the predictions at the up to four tokens after it; NaN where there are none.
    """

    at_token: Float[np.ndarray, "held_out readers"]
    later: Float[np.ndarray, "held_out readers"]


def substitution(
    model: Any,
    held_out: HeldOutRows,
    neighbors: dict[ReaderKey, Int[np.ma.MaskedArray, "held_out k"]],
    *,
    ranks: Sequence[int] = (1, 5),
    seed: int = 0,
    progress: bool = True,
) -> list[Measure]:
    """The KL divergence of the model's next-token distributions, in nats, when a token's activation is replaced by a row's.

    KL(before || after) is measured for the prediction at the token, with the neighbor of each rank, and averaged over the
    up to four tokens after it. Nulls: a random row, a random row of the same token, and, in the residual stream, a random row
    of the token whose W_E row is nearest to the activation. The row has its own length, not that of the replaced activation.
    The KL is 0 where the neighbor gives the prediction that the activation gives. The figure is the geometric mean over
    tokens: KLs spread over powers of ten, and of their plain mean no interval from some hundred tokens holds the truth.

    Args:
        model: The bank's model, causal.
        held_out: The tokens that are replaced (`draw_held_out_rows`).
        neighbors: Each reader's neighbors of each token, nearest first (`neighbors_in_other_prompts`).
        ranks: Which neighbors, from 1.
        seed: Seed of the random rows.
        progress: Show a progress bar.

    Raises:
        InvalidInputError: An encoder, which predicts no next token.
    """
    if is_bidirectional(model):
        raise InvalidInputError("substitution asks for next-token distributions, which an encoder does not give")
    rng = np.random.default_rng(seed)
    same_token = random_rows_in_other_prompts(held_out, 1, rng, held_out.token_ids)
    any_token = random_rows_in_other_prompts(held_out, 1, rng)
    at_token: dict[int, dict[ReaderKey, np.ndarray]] = {rank: {} for rank in ranks}
    later: dict[ReaderKey, np.ndarray] = {}
    hook_names = dict.fromkeys(key.hook_name for key in neighbors)
    n_tokens = len(hook_names) * len(held_out.rows)
    bar = tqdm(total=n_tokens, desc="substitution", unit=" tokens", delay=2, disable=not progress)
    for hook_name in hook_names:
        assert hook_name is not None  # Neighbors are rows of a hook name.
        nulls = {"same token": same_token, "random": any_token}
        if in_residual_stream(hook_name):
            nearest = _nearest_embeddings(model, held_out, hook_name)
            nulls["embedding"] = random_rows_in_other_prompts(held_out, 1, rng, nearest)
        of_hook = {key.reader: rows for key, rows in neighbors.items() if key.hook_name == hook_name}
        columns = {(reader, rank): rows[:, 0] for reader, rows in nulls.items() for rank in ranks}
        columns |= {(reader, rank): rows[:, rank - 1] for reader, rows in of_hook.items() for rank in ranks}
        shift = prediction_shift(model, held_out, hook_name, np.ma.stack(list(columns.values()), 1), bar)
        for i, (reader, rank) in enumerate(columns):
            at_token[rank][ReaderKey(reader, hook_name)] = shift.at_token[:, i]
            if rank == ranks[0]:
                later[ReaderKey(reader, hook_name)] = shift.later[:, i]
    bar.close()
    figures = {f"KL of neighbor {rank} (nats)": at_token[rank] for rank in ranks}
    figures[f"KL of neighbor {ranks[0]} on later tokens (nats)"] = later
    settings: dict[str, Any] = {"lower_is_better": True, "kind": "geometric mean", "about": _ABOUT}
    return [Measure(name, values, "tokens", **settings) for name, values in figures.items()]


@own_arithmetic(full_products=True)
def _nearest_embeddings(model: Any, held_out: HeldOutRows, hook_name: str) -> Int[np.ndarray, " held_out"]:
    """The token, among those that have rows, whose W_E row has the largest cosine to each held-out activation."""
    plan = held_out.bank.plan
    token_ids = np.unique(plan.tokens[plan.row_tokens])
    weight = model.W_E.detach()
    rows = weight[torch.from_numpy(token_ids).long().to(weight.device)].float()
    units = torch.nn.functional.normalize(rows, dim=-1)
    activations = torch.from_numpy(held_out.activations(hook_name)).to(units)
    nearest = torch.cat([(part @ units.T).argmax(-1) for part in activations.split(_EMBEDDING_BATCH)])
    return token_ids[nearest.cpu().numpy()]


@torch.no_grad()
def prediction_shift(
    model: Any,
    held_out: HeldOutRows,
    hook_name: str,
    rows: Int[np.ma.MaskedArray, "held_out readers"],
    bar: tqdm | None = None,
) -> PredictionShift:
    """The shift of predictions for each row that is put in the place of a held-out activation; `bar` counts these tokens."""
    plan, device = held_out.bank.plan, model_device(model)
    prompt_ids = plan.row_prompts[held_out.rows]
    positions = plan.row_tokens[held_out.rows] - plan.prompt_starts[prompt_ids]
    whole, positions = prompts_as_run([held_out.bank.prompt(i) for i in prompt_ids.tolist()], positions, plan.settings)
    prompts = [prompt[: pos + 1 + _N_LATER_TOKENS] for prompt, pos in zip(whole, positions.tolist(), strict=True)]
    is_row = ~np.ma.getmaskarray(rows)
    shift = PredictionShift(np.full(rows.shape, np.nan), np.full(rows.shape, np.nan))
    for chosen, tokens, mask in batches_by_length(prompts, device):
        window = _Window(model, tokens, mask, torch.from_numpy(positions[chosen]).to(device))
        places, readers = is_row[chosen].nonzero()
        pairs = np.stack([places, rows.data[chosen[places], readers]])
        distinct, pair_ids = np.unique(pairs, axis=1, return_inverse=True)  # Readers with the same row share a run.
        kl = np.empty((distinct.shape[1], 2))
        before = window.log_probs()
        for first in range(0, len(kl), len(chosen)):
            part = slice(first, first + len(chosen))
            vectors = torch.from_numpy(held_out.bank.activations(hook_name, distinct[1, part])).to(device)
            kl[part] = window.kl(before, torch.from_numpy(distinct[0, part]).to(device), hook_name, vectors)
        shift.at_token[chosen[places], readers], shift.later[chosen[places], readers] = kl[pair_ids.reshape(-1)].T
        if bar is not None:
            bar.update(len(chosen))
    return shift


@dataclass(frozen=True, eq=False)
class _Window:
    """Prompts of a batch, and the predictions at one position of each and at the four after it.

    Attributes:
        model: The model.
        tokens: The prompts, padded at the right.
        mask: True where there is a token.
        positions: The position in each prompt.
    """

    model: Any
    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    positions: Int[Tensor, " batch"]

    def kl(
        self,
        before: Float[Tensor, "batch window d_vocab"],
        lines: Int[Tensor, " n"],
        hook_name: str,
        vectors: Float[Tensor, "n d"],
    ) -> Float[np.ndarray, "n 2"]:
        """KL(before || after) at the position and its mean over later ones, with a vector put in each chosen prompt."""
        after = _Window(self.model, self.tokens[lines], self.mask[lines], self.positions[lines]).log_probs(hook_name, vectors)
        has_token = self._has_token()[lines]
        kl = (before[lines].exp() * (before[lines] - after)).sum(-1).clamp(min=0) * has_token
        later = kl[:, 1:].sum(-1) / has_token[:, 1:].sum(-1)
        return torch.stack([kl[:, 0], later], -1).cpu().numpy()

    def log_probs(
        self, hook_name: str | None = None, vectors: Float[Tensor, "batch d"] | None = None
    ) -> Float[Tensor, "batch window d_vocab"]:
        """Log-probabilities of the next token, with `vectors` in place of the activations at the position if given."""
        lines = torch.arange(len(self.tokens), device=self.tokens.device)

        def replace(activation: Tensor, hook: Any) -> Tensor:
            assert vectors is not None
            changed = activation.clone()
            here = changed.device  # the layer's own, where a model is on several
            changed[lines.to(here), self.positions.to(here)] = vectors.to(activation).view(len(vectors), *activation.shape[2:])
            return changed

        with evaluating(self.model):
            hooks = [] if hook_name is None else [(hook_name, replace)]
            logits = self.model.run_with_hooks(self.tokens, fwd_hooks=hooks, return_type="logits").to(self.tokens.device)
        places = self._places().clamp(max=self.tokens.shape[1] - 1)
        return logits[lines[:, None], places].float().log_softmax(-1)

    def _places(self) -> Int[Tensor, "batch window"]:
        return self.positions[:, None] + torch.arange(1 + _N_LATER_TOKENS, device=self.tokens.device)

    def _has_token(self) -> Float[Tensor, "batch window"]:
        """1 where a place of the window holds a token, else 0."""
        padded = torch.nn.functional.pad(self.mask, (0, 1 + _N_LATER_TOKENS))
        return padded.gather(1, self._places()).float()
