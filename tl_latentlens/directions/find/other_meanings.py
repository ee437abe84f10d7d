"""The meanings of other words of the bank as directions: what components are held against that write a word's own meaning."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tl_latentlens.directions.find.word_in_context import (
    MIN_USES,
    WordInContext,
    difference_of_uses,
    stored_activations,
    unit_direction,
)
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.search.ambient import own_arithmetic

N_MEANINGS = 199
_MAX_TOKENS = 2000  # Tokens of which the nearest are taken.
_MAX_USES = 50  # Rows of a token that its meaning is made of.
_MAX_COSINE = 0.5  # A meaning nearer to the word's own is no other meaning.


@own_arithmetic(full_products=True)
def other_meanings(word: WordInContext, index: ContextualIndex, seed: int) -> Float[Tensor, "meanings d"]:
    """Meanings of up to 199 other tokens, each of one random use, as `locate_word` makes the word's own; of length 1.

    Of up to 2,000 tokens they are those whose activations are nearest to the word's: nouns, where the word is a noun. Where
    the word's meaning is its activation less the bank's mean, so are these, of random rows.

    Args:
        word: The word. Its own token is left out.
        index: The index.
        seed: Seed of the tokens and their uses.
    """
    rng = np.random.default_rng([seed, 1])
    rows = rng.permutation(index.bank_rows.row_ids(word.hook_name))
    tokens = index.bank_rows.token_ids()[rows]
    rows, tokens = rows[tokens != word.tokens[-1]], tokens[tokens != word.tokens[-1]]
    if word.has_contrast:
        groups = _nearest_tokens(_rows_by_token(rows, tokens, rng), word, index)
        stored = stored_activations(index, word.hook_name, np.concatenate([rows[:0], *groups]))
        uses = stored.split([len(group) for group in groups])
        added = torch.stack([difference_of_uses(of_token[1:], of_token[0]) for of_token in uses] or [stored.sum(0)])
    else:
        added = stored_activations(index, word.hook_name, rows[:N_MEANINGS]) - word.usual
    directions = unit_direction(added, index, word.hook_name)
    return directions[directions.isfinite().all(-1)]  # A token whose uses are all alike has no meaning.


@own_arithmetic(full_products=True)
def unlike_the_word(others: Float[Tensor, "meanings d"], word: WordInContext) -> Float[Tensor, "meanings d"]:
    """The meanings whose cosine to the word's own is at most 0.5, either way: what writes a shared meaning writes the word's.

    Each is turned so that the word has more of it than the rows it is compared with, as it has of its own.
    """
    others = others[(others @ word.direction).abs() <= _MAX_COSINE]
    return others * torch.where(others @ (word.activation - word.usual) < 0, -1.0, 1.0)[:, None]


def _rows_by_token(
    rows: Int[np.ndarray, " rows"], tokens: Int[np.ndarray, " rows"], rng: np.random.Generator
) -> list[Int[np.ndarray, " uses"]]:
    """Up to 50 rows of each of up to 2,000 tokens that have enough of them."""
    order = np.argsort(tokens, kind="stable")
    starts = np.flatnonzero(np.diff(tokens[order], prepend=-1))
    n_uses = np.diff(starts, append=len(order))
    chosen = rng.permutation(np.flatnonzero(n_uses > MIN_USES))[:_MAX_TOKENS]
    ends = starts + np.minimum(n_uses, _MAX_USES)
    return [rows[order[starts[i] : ends[i]]] for i in chosen.tolist()]


def _nearest_tokens(
    groups: list[Int[np.ndarray, " uses"]], word: WordInContext, index: ContextualIndex
) -> list[Int[np.ndarray, " uses"]]:
    """The groups whose first row is nearest to the word's usual activation, by the cosine of both less the rows' mean."""
    firsts = stored_activations(index, word.hook_name, np.array([group[0] for group in groups], np.int64))
    mean = firsts.mean(0)
    cosines = cosine_similarity(firsts - mean, (word.usual - mean)[None], -1)
    return [groups[i] for i in cosines.argsort(descending=True, stable=True)[:N_MEANINGS].tolist()]
