"""Reader agreement: does what stands around a token's neighbors agree with what stands around the token?"""

from collections import Counter
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from tl_latentlens.evaluation.readings import Cells, random_rows
from tl_latentlens.index.transforms import spread
from tl_latentlens.index.words import word_at_row
from tl_latentlens.statistics.intervals import Measure

_RARE = 0.01  # of rows near which a word stands at most, to be one that tells a topic
_BACKGROUND = 2000  # rows that say so


def reader_agreement(
    cells: Cells, read: dict[tuple[str, str], Int[np.ndarray, "cells k"]], *, seed: int = 0, progress: bool = True
) -> list[Measure]:
    """How often neighbors in other prompts agree with a token's own text, beside rows of the same token and random rows.

    "next token": the share of the k neighbors whose next token is the one that really comes next; a causal model is trained
    to know it, so a vector of a middle or late layer should. "topic": the share that has a telling word (of three letters
    or more, near at most 1 % of the bank's rows) within eight tokens in common with the token's own text, the words of both
    tokens themselves left out.

    Args:
        cells: The tokens that are read (`draw_cells`).
        read: (Reader, hook name) → rows by which each is read, -1 where there is none (`neighbors_elsewhere`).
        seed: Of the nulls.
        progress: Show a progress bar.
    """
    rng, bank = np.random.default_rng(seed), cells.bank
    following = cells.tokens_at(np.arange(bank.n_rows), 1)

    @lru_cache(2**18)
    def near(row: int) -> tuple[str, frozenset[str]]:
        found = word_at_row(bank.row(row))
        return found.word, found.near

    sample = spread(bank.n_rows, _BACKGROUND)
    common = Counter(word for row in sample.tolist() for word in near(row)[1])
    frequent = {word for word, n in common.items() if n > max(1, _RARE * len(sample))}

    def topics(rows: Int[np.ndarray, "cells k"]) -> Bool[np.ndarray, "cells k"]:
        shared = np.zeros(rows.shape, bool)
        for i, (own, others) in enumerate(zip(cells.rows.tolist(), rows.tolist(), strict=True)):
            word, words = near(own)
            words = words - frequent - {word}
            for k, row in enumerate(others):
                shared[i, k] = row >= 0 and not words.isdisjoint(near(row)[1] - {near(row)[0]})
        return shared

    def share(agree: Bool[np.ndarray, "cells k"], rows: Int[np.ndarray, "cells k"]) -> Float[np.ndarray, " cells"]:
        known = (rows >= 0).sum(1)
        return np.where(known, (agree & (rows >= 0)).sum(1) / np.maximum(known, 1), np.nan)

    k = next(iter(read.values())).shape[1]
    nulls = {
        ("same token", ""): random_rows(cells, k, rng, cells.tokens_at(cells.rows)),
        ("random", ""): random_rows(cells, k, rng),
    }
    asked = {**nulls, **read}
    own = following[cells.rows][:, None]
    together: dict[str, dict[tuple[str, str], np.ndarray]] = {"next token": {}, "topic": {}}
    for key, rows in tqdm(asked.items(), desc="agreement", delay=2, disable=not progress):
        together["next token"][key] = share(following[rows] == own, rows)
        together["topic"][key] = share(topics(rows), rows)
    return [Measure(name, values, "tokens") for name, values in together.items()]
