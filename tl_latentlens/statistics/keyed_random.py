"""Random numbers that hang on a key alone: what else is drawn, and in which order, does not change them."""

import numpy as np
from jaxtyping import Float, Int, UInt64

_STEP = np.uint64(0x9E3779B97F4A7C15)
_SHIFTS_AND_FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def keyed_uniform(seed: int | tuple[int, ...], keys: Int[np.ndarray, " keys"], n: int) -> Float[np.ndarray, "keys n"]:
    """`n` numbers in [0, 1) for each key, the same for a seed and a key wherever the key stands.

    Each is the hash of its key and its place by SplitMix64 (Steele, Lea and Flood, 2014), computed for all keys at once.

    Args:
        seed: One or several numbers, 0 or more.
        keys: Whole numbers, 0 or more.
        n: Numbers of each key.
    """
    start = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    of_keys = _mix(start + _STEP * np.asarray(keys).astype(np.uint64))
    bits = _mix(of_keys[:, None] + _STEP * np.arange(1, n + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)) * 2.0**-53


def keyed_hash(
    keys: Int[np.ndarray, " n"] | UInt64[np.ndarray, " n"], places: Int[np.ndarray, " n"], seed: int = 0
) -> UInt64[np.ndarray, " n"]:
    """A hash of each pair of a key and a place, the same wherever the pair stands; by SplitMix64.

    Args:
        keys: Whole numbers, 0 or more.
        places: Whole numbers, 0 or more.
        seed: Another seed gives other hashes.
    """
    of_keys = _mix(np.asarray(keys).astype(np.uint64) + np.uint64(int(_STEP) * (seed + 1) % 2**64))
    return _mix(of_keys + _STEP * (np.asarray(places).astype(np.uint64) + np.uint64(1)))


def _mix(numbers: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """The finalizer of SplitMix64; products wrap around."""
    for shift, factor in _SHIFTS_AND_FACTORS:
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(31))
