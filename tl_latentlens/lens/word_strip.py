"""The other words of one token over all layers: where its meaning emerges."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Group

from tl_latentlens.corpus.words import find_position
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.search_result import SearchResult
from tl_latentlens.index.word_search import WordSearchResult
from tl_latentlens.views.data import TokenHeading
from tl_latentlens.views.known import is_unknown
from tl_latentlens.views.notebook import strip_html
from tl_latentlens.views.strip import Strip, strip_lines
from tl_latentlens.views.terminal.layout import plain_text
from tl_latentlens.views.terminal.strip import strip_table


@dataclass(frozen=True)
class WordStrip:
    """The nearest other words of one token over all hook names, in a line for each run of layers that read alike.

    Attributes:
        batch: The text in which the token stands.
        pos: Its position there.
        word: The word that it belongs to.
        words: Hook name → its nearest other words there, nearest first.
        known: Hook name → how well the bank knows it there, in (0, 1]; None where it was not computed.
        strip: The lines.
    """

    batch: int
    pos: int
    word: str
    words: dict[str, list[str]]
    known: dict[str, float | None]
    strip: Strip = field(repr=False)

    def __str__(self) -> str:
        return plain_text(self.to_rich())

    def _repr_html_(self) -> str:
        return strip_html(self.strip)

    def to_rich(self, *, width: int | None = None) -> Group:
        """A table for the terminal (`rich.print`): a line for each run of layers that read alike.

        Args:
            width: In characters; None: the terminal's.
        """
        return strip_table(self.strip, width)

    def to_dataframe(self) -> pd.DataFrame:
        """One line for each hook name: batch, pos, word, hook_name, line (from 1), words, and known where it was computed."""
        lines: list[dict[str, Any]] = []
        for number, line in enumerate(self.strip.lines, 1):
            for hook_name in self.strip.hook_names[line.first : line.last + 1]:
                place = {"batch": self.batch, "pos": self.pos, "word": self.word, "hook_name": hook_name}
                known = {} if self.known[hook_name] is None else {"known": self.known[hook_name]}
                lines.append({**place, "line": number, "words": ", ".join(self.words[hook_name]), **known})
        return pd.DataFrame(lines)


def position_of(position_or_word: int | str, texts: Sequence[Sequence[str]], batch: int) -> int:
    """A position as it is; of a word, the position of the token that ends its last occurrence.

    Args:
        position_or_word: A position, or a word in any case.
        texts: The tokens of each text, empty where they are no text; no lists where they are not known.
        batch: Which text.

    Raises:
        InvalidInputError: There is no such text, or it has no such word, or its tokens are not known.
    """
    if not isinstance(position_or_word, str):
        return position_or_word
    if not texts:
        raise InvalidInputError(f"got the word {position_or_word!r} of a run whose tokens are not known; give a position")
    if not 0 <= batch < len(texts):
        raise InvalidInputError(f"got batch {batch}; the run had {len(texts)} texts, from 0 on")
    return find_position(position_or_word, texts[batch], np.array([not token for token in texts[batch]]))


def word_strip(
    found: Mapping[str, SearchResult],
    words: Mapping[str, WordSearchResult],
    cell: int,
    place: tuple[int, int],
    heading: TokenHeading,
    word: str | None,
    n_words: int,
) -> WordStrip:
    """The strip of one token.

    Args:
        found: Hook name → neighbors, in forward order.
        words: Hook name → nearest other words.
        cell: The token, counted as in both.
        place: Its text and position.
        heading: The token in its text.
        word: What it is called; None: the word in that text.
        n_words: How many words count, and are shown.

    Raises:
        InvalidInputError: Other words were not read, or fewer than one is asked for.
    """
    if not words:
        raise InvalidInputError("this result has no other words; read them: latentlens_hooks(index, words=8)")
    if n_words < 1:
        raise InvalidInputError(f"got n_words={n_words}; expected 1 or more")
    lists = {name: words[name].texts_of(cell) if name in words else [] for name in found}
    known = {name: search.known_of(cell) for name, search in found.items()}
    name = word if word is not None else heading.label if heading.context is None else heading.context.word
    lines = strip_lines(list(lists.values()), n_words)
    strip = Strip(heading, name.strip(), tuple(found), lines, [bool(is_unknown(share)) for share in known.values()])
    return WordStrip(*place, name.strip(), lists, known, strip)
