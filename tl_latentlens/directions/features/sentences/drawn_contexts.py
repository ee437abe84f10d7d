"""The contexts by which a sentence is written and scored: those it is written from, and held-out ones, active and silent."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from tl_latentlens.bank.bank import Row
from tl_latentlens.directions.features.activity import Activity
from tl_latentlens.directions.features.contexts import CONTEXT_TOKENS
from tl_latentlens.directions.features.detection import N_TENTHS
from tl_latentlens.views.context import Context


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


def draw_contexts(activity: Activity, feature: int, place: int, n_shown: int, n_held_out: int, seed: int) -> DrawnContexts:
    """Contexts of a feature, from what its label was made from and scored on; they do not hang on other features.

    Args:
        activity: Of labelled features.
        feature: The feature's number.
        place: Its place in the activity.
        n_shown: Most contexts to write a sentence from.
        n_held_out: Most held-out contexts, half of them active.
        seed: Seed of the silent ones.
    """
    evidence = activity.evidence
    fitted, held_out, silent = evidence.fitted, evidence.held_out, evidence.silent
    shown = fitted.rows[place][np.argsort(-fitted.activations[place], kind="stable")]
    is_drawn = held_out.rows[place] >= 0
    active, activations = held_out.rows[place][is_drawn], held_out.activations[place][is_drawn]
    tenths = _tenths(activations, activity.top.activations[place, 0])
    order = spread_over_tenths(tenths)[: n_held_out // 2]
    is_silent = silent.is_held_out & ~silent.is_active[:, place]
    contexts = np.random.default_rng((seed, feature)).permutation(silent.contexts[is_silent])[: n_held_out // 2]
    return DrawnContexts(shown[shown >= 0][:n_shown], active[order], tenths[order], evidence.contexts.first_rows[contexts])


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
