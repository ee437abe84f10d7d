"""Words that stand near the rows of a label: they say in which company, not what, and stand apart from it."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from tl_latentlens.directions.features.row_texts import LANGUAGE
from tl_latentlens.directions.features.samples import DrawnRows
from tl_latentlens.index.context_words import ContextWords
from tl_latentlens.index.rows import BankRows

_N_ROWS = 32  # Rows of each feature whose texts are read.
_N_BACKGROUND = 2000  # Random rows that tell how common a word is.
_MAX_WORDS = 3
_MIN_ROWS, _MIN_SHARE, _MIN_RATIO = 3, 0.25, 4.0
_ROWS_AT_ONCE = 2**16


def near_words(bank_rows: BankRows, rows: DrawnRows, own_stems: Sequence[frozenset[str]], seed: int) -> list[list[str]]:
    """Up to three words within eight tokens of a feature's rows, the most telling first.

    A word stands near a quarter of the rows, three at least, with a quarter of the feature's weight, and four times as
    often as near random rows. They are ranked by share x log2(share / share near random rows).

    Args:
        bank_rows: The rows of the index.
        rows: Drawn rows of each feature; the first 32 are read.
        own_stems: For each feature the stems that its label names, which are left out.
        seed: Seed of the random rows.
    """
    context_words = ContextWords(bank_rows.by_plan, LANGUAGE)
    drawn = DrawnRows(*(values[:, :_N_ROWS] for values in vars(rows).values()))
    feature, place = np.nonzero(drawn.rows >= 0)
    different, inverse = np.unique(drawn.rows[feature, place], return_inverse=True)
    at, stem = _near(context_words, different)
    background = np.random.default_rng((seed, 4)).integers(0, bank_rows.n_rows, _N_BACKGROUND)
    _, background_stems = _near(context_words, background)
    n_stems = int(max(stem.max(initial=0), background_stems.max(initial=0))) + 1
    common = (np.bincount(background_stems, minlength=n_stems) + 0.5) / (_N_BACKGROUND + 1)
    sizes = np.bincount(at, minlength=len(different))
    ends = sizes.cumsum()
    of_rows = np.repeat(np.arange(len(inverse)), sizes[inverse])
    offsets = np.arange(len(of_rows)) - np.repeat(sizes[inverse].cumsum() - sizes[inverse], sizes[inverse])
    stems = stem[(ends - sizes)[inverse[of_rows]] + offsets]
    weights = (drawn.weights / np.maximum(drawn.weights.sum(-1, keepdims=True), 1e-300))[feature, place]
    codes, code = np.unique(feature[of_rows] * n_stems + stems, return_inverse=True)
    share = np.bincount(code, weights[of_rows], len(codes))
    n_rows = np.bincount(code, minlength=len(codes))
    ratio = share / common[codes % n_stems]
    n_read = (drawn.rows >= 0).sum(-1)[codes // n_stems]
    is_telling = (n_rows >= np.maximum(_MIN_ROWS, _MIN_SHARE * n_read)) & (share >= _MIN_SHARE) & (ratio >= _MIN_RATIO)
    codes, score = codes[is_telling], (share * np.log2(np.maximum(ratio, 1e-300)))[is_telling]
    order = np.lexsort((codes, -score, codes // n_stems))
    words: list[list[str]] = [[] for _ in rows.rows]
    stem_ids = codes[order] % n_stems
    names = zip(context_words.words_of(stem_ids), context_words.stems_at(stem_ids), strict=True)
    for of_feature, (word, name) in zip((codes[order] // n_stems).tolist(), names, strict=True):
        if len(words[of_feature]) < _MAX_WORDS and name not in own_stems[of_feature]:
            words[of_feature].append(word)
    return words


def _near(context_words: ContextWords, rows: Int[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """The places of rows, ascending, with each stem near them."""
    parts = [(start, context_words.near(rows[start : start + _ROWS_AT_ONCE])) for start in range(0, len(rows), _ROWS_AT_ONCE)]
    places = np.concatenate([np.zeros(0, np.int64), *(start + near[0] for start, near in parts)])
    return places, np.concatenate([np.zeros(0, np.int64), *(near[1] for _, near in parts)])
