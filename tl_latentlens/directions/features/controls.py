"""Rows and features drawn at random that the scores of labels are compared with."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from tl_latentlens.directions.features.selection import FeatureSelection
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.statistics.keyed_random import keyed_uniform

_N_SHUFFLED = 1000
_FEATURES_PER_SHUFFLED = 10
CONTROLS_PER_NEIGHBOR = 5


@dataclass(frozen=True, eq=False)
class ShuffledDecoders:
    """Features, each with the neighbors of another feature's direction.

    Attributes:
        feature_ids: The features, drawn with replacement.
        other_ids: The other features.
        neighbors: Rows nearest to the other feature's direction.
    """

    feature_ids: Int[np.ndarray, " n"]
    other_ids: Int[np.ndarray, " n"]
    neighbors: Int[np.ndarray, "n k"]


@dataclass(frozen=True, eq=False)
class ControlRows:
    """Rows to compare neighbors with, `CONTROLS_PER_NEIGHBOR` for each.

    Attributes:
        same_token: Other rows of the neighbor's token; any rows, where the token has no other.
        any_token: Rows of any token.
    """

    same_token: Int[np.ndarray, "f controls"]
    any_token: Int[np.ndarray, "f controls"]


def draw_shuffled_decoders(
    selection: FeatureSelection, index: ContextualIndex, top_k: int, rng: np.random.Generator, n: int = _N_SHUFFLED
) -> ShuffledDecoders:
    """Random features of the SAE, each with the neighbors of another one. Which features are selected does not matter."""
    features = selection.all_ids
    own = rng.choice(features, n)
    steps = rng.integers(1, max(2, len(features)), n)
    other = features[(np.searchsorted(features, own) + steps) % len(features)]
    neighbors = index.search(selection.decoder[other], top_k, selection.searched_hook).rows.cpu().numpy()
    return ShuffledDecoders(own, other, neighbors)


def draw_other_features(
    selection: FeatureSelection, shuffled: ShuffledDecoders, counts: Int[np.ndarray, " d_sae"], rng: np.random.Generator
) -> Int[np.ndarray, "n features"]:
    """Ten features for each line of neighbors, none of them the feature that the neighbors belong to; of each density as many.

    Densities are counted in octaves: features that are active on no row of a sample, on 1 or 2, on 3 to 6, on 7 to 14, ...

    Args:
        selection: The features.
        shuffled: The lines of neighbors.
        counts: On how many rows of a sample each feature of the SAE is active.
        rng: The random numbers.
    """
    octaves = np.log2(counts[selection.all_ids] + 1).astype(int)
    by_octave = selection.all_ids[np.argsort(octaves, kind="stable")]
    sizes = np.bincount(octaves)
    sizes = sizes[sizes > 0]
    of_pairs = rng.integers(0, len(sizes), (len(shuffled.other_ids), _FEATURES_PER_SHUFFLED))
    first, size = (sizes.cumsum() - sizes)[of_pairs], sizes[of_pairs]
    place = rng.integers(0, size)
    # The next of the octave, where the drawn one is that of the neighbors; the next of all, where the octave has no other.
    is_own = by_octave[first + place] == shuffled.other_ids[:, None]
    place = np.where(is_own, (place + 1) % size, place)
    return by_octave[(first + place + (is_own & (size == 1))) % len(by_octave)]


def draw_control_rows(
    index: ContextualIndex, hook_name: str, rows: Int[np.ndarray, "f k"], keys: Int[np.ndarray, " f"], seed: int
) -> ControlRows:
    """Random rows for each row: some of its token, and some of any token.

    Args:
        index: The rows.
        hook_name: The hook name that the controls are drawn from.
        rows: The rows that they are compared with.
        keys: A number for each line of `rows`. What is drawn for it hangs on that number and the seed, not on other lines.
        seed: The seed.
    """
    hook_rows = index.bank_rows.row_ids(hook_name)
    token_ids = index.bank_rows.token_ids()
    rows_by_token = hook_rows[np.argsort(token_ids[hook_rows], kind="stable")]
    sorted_token_ids = token_ids[rows_by_token]
    places = np.empty(index.n_rows, np.int64)
    places[rows_by_token] = np.arange(len(rows_by_token))

    repeated = np.repeat(rows, CONTROLS_PER_NEIGHBOR, -1)
    own, instead, any_token = np.split(keyed_uniform((seed, 2), keys, 3 * repeated.shape[1]), 3, -1)
    first, end = (np.searchsorted(sorted_token_ids, token_ids[repeated], side) for side in ("left", "right"))
    n_others = end - first - 1
    steps = 1 + _below(np.maximum(n_others, 1), own)
    other_places = first + (places[repeated] - first + steps) % (end - first)  # Never the row's own place.
    other_places = np.where(n_others > 0, other_places, _below(len(rows_by_token), instead))
    return ControlRows(rows_by_token[other_places], rows_by_token[_below(len(rows_by_token), any_token)])


def _below(bounds: Int[np.ndarray, "f n"] | int, uniform: Float[np.ndarray, "f n"]) -> Int[np.ndarray, "f n"]:
    """Whole numbers from 0 to below each bound, from numbers in [0, 1)."""
    return (bounds * uniform).astype(np.int64)
