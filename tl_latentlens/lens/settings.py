"""The settings of a lens hook, checked when they are made."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.contextual import require_top_k


@dataclass(frozen=True, eq=False)
class LensSettings:
    """The settings of a lens hook: what it reads, and where; see `latentlens_hooks`.

    Attributes:
        top_k: Neighbors, and tokens of the other lenses, for each token.
        logit_lens: Whether the model's own unembedding is read too.
        embedding_lens: Whether the nearest input embeddings are read too.
        positions: The positions to decode: numbers, a slice, a mask [batch, pos], or "image"; None: all but BOS and padding.
        words: Nearest other words of each token, and the words around its nearest uses; 0: none.
        distinct: Whether each row is listed once.
        calibrate: "known": the bank is asked how well it knows each token; True: neighbors come with their chance too; False:
            neither.

    Raises:
        InvalidInputError: top_k below 1, words below 0, another `calibrate`, or another string than "image" for positions.
    """

    top_k: int = 5
    logit_lens: bool = True
    embedding_lens: bool = False
    positions: int | Sequence[int] | slice | str | Bool[Tensor, "batch pos"] | None = None
    calibrate: bool | str = "known"
    words: int = 8
    distinct: bool = True

    def __post_init__(self) -> None:
        """Check the settings, and make a list of a single position."""
        require_top_k(self.top_k)
        if not isinstance(self.words, int | np.integer) or self.words < 0:
            raise InvalidInputError(f"got words={self.words!r}; expected how many words, 0 for none")
        if self.calibrate not in (True, False, "known"):
            raise InvalidInputError(f"got calibrate={self.calibrate!r}; expected 'known', True or False")
        if isinstance(self.positions, str) and self.positions != "image":
            raise InvalidInputError(
                f"got positions={self.positions!r}; expected 'image', numbers, a slice, or a mask [batch, pos]"
            )
        if isinstance(self.positions, int | np.integer):
            object.__setattr__(self, "positions", [int(self.positions)])
