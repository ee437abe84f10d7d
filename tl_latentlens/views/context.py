"""A token in its text: marked, cut to a width, completed to a word. How tokens are written is left to `text`."""

import re
from dataclasses import dataclass

from tl_latentlens.views.text import display_width, printable, take_columns, visible

_UNSPACED = r"\u0E00-\u0EFF\u1000-\u109F\u1780-\u17FF\u2E80-\U0010FFFF"  # scripts that put no spaces between words
_LETTER = rf"[^\W_{_UNSPACED}]"
_LETTERS_LAST = rf"(?<!{_LETTER}){_LETTER}{{1,12}}$"
_LETTERS_FIRST = rf"{_LETTER}{{1,12}}(?!{_LETTER})"
_MAX_PART = 30  # Longer runs of letters and signs, such as addresses, are cut anywhere.
_PART_LAST = rf"(?<=[\s{_UNSPACED}])[^\s{_UNSPACED}]{{1,{_MAX_PART}}}$"
_PART_FIRST = rf"^[^\s{_UNSPACED}]{{1,{_MAX_PART}}}(?=[\s{_UNSPACED}])"
_IN_WORD = rf"[^\s{_UNSPACED}]"


@dataclass(frozen=True)
class Context:
    """A token with the text to both sides of it.

    Attributes:
        before: The text before the token; the token's leading spaces stand here.
        token: The token as the tokenizer gives it.
        after: The text after the token; the token's trailing spaces stand here.
    """

    before: str
    token: str
    after: str

    @classmethod
    def around(cls, before: str, token: str, after: str) -> "Context":
        """A token in its text; the spaces at its ends stand to both sides of it."""
        bare = token.strip()
        start = token.find(bare) if bare else 0
        end = start + len(bare) if bare else len(token)
        return cls(before + token[:start], token, token[end:] + after)

    def __str__(self) -> str:
        return self.marked()

    def marked(self, marks: tuple[str, str] = ("«", "»")) -> str:
        """The text in one line, with the token between two marks."""
        token = (self.token.strip() or self.token).replace("\n", " ")
        return f"{self.before}{marks[0]}{token}{marks[1]}{self.after}"

    def clipped(self, width: int | None) -> "Context":
        """The same token with less text, at most `width` columns of a terminal (None: all of it), safe to show.

        More text is kept before the token than after it, because a causal model saw only what stands before. A wide character
        takes two columns. Control characters become signs, spaces around the token are left out, and no word is cut in two
        where a whole one stays.
        """
        before, token, after = printable(self.before), visible(self.token.strip() or self.token), printable(self.after)
        if width is None:
            return Context(before, token, after)
        free = width - display_width(token)
        free_after = min(display_width(after), max(width // 4, free - display_width(before)))
        free_before = max(8, free - free_after)
        free_after = min(free_after, max(1, free - min(free_before, display_width(before))))
        if display_width(before) > free_before:
            before = "…" + end_of_text(before, take_columns(before[::-1], free_before - 1)[::-1]).lstrip("…")
        if display_width(after) > free_after:
            after = start_of_text(after, take_columns(after, free_after - 1)).rstrip("…") + "…"
        return Context(before, token, after)

    @property
    def lead(self) -> str:
        """The letters before the token that belong to its word; empty where the token begins the word.

        At most twelve letters, of scripts that put spaces between words. In other scripts a word has no end to look for.
        """
        match = re.search(_LETTERS_LAST, self.before) if self.token[:1].isalnum() else None
        return match[0] if match else ""

    @property
    def tail(self) -> str:
        """The letters after the token that belong to its word; empty where the token ends the word."""
        match = re.match(_LETTERS_FIRST, self.after) if self.token[-1:].isalnum() else None
        return match[0] if match else ""

    @property
    def word(self) -> str:
        """The word that the token belongs to, in the case it was written in."""
        return self.lead + self.token.strip() + self.tail


def start_of_text(text: str, part: str) -> str:
    """A beginning of a text without the word that it cuts in two, where a whole one stays, and without spaces at the cut.

    Args:
        text: The text.
        part: Its beginning; its last character may be a space in place of half a wide character.
    """
    is_cut = re.match(_IN_WORD, part[-1:]) and re.match(_IN_WORD, text[len(part) : len(part) + 1])
    whole = (re.sub(_PART_LAST, "", part) if is_cut else part).rstrip()
    return whole if whole.strip("… ") else part


def end_of_text(text: str, part: str) -> str:
    """An end of a text without the word that it cuts in two, where a whole one stays, and without spaces at the cut."""
    rest = text[: len(text) - len(part)]
    is_cut = re.match(_IN_WORD, part[:1]) and re.match(_IN_WORD, rest[-1:]) and not rest.endswith("…")
    whole = (re.sub(_PART_FIRST, "", part) if is_cut else part).lstrip()
    return whole if whole.strip("… ") else part
