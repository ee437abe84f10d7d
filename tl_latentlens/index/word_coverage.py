"""How many rows of a plan each wanted word would get, before any model is run."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from tl_latentlens.corpus.plan import Plan
from tl_latentlens.corpus.words import letters_of
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.word_table import MIN_LETTERS, TokenWords, stems_of


class _Texts:
    """The text of tokens, from their bytes."""

    def __init__(self, token_bytes: Mapping[int, bytes], special_ids: Iterable[int]) -> None:
        self._bytes, self._special_ids = token_bytes, set(special_ids)

    def token_string(self, token_id: int) -> str:
        """The text of one token."""
        return self._bytes[token_id].decode("utf-8", "replace")

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens in sequence, special tokens left out."""
        return b"".join(self._bytes[i] for i in token_ids if i not in self._special_ids).decode("utf-8", "replace")


def word_coverage(
    plan: Plan,
    words: Sequence[str],
    token_bytes: Mapping[int, bytes],
    special_ids: Iterable[int],
    language: str | None,
) -> pd.DataFrame:
    """The rows that end each wanted word, one line a word, in the order given.

    Columns: word; rows (of the word itself, in any case); inflection_rows (of the word and its inflections); prompts (with a
    row of either); inflections (the other forms that the corpus has, the most frequent first).

    Args:
        plan: The rows.
        words: Whole words of three letters or more, each once.
        token_bytes: Token id → the bytes of its text, for every id of the plan.
        special_ids: Tokens that are no text.
        language: Of the stemmer, as Snowball names it; None: a word has no inflections.

    Raises:
        InvalidInputError: No word, one that is not a whole word, or a language without a stemmer.
    """
    words = list(dict.fromkeys(_plain(word) for word in words))
    if not words:
        raise InvalidInputError("got no wanted word; expected one at least, one a line of the file")
    ids: dict[str, int] = {}
    word_ids = TokenWords(plan, _Texts(token_bytes, special_ids), special_ids).word_ids(plan.row_tokens, ids)
    found = list(ids)
    stems: dict[str, int] = {}
    stem_of_word = np.array([stems.setdefault(s, len(stems)) for s in stems_of([letters_of(w) for w in found], language)], int)
    n_rows = np.bincount(word_ids[word_ids >= 0], minlength=len(found))
    order = np.lexsort((-n_rows, stem_of_word))  # the words of each stem, the most frequent first
    first_of_stem = np.searchsorted(stem_of_word[order], np.arange(len(stems) + 1))
    row_stems = stem_of_word[word_ids[word_ids >= 0]]
    rows_of_stem = np.bincount(row_stems, minlength=len(stems))
    pairs = np.unique(row_stems * plan.n_prompts + plan.row_prompts[word_ids >= 0])
    prompts_of_stem = np.bincount(pairs // plan.n_prompts, minlength=len(stems))
    lines = []
    for word, stem in zip(words, stems_of([letters_of(word) for word in words], language), strict=True):
        own, number = int(n_rows[ids[word]]) if word in ids else 0, stems.get(stem)
        if number is None:
            lines.append((word, 0, 0, 0, ""))
            continue
        forms = [found[i] for i in order[slice(*first_of_stem[number : number + 2])].tolist()]
        others = ", ".join(form for form in forms if form != word)
        lines.append((word, own, int(rows_of_stem[number]), int(prompts_of_stem[number]), others))
    return pd.DataFrame(lines, columns=["word", "rows", "inflection_rows", "prompts", "inflections"])


def _plain(word: str) -> str:
    """A word as the rows have it, in lower case.

    Raises:
        InvalidInputError: It is none that rows have.
    """
    plain = word.strip().lower() if isinstance(word, str) else ""
    if len(letters_of(plain)) < MIN_LETTERS or len(plain.split()) != 1 or any(sign.isdigit() for sign in plain):
        raise InvalidInputError(
            f"got the wanted word {word!r}; expected one word of three letters or more, without spaces and digits, on each line"
        )
    return plain
