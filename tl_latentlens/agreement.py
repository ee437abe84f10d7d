"""Reader agreement: does what stands around a token's neighbors agree with what stands around the token?"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from tl_latentlens.index import ContextualIndex
from tl_latentlens.intervals import Measure
from tl_latentlens.readings import Cells, neighbors_elsewhere, random_rows, token_ids_of
from tl_latentlens.transforms import spread
from tl_latentlens.words import words_around

_RARE = 0.01  # of rows near which a word stands at most, to be one that tells a topic
_BACKGROUND = 2000  # rows that say so


def reader_agreement(
    indexes: Sequence[ContextualIndex], cells: Cells, *, top_k: int = 5, seed: int = 0, progress: bool = True
) -> list[Measure]:
    """How often neighbors in other prompts agree with a token's own text, beside rows of the same token and random rows.

    "next token": the share of the k neighbors whose next token is the one that really comes next; a causal model is trained
    to know it, so a vector of a middle or late layer should. "topic": the share that has a telling word (of three letters
    or more, near at most 1 % of the bank's rows) within eight tokens in common with the token's own text, the words of both
    tokens themselves left out.

    Args:
        indexes: One for each transform to compare, over one bank.
        cells: The tokens that are read (`draw_cells`).
        top_k: Neighbors of each.
        seed: Of the nulls.
        progress: Show a progress bar.
    """
    index, rng = indexes[0], np.random.default_rng(seed)
    following = index.row_token_ids(1)

    @lru_cache(2**18)
    def near(row: int) -> tuple[str, frozenset[str]]:
        found = words_around(index.row(row))
        return found.word, found.near

    sample = spread(index.n_rows, _BACKGROUND)
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

    read = {
        ("same token", ""): random_rows(cells, top_k, rng, token_ids_of(cells)),
        ("random", ""): random_rows(cells, top_k, rng),
    }
    pairs = [(name, one) for name in index.hook_names for one in indexes]
    for name, one in tqdm(pairs, desc="agreement", delay=2, disable=not progress):
        read[one.transform, name] = neighbors_elsewhere(one, cells, name, top_k)
    own = following[cells.rows][:, None]
    return [
        Measure("next token", {key: share(following[rows] == own, rows) for key, rows in read.items()}, "tokens"),
        Measure("topic", {key: share(topics(rows), rows) for key, rows in read.items()}, "tokens"),
    ]
