"""Rows and contexts of each feature, drawn while its activations pass by, so that memory does not grow with the bank.

A row or context is drawn by its activation (priority sampling: Duffield, Lund and Thorup, 2007): of each feature those with
the largest weight / u are kept, with u uniform in (0, 1] by a hash of the row and the feature. A feature with no more of them
than are kept has all.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.search.topk import argsort_by_query_then_score
from tl_latentlens.statistics.keyed_random import keyed_hash

_MAX_PENDING = 2**22  # Pairs that are held before the largest are sorted out.


@dataclass(frozen=True, eq=False)
class ActivePairs:
    """Activations above 0, each of a row and a feature.

    Attributes:
        activations: The activations.
        rows: The row of each.
        places: The place of its feature among the requested ones.
    """

    activations: Float[Tensor, " pairs"]
    rows: Int[Tensor, " pairs"]
    places: Int[Tensor, " pairs"]

    def select(self, chosen: Tensor) -> "ActivePairs":
        """Some of the pairs, by a mask or their places."""
        return ActivePairs(self.activations[chosen], self.rows[chosen], self.places[chosen])


@dataclass(frozen=True, eq=False)
class DrawnRows:
    """The drawn rows of each feature, the largest weight / u first.

    Attributes:
        rows: Rows of the index; -1 past the last.
        activations: The feature's activation on each; 0 past the last.
        weights: How much of the feature's whole weight each row stands for, in units of the largest weight of a row; 0 past
            the last. The sum over some of the rows is an unbiased estimate of the sum over all rows like them, and exact
            where all were kept.
        counts: How many rows each stands for; 0 past the last.
    """

    rows: Int[np.ndarray, "f k"]
    activations: Float[np.ndarray, "f k"]
    weights: Float[np.ndarray, "f k"]
    counts: Float[np.ndarray, "f k"]

    def select(self, places: Int[np.ndarray, " some"]) -> "DrawnRows":
        """The rows of some features, by their places."""
        return DrawnRows(self.rows[places], self.activations[places], self.weights[places], self.counts[places])


class LargestPairs:
    """The pairs with the highest scores of each feature, kept while pairs are added."""

    def __init__(self, n_features: int, k: int, device: torch.device) -> None:
        """Keep nothing yet."""
        self.scores = torch.full((n_features, k), -torch.inf, dtype=torch.float32, device=device)
        self.rows = torch.full((n_features, k), -1, dtype=torch.int64, device=device)
        self.activations = torch.zeros((n_features, k), dtype=torch.float32, device=device)
        self._pending: list[tuple[Tensor, ActivePairs]] = []
        self._n_pending = 0

    def add(self, scores: Float[Tensor, " pairs"], pairs: ActivePairs) -> None:
        """Add pairs with their scores."""
        may_stay = scores >= self.scores[pairs.places, -1]
        self._pending.append((scores[may_stay], pairs.select(may_stay)))
        self._n_pending += len(self._pending[-1][0])
        if self._n_pending > _MAX_PENDING:
            self.sort_out()

    def sort_out(self) -> None:
        """Keep the highest of all that was added; ties in ascending row order."""
        if not self._n_pending:
            return
        is_known = self.scores > -torch.inf
        known = ActivePairs(self.activations[is_known], self.rows[is_known], is_known.nonzero()[:, 0])
        scores = torch.cat([*(part for part, _ in self._pending), self.scores[is_known]])
        parts = [*(pairs for _, pairs in self._pending), known]
        pairs = ActivePairs(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(known)))
        by_row = pairs.rows.argsort()
        order = by_row[argsort_by_query_then_score(scores[by_row], pairs.places[by_row])]
        counts = torch.bincount(pairs.places, minlength=len(self.scores))
        rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[pairs.places[order]]
        order, rank = order[rank < self.scores.shape[1]], rank[rank < self.scores.shape[1]]
        at = pairs.places[order], rank
        self.scores[at], self.rows[at], self.activations[at] = scores[order], pairs.rows[order], pairs.activations[order]
        self._pending, self._n_pending = [], 0


class PrioritySample:
    """A sample of each feature's rows, drawn by a power of their activations."""

    def __init__(self, feature_ids: Int[np.ndarray, " f"], k: int, power: int, seed: int, device: torch.device) -> None:
        """Draw nothing yet.

        Args:
            feature_ids: The requested features; what is drawn for one hangs on its number.
            k: Rows of each.
            power: A row's weight is its activation to this power.
            seed: Seed of the drawing.
            device: Where the pairs are.
        """
        self._feature_ids, self._power, self._seed = feature_ids, power, seed
        self._largest = LargestPairs(len(feature_ids), k + 1, device)

    def add(self, pairs: ActivePairs) -> None:
        """Let some pairs pass by."""
        rows, places = pairs.rows.cpu().numpy(), pairs.places.cpu().numpy()
        bits = keyed_hash(rows, self._feature_ids[places], self._seed)
        uniform = torch.from_numpy(((bits >> np.uint64(40)).astype(np.float32) + 1) * np.float32(2.0**-24))
        # Logarithms of weight / u: a power may be larger than any float.
        self._largest.add(self._power * pairs.activations.log() - uniform.log().to(pairs.activations.device), pairs)

    def drawn(self) -> DrawnRows:
        """What was drawn."""
        self._largest.sort_out()
        scores, rows, activations = (
            values.cpu().numpy() for values in (self._largest.scores, self._largest.rows, self._largest.activations)
        )
        threshold, rows, activations = scores[:, -1:], rows[:, :-1], activations[:, :-1].astype(float)
        is_drawn = rows >= 0
        own = np.where(is_drawn, self._power * np.log(np.where(is_drawn, activations, 1)), -np.inf)
        stands_for = np.maximum(own, threshold)
        largest = own.max(-1, keepdims=True, initial=-np.finfo(float).max)
        weights = np.where(is_drawn, np.exp(stands_for - largest), 0)
        of_drawn = (np.where(is_drawn, values, 0) for values in (stands_for, own))
        counts = np.where(is_drawn, np.exp(np.subtract(*of_drawn)), 0)
        return DrawnRows(rows, activations, weights, counts)
