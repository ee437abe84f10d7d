"""Prompts to begin with: sentences of the bank in which one ambiguous word means two things."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tl_latentlens.bank.bank import Row
from tl_latentlens.evaluation.labelled_uses import load_senses
from tl_latentlens.index.contextual import ContextualIndex

_WIDTH = 110  # Characters to each side of the word, before the sentence is cut out.
_MIN_ROWS = 6  # Of an ambiguous word.
_MIN_WORDS = 4  # Of a sentence.
_MAX_ROWS_TRIED = 200  # For a bank without such words.
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")


class Example(NamedTuple):
    """A prompt to begin with.

    Attributes:
        before, word, after: The sentence; the word is read first.
    """

    before: str
    word: str
    after: str

    @property
    def text(self) -> str:
        """The sentence."""
        return f"{self.before}{self.word}{self.after}"

    @property
    def is_whole_word(self) -> bool:
        """Whether no letters stand next to the word."""
        return not (self.before[-1:].isalpha() or self.after[:1].isalpha())


def find_examples(index: ContextualIndex) -> list[Example]:
    """Two sentences with one ambiguous word, whose rows are far apart; for a bank without such a word, its first sentence.

    The words are those of the embedded labelled uses. The word is that whose rows differ most along one direction; the
    sentences are those of the rows at its two ends. Empty where the bank has no sentence.
    """
    token_ids = index.bank_rows.token_ids()
    best_share, best = 0.0, []
    for rows in _rows_of_ambiguous_words(index, token_ids):
        share, order = _spread(index, rows)
        if share > best_share and len(found := _at_both_ends(index, order)) == 2:
            best_share, best = share, found
    return best or _first_sentences(index)


def _rows_of_ambiguous_words(index: ContextualIndex, token_ids: Int[np.ndarray, " rows"]) -> list[Int[np.ndarray, " some"]]:
    """The rows of each token that is a whole ambiguous word, where there are several."""
    words = {str(word).lower() for word in load_senses("demo")["word"]}
    distinct, counts = np.unique(token_ids, return_counts=True)
    bank = index.banks[0]
    frequent = distinct[counts >= _MIN_ROWS].tolist()
    ambiguous = [token_id for token_id in frequent if bank.token_string(token_id).strip().lower() in words]
    return [np.flatnonzero(token_ids == token_id) for token_id in ambiguous]


def _spread(index: ContextualIndex, rows: Int[np.ndarray, " some"]) -> tuple[float, Int[np.ndarray, " some"]]:
    """How much of the variance of rows one direction has, and the rows in their order along it, at the middle hook name."""
    hook_name = index.hook_names[len(index.hook_names) // 2]
    vectors: Float[np.ndarray, "some d"] = index.bank_rows.activations(hook_name, rows)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    left, sizes, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    return float(sizes[0] ** 2 / max(1e-12, (sizes**2).sum())), rows[np.argsort(left[:, 0])]


def _at_both_ends(index: ContextualIndex, rows: Int[np.ndarray, " some"]) -> list[Example]:
    """The first row from each end whose sentence can be shown."""
    half = len(rows) // 2
    ends = (rows[:half].tolist(), rows[half:][::-1].tolist())
    found = [_first_shown(index, end, whole_word=True) for end in ends]
    return [example for example in found if example is not None]


def _first_sentences(index: ContextualIndex) -> list[Example]:
    """The sentence of the first text that has one."""
    rows = np.linspace(0, index.n_rows - 1, min(index.n_rows, _MAX_ROWS_TRIED)).astype(int).tolist()
    example = _first_shown(index, rows, whole_word=False)
    return [] if example is None else [example]


def _first_shown(index: ContextualIndex, rows: Sequence[int], *, whole_word: bool) -> Example | None:
    found = (_sentence(index.bank_rows.row(row)) for row in rows)
    return next((example for example in found if example and (example.is_whole_word or not whole_word)), None)


def _sentence(row: Row) -> Example | None:
    """The whole sentence around a row; None where it is short, cut, or has what is no text."""
    context = row.window(_WIDTH)
    before = _SENTENCE_END.split(context.before)[-1].lstrip()
    after = _SENTENCE_END.split(context.after)[0].rstrip()
    example = Example(before, context.token.strip(), after)
    is_shown = len(example.text.split()) >= _MIN_WORDS or not example.text.isascii()
    return example if is_shown and example.word and not {"…", "\ufffd"} & set(example.text) else None
