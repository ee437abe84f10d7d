"""The texts around rows as tokens, each with a feature's activation, for other programs and for language models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from tl_latentlens.bank.token_bytes import TokenBytes
from tl_latentlens.directions.features.activations_around import activations_around
from tl_latentlens.directions.features.token_places import TokenPlaces, concatenated_ranges, token_places
from tl_latentlens.index.search_result import SearchedIndex

_UNREADABLE = "\N{REPLACEMENT CHARACTER}"
_CONTINUES = 0  # The string number of a token whose text stands at the token before it.


@dataclass(frozen=True)
class TokenContext:
    """The tokens around a row.

    Attributes:
        tokens: Their texts as they stand in the prompt, none of them empty. Tokens that are parts of one character are one.
        activations: The feature's activation on each; NaN where it is not known, and on special tokens, such as BOS.
        at: The place of the row among them.
        column: The row's place in its line of rows.
    """

    tokens: list[str]
    activations: Float[np.ndarray, " tokens"]
    at: int
    column: int


class ContextTexts:
    """The tokens around the rows of some features, and the features' activations on them."""

    def __init__(
        self,
        sae: Any,
        index: SearchedIndex,
        hook_name: str,
        features: Sequence[int],
        rows: Int[np.ndarray, "f n"],
        *,
        before: int,
        after: int,
        model: Any = None,
        progress: bool = True,
    ) -> None:
        """Read the tokens and their activations, as `activations_around` does.

        Args:
            sae: What `label_features` takes, with an encoder.
            index: The rows.
            hook_name: The activation that the SAE reads.
            features: The feature of each line of `rows`.
            rows: Rows of the index; -1: none.
            before: Tokens before each row.
            after: Tokens after each row.
            model: The bank's model, which runs the prompts again; without it only rows of the bank have a known activation.
            progress: Show a progress bar.
        """
        self._all_tokens, self._rows, self._before = token_places(index), rows, before
        self._activations = activations_around(
            sae,
            self._all_tokens,
            hook_name,
            features,
            rows,
            before=before,
            after=after,
            model=model,
            progress=progress,
        )
        self._first, self._end = self._all_tokens.windows(np.maximum(rows, 0), before, after)
        is_row = rows >= 0
        self._places = np.unique(concatenated_ranges(self._first[is_row], self._end[is_row]))
        self._string_ids, self._strings = _strings_at(self._all_tokens, self._places)
        self._is_special = _is_special(self._all_tokens, self._places)

    def of(self, line: int) -> list[TokenContext]:
        """The contexts of the rows of a line, in their order; rows that are parts of one character have one."""
        contexts: dict[Any, TokenContext] = {}
        for column in np.flatnonzero(self._rows[line] >= 0).tolist():
            context = self._context(line, column)
            contexts.setdefault((context.at, *context.tokens), context)
        return list(contexts.values())

    def _context(self, line: int, column: int) -> TokenContext:
        first, end = int(self._first[line, column]), int(self._end[line, column])
        row_place = int(self._all_tokens.row_places[self._rows[line, column]])
        window = slice(first - row_place + self._before, end - row_place + self._before)
        start = int(np.searchsorted(self._places, first))
        tokens_of_window = slice(start, start + end - first)
        activations = np.where(self._is_special[tokens_of_window], np.nan, self._activations[line, column, window])
        string_ids = self._string_ids[tokens_of_window]
        begins = string_ids != _CONTINUES
        begins[0] = True
        heads = np.flatnonzero(begins)
        tokens = [self._strings[i] or _UNREADABLE for i in string_ids[heads].tolist()]
        at = int(np.searchsorted(heads, row_place - first, "right")) - 1
        return TokenContext(tokens, np.fmax.reduceat(activations, heads), at, column)


def _strings_at(all_tokens: TokenPlaces, places: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n"], list[str]]:
    """The string number of the token at each ascending place, and the strings; number 0 is that of `_CONTINUES`."""
    number_of: dict[str, int] = {"": _CONTINUES}
    parts = [np.zeros(0, np.int64)]
    for bank, bank_start, bank_places in all_tokens.by_bank(places):
        bytes_of = TokenBytes(bank.file)
        token_ids, inverse = np.unique(bank.plan.tokens[bank_places - bank_start], return_inverse=True)
        texts = [bytes_of[i] for i in token_ids.tolist()]
        whole = [_decoded(text) for text in texts]
        numbers = np.array([number_of.setdefault(text or _UNREADABLE, len(number_of)) for text in whole], np.int64)[inverse]
        is_part = np.array([text is None for text in whole], bool)[inverse]
        for run in _runs(is_part, bank_places, all_tokens.prompt_starts):
            joined = _characters([texts[i] for i in inverse[run].tolist()])
            numbers[run] = [number_of.setdefault(text, len(number_of)) for text in joined]
        parts.append(numbers)
    return np.concatenate(parts), list(number_of)


def _is_special(all_tokens: TokenPlaces, places: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """True at the places of special tokens, such as BOS."""
    parts = [
        np.isin(bank.plan.tokens[bank_places - bank_start], bank.file.metadata.special_ids)
        for bank, bank_start, bank_places in all_tokens.by_bank(places)
    ]
    return np.concatenate([np.zeros(0, bool), *parts])


def _runs(is_part: np.ndarray, places: np.ndarray, prompt_starts: np.ndarray) -> list[slice]:
    """Each run of parts of characters at places that follow each other in one prompt."""
    at = np.flatnonzero(is_part)
    if not len(at):
        return []
    begins = np.flatnonzero((np.diff(places[at], prepend=-2) > 1) | np.isin(places[at], prompt_starts))
    return [slice(run[0], run[-1] + 1) for run in np.split(at, begins[1:])]


def _characters(parts: list[bytes]) -> list[str]:
    """The text of each part: whole characters at the part that begins them, nothing at the parts that go on."""
    texts, start, pending = [""] * len(parts), 0, b""
    for place, part in enumerate(parts):
        pending += part
        if (text := _decoded(pending)) is not None:
            texts[start], start, pending = text, place + 1, b""
    if pending:
        texts[start] = _decoded(pending, errors="replace") or _UNREADABLE
    return texts


def _decoded(text: bytes, errors: str = "strict") -> str | None:
    """The text of bytes, with a sign for NUL, which databases do not take; None where they are no whole characters."""
    try:
        return text.decode("utf-8", errors).replace("\0", "␀")
    except UnicodeDecodeError:
        return None
