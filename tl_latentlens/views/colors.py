"""Colors that several views use, and the range of a color scale. The colors of the lenses are in `lens_names`."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

LINE_COLORS = ("#3366cc", "#dc3912", "#ff9900", "#109618", "#990099", "#0099c6")
BASELINE_GRAYS = ("#222222", "#666666", "#999999")
NOTEBOOK_HUE = "66 133 244"  # It can be read on light and dark notebooks.


def color_range(values: Sequence[Float[np.ndarray, "..."]], score_name: str) -> tuple[float, float]:
    """The ends of a color scale: probabilities and -log10 of chances start at 0, cosines at the least one shown."""
    flat = np.concatenate([np.ravel(array) for array in values])
    finite = flat[np.isfinite(flat)]
    if score_name == "probability" or not len(finite):
        return 0.0, 1.0
    low, high = (0.0 if score_name != "cosine" else float(finite.min())), float(finite.max())
    return low, high if high > low else low + 1e-3
