"""One pass of an SAE's encoder over a bank's rows: how often its features are active, how much, and on which rows most."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_latentlens.directions.features.contexts import Contexts, contexts_of
from tl_latentlens.directions.features.evidence import Evidence, EvidenceCollector
from tl_latentlens.directions.features.sae import decoder_of, encode, rows_per_step
from tl_latentlens.directions.features.sae_fit import require_encoder_of_rows
from tl_latentlens.directions.features.samples import ActivePairs, LargestPairs
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.index.transforms import evenly_spaced_rows_of
from tl_latentlens.search.ambient import own_arithmetic

HISTOGRAM_EDGES = 2.0 ** np.arange(-8, 12.5, 0.5)  # Of activations. The first and the last bin are open.
_SAMPLE_ROWS = 1024  # Rows that tell beforehand about how often each feature is active.


@dataclass(frozen=True, eq=False)
class MaxActivating:
    """The rows on which features are most active, the largest activation first.

    Attributes:
        activations: Activations, float32, [f, k]; 0 where a feature is active on fewer rows.
        rows: Rows of the index, [f, k]; 0 where a feature is active on fewer rows.
        n_active: How many of the k rows of each feature are there, [f].
    """

    activations: Float[np.ndarray, "f k"]
    rows: Int[np.ndarray, "f k"]
    n_active: Int[np.ndarray, " f"]

    @property
    def is_active(self) -> Bool[np.ndarray, "f k"]:
        """False where a feature is active on fewer rows."""
        return np.arange(self.rows.shape[1]) < self.n_active[:, None]

    def select(self, places: Int[np.ndarray, " some"]) -> "MaxActivating":
        """The rows of some of the features, by their places."""
        return MaxActivating(self.activations[places], self.rows[places], self.n_active[places])


@dataclass(frozen=True, eq=False)
class Activity:
    """Counts, histograms and max-activating rows from one pass of an encoder over a bank's rows.

    Attributes:
        hook_name: The activation that was encoded.
        n_rows: Rows that were encoded.
        count: Rows on which each feature is active, for all features, [d_sae].
        total: Sum of each feature's activations, [d_sae].
        top: Max-activating rows of each requested feature.
        histogram: Active rows between `HISTOGRAM_EDGES` of each requested feature, [f, bins].
        evidence: What labels of the requested features are made from and scored on.
        probed: Activations of the requested pairs of row and feature.
    """

    hook_name: str
    n_rows: int
    count: Int[np.ndarray, " d_sae"]
    total: Float[np.ndarray, " d_sae"]
    top: MaxActivating
    histogram: Int[np.ndarray, "f bins"]
    evidence: Evidence
    probed: Float[np.ndarray, " pairs"]

    def select(self, places: Int[np.ndarray, " some"]) -> "Activity":
        """The activity with max-activating rows, histograms and evidence of some of the requested features, by their places."""
        evidence = self.evidence.select(places)
        return replace(self, top=self.top.select(places), histogram=self.histogram[places], evidence=evidence)


@own_arithmetic(full_products=True)
def bank_activity(
    sae: Any,
    index: ContextualIndex,
    hook_name: str,
    features: Sequence[int],
    *,
    top_k: int = 20,
    probe_rows: Int[np.ndarray, " pairs"] | None = None,
    probe_features: Int[np.ndarray, " pairs"] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Activity:
    """The activity of features on all rows of a hook name. Memory does not grow with the rows.

    Args:
        sae: What `label_features` takes, with an encoder.
        index: The rows.
        hook_name: The activation that the SAE reads.
        features: Features whose max-activating rows, histograms and evidence are kept.
        top_k: Max-activating rows of each.
        probe_rows: The row of each pair whose activation is wanted.
        probe_features: The feature of each pair.
        seed: Seed of the evidence.
        progress: Show a progress bar.

    Raises:
        InvalidInputError: The encoder gives NaN or inf, or other features for a row among other rows.
    """
    no_pairs = np.zeros(0, np.int64)
    probes = _Probes(no_pairs if probe_rows is None else probe_rows, no_pairs if probe_features is None else probe_features)
    decoder = decoder_of(sae)
    contexts = contexts_of(index.bank_rows, hook_name)
    collector = EvidenceCollector(contexts, features, seed, decoder.device)
    accumulator = _Accumulator(len(decoder), features, top_k, decoder.device, hook_name)
    for first_row, activations in _encoded_chunks(sae, index, hook_name, contexts, progress):
        probes.read(first_row, activations)
        pairs = accumulator.add(first_row, activations)
        collector.add(pairs.select(pairs.activations > 0), first_row, first_row + len(activations))
    n_rows = sum(bank.n_rows for _, bank in index.bank_rows.of(hook_name))
    return Activity(
        hook_name,
        n_rows,
        accumulator.count.cpu().numpy(),
        accumulator.total.cpu().numpy(),
        accumulator.max_activating(),
        accumulator.histograms(),
        collector.evidence(),
        probes.activations,
    )


@own_arithmetic(full_products=True)
def sampled_counts(sae: Any, index: ContextualIndex, hook_name: str) -> Int[np.ndarray, " d_sae"]:
    """On how many of about a thousand rows, evenly spaced over the bank, each feature is active."""
    banks = index.bank_rows.of(hook_name)
    require_encoder_of_rows(sae, torch.from_numpy(banks[0][1].activations(hook_name, slice(0, 1))))
    count = torch.zeros(len(decoder_of(sae)), dtype=torch.int64)
    for (_, bank), rows in zip(banks, evenly_spaced_rows_of(banks, _SAMPLE_ROWS), strict=True):
        for some in torch.from_numpy(bank.activations(hook_name, rows)).split(rows_per_step(sae)):
            count += (encode(sae, some) != 0).sum(0).cpu()
    return count.numpy()


def _encoded_chunks(
    sae: Any, index: ContextualIndex, hook_name: str, contexts: Contexts, progress: bool
) -> Iterator[tuple[int, Float[Tensor, "rows d_sae"]]]:
    """The first row of each chunk of whole contexts, and the features' activations on its rows."""
    banks, step = index.bank_rows.of(hook_name), rows_per_step(sae)
    require_encoder_of_rows(sae, torch.from_numpy(banks[0][1].activations(hook_name, slice(0, 1))))
    n_rows = sum(bank.n_rows for _, bank in banks)
    with tqdm(total=n_rows, desc="encoding the bank", unit=" rows", unit_scale=True, delay=2, disable=not progress) as bar:
        for bank_start, bank in banks:
            first = 0
            while first < bank.n_rows:
                end = min(contexts.end_of_chunk(bank_start + first, step) - bank_start, bank.n_rows)
                yield bank_start + first, encode(sae, torch.from_numpy(bank.activations(hook_name, slice(first, end))))
                bar.update(end - first)
                first = end


