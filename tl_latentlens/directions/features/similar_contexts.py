"""Are the rows that activate a feature alike in what else they are? Scores that need no label and no language model.

After Paulo and Belrose (arXiv 2507.08473), with the bank's vectors in place of a language model's reading and of a sentence
embedding. What the feature itself writes is taken out of the vectors first: its activation alone makes nothing alike.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.directions.features.evidence import Evidence
from tl_latentlens.index.rows import BankRows
from tl_latentlens.statistics.auroc import auroc
from tl_latentlens.statistics.keyed_random import keyed_uniform

N_SHOWN, N_TRIALS = 4, 16
"""Activating rows beside an intruder, and trials of each feature."""
_N_EXAMPLES, _N_QUERIES = 8, 16
_FEATURES_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class SimilarityOfContexts:
    """Scores of each feature; NaN where it has too few held-out contexts.

    Attributes:
        intruder: The share of trials in which the one silent row among five is the one least like the others; chance: 1/5.
        embedding: The chance that a held-out activating row is more like activating rows (less like silent ones) than a
            held-out silent row is; chance: 1/2.
    """

    intruder: Float[np.ndarray, " f"]
    embedding: Float[np.ndarray, " f"]


def similarity_of_contexts(
    evidence: Evidence,
    bank_rows: BankRows,
    hook_name: str,
    directions: Float[Tensor, "f d"],
    feature_ids: Int[np.ndarray, " f"],
    mean: Float[np.ndarray, " d"],
    seed: int,
) -> SimilarityOfContexts:
    """How well rows' vectors, the feature's own direction taken out, tell its activating rows from silent ones.

    Args:
        evidence: Of the features.
        bank_rows: The rows.
        hook_name: Whose vectors are compared.
        directions: The features' directions.
        feature_ids: Their numbers; what is drawn for one hangs on its number.
        mean: Of the vectors, each brought to length 1.
        seed: Seed of what is drawn.
    """
    found = SimilarityOfContexts(np.full(len(directions), np.nan), np.full(len(directions), np.nan))
    units = torch.nn.functional.normalize(directions.float().cpu(), dim=-1)
    sides = [_side(evidence, held_out, feature_ids, seed) for held_out in (False, True)]
    sizes = (_N_EXAMPLES, _N_EXAMPLES, _N_QUERIES, _N_QUERIES)
    rows = np.concatenate([part[:, :n] for part, n in zip([*sides[0], *sides[1]], sizes, strict=True)], -1)
    is_known = (rows >= 0).all(-1)
    trials = keyed_uniform((seed, 9), feature_ids, N_TRIALS * (_N_QUERIES + 1)).reshape(-1, N_TRIALS, _N_QUERIES + 1)
    center = torch.from_numpy(mean).float()
    for places in np.array_split(np.flatnonzero(is_known), max(1, is_known.sum() // _FEATURES_AT_ONCE)):
        if not len(places):
            continue
        vectors = torch.from_numpy(bank_rows.activations(hook_name, rows[places].ravel())).unflatten(0, (len(places), -1))
        vectors = torch.nn.functional.normalize(vectors, dim=-1) - center
        own = units[places][:, None]
        vectors = torch.nn.functional.normalize(vectors - (vectors * own).sum(-1, keepdim=True) * own, dim=-1)
        active, silent, active_queries, silent_queries = vectors.split(sizes, 1)
        found.embedding[places] = _embedding(active, silent, active_queries, silent_queries)
        found.intruder[places] = _intruder(active_queries, silent_queries, trials[places])
    return found


def _side(
    evidence: Evidence, held_out: bool, feature_ids: Int[np.ndarray, " f"], seed: int
) -> tuple[Int[np.ndarray, "f n"], Int[np.ndarray, "f n"]]:
    """Activating and silent rows of one side, in random order, at most `_N_QUERIES`; -1 where there are not so many."""
    drawn = (evidence.held_out if held_out else evidence.fitted).rows
    uniform = keyed_uniform((seed, 7, int(held_out)), feature_ids, drawn.shape[1])
    order = np.argsort(np.where(drawn >= 0, uniform, 2), -1)[:, :_N_QUERIES]
    active = np.take_along_axis(drawn, order, -1)
    silent, contexts = evidence.silent, evidence.contexts
    of_side = np.flatnonzero(silent.is_held_out == held_out)
    uniform = keyed_uniform((seed, 8, int(held_out)), feature_ids, 2 * len(of_side)).reshape(len(feature_ids), 2, len(of_side))
    is_silent = ~silent.is_active[of_side].T
    order = np.argsort(np.where(is_silent, uniform[:, 0], 2), -1)[:, :_N_QUERIES]
    chosen = silent.contexts[of_side[order]]
    first, end = contexts.first_rows[chosen], contexts.end_rows[chosen]
    rows = first + (np.take_along_axis(uniform[:, 1], order, -1) * (end - first)).astype(np.int64)
    return active, np.where(np.take_along_axis(is_silent, order, -1), rows, -1)


def _embedding(active: Tensor, silent: Tensor, active_queries: Tensor, silent_queries: Tensor) -> Float[np.ndarray, " f"]:
    middle = active.mean(1) - silent.mean(1)
    scores = [(queries * middle[:, None]).sum(-1).numpy() for queries in (active_queries, silent_queries)]
    return auroc(scores[0], scores[1])


def _intruder(active: Tensor, silent: Tensor, uniform: Float[np.ndarray, "f trials draws"]) -> Float[np.ndarray, " f"]:
    """In each trial some activating rows and one silent row; right where its mean cosine with the others is the least."""
    shown = torch.from_numpy(np.argsort(uniform[..., :-1], -1)[..., :N_SHOWN])
    intruders = torch.from_numpy((uniform[..., -1] * silent.shape[1]).astype(np.int64))
    lines = torch.arange(len(active))[:, None]
    rows = torch.cat([active[lines[..., None], shown], silent[lines, intruders][:, :, None]], 2)
    likeness = (rows @ rows.transpose(-1, -2)).sum(-1)
    return (likeness.argmin(-1) == N_SHOWN).float().mean(-1).numpy()
