"""SAE features read from a bank: neighbors, max-activating rows, a label, and figures that say whether to believe it.

One pass of the SAE's encoder over the stored activations (vector × norm) gives all features' activations without running the
model. Whether a feature's neighbors say something about it is measured (do they activate it more than other rows, and than
other uses of their tokens?) and held against the same figure of wrong directions; what does not beat those gets no label.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from tl_latentlens.bank import Row
from tl_latentlens.directions import decode_directions
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index import ContextualIndex
from tl_latentlens.lenses import logit_lens
from tl_latentlens.results import FeatureResult
from tl_latentlens.sae import can_encode, decoder_of, encode, hook_names_of
from tl_latentlens.search import TopK, rank_pairs

HISTOGRAM_EDGES = 2.0 ** np.arange(-8, 12.5, 0.5)  # of activations; the first and last bin hold what is beyond
_CHUNK_BYTES = 2**26  # of feature activations at once
_PENDING = 2**22  # activations gathered before the largest are sorted out
_NULLS = 1000
_CONTROLS = 5  # rows of the same token for each neighbor
_ALPHA = 0.01
_HELD_OUT = 4  # times top_k max-activating rows are kept, to leave enough when the neighbors' own prompts are left out
_CONTEXT = 8  # tokens to each side that count as context of a word
_BACKGROUND = 2000  # rows that say how common a word is


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
    """
    weight = decoder_of(sae)
    d_sae, device = len(weight), weight.device
    place = torch.full((d_sae,), -1, dtype=torch.int64, device=device)
    place[torch.tensor(features, device=device)] = torch.arange(len(features), device=device)
    bins = len(HISTOGRAM_EDGES) + 1
    edges = torch.from_numpy(HISTOGRAM_EDGES).float().to(device)
    count = torch.zeros(d_sae, dtype=torch.int64, device=device)
    total = torch.zeros(d_sae, dtype=torch.float64, device=device)
    histogram = torch.zeros(len(features) * bins, dtype=torch.int64, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    top = rank_pairs(none.float(), none, none, len(features), top_k)
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
            vectors, norms = bank.vectors(hook_name), bank.norms(hook_name)
            for first in range(0, bank.n_rows, step):
                part = slice(first, min(first + step, bank.n_rows))
                rows = torch.from_numpy(np.asarray(vectors[part]).astype(np.float32) * np.asarray(norms[part])[:, None])
                acts = encode(sae, rows)
                begin, end = np.searchsorted(sorted_rows, [start + part.start, start + part.stop])
                pairs = order[begin:end]
                at, of = (torch.from_numpy(ids[pairs]).to(device) for ids in (rows_asked - start - first, features_asked))
                probed[pairs] = acts[at, of].cpu().numpy()
                row, feature = acts.nonzero(as_tuple=True)
                value = acts[row, feature]
                count += torch.bincount(feature, minlength=d_sae)
                total += acts.sum(0, dtype=torch.float64)
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


def label_features(
    sae: Any,
    index: ContextualIndex,
    features: Sequence[int] | None = None,
    *,
    top_k: int = 10,
    hook_name: str | None = None,
    model: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> FeatureResult:
    """Decode SAE features by their decoder rows, label them, and say how far each label is to be believed.

    A feature's *neighbors* are the rows nearest to its decoder direction. With an encoder, and a bank of the activation that
    it reads, one pass over the bank gives activation density and max-activating rows, and

    - `auroc`: the chance that a neighbor activates the feature more than a random row does. Its null is the same figure for
      neighbors of another feature's direction (shuffled decoders).
    - `auroc_same_token`: the same against other uses of the neighbors' tokens (0.5: their contexts say nothing more).
    - `overlap`: the share of max-activating rows, of prompts that have no neighbor, whose token is among the neighbors' tokens.

    `similarity`, the neighbors' mean cosine, is held against that of random directions. A p-value is the share of 1000 nulls
    that come as far. A label is given where the neighbors are nearer than a random direction's, and beat the null of one AUROC,
    both at p < 0.01; else `why_not` says what failed.

    The label: the words (subwords merged) of the evidence rows, neighbors and max-activating rows, and the words within eight
    tokens of them at half the weight, that stand in at least two rows, by share x log2(share / share in the bank).

    Args:
        sae: An SAELens SAE (anything with `W_dec` [d_sae, d_in]), what `load_sae` returns, or W_dec itself.
        index: What to decode against.
        features: Feature numbers; None: all.
        top_k: Neighbors of each sign, and max-activating rows.
        hook_name: The activation that the SAE writes; None: what the SAE says. Where the index holds it, only that is searched.
        model: The model, for the logit lens of each direction; None: without.
        seed: Of the nulls and controls.
        progress: Show progress bars.

    Raises:
        InvalidInputError: No decoder, a feature out of range, a decoder row of zeros, or another width than the index.
    """
    weight = decoder_of(sae)
    numbers = list(range(len(weight))) if features is None else [int(f) for f in features]
    outside = [f for f in numbers if not 0 <= f < len(weight)]
    if outside:
        raise InvalidInputError(f"got feature {outside[0]}; the SAE has features 0 to {len(weight) - 1}")
    dead = (weight[numbers] == 0).all(-1)
    if bool(dead.any()):
        named = [numbers[i] for i in torch.nonzero(dead)[:10, 0].tolist()]
        raise InvalidInputError(f"{int(dead.sum())} features have a decoder row of zeros, first {named}; leave them out")
    read, written = hook_names_of(sae) if hook_name is None else (hook_name, hook_name)
    searched = written if written in index.hook_names else None
    found = decode_directions(weight[numbers], index, top_k=top_k, hook_name=searched, ids=numbers)
    table = pd.DataFrame({"feature": numbers})
    rng = np.random.default_rng(seed)

    random = torch.from_numpy(rng.standard_normal((_NULLS, weight.shape[1]), np.float32))
    nearest = index.search(random, top_k, searched)
    table["similarity"] = found.positive.similarities.mean(-1).cpu().numpy()
    table["p_similarity"] = _p_values(table["similarity"].to_numpy(), nearest.similarities.mean(-1).cpu().numpy())
    evidence = found.positive.rows.cpu().numpy()
    activity = None
    if can_encode(sae) and read in index.hook_names and read == searched and len(numbers):
        assert read is not None
        activity = _score(table, sae, index, read, numbers, found.positive.rows.cpu().numpy(), top_k, rng, progress)
        largest = activity.top.rows[:, :top_k].cpu().numpy()
        evidence = np.concatenate([evidence, largest], -1)
    table["label"] = _labels(index, evidence, rng, progress)
    table["why_not"] = [_why_not(line) for line in table.to_dict("records")]
    table.loc[table["why_not"] != "", "label"] = ""
    if model is not None and weight.shape[1] == model.cfg.d_model:
        reading = logit_lens(model, weight[numbers])
        table["logit_tokens"] = [reading.tokens(i) for i in range(len(numbers))]
    first = ["feature", "label", "why_not"]
    table = table.reindex(columns=[*first, *(name for name in table.columns if name not in first)])
    return FeatureResult(found.ids, found.positive, found.negative, table, activity)


def _score(
    table: pd.DataFrame,
    sae: Any,
    index: ContextualIndex,
    hook_name: str,
    numbers: list[int],
    neighbors: Int[np.ndarray, "f k"],
    top_k: int,
    rng: np.random.Generator,
    progress: bool,
) -> Activity:
    """Add density, AUROC and overlap, with their nulls, to the table."""
    weight = decoder_of(sae)
    usable = np.flatnonzero((weight != 0).any(-1).cpu().numpy())
    first = rng.choice(usable, _NULLS)
    second = usable[(np.searchsorted(usable, first) + rng.integers(1, max(2, len(usable)), _NULLS)) % len(usable)]
    shuffled = index.search(weight[second], top_k, hook_name).rows.cpu().numpy()
    rows = np.concatenate([neighbors, shuffled])
    k = rows.shape[1]
    same, anywhere = _controls(index, hook_name, rows, rng)
    all_rows = np.concatenate([rows, same, anywhere], -1)
    of = np.concatenate([numbers, first])
    activity = bank_activity(
        sae,
        index,
        hook_name,
        numbers,
        top_k=_HELD_OUT * top_k,
        probe_rows=all_rows.flatten(),
        probe_features=np.repeat(of, all_rows.shape[1]),
        progress=progress,
    )
    acts, controls = activity.probed.reshape(all_rows.shape), _CONTROLS * k
    count = activity.count[numbers]
    table["density"] = count / activity.n_rows
    table["mean_activation"] = activity.total[numbers] / np.maximum(count, 1)
    table["max_activation"] = activity.top.similarities[:, 0].clamp(min=0).cpu().numpy()
    alive = (activity.count > 0)[first]
    for name, against in (("auroc", acts[:, -controls:]), ("auroc_same_token", acts[:, k : k + controls])):
        u = stats.mannwhitneyu(acts[:, :k], against, alternative="greater", axis=1, method="asymptotic").statistic
        auroc = np.asarray(u) / (k * controls)
        own, null = auroc[: len(numbers)], auroc[len(numbers) :][alive]
        half = 1.96 * _auroc_error(own, k, controls)
        table[name], table[f"{name}_low"], table[f"{name}_high"] = own, (own - half).clip(0, 1), (own + half).clip(0, 1)
        table[f"{name}_null"] = null.mean() if len(null) else np.nan
        table[f"p_{name}"] = _p_values(own, null)
    table["overlap"], table["overlap_null"] = _overlap(index, activity.top, neighbors, shuffled, top_k)
    return activity


def _p_values(values: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Share of nulls, each value among its own, that come as far as each value; in (0, 1]."""
    ordered = np.sort(null)
    beyond = len(ordered) - np.searchsorted(ordered, values, "left")
    return (1 + beyond) / (1 + len(ordered))


def _auroc_error(auroc: np.ndarray, n_first: int, n_second: int) -> np.ndarray:
    """Standard error of an AUROC (Hanley and McNeil 1982, equation 2)."""
    both, pair = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    spread = auroc * (1 - auroc) + (n_first - 1) * (both - auroc**2) + (n_second - 1) * (pair - auroc**2)
    return np.sqrt(np.maximum(spread, 0) / (n_first * n_second))


def _controls(
    index: ContextualIndex, hook_name: str, rows: Int[np.ndarray, "f k"], rng: np.random.Generator
) -> tuple[Int[np.ndarray, "f controls"], Int[np.ndarray, "f controls"]]:
    """For each row some other rows of its token (any rows, where a token has no other), and some of any token."""
    having = np.concatenate([start + np.arange(bank.n_rows) for start, bank in index.banks_of(hook_name)])
    by_token = having[np.argsort(index.row_token_ids[having], kind="stable")]
    tokens = index.row_token_ids[by_token]
    place = np.empty(index.n_rows, np.int64)
    place[by_token] = np.arange(len(by_token))
    asked = np.repeat(rows, _CONTROLS, -1)
    start, end = (np.searchsorted(tokens, index.row_token_ids[asked], side) for side in ("left", "right"))
    others = end - start - 1
    chosen = start + (place[asked] - start + 1 + rng.integers(0, np.maximum(others, 1))) % (end - start)
    first, second = (by_token[rng.integers(0, len(by_token), asked.shape)] for _ in range(2))
    return np.where(others > 0, by_token[chosen], first), second


def _overlap(
    index: ContextualIndex, top: TopK, neighbors: np.ndarray, shuffled: np.ndarray, top_k: int
) -> tuple[np.ndarray, float]:
    """Share of held-out max-activating rows whose token the neighbors have, and the mean for another feature's neighbors."""
    tokens, prompts = index.row_token_ids, index.row_prompts
    known = (top.similarities > -torch.inf).cpu().numpy()
    rows = np.where(known, top.rows.cpu().numpy(), 0)
    other = shuffled[np.arange(len(rows)) % len(shuffled)]
    shares = []
    for against in (neighbors, other):
        held_out = known & ~(prompts[rows][:, :, None] == prompts[against][:, None]).any(-1)
        held_out &= held_out.cumsum(-1) <= top_k
        same = (tokens[rows][:, :, None] == tokens[against][:, None]).any(-1)
        n = held_out.sum(-1)
        shares.append(np.where(n > 0, (same & held_out).sum(-1) / np.maximum(n, 1), np.nan))
    return shares[0], float(np.nanmean(shares[1])) if np.isfinite(shares[1]).any() else math.nan


def _why_not(line: dict[str, Any]) -> str:
    if line.get("density") == 0:
        return "never active on this bank"
    if line["p_similarity"] >= _ALPHA:
        return f"no nearer to its neighbors than random directions are to theirs (p = {line['p_similarity']:.2g})"
    p_auroc = min(line.get("p_auroc", 0), line.get("p_auroc_same_token", 0))
    if p_auroc >= _ALPHA:
        return f"its neighbors activate it no more than another feature's do (p = {p_auroc:.2g})"
    return "" if line["label"] else "no word stands in two of its rows"


def _labels(index: ContextualIndex, evidence: Int[np.ndarray, "f rows"], rng: np.random.Generator, progress: bool) -> list[str]:
    @lru_cache(2**16)
    def words(row: int) -> tuple[str, frozenset[str]]:
        return words_around(index.row(row))

    sample = rng.integers(0, index.n_rows, min(index.n_rows, _BACKGROUND)).tolist()
    own, near = Counter(words(row)[0] for row in sample), Counter(word for row in sample for word in words(row)[1])
    labels = []
    for rows in tqdm(evidence.tolist(), desc="labels", unit=" features", delay=2, disable=not progress):
        found = [words(row) for row in set(rows) if row < index.n_rows]
        scores: dict[str, float] = {}
        for weight, common, counts in (
            (1.0, own, Counter(word for word, _ in found)),
            (0.5, near, Counter(word for _, around in found for word in around)),
        ):
            for word, n in counts.items():
                share, background = n / len(found), (common[word] + 0.5) / (len(sample) + 1)
                if n >= 2 and word and share > background:
                    scores[word] = max(scores.get(word, 0.0), weight * share * math.log2(share / background))
        labels.append(", ".join(sorted(scores, key=lambda word: (-scores[word], word))[:3]))
    return labels


def words_around(row: Row) -> tuple[str, frozenset[str]]:
    """The word that a row's token belongs to, and the other words near it; lower case, subwords merged, letters only."""
    tokens, at = row.prompt_tokens, row.position
    words: list[str] = []
    mine = -1
    low, high = max(0, at - _CONTEXT), at + _CONTEXT + 1
    while low > 0 and not _starts_word(tokens, low):
        low -= 1
    while high < len(tokens) and not _starts_word(tokens, high):
        high += 1
    for place in range(low, min(high, len(tokens))):
        if _starts_word(tokens, place) or not words:
            words.append("")
        words[-1] += tokens[place]
        if place == at:
            mine = len(words) - 1
    plain = ["".join(letter for letter in word.lower() if letter.isalpha()) for word in words]
    around = frozenset(word for i, word in enumerate(plain) if i != mine and len(word) > 2)
    return plain[mine], around - {plain[mine]}


def _starts_word(tokens: list[str], place: int) -> bool:
    """True where a token begins a word: at a space, or where letters meet what is none."""
    token, before = tokens[place], tokens[place - 1] if place else ""
    return not token[:1].isalnum() or not before[-1:].isalnum()


def summarize(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Means over living features beside their nulls, and shares, with 95 % bootstrap intervals over features."""
    alive = table["density"].to_numpy() > 0 if "density" in table else np.ones(len(table), bool)
    column = {str(name): table[name].to_numpy()[alive] for name in table}
    figures: dict[str, tuple[np.ndarray, float]] = {"labelled": (column["label"] != "", math.nan)}
    for name, null in (("similarity", "random directions"), ("auroc", "shuffled"), ("auroc_same_token", "shuffled")):
        if f"p_{name}" in column:
            figures[f"{name} beats {null}, p < {_ALPHA}"] = column[f"p_{name}"] < _ALPHA, _ALPHA
    for name in ("auroc", "auroc_same_token", "overlap"):
        if name in column:
            figures[name] = column[name], float(table[f"{name}_null"].iloc[0])
    lines = []
    for name, (values, null) in figures.items():
        known = values.astype(float)[~np.isnan(values.astype(float))]
        mean = low = high = known.mean() if len(known) else math.nan
        if len(np.unique(known)) > 1:
            rng = np.random.default_rng(seed)
            low, high = stats.bootstrap((known,), np.mean, method="percentile", rng=rng).confidence_interval
        lines.append({"figure": name, "mean": mean, "low": low, "high": high, "null": null, "features": len(known)})
    return pd.DataFrame(lines)
