"""Colors that several views use, and the range of a color scale. The colors of the lenses are in `lens_names`."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

LINE_COLORS = ("#3366cc", "#dc3912", "#ff9900", "#109618", "#990099", "#0099c6")
BASELINE_GRAYS = ("#222222", "#666666", "#999999")
WORD_READER_COLORS = {"other words": "#0f766e", "around": "#7c3aed"}
NOTEBOOK_HUE = "66 133 244"  # It can be read on light and dark notebooks.


def color_range(values: Sequence[Float[np.ndarray, "..."]], score_name: str) -> tuple[float, float]:
    """The ends of a color scale: 0 and 1 for probabilities and `known`, the least and greatest cosine."""
    flat = np.concatenate([np.ravel(array) for array in values])
    finite = flat[np.isfinite(flat)]
    if score_name != "cosine" or not len(finite):
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return low, high if high > low else low + 1e-3
