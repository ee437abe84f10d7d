"""The other words of one token over all layers, in a line for each run of layers that read alike: plain data."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tl_latentlens.views.data import TokenHeading
from tl_latentlens.views.lens_names import NO_WORD
from tl_latentlens.views.text import layer_headings

STRIP_WORDS = 4
_WORDS_OF_SUMMARY = 2

STRIP_NOTE = "nearest other words; layers that share at least half of them stand in one line"


@dataclass(frozen=True)
class StripLine:
    """Neighboring hook names that read alike.

    Attributes:
        first: The place of the first of them.
        last: The place of the last.
        words: The words that most of them read, those of the best ranks first; empty where they read none.
    """

    first: int
    last: int
    words: list[str]


@dataclass(frozen=True)
class Strip:
    """The other words of one token over all layers.

    Attributes:
        heading: The token.
        word: The word that it belongs to.
        hook_names: All hook names, in forward order.
        lines: Each once, in a line.
        is_unknown: Of each hook name whether the bank does not know the token there.
    """

    heading: TokenHeading
    word: str
    hook_names: Sequence[str]
    lines: list[StripLine]
    is_unknown: Sequence[bool]

    def label(self, line: StripLine) -> str:
        """The hook names of a line: "6–12"."""
        headings, _ = layer_headings(self.hook_names)
        return headings[line.first] if line.first == line.last else f"{headings[line.first]}–{headings[line.last]}"

    def is_faint(self, line: StripLine) -> bool:
        """True where the bank knows the token at none of a line's hook names."""
        return all(self.is_unknown[line.first : line.last + 1])

    def summary(self) -> str:
        """The whole strip in one line: "bank: account, loan → store, shop"."""
        shown = [", ".join(line.words[:_WORDS_OF_SUMMARY]) for line in self.lines if line.words]
        return f"{self.word}: {' → '.join(shown) or NO_WORD}"


def strip_lines(word_lists: Sequence[Sequence[str]], n_words: int = STRIP_WORDS) -> list[StripLine]:
    """Hook names in lines: one goes on where a hook name reads at least half of the words of the line's first.

    Args:
        word_lists: The other words at each hook name, in forward order, nearest first.
        n_words: How many words of each count, and are shown.
    """
    starts: list[int] = []
    for i, words in enumerate(word_lists):
        first = word_lists[starts[-1]][:n_words] if starts else []
        shared = set(first) & set(words[:n_words])
        goes_on = starts and (2 * len(shared) >= max(len(first), len(words[:n_words])))
        if not goes_on:
            starts.append(i)
    ends = [*starts[1:], len(word_lists)] if starts else []
    return [StripLine(start, end - 1, _common(word_lists[start:end], n_words)) for start, end in zip(starts, ends, strict=True)]


def _common(word_lists: Sequence[Sequence[str]], n_words: int) -> list[str]:
    """The words that most lists hold among their first; of those in as many, the one with the better ranks is first."""
    counts, ranks = Counter[str](), Counter[str]()
    for words in word_lists:
        for rank, word in enumerate(words[:n_words]):
            counts[word] += 1
            ranks[word] += rank
    return sorted(counts, key=lambda word: (-counts[word], ranks[word] / counts[word]))[:n_words]