def _require_finite(values: Float[Tensor, " pairs"], features: Int[Tensor, " pairs"], hook_name: str) -> None:
    is_finite = torch.isfinite(values)
    if not bool(is_finite.all()):
        bad = features[~is_finite].unique().tolist()
        raise InvalidInputError(
            f"the SAE's encoder gives NaN or inf for {len(bad)} features, first {bad[:5]}, on rows of {hook_name}; "
            "check its weights and dtype"
        )


class _Probes:
    """Activations of pairs of a row and a feature, read chunk by chunk."""

    def __init__(self, rows: Int[np.ndarray, " pairs"], features: Int[np.ndarray, " pairs"]) -> None:
        self._rows, self._features = rows, features
        self._order = np.argsort(rows, kind="stable")
        self._sorted_rows = rows[self._order]
        self.activations = np.zeros(len(rows), np.float32)

    def read(self, first_row: int, activations: Float[Tensor, "rows d_sae"]) -> None:
        """Read the pairs whose rows are in a chunk."""
        begin, end = np.searchsorted(self._sorted_rows, [first_row, first_row + len(activations)])
        pairs = self._order[begin:end]
        places = torch.from_numpy(self._rows[pairs] - first_row).to(activations.device)
        features = torch.from_numpy(self._features[pairs]).to(activations.device)
        self.activations[pairs] = activations[places, features].cpu().numpy()


class _Accumulator:
    """Counts and sums of all features; histograms and largest activations of the requested ones."""

    def __init__(self, d_sae: int, features: Sequence[int], top_k: int, device: torch.device, hook_name: str) -> None:
        self._hook_name = hook_name
        self.count = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.total = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self._n_bins = len(HISTOGRAM_EDGES) + 1
        self._histogram = torch.zeros(len(features) * self._n_bins, dtype=torch.int64, device=device)
        self._edges = torch.from_numpy(HISTOGRAM_EDGES).float().to(device)
        self._place_of_feature = torch.full((d_sae,), -1, dtype=torch.int64, device=device)
        feature_ids = torch.tensor(features, dtype=torch.int64, device=device)
        self._place_of_feature[feature_ids] = torch.arange(len(features), device=device)
        self._largest = LargestPairs(len(features), top_k, device)

    def add(self, first_row: int, activations: Float[Tensor, "rows d_sae"]) -> ActivePairs:
        """Add the activations on a chunk of rows; returns those of requested features that are not 0.

        Raises:
            InvalidInputError: One of them is NaN or inf.
        """
        rows, features = activations.nonzero(as_tuple=True)
        values, places = activations[rows, features], self._place_of_feature[features]
        _require_finite(values, features, self._hook_name)
        self.count += torch.bincount(features, minlength=len(self.count))
        self.total += torch.bincount(features, values.double(), len(self.total))
        is_requested = places >= 0
        pairs = ActivePairs(values[is_requested], rows[is_requested] + first_row, places[is_requested])
        bins = pairs.places * self._n_bins + torch.bucketize(pairs.activations, self._edges)
        self._histogram += torch.bincount(bins, minlength=len(self._histogram))
        self._largest.add(pairs.activations, pairs)
        return pairs

    def histograms(self) -> Int[np.ndarray, "f bins"]:
        """The histogram of each requested feature."""
        return self._histogram.view(-1, self._n_bins).cpu().numpy()

    def max_activating(self) -> MaxActivating:
        """The largest activations of all chunks."""
        self._largest.sort_out()
        rows, activations = self._largest.rows.cpu().numpy(), self._largest.activations.cpu().numpy()
        return MaxActivating(activations, np.maximum(rows, 0), (rows >= 0).sum(-1))
