"""One pass of an SAE's encoder over a bank's rows: how often its features are active, how much, and where most."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_latentlens.directions.sae import decoder_of, encode
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.search.topk import TopK, rank_pairs

HISTOGRAM_EDGES = 2.0 ** np.arange(-8, 12.5, 0.5)  # of activations; the first and last bin hold what is beyond
_CHUNK_BYTES = 2**26  # of feature activations at once
_PENDING = 2**22  # activations gathered before the largest are sorted out


@dataclass(frozen=True, eq=False)
class Activity:
    """What one pass of an encoder over a bank's rows found.

    Attributes:
        n_rows: Rows seen.
        count: Rows on which each feature is active, for all features, [d_sae].
        total: Sum of its activations, [d_sae].
        top: Activations (as `similarities`) and rows of the max-activating rows of each asked feature, [f, k]; where a feature
            is active on fewer, activation -inf.
        histogram: Active rows between `HISTOGRAM_EDGES`, [f, bins].
        probed: Activations of the pairs asked for.
        hook_name: The activation that was encoded.
    """

    hook_name: str
    n_rows: int
    count: Int[np.ndarray, " d_sae"]
    total: Float[np.ndarray, " d_sae"]
    top: TopK
    histogram: Int[np.ndarray, "f bins"]
    probed: Float[np.ndarray, " pairs"]


@torch.no_grad()
def bank_activity(
    sae: Any,
    index: ContextualIndex,
    hook_name: str,
    features: Sequence[int],
    *,
    top_k: int = 20,
    probe_rows: Int[np.ndarray, " pairs"] | None = None,
    probe_features: Int[np.ndarray, " pairs"] | None = None,
    progress: bool = True,
) -> Activity:
    """Encode every row of a hook name once: density, histogram and max-activating rows, in memory that does not grow with them.

    Args:
        sae: What `label_features` takes, with an encoder.
        index: The rows.
        hook_name: The activation that the SAE reads.
        features: Whose max-activating rows and histograms to keep.
        top_k: Max-activating rows of each.
        probe_rows: Rows, and
        probe_features: features, whose activations to note: pairs.
        progress: Show a progress bar.

    Raises:
        InvalidInputError: The encoder gives NaN or inf.
    """
    weight = decoder_of(sae)
    d_sae, device = len(weight), weight.device
    place = torch.full((d_sae,), -1, dtype=torch.int64, device=device)
    place[torch.tensor(features, dtype=torch.int64, device=device)] = torch.arange(len(features), device=device)
    bins = len(HISTOGRAM_EDGES) + 1
    edges = torch.from_numpy(HISTOGRAM_EDGES).float().to(device)
    count = torch.zeros(d_sae, dtype=torch.int64, device=device)
    total = torch.zeros(d_sae, dtype=torch.float64, device=device)
    histogram = torch.zeros(len(features) * bins, dtype=torch.int64, device=device)
    top = TopK.none(len(features), top_k, device)
    pending: list[tuple[Tensor, Tensor, Tensor]] = []
    rows_asked = np.zeros(0, np.int64) if probe_rows is None else probe_rows
    features_asked = np.zeros(0, np.int64) if probe_features is None else probe_features
    order = np.argsort(rows_asked, kind="stable")
    sorted_rows, probed = rows_asked[order], np.zeros(len(order), np.float32)
    step = max(1, _CHUNK_BYTES // (4 * d_sae))
    banks = index.banks_of(hook_name)
    n_rows = sum(bank.n_rows for _, bank in banks)
    with tqdm(total=n_rows, desc="encoding the bank", unit=" rows", unit_scale=True, delay=2, disable=not progress) as bar:
        for start, bank in banks:
            for first in range(0, bank.n_rows, step):
                part = slice(first, min(first + step, bank.n_rows))
                rows = torch.from_numpy(bank.activations(hook_name, part))
                acts = encode(sae, rows)
                sums = acts.sum(0, dtype=torch.float64)
                if not bool(torch.isfinite(sums).all()):
                    bad = torch.nonzero(~torch.isfinite(sums))[:, 0].tolist()
                    raise InvalidInputError(
                        f"the SAE's encoder gives NaN or inf for {len(bad)} features, first {bad[:5]}, on rows of {hook_name}; "
                        "check its weights and dtype"
                    )
                begin, end = np.searchsorted(sorted_rows, [start + part.start, start + part.stop])
                pairs = order[begin:end]
                at, of = (torch.from_numpy(ids[pairs]).to(device) for ids in (rows_asked - start - first, features_asked))
                probed[pairs] = acts[at, of].cpu().numpy()
                row, feature = acts.nonzero(as_tuple=True)
                value = acts[row, feature]
                count += torch.bincount(feature, minlength=d_sae)
                total += sums
                kept = place[feature] >= 0
                row, feature, value = row[kept] + start + first, place[feature[kept]], value[kept]
                histogram += torch.bincount(feature * bins + torch.bucketize(value, edges), minlength=len(histogram))
                large = value >= top.similarities[feature, -1]
                pending.append((value[large], row[large], feature[large]))
                if sum(len(values) for values, _, _ in pending) > _PENDING:
                    top, pending = _largest(top, pending), []
                bar.update(len(rows))
    top = _largest(top, pending)
    return Activity(
        hook_name, n_rows, count.cpu().numpy(), total.cpu().numpy(), top, histogram.view(-1, bins).cpu().numpy(), probed
    )


def _largest(top: TopK, pending: list[tuple[Tensor, Tensor, Tensor]]) -> TopK:
    known = top.similarities > -torch.inf
    parts = [*pending, (top.similarities[known], top.rows[known], known.nonzero()[:, 0])]
    values, rows, features = (torch.cat(part) for part in zip(*parts, strict=True))
    return rank_pairs(values, rows, features, *top.rows.shape)
