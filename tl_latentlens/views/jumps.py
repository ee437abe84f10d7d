"""Where a list of neighbors has a jump: those after it are much further than those before."""

import numpy as np
from jaxtyping import Bool, Float

JUMP_RATIO = 1.5  # The next neighbor is at least so many times as far, in 1 - cosine.
_MIN_GAP = 1e-3  # Rows stored in half precision are off by less.

JUMP_SENTENCE = f"the next use is at least {JUMP_RATIO:g} times as far (1 − cosine)"


def is_jump(similarities: Float[np.ndarray, "... k"]) -> Bool[np.ndarray, "... k"]:
    """True for each neighbor whose next one is at least 1.5 times as far (1 - cosine), and .001 further; False for the last.

    The ratio does not depend on a direction that all rows share, so that it means the same where all cosines are near 1.

    Args:
        similarities: Cosines of neighbors, nearest first.
    """
    far = 1 - np.asarray(similarities, np.float64)
    gaps = np.diff(far, axis=-1)
    jumps = (far[..., 1:] >= JUMP_RATIO * far[..., :-1]) & (gaps > _MIN_GAP)
    return np.concatenate([jumps, np.zeros_like(far[..., :1], bool)], -1)
