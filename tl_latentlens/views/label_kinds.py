"""What the kinds of labels of features are called: one set of words for the terminal, notebooks and pages."""

from tl_latentlens.views.text import visible

MIXED = "mixed"
FIRES = {"token": "fires on", "before": "fires after", "after": "fires before", "position": "fires at"}
"""Kind of a label that names something → what the feature does."""
N_WRITES = 3
"""Words that a line of a table shows of those that a feature writes."""
_COUNTED = {"token": "on a token", "before": "after one", "after": "before one", "position": "at a position"}


def counts_in_words(counts: dict[str, int]) -> str:
    """How many features fire on, after, before or at something; kinds that do not occur are left out.

    Args:
        counts: Kind → number of features.
    """
    parts = [f"{counts[kind]:,} {words}" for kind, words in _COUNTED.items() if counts.get(kind)]
    return ", ".join(parts).replace(" ", " fire ", 1)


def unbroken(label: str) -> str:
    """A label whose shares stay on one line with their percent signs where it is wrapped."""
    return label.replace(" %", "\N{NO-BREAK SPACE}%")


def part_name(text: str) -> str:
    """A text of a label as it is written: one without a letter in quotes."""
    return text if any(sign.isalpha() for sign in text) else f"«{visible(text)}»"
