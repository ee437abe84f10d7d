"""The texts around rows as one stream of string numbers, each token once, as the page of features holds them."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from tl_latentlens.directions.features.token_places import TokenPlaces, concatenated_ranges
from tl_latentlens.views.features import TEXT_CUT, TEXT_END, TEXT_JOINED
from tl_latentlens.views.text import printable


@dataclass(frozen=True, eq=False)
class TokenStream:
    """The texts around some rows.

    Attributes:
        tokens: A string number for each token; between texts stands `TEXT_CUT` or `TEXT_END`.
        string_ids: String → its number.
        row_places: Where in `tokens` each row stands; 0 for a row of -1.
    """

    tokens: Int[np.ndarray, " tokens"]
    string_ids: dict[str, int]
    row_places: Int[np.ndarray, " rows"]


def token_stream(all_tokens: TokenPlaces, rows: Int[np.ndarray, " rows"], n_before: int, n_after: int) -> TokenStream:
    """The texts around rows; windows that meet become one.

    Args:
        all_tokens: The tokens of the index.
        rows: Rows of the index; -1: none.
        n_before: Tokens before a row.
        n_after: Tokens after it.
    """
    begin, end = all_tokens.windows(np.unique(rows[rows >= 0]), n_before, n_after)
    reached = np.maximum.accumulate(end)
    first = np.flatnonzero(np.concatenate([[True], begin[1:] >= reached[:-1]])[: len(begin)])
    begin, end = begin[first], np.maximum.reduceat(end, first) if len(first) else end
    sizes = end - begin + 2
    starts = sizes.cumsum() - sizes
    tokens = np.empty(int(sizes.sum()), np.int64)
    string_ids = {"…": TEXT_CUT, "\0": TEXT_END, "": TEXT_JOINED}
    tokens[starts] = np.where(np.isin(begin, all_tokens.prompt_starts), TEXT_END, TEXT_CUT)
    tokens[starts + sizes - 1] = np.where(np.isin(end, all_tokens.prompt_starts), TEXT_END, TEXT_CUT)
    tokens[concatenated_ranges(starts + 1, starts + sizes - 1)] = _strings_at(
        all_tokens, concatenated_ranges(begin, end), string_ids
    )
    places = all_tokens.row_places[rows]
    segments = np.searchsorted(begin, places, "right") - 1
    row_places = places - begin[segments] + starts[segments] + 1 if len(begin) else places
    return TokenStream(tokens, string_ids, np.where(rows >= 0, row_places, 0))


def _strings_at(all_tokens: TokenPlaces, places: Int[np.ndarray, " n"], string_ids: dict[str, int]) -> Int[np.ndarray, " n"]:
    """The string number of the token at each ascending place; new strings are added to `string_ids`.

    Tokens that are parts of characters are joined: the first has their text, the others are `TEXT_JOINED`.
    """
    parts = [np.zeros(0, np.int64)]
    for bank, bank_start, bank_places in all_tokens.by_bank(places):
        token_ids, inverse = np.unique(bank.plan.tokens[bank_places - bank_start], return_inverse=True)
        token_bytes = [bank.token_bytes(i) for i in token_ids.tolist()]
        strings = np.array([_string_id(text, string_ids) for text in token_bytes], np.int64)[inverse]
        is_part = np.array([_is_part_of_character(text) for text in token_bytes], bool)[inverse]
        for first, last in _runs(is_part, bank_places, all_tokens.prompt_starts):
            joined = b"".join(token_bytes[i] for i in inverse[first:last].tolist())
            strings[first], strings[first + 1 : last] = _string_id(joined, string_ids), TEXT_JOINED
        parts.append(strings)
    return np.concatenate(parts)


def _string_id(text: bytes, string_ids: dict[str, int]) -> int:
    string = printable(text.decode("utf-8", errors="replace"))
    return string_ids.setdefault(string, len(string_ids)) if text else TEXT_END


def _is_part_of_character(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


def _runs(
    is_part: Bool[np.ndarray, " n"], places: Int[np.ndarray, " n"], prompt_starts: Int[np.ndarray, " prompts"]
) -> list[tuple[int, int]]:
    """First and end of each run of True at places that follow each other in one prompt."""
    if not is_part.any():
        return []
    true_at = np.flatnonzero(is_part)
    begins_run = np.flatnonzero((np.diff(places[true_at], prepend=-2) > 1) | np.isin(places[true_at], prompt_starts))
    ends = true_at[np.append(begins_run[1:], len(true_at)) - 1] + 1
    return list(zip(true_at[begins_run].tolist(), ends.tolist(), strict=True))
