"""Activations of features on the tokens around rows, from the bank's rows or from another run of the model."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_latentlens.directions.features.sae import encode, rows_per_step
from tl_latentlens.directions.features.token_places import TokenPlaces, concatenated_ranges
from tl_latentlens.model.activations import batches_by_length, prompts_as_run
from tl_latentlens.model.describe import model_device
from tl_latentlens.model.flatten import flat_activation
from tl_latentlens.model.heads import tl_hook_name
from tl_latentlens.model.running import run_hooked


def activations_around(
    sae: Any,
    tokens: TokenPlaces,
    hook_name: str,
    features: Sequence[int],
    rows: Int[np.ndarray, "f n"],
    *,
    before: int,
    after: int,
    model: Any = None,
    progress: bool = True,
) -> Float[np.ndarray, "f n window"]:
    """Each feature's activation on every token around its rows; NaN outside of the prompt and where it is not known.

    Without a model it is known on the tokens that are rows of the bank: the encoder passes over these once more. With the
    model, which runs the prompts again, it is known on all tokens. Memory grows with the requested tokens, not with the bank.

    Args:
        sae: What `label_features` takes, with an encoder.
        tokens: The tokens of the index.
        hook_name: The activation that the SAE reads.
        features: The feature of each line of `rows`.
        rows: Rows of the index; -1: none.
        before: Tokens before each row.
        after: Tokens after each row.
        model: The bank's model.
        progress: Show a progress bar.
    """
    first, end = tokens.windows(np.maximum(rows, 0), before, after)
    window_places = tokens.row_places[rows][..., None] + np.arange(-before, after + 1)
    is_token = (rows >= 0)[..., None] & (window_places >= first[..., None]) & (window_places < end[..., None])
    pair_features = np.broadcast_to(np.asarray(features, np.int64)[:, None, None], window_places.shape)[is_token]
    pair_places = window_places[is_token]
    if model is None:
        chunks = _stored_activations(tokens, hook_name, rows_per_step(sae))
    else:
        chunks = _activations_of_model(model, tokens, hook_name, np.unique(pair_places))
    activations = np.full(window_places.shape, np.nan, np.float32)
    activations[is_token] = _encode_pairs(sae, chunks, pair_places, pair_features, progress)
    return activations


def _encode_pairs(
    sae: Any,
    chunks: Iterator[tuple[Int[np.ndarray, " chunk"], Float[Tensor, "chunk d"]]],
    pair_places: Int[np.ndarray, " pairs"],
    pair_features: Int[np.ndarray, " pairs"],
    progress: bool,
) -> Float[np.ndarray, " pairs"]:
    """The activation of each pair of a place and a feature; NaN for places that no chunk has."""
    order = np.argsort(pair_places, kind="stable")
    sorted_places, values = pair_places[order], np.full(len(pair_places), np.nan, np.float32)
    step = rows_per_step(sae)
    with tqdm(desc="shading", unit=" tokens", unit_scale=True, delay=2, disable=not progress) as bar:
        for chunk_places, activations in chunks:
            low, high = (np.searchsorted(sorted_places, chunk_places, side) for side in ("left", "right"))
            requested = np.flatnonzero(high > low)
            for part in np.split(requested, range(step, len(requested), step)):
                encoded = encode(sae, activations[torch.from_numpy(part)]).cpu().numpy()
                pairs = order[concatenated_ranges(low[part], high[part])]
                lines = np.repeat(np.arange(len(part)), (high - low)[part])
                values[pairs] = encoded[lines, pair_features[pairs]]
            bar.update(len(chunk_places))
    return values


def _stored_activations(
    tokens: TokenPlaces, hook_name: str, step: int
) -> Iterator[tuple[Int[np.ndarray, " n"], Float[Tensor, "n d"]]]:
    """Places and activations of the banks' rows, `step` at a time."""
    for start, bank in tokens.bank_rows.of(hook_name):
        for first in range(0, bank.n_rows, step):
            end = min(first + step, bank.n_rows)
            activations = torch.from_numpy(bank.activations(hook_name, slice(first, end)))
            yield tokens.row_places[start + first : start + end], activations


def _activations_of_model(
    model: Any, tokens: TokenPlaces, hook_name: str, places: Int[np.ndarray, " n"]
) -> Iterator[tuple[Int[np.ndarray, " n"], Float[Tensor, "n d"]]]:
    """Places and activations of all tokens of the prompts that hold the given places, from a run of the model."""
    for bank, bank_start, in_bank in tokens.by_bank(places):
        plan = bank.plan
        prompt_ids = np.unique(np.searchsorted(plan.prompt_starts, in_bank - bank_start, "right") - 1)
        prompts, shifts = [bank.prompt(prompt_id) for prompt_id in prompt_ids.tolist()], plan.shifts(prompt_ids)
        lengths = np.array([len(prompt) for prompt in prompts])
        prompts_to_run, _ = prompts_as_run(prompts, np.zeros_like(lengths), plan.settings)
        for chosen, token_ids, mask in batches_by_length(prompts_to_run, model_device(model)):
            lines = np.repeat(np.arange(len(chosen)), lengths[chosen])
            positions = concatenated_ranges(np.zeros_like(chosen), lengths[chosen])
            activations = _run(model, token_ids, mask, hook_name)
            yield (
                bank_start + plan.prompt_starts[prompt_ids[chosen][lines]] + positions,
                activations[torch.from_numpy(lines), torch.from_numpy(positions + shifts[chosen][lines])],
            )


def _run(
    model: Any, token_ids: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"], hook_name: str
) -> Float[Tensor, "batch pos d"]:
    """The activation of a hook name at all positions."""
    captured: list[Tensor] = []

    def capture(activation: Tensor, hook: Any) -> None:
        captured.append(flat_activation(hook_name, activation, mask.shape))

    run_hooked(model, token_ids, mask, [(tl_hook_name(hook_name), capture)])
    return captured[0]
