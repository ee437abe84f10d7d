"""What a label is made from and scored on: drawn rows, and contexts in which a feature is active or silent."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from tl_latentlens.directions.features.contexts import ContextMaxima, Contexts, SilentContexts
from tl_latentlens.directions.features.samples import ActivePairs, DrawnRows, PrioritySample

POWER = 5
"""A row speaks for a label by its activation to this power: a label is about where the feature is most active."""
_N_ROWS, _N_CONTEXTS = 256, 128


@dataclass(frozen=True, eq=False)
class Evidence:
    """Rows and contexts of some features. Rows are drawn by (activation)⁵, contexts by their largest activation.

    Attributes:
        contexts: The contexts of the encoded rows.
        rows: Rows of prompts that are not held out.
        fitted: Contexts that are not held out, each by its row with the largest activation.
        held_out: The same of contexts that are held out.
        silent: Contexts drawn for all features together.
    """

    contexts: Contexts
    rows: DrawnRows
    fitted: DrawnRows
    held_out: DrawnRows
    silent: SilentContexts

    def select(self, places: np.ndarray) -> "Evidence":
        """The evidence of some features, by their places."""
        silent = SilentContexts(self.silent.contexts, self.silent.is_held_out, self.silent.is_active[:, places])
        rows, fitted, held_out = (part.select(places) for part in (self.rows, self.fitted, self.held_out))
        return Evidence(self.contexts, rows, fitted, held_out, silent)


class EvidenceCollector:
    """Collects the evidence while the activations of a bank pass by, context by context."""

    def __init__(self, contexts: Contexts, features: Sequence[int], seed: int, device: torch.device) -> None:
        """Collect nothing yet.

        Args:
            contexts: The contexts of the rows.
            features: The requested features.
            seed: Seed of what is drawn.
            device: Where the activations are.
        """
        self._contexts, self._n_features = contexts, len(features)
        ids = np.asarray(features, np.int64)
        sizes = ((_N_ROWS, POWER), (_N_CONTEXTS, 1), (_N_CONTEXTS, 1))
        self._rows, self._fitted, self._held_out = (
            PrioritySample(ids, k, power, 8 * seed + 1 + i, device) for i, (k, power) in enumerate(sizes)
        )
        self._sampled = contexts.sampled(seed)
        self._is_active = np.zeros((len(self._sampled), len(ids)), bool)

    def add(self, pairs: ActivePairs, first_row: int, end_row: int) -> None:
        """Add the activations above 0 on the rows from one to another, which are whole contexts."""
        first, last = self._contexts.of_rows[[first_row, end_row - 1]].tolist()
        of_pairs = self._contexts.of_rows[pairs.rows.cpu().numpy()]
        device = pairs.rows.device
        maxima = ContextMaxima(pairs, torch.from_numpy(of_pairs - first).to(device), last + 1 - first, self._n_features)
        self._rows.add(pairs.select(self._of_side(pairs, False)))
        for side, sample in ((False, self._fitted), (True, self._held_out)):
            sample.add(maxima.pairs.select(self._of_side(maxima.pairs, side)))
        places = slice(*np.searchsorted(self._sampled, [first, last + 1]))
        here = torch.from_numpy(self._sampled[places] - first).to(device)
        self._is_active[places] = maxima.is_active[here].cpu().numpy()

    def _of_side(self, pairs: ActivePairs, is_held_out: bool) -> Bool[Tensor, " pairs"]:
        contexts = self._contexts.of_rows[pairs.rows.cpu().numpy()]
        return torch.from_numpy(self._contexts.is_held_out[contexts] == is_held_out).to(pairs.rows.device)

    def evidence(self) -> Evidence:
        """What was collected."""
        silent = SilentContexts(self._sampled, self._contexts.is_held_out[self._sampled], self._is_active)
        rows, fitted, held_out = (sample.drawn() for sample in (self._rows, self._fitted, self._held_out))
        return Evidence(self._contexts, rows, fitted, held_out, silent)
