"""Nearest neighbors that may miss some: FAISS proposes rows, their similarities are exact. For banks past exact search."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.errors import InvalidInputError, MissingExtraError
from tl_latentlens.search.ranking import TopK, rank_pairs
from tl_latentlens.search.vectors import VectorSearch

_TRAINING = 64  # rows for each list of an inverted file, of which FAISS asks for 39 at least
_PROBES = 16  # of so many lists one is looked into


class ApproximateSearch(VectorSearch):
    """A `VectorSearch` that scores only the rows that a FAISS index proposes, ten times as many as asked for.

    Attributes:
        faiss: The FAISS index, for its own parameters (`faiss.ParameterSpace`).
    """

    def __init__(self, *args: Any, factory: str | None = None, **kwargs: Any) -> None:
        """Fill a FAISS index in the computer's memory.

        Args:
            *args: As `VectorSearch` takes them.
            factory: What `faiss.index_factory` makes ("IVF1024,PQ64x4fs", "HNSW32,SQ8"). None: an inverted file of
                4 √n lists with 8 bits a number, of which a sixteenth is looked into.
            **kwargs: As `VectorSearch` takes them.

        Raises:
            MissingExtraError: FAISS is not installed.
            InvalidInputError: FAISS does not know such an index, or cannot train it on so few rows.
        """
        super().__init__(*args, **kwargs)
        try:
            import faiss
        except ImportError as error:
            raise MissingExtraError("approximate search needs FAISS: pip install 'tl-latentlens[faiss]'") from error
        n_lists = max(1, min(round(4 * math.sqrt(len(self))), len(self) // _TRAINING))
        try:
            self.faiss = faiss.index_factory(self.d, factory or f"IVF{n_lists},SQ8", faiss.METRIC_INNER_PRODUCT)
            sample = torch.linspace(0, len(self) - 1, min(len(self), _TRAINING * n_lists), device=self.device).round().long()
            self.faiss.train(self._unit_rows(sample).cpu().numpy())
            for first, last in self._spans(0, len(self), 64 * self.d):
                self.faiss.add(self._unit_rows(slice(first, last)).cpu().numpy())
        except RuntimeError as error:
            raise InvalidInputError(
                f"FAISS cannot make an index {factory!r} of {len(self)} rows × {self.d}: {error}"
            ) from error
        if factory is None:
            faiss.ParameterSpace().set_index_parameter(self.faiss, "nprobe", max(1, n_lists // _PROBES))

    def recall(self, queries: Float[Tensor, "... d"] | np.ndarray, k: int) -> float:
        """Share of the k exact neighbors of each query that this search finds, in [0, 1]."""
        found, exact = (rank(queries, k).rows for rank in (self.rank, super().rank))
        return float((exact[..., :, None] == found[..., None, :]).any(-1).float().mean())

    @torch.no_grad()
    def rank(self, queries: Float[Tensor, "... d"] | np.ndarray, k: int) -> TopK:
        """The k best of what FAISS proposes."""
        units = self.units(queries)
        flat, k = units.reshape(-1, self.d), min(k, len(self))
        _, found = self.faiss.search(flat.cpu().numpy(), min(10 * k, len(self)))
        proposed = torch.from_numpy(found).to(self.device)
        of, place = (proposed >= 0).nonzero(as_tuple=True)
        rows = proposed[of, place]
        best = rank_pairs(self.scores(flat, rows, of, torch.float64), rows, of, len(flat), k)
        short = (best.rows >= len(self)).any(-1).nonzero()[:, 0]  # the lists that were looked into hold fewer than k rows
        if len(short):
            exact = super().rank(flat[short], k)
            best.similarities[short], best.rows[short] = exact.similarities, exact.rows
        return TopK(best.similarities.reshape(*units.shape[:-1], k), best.rows.reshape(*units.shape[:-1], k))


def rank_apart(parts: Sequence[VectorSearch], queries: Sequence[Float[Tensor, "... d"]], k: int) -> TopK:
    """What `ranking.rank_together` gives, of what is found in each part by itself."""
    found = [part.rank(asked, k) for part, asked in zip(parts, queries, strict=True)]
    firsts = np.cumsum([0, *(len(part) for part in parts)])
    rows = torch.cat([best.rows + int(first) for best, first in zip(found, firsts, strict=False)], -1)
    best = torch.cat([best.similarities for best in found], -1).sort(dim=-1, descending=True, stable=True)
    return TopK(best.values[..., :k], rows.gather(-1, best.indices[..., :k]))
