"""Rows in their texts, many at once: the tokens around each, and how much a feature is active on every one of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_latentlens.bank.bank import Bank
from tl_latentlens.directions.sae import decoder_of, encode
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.model.activations import batches_by_length, prompts_as_run
from tl_latentlens.model.describe import model_device
from tl_latentlens.model.flatten import flat_activation
from tl_latentlens.model.heads import tl_hook_name
from tl_latentlens.model.running import run_hooked

_CHUNK_BYTES = 2**26  # of feature activations at once


@dataclass(frozen=True, eq=False)
class Texts:
    """The tokens of an index's banks as if they stood one bank after the other; a *place* counts through all of them.

    Attributes:
        index: Whose texts they are.
        bank_starts: The place of each bank's first token, and the end.
        prompt_starts: The place of each prompt's first token, and the end.
        row_places: The place of each row, ascending.
    """

    index: ContextualIndex
    bank_starts: Int[np.ndarray, " banks_and_end"]
    prompt_starts: Int[np.ndarray, " prompts_and_end"]
    row_places: Int[np.ndarray, " rows"]

    def spans(self, rows: Int[np.ndarray, "..."], before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
        """First place and end of at most `before` and `after` tokens around each row, within its prompt."""
        places = self.row_places[rows]
        prompts = np.searchsorted(self.prompt_starts, places, "right")
        first = np.maximum(places - before, self.prompt_starts[prompts - 1])
        return first, np.minimum(places + after + 1, self.prompt_starts[prompts])

    def of_banks(self, places: Int[np.ndarray, " n"]) -> Iterator[tuple[Bank, int, Int[np.ndarray, " some"]]]:
        """Ascending places by bank: each bank that has some, the place of its first token, and its places."""
        for (_, bank), start, end in zip(self.index.row_banks, self.bank_starts[:-1], self.bank_starts[1:], strict=True):
            here = places[slice(*np.searchsorted(places, [start, end]))]
            if len(here):
                yield bank, int(start), here


def texts_of(index: ContextualIndex) -> Texts:
    """The texts of an index."""
    plans = [bank.plan for _, bank in index.row_banks]
    starts = np.cumsum([0, *(len(plan.tokens) for plan in plans)])
    prompts = [plan.prompt_starts[:-1] + start for plan, start in zip(plans, starts, strict=False)]
    rows = [plan.row_tokens + start for plan, start in zip(plans, starts, strict=False)]
    return Texts(index, starts, np.concatenate([*prompts, starts[-1:]]), np.concatenate(rows))


def ranges(first: Int[np.ndarray, " n"], end: Int[np.ndarray, " n"]) -> Int[np.ndarray, " total"]:
    """Whole numbers from each first to its end, one range after the other: of [5, 1] and [7, 2] they are [5, 6, 1]."""
    sizes = end - first
    return np.repeat(first - (sizes.cumsum() - sizes), sizes) + np.arange(sizes.sum())


def activations_around(
    sae: Any,
    texts: Texts,
    hook_name: str,
    features: Sequence[int],
    rows: Int[np.ndarray, "f n"],
    *,
    before: int,
    after: int,
    model: Any = None,
    progress: bool = True,
) -> Float[np.ndarray, "f n window"]:
    """Each feature's activation on every token around its rows, NaN where it is not known and outside of the prompt.

    Without a model it is known on the tokens that are rows of the bank, and found by one more pass of the encoder over those;
    with the model, which runs the prompts again, on all. Memory grows with the tokens asked for and not with the bank.

    Args:
        sae: What `label_features` takes, with an encoder.
        texts: Of the index.
        hook_name: The activation that the SAE reads.
        features: The feature of each line of `rows`.
        rows: Rows of the index; -1: none.
        before: Tokens before each row, and
        after: after it.
        model: The bank's model.
        progress: Show a progress bar.
    """
    first, end = texts.spans(np.maximum(rows, 0), before, after)
    places = texts.row_places[rows][..., None] + np.arange(-before, after + 1)
    asked = (rows >= 0)[..., None] & (places >= first[..., None]) & (places < end[..., None])
    wanted, of = places[asked], np.broadcast_to(np.asarray(features, np.int64)[:, None, None], places.shape)[asked]
    order = np.argsort(wanted, kind="stable")
    ascending, values = wanted[order], np.full(len(wanted), np.nan, np.float32)
    step = max(1, _CHUNK_BYTES // (4 * len(decoder_of(sae))))
    source = _of_banks(texts, hook_name, step) if model is None else _of_model(model, texts, hook_name, np.unique(wanted))
    with tqdm(desc="shading", unit=" tokens", unit_scale=True, delay=2, disable=not progress) as bar:
        for at, activations in source:
            low, high = (np.searchsorted(ascending, at, side) for side in ("left", "right"))
            used = np.flatnonzero(high > low)
            for some in np.split(used, range(step, len(used), step)):
                acts = encode(sae, activations[torch.from_numpy(some)]).cpu().numpy()
                pairs = order[ranges(low[some], high[some])]
                values[pairs] = acts[np.repeat(np.arange(len(some)), (high - low)[some]), of[pairs]]
            bar.update(len(at))
    found = np.full(places.shape, np.nan, np.float32)
    found[asked] = values
    return found


def _of_banks(texts: Texts, hook_name: str, step: int) -> Iterator[tuple[Int[np.ndarray, " n"], Float[Tensor, "n d"]]]:
    """Places and activations of the banks' rows, `step` at a time."""
    for start, bank in texts.index.banks_of(hook_name):
        for first in range(0, bank.n_rows, step):
            part = slice(first, min(first + step, bank.n_rows))
            rows = torch.from_numpy(bank.activations(hook_name, part))
            yield texts.row_places[start + part.start : start + part.stop], rows


def _of_model(
    model: Any, texts: Texts, hook_name: str, wanted: Int[np.ndarray, " n"]
) -> Iterator[tuple[Int[np.ndarray, " n"], Float[Tensor, "n d"]]]:
    """Places and activations of all tokens of the prompts that hold the wanted places, as the model gives them."""
    for bank, start, places in texts.of_banks(wanted):
        plan = bank.plan
        numbers = np.unique(np.searchsorted(plan.prompt_starts, places - start, "right") - 1)
        prompts, shifts = [bank.prompt(number) for number in numbers.tolist()], plan.shifts(numbers)
        lengths = np.array([len(prompt) for prompt in prompts])
        runs, _ = prompts_as_run(prompts, np.zeros_like(lengths), plan.settings)
        for chosen, tokens, mask in batches_by_length(runs, model_device(model)):
            line = np.repeat(np.arange(len(chosen)), lengths[chosen])
            pos = ranges(np.zeros_like(chosen), lengths[chosen])
            activations = _run(model, tokens, mask, hook_name)
            yield (
                start + plan.prompt_starts[numbers[chosen][line]] + pos,
                activations[torch.from_numpy(line), torch.from_numpy(pos + shifts[chosen][line])],
            )


def _run(
    model: Any, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"], hook_name: str
) -> Float[Tensor, "batch pos d"]:
    seen: list[Tensor] = []

    def take(activation: Tensor, hook: Any) -> None:
        seen.append(flat_activation(hook_name, activation, mask.shape))

    run_hooked(model, tokens, mask, [(tl_hook_name(hook_name), take)])
    return seen[0]
