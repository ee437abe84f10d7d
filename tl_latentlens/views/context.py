"""A token in its text: marked, cut to a width, completed to a word. How tokens are written is left to `text`."""

import re
from dataclasses import dataclass

from tl_latentlens.views.text import display_width, printable, take_columns, visible

_LETTER = r"[^\W_\u0E00-\u0EFF\u1000-\u109F\u1780-\u17FF\u2E80-\U0010FFFF]"
_LETTERS_LAST = rf"(?<!{_LETTER}){_LETTER}{{1,12}}$"
_LETTERS_FIRST = rf"{_LETTER}{{1,12}}(?!{_LETTER})"


@dataclass(frozen=True)
class Context:
    """A token with the text to both sides of it.

    Attributes:
        before: The text before the token; the token's leading spaces stand here.
        token: The token as the tokenizer gives it.
        after: The text after the token.
    """

    before: str
    token: str
    after: str

    def __str__(self) -> str:
        return self.marked()

    def marked(self, marks: tuple[str, str] = ("«", "»")) -> str:
        """The text in one line, with the token between two marks."""
        token = (self.token.lstrip() or self.token).replace("\n", " ")
        return f"{self.before}{marks[0]}{token}{marks[1]}{self.after}"

    def clipped(self, width: int | None) -> "Context":
        """The same token with less text, at most `width` columns of a terminal (None: all of it), safe to show.

        More text is kept before the token than after it, because a causal model saw only what stands before. A wide character
        takes two columns. Control characters become signs, and spaces around the token are left out.
        """
        before, token, after = printable(self.before), visible(self.token.strip() or self.token), printable(self.after)
        if width is None:
            return Context(before, token, after)
        free = width - display_width(token)
        free_after = min(display_width(after), max(width // 4, free - display_width(before)))
        free_before = max(8, free - free_after)
        free_after = min(free_after, max(1, free - min(free_before, display_width(before))))
        if display_width(before) > free_before:
            before = "…" + take_columns(before[::-1], free_before - 1)[::-1].lstrip("…")
        if display_width(after) > free_after:
            after = take_columns(after, free_after - 1).rstrip("…") + "…"
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
