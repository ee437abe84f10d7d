"""What the columns of a table of readings show, in a line each."""

from collections.abc import Iterable

from tl_latentlens.views.jumps import JUMP_RATIO
from tl_latentlens.views.known import KNOWN_LEVEL

_KNOWN_LEVEL = f"{KNOWN_LEVEL:.2f}".lstrip("0")

COLUMN_LEGEND = {
    "layer": "where the token is read: the residual stream after this layer",
    "hook": "where the token is read",
    "p": f"high: the bank knows such a token; ≤ {_KNOWN_LEVEL} (dim): it does not",
    "other words": "nearest but its own (–: signs, first layers)",
    "words around": "words near its nearest uses and not near its other uses",
    "nearest uses": f"tokens of the bank; at 2: of layer 2; ┄ the next is {JUMP_RATIO:g}× as far",
    "logit lens": "what the model would say next, with its probability",
    "embedding lens": "the nearest input embeddings, with their cosine",
}
"""Column → what it shows."""


def legend_of(columns: Iterable[str]) -> dict[str, str]:
    """What some columns show; those that explain themselves are left out."""
    return {name: COLUMN_LEGEND[name] for name in columns if name in COLUMN_LEGEND}
