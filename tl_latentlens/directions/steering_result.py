"""Readings of steered runs: neighbors under each multiple of a vector, and how far the stream has turned."""

import html
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Float
from rich.console import Group

from tl_latentlens.lens.result import LensResult


@dataclass(frozen=True)
class SteeringResult:
    """What was read under each multiple of a steering vector.

    Attributes:
        hook_name: Where the vector was added.
        relative_length: Length of the vector (at multiple 1) as a share of the median length of the bank's rows at `hook_name`;
            None where the index does not hold it.
        readings: Multiple → what the lens hooks read.
        cosines: Multiple → hook name → cosine in [-1, 1] of each decoded token's activation with the unsteered one, in reading
            order; NaN where the tokens up to there are not the same. Empty where multiple 0 was not run.
    """

    hook_name: str
    relative_length: float | None
    readings: dict[float, LensResult] = field(repr=False)
    cosines: dict[float, dict[str, Float[np.ndarray, " cells"]]] = field(repr=False)

    def __str__(self) -> str:
        from tl_latentlens.views.terminal import as_plain

        return as_plain(self.table(width=80), 80)

    def _repr_html_(self) -> str:
        return f"<pre style='line-height: 1.2'>{html.escape(str(self))}</pre>"

    def table(self, pos: int | None = None, batch: int | None = None, *, width: int | None = None) -> Group:
        """Tables for the terminal (`rich.print`): a line a layer, the multiples side by side.

        Args:
            pos: Which token; negative ones count from the end. None: the last that was decoded.
            batch: Which text; None: each.
            width: In characters; None: the terminal's.

        Raises:
            InvalidInputError: The position was not decoded.
        """
        from tl_latentlens.views.steering import steering_table

        return steering_table(self, pos, batch, width)

    def to_dataframe(self) -> pd.DataFrame:
        """The lines of `LensResult.to_dataframe` with `multiple` in front, and `cos_to_unsteered` (of the cell) behind."""
        frames = []
        for multiple, reading in self.readings.items():
            frame = reading.to_dataframe()
            frame.insert(0, "multiple", multiple)
            places = zip(frame["hook_name"], frame["batch"], frame["pos"], strict=True)
            cosines = self.cosines_at(multiple)
            frame["cos_to_unsteered"] = [cosines.get(place, np.nan) for place in places]
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def cosines_at(self, multiple: float) -> dict[tuple[str, int, int], float]:
        """(hook name, batch, pos) → cosine with the unsteered activation."""
        places = self.readings[multiple].positions.tolist()
        found = self.cosines.get(multiple, {})
        return {(name, *place): cos for name in found for place, cos in zip(places, found[name].tolist(), strict=True)}
