"""What labels may say of rows: the token, its word, the tokens beside it, its position. As numbers, for all rows at once."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from tl_latentlens.bank.bank import Bank
from tl_latentlens.corpus.words import is_of_word, letters_of
from tl_latentlens.index.rows import BankRows
from tl_latentlens.index.word_table import stems_of, words_of_bank

WORD, TOKEN, BEFORE, AFTER, POSITION = "word", "token", "before", "after", "position"
START, END = "start of the text", "end of the text"
LANGUAGE = "english"


@dataclass(frozen=True, eq=False)
class NumberedTexts:
    """One text for each row.

    Attributes:
        ids: The place of each row's text in `texts`; -1: none.
        texts: The texts.
    """

    ids: Int[np.ndarray, " rows"]
    texts: list[str]


@dataclass(frozen=True, eq=False)
class RowTexts:
    """What labels may say of the rows of an index.

    Attributes:
        by_kind: "word": the stem of the whole word that the token is in; "token": the token, in small letters, without spaces
            around it; "before" and "after": the tokens beside it in its text, with … where their word goes on, or that the
            text ends there;
            "position": the number of the token in its text, from 1.
        forms: As a label writes them: "word": the whole words; "token": tokens with … where their word goes on.
    """

    by_kind: dict[str, NumberedTexts]
    forms: dict[str, NumberedTexts]


def row_texts(bank_rows: BankRows) -> RowTexts:
    """The texts of all rows."""
    word_ids: dict[str, int] = {}
    token_ids: dict[str, int] = {}
    columns: dict[str, list[np.ndarray]] = {WORD: [], TOKEN: [], BEFORE: [], AFTER: [], POSITION: []}
    for _, bank in bank_rows.by_plan:
        tokens, places = _BankTokens(bank), bank.plan.row_tokens
        columns[WORD].append(tokens.words.whole_word_ids(places, word_ids))
        columns[TOKEN].append(tokens.numbers(places, token_ids))
        before = tokens.numbers_beside(places, -1, token_ids)
        columns[BEFORE].append(np.where(before == token_ids[START], -1, before))  # That is position 1.
        columns[AFTER].append(tokens.numbers_beside(places, 1, token_ids))
        columns[POSITION].append(tokens.positions(places))
    ids = {kind: np.concatenate(parts) for kind, parts in columns.items()}
    words, texts = list(word_ids), list(token_ids)
    stem_numbers: dict[str, int] = {}
    stems = [stem_numbers.setdefault(stem, len(stem_numbers)) for stem in stems_of(list(map(letters_of, words)), LANGUAGE)]
    bare_numbers: dict[str, int] = {}
    bare = np.array([bare_numbers.setdefault(_without_dots(text), len(bare_numbers)) for text in texts], np.int64)
    positions = [str(position) for position in range(int(ids[POSITION].max(initial=0)) + 1)]
    by_kind = {
        WORD: NumberedTexts(np.append(np.array(stems, np.int64), -1)[ids[WORD]], list(stem_numbers)),
        TOKEN: NumberedTexts(bare[ids[TOKEN]], list(bare_numbers)),
        BEFORE: NumberedTexts(ids[BEFORE], texts),
        AFTER: NumberedTexts(ids[AFTER], texts),
        POSITION: NumberedTexts(ids[POSITION], positions),
    }
    return RowTexts(by_kind, {WORD: NumberedTexts(ids[WORD], words), TOKEN: NumberedTexts(ids[TOKEN], texts)})


def _without_dots(text: str) -> str:
    return text.strip("…") or text


class _BankTokens:
    """The tokens of a bank's texts, and how they are written in a label."""

    def __init__(self, bank: Bank) -> None:
        self.words = words_of_bank(bank)
        self._bank, self._plan = bank, bank.plan
        self._used, self._place = np.unique(bank.plan.tokens, return_inverse=True)
        self._special_ids = bank.file.metadata.special_ids
        is_special = np.isin(self._used, self._special_ids)[self._place]
        texts_before = np.append(0, np.cumsum(~is_special))  # Tokens of texts before each place.
        self._is_special, self._n_before = is_special, texts_before

    def numbers(self, places: Int[np.ndarray, " n"], ids: dict[str, int]) -> Int[np.ndarray, " n"]:
        """The number of each token's text in `ids`, which gets the new ones."""
        starts = self.words.starts_word
        codes = 4 * self._place[places] + 2 * starts[places] + np.append(starts, True)[places + 1]
        distinct, inverse = np.unique(codes, return_inverse=True)
        texts = [self._text(code >> 2, bool(code & 2), bool(code & 1)) for code in distinct.tolist()]
        numbers = [ids.setdefault(text, len(ids)) for text in texts]
        return np.array(numbers, np.int64)[inverse]

    def numbers_beside(self, places: Int[np.ndarray, " n"], step: int, ids: dict[str, int]) -> Int[np.ndarray, " n"]:
        """The same of the token a step away; where no token of the text is there, that the text starts or ends."""
        prompts = np.searchsorted(self._plan.prompt_starts, places, "right") - 1
        beside = places + step
        is_inside = (beside >= self._plan.prompt_starts[prompts]) & (beside < self._plan.prompt_starts[prompts + 1])
        beside = np.where(is_inside, beside, places)
        is_inside &= ~self._is_special[beside]
        outside = ids.setdefault(START if step < 0 else END, len(ids))
        return np.where(is_inside, self.numbers(beside, ids), outside)

    def positions(self, places: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The number of each token in its text, from 1; special tokens are not counted."""
        starts = self._plan.prompt_starts[np.searchsorted(self._plan.prompt_starts, places, "right") - 1]
        return self._n_before[places + 1] - self._n_before[starts]

    def _text(self, used: int, starts_word: bool, ends_word: bool) -> str:
        text = self._bank.token_string(int(self._used[used]))
        text = text.strip().lower() or text
        is_word = is_of_word(text[:1]), is_of_word(text[-1:])
        return "…" * (is_word[0] and not starts_word) + text + "…" * (is_word[1] and not ends_word)
