"""Rows and features drawn at random that the scores of labels are compared with."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from tl_latentlens.directions.features.selection import FeatureSelection
from tl_latentlens.index.contextual import ContextualIndex

N_NULL_DIRECTIONS = 1000
CONTROLS_PER_NEIGHBOR = 5
_MIN_NULL_FEATURES = 100


@dataclass(frozen=True, eq=False)
class ShuffledDecoders:
    """Features, each with the neighbors of another feature's direction.

    Attributes:
        feature_ids: The features, drawn with replacement.
        neighbors: Rows nearest to the other feature's direction.
    """

    feature_ids: Int[np.ndarray, " n"]
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
    selection: FeatureSelection, index: ContextualIndex, top_k: int, rng: np.random.Generator
) -> ShuffledDecoders:
    """Random features of the SAE, each with the neighbors of another one."""
    features = selection.all_ids
    own = rng.choice(features, N_NULL_DIRECTIONS)
    steps = rng.integers(1, max(2, len(features)), N_NULL_DIRECTIONS)
    other = features[(np.searchsorted(features, own) + steps) % len(features)]
    neighbors = index.search(selection.decoder[other], top_k, selection.encoded_hook).rows.cpu().numpy()
    return ShuffledDecoders(own, neighbors)


def draw_control_rows(
    index: ContextualIndex, hook_name: str, rows: Int[np.ndarray, "f k"], rng: np.random.Generator
) -> ControlRows:
    """Random rows for each row: some of its token, and some of any token."""
    hook_rows = index.bank_rows.row_ids(hook_name)
    token_ids = index.bank_rows.token_ids()
    rows_by_token = hook_rows[np.argsort(token_ids[hook_rows], kind="stable")]
    sorted_token_ids = token_ids[rows_by_token]
    places = np.empty(index.n_rows, np.int64)
    places[rows_by_token] = np.arange(len(rows_by_token))

    repeated = np.repeat(rows, CONTROLS_PER_NEIGHBOR, -1)
    first, end = (np.searchsorted(sorted_token_ids, token_ids[repeated], side) for side in ("left", "right"))
    n_others = end - first - 1
    steps = 1 + rng.integers(0, np.maximum(n_others, 1))
    other_places = first + (places[repeated] - first + steps) % (end - first)  # Never the row's own place.
    instead, any_token = (rows_by_token[rng.integers(0, len(rows_by_token), repeated.shape)] for _ in range(2))
    return ControlRows(np.where(n_others > 0, rows_by_token[other_places], instead), any_token)


def neighbors_of_other_features(
    selection: FeatureSelection, index: ContextualIndex, top_k: int, rng: np.random.Generator
) -> Int[np.ndarray, "f others"]:
    """For each selected feature the neighbors of one other feature, or of several where few features are selected."""
    features, n_selected = selection.all_ids, len(selection.ids)
    if len(features) < 2 or not n_selected:
        return np.zeros((n_selected, 0), np.int64)
    places = np.searchsorted(features, selection.ids)[:, None]
    others = features[(places + rng.integers(1, len(features), (n_selected, n_null_sets(n_selected)))) % len(features)]
    distinct, place = np.unique(others, return_inverse=True)
    neighbors = index.search(selection.decoder[distinct], top_k, selection.searched_hook).rows.cpu().numpy()
    return neighbors[place.reshape(n_selected, -1)].reshape(n_selected, -1)


def n_null_sets(n_features: int) -> int:
    """The number of other features that stand for chance beside each feature: up to 100 in all, but at least one for each."""
    return max(1, _MIN_NULL_FEATURES // max(1, n_features))
