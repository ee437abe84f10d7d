"""The contexts by which a sentence is written and scored: those it is written from, and held-out ones, active and silent."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from tl_latentlens.bank.bank import Row
from tl_latentlens.directions.features.activity import Activity
from tl_latentlens.directions.features.sae import encode, rows_per_step
from tl_latentlens.index.search_result import SearchedIndex
from tl_latentlens.views.context import Context

CONTEXT_TOKENS = 32
N_TENTHS = 10


@dataclass(frozen=True, eq=False)
class DrawnContexts:
    """The contexts of one feature, each given by a row in it.

    Attributes:
        shown: Contexts of prompts that are not held out, each by its most active row, the most active first.
        active: Held-out contexts in which the feature is active, each by its most active row.
        tenths: The tenth of the feature's largest activation, 0 to 9, that each of `active` reaches.
        silent: Held-out contexts in which the feature is silent.
    """

    shown: Int[np.ndarray, " shown"]
    active: Int[np.ndarray, " active"]
    tenths: Int[np.ndarray, " active"]
    silent: Int[np.ndarray, " silent"]


class ContextDraw:
    """Draws contexts of features; those of one do not hang on which others are asked for."""

    def __init__(self, sae: Any, index: SearchedIndex, activity: Activity, features: list[int], seed: int) -> None:
        """Read the activations of some features on all rows."""
        self._features, self._seed = features, seed
        self._pieces, self._is_held_out = _pieces(index, activity.hook_name)
        self._active = _activations(sae, index, activity.hook_name, features)

    def of(self, place: int, n_shown: int, n_held_out: int) -> DrawnContexts:
        """The contexts of a feature, by its place among the requested ones.

        Args:
            place: The place.
            n_shown: Most contexts to write a sentence from.
            n_held_out: Most held-out contexts, half of them active.
        """
        rng = np.random.default_rng((self._seed, self._features[place]))
        rows, activations = self._active[place]
        values = np.zeros(len(self._pieces), np.float32)
        values[rows] = activations
        rows = np.lexsort((-values, self._pieces))
        rows = rows[self._pieces[rows] >= 0]
        rows = rows[np.append(True, np.diff(self._pieces[rows]) > 0)[: len(rows)]]  # the most active row of each piece
        is_active, is_held_out = values[rows] > 0, self._is_held_out[rows]
        shown = rows[is_active & ~is_held_out]
        active, silent = rng.permutation(rows[is_active & is_held_out]), rng.permutation(rows[~is_active & is_held_out])
        tenths = _tenths(values[active], values.max(initial=0))
        order = spread_over_tenths(tenths)[: n_held_out // 2]
        shown = shown[np.argsort(-values[shown], kind="stable")][:n_shown]
        return DrawnContexts(shown, active[order], tenths[order], silent[: n_held_out // 2])


def spread_over_tenths(tenths: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Places in such an order that every tenth is met once before any is met again."""
    order = np.argsort(tenths, kind="stable")
    counts = np.bincount(tenths, minlength=N_TENTHS)
    rounds = np.empty(len(tenths), np.int64)
    rounds[order] = np.arange(len(tenths)) - np.repeat(counts.cumsum() - counts, counts)
    return np.lexsort((-tenths, rounds))


def context_text(row: Row, *, marked: bool) -> str:
    """The text of the piece of a prompt that a row stands in, special tokens left out; the row's token may be marked."""
    token_ids, first = row.bank.prompt(row.prompt_index), row.position // CONTEXT_TOKENS * CONTEXT_TOKENS
    parts = (
        token_ids[first : row.position],
        token_ids[row.position : row.position + 1],
        token_ids[row.position + 1 : first + CONTEXT_TOKENS],
    )
    before, token, after = map(row.bank.text, parts)
    return (
        Context.around(before, token, after).marked() if marked else row.bank.text(token_ids[first : first + CONTEXT_TOKENS])
    ).strip()


def _tenths(values: Float[np.ndarray, " n"], largest: float) -> Int[np.ndarray, " n"]:
    return np.minimum(N_TENTHS * values / max(largest, 1e-30), N_TENTHS - 1).astype(np.int64)


def _pieces(index: SearchedIndex, hook_name: str) -> tuple[Int[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
    """The number of the piece that each row stands in, -1 for rows without the hook name; and whether it is held out."""
    pieces, is_held_out, n_pieces = np.full(index.bank_rows.n_rows, -1), np.zeros(index.bank_rows.n_rows, bool), 0
    for first_row, bank in index.bank_rows.of(hook_name):
        plan, rows = bank.plan, slice(first_row, first_row + bank.n_rows)
        positions = plan.row_tokens - plan.prompt_starts[plan.row_prompts]
        keys = plan.row_prompts * (int(positions.max(initial=0)) + 1) + positions // CONTEXT_TOKENS
        _, numbers = np.unique(keys, return_inverse=True)
        pieces[rows], is_held_out[rows] = n_pieces + numbers, plan.row_prompts % 2 == 1
        n_pieces += int(numbers.max(initial=-1)) + 1
    return pieces, is_held_out


def _activations(
    sae: Any, index: SearchedIndex, hook_name: str, features: list[int]
) -> list[tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]]:
    """Of each feature the rows on which it is active, and how much."""
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
    for first_row, bank in index.bank_rows.of(hook_name):
        for rows in np.split(np.arange(bank.n_rows), range(rows_per_step(sae), bank.n_rows, rows_per_step(sae))):
            encoded = encode(sae, torch.from_numpy(bank.activations(hook_name, rows)))[:, features].cpu().numpy()
            at, places = np.nonzero(encoded > 0)
            parts.append((places, first_row + rows[at], encoded[at, places]))
    places, rows, activations = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.argsort(places, kind="stable")
    ends = np.searchsorted(places[order], np.arange(1, len(features)))
    return list(zip(np.split(rows[order], ends), np.split(activations[order], ends), strict=True))
