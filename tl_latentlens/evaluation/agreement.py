"""Reader agreement: do a token's neighbors have the same next token and the same topic as the token itself?"""

from collections import Counter
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from tl_latentlens.bank.bank import Bank
from tl_latentlens.evaluation.held_out import HeldOutRows, random_rows_in_other_prompts
from tl_latentlens.index.transforms import evenly_spaced_rows
from tl_latentlens.index.words import word_at_row
from tl_latentlens.statistics.measures import Measure, ReaderKey

_MAX_TOPIC_WORD_SHARE = 0.01  # A word near more rows than this share tells no topic.
_WORD_SAMPLE_ROWS = 2000  # Rows whose words are counted for it.

_NULLS = "same token: other rows of the token that is read; random: any rows."
_ABOUT = {
    "next token": f"The share of the nearest rows, in other texts, that are followed by the token that follows here. {_NULLS}",
    "topic": f"The share of the nearest rows, in other texts, near which a rare word of this text stands too. {_NULLS}",
}


def reader_agreement(
    held_out: HeldOutRows,
    neighbors: dict[ReaderKey, Int[np.ma.MaskedArray, "held_out k"]],
    *,
    seed: int = 0,
    progress: bool = True,
) -> list[Measure]:
    """The measures "next token" and "topic": shares of neighbors in other prompts that agree with the token's own text.

    "next token": the share of the k neighbors whose next token is the one that follows the held-out token. A causal model is
    trained to predict it, so vectors of middle and late layers should agree. "topic": the share that has a topic word within
    eight tokens in common with the held-out token's text. A topic word has three letters or more and stands near at most 1 %
    of the bank's rows. The words of both tokens themselves do not count. Nulls: rows of the same token, and random rows.

    Args:
        held_out: The tokens that are read (`draw_held_out_rows`).
        neighbors: Each reader's rows for each token (`neighbors_in_other_prompts`).
        seed: Seed of the nulls.
        progress: Show a progress bar.
    """
    rng, plan = np.random.default_rng(seed), held_out.bank.plan
    k = next(iter(neighbors.values())).shape[1]
    nulls = {
        ReaderKey("same token"): random_rows_in_other_prompts(held_out, k, rng, held_out.token_ids),
        ReaderKey("random"): random_rows_in_other_prompts(held_out, k, rng),
    }
    next_places = plan.row_tokens + 1
    next_tokens = plan.tokens[np.minimum(next_places, len(plan.tokens) - 1)]
    has_next = next_places < plan.prompt_starts[plan.row_prompts + 1]
    topics = _Topics(held_out.bank)
    same_next_token: dict[ReaderKey, np.ndarray] = {}
    same_topic: dict[ReaderKey, np.ndarray] = {}
    for key, rows in tqdm({**nulls, **neighbors}.items(), desc="agreement", delay=2, disable=not progress):
        is_same = has_next[rows.data] & (next_tokens[rows.data] == next_tokens[held_out.rows][:, None])
        same_next_token[key] = _share_of_unmasked(is_same, rows)
        same_topic[key] = _share_of_unmasked(topics.are_shared(held_out.rows, rows), rows)
    figures = {"next token": same_next_token, "topic": same_topic}
    return [Measure(name, values, "tokens", kind="share", about=_ABOUT[name]) for name, values in figures.items()]


def _share_of_unmasked(
    agrees: Bool[np.ndarray, "held_out k"], rows: Int[np.ma.MaskedArray, "held_out k"]
) -> Float[np.ndarray, " held_out"]:
    """The share of the rows that are there which agree; NaN where there are none."""
    is_row = ~np.ma.getmaskarray(rows)
    n_rows = is_row.sum(1)
    return np.where(n_rows, (agrees & is_row).sum(1) / np.maximum(n_rows, 1), np.nan)


class _Topics:
    """Topic words near the rows of a bank."""

    def __init__(self, bank: Bank) -> None:
        self._word_at_row = lru_cache(2**18)(lambda row: word_at_row(bank.row(row)))
        sample = evenly_spaced_rows(bank.n_rows, _WORD_SAMPLE_ROWS)
        n_rows_near = Counter(word for row in sample.tolist() for word in self._word_at_row(row).near)
        max_rows = max(1, _MAX_TOPIC_WORD_SHARE * len(sample))
        self._common_words = {word for word, n in n_rows_near.items() if n > max_rows}

    def are_shared(
        self, held_out_rows: Int[np.ndarray, " held_out"], rows: Int[np.ma.MaskedArray, "held_out k"]
    ) -> Bool[np.ndarray, "held_out k"]:
        """True for rows that have a topic word in common with the held-out row; False where masked."""
        shared = np.zeros(rows.shape, bool)
        is_row = ~np.ma.getmaskarray(rows)
        for i, held_out_row in enumerate(held_out_rows.tolist()):
            own = self._word_at_row(held_out_row)
            topic_words = own.near - self._common_words - {own.word}
            for k in np.flatnonzero(is_row[i]).tolist():
                other = self._word_at_row(int(rows.data[i, k]))
                shared[i, k] = not topic_words.isdisjoint(other.near - {other.word})
        return shared
