"""Scores that say whether the neighbors of a feature tell what it is about, beside the scores of wrong directions.

`steering_scores` has those that run the model. Each function returns columns of the table; none changes a table.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from tl_latentlens.directions.features.activity import Activity, MaxActivating, bank_activity
from tl_latentlens.directions.features.controls import (
    CONTROLS_PER_NEIGHBOR,
    N_NULL_DIRECTIONS,
    draw_control_rows,
    draw_shuffled_decoders,
)
from tl_latentlens.directions.features.selection import FeatureSelection
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.index.search_result import SearchResult
from tl_latentlens.statistics.auroc import auroc, auroc_standard_error
from tl_latentlens.statistics.p_values import p_values

_HELD_OUT_FACTOR = 4  # This many times `top_k` max-activating rows are kept: `overlap` leaves the neighbors' prompts out.
_NORMAL_975 = 1.96


@dataclass(frozen=True, eq=False)
class Scores:
    """Columns of the table of features, and the scores of wrong directions.

    Attributes:
        columns: Column → a value for each selected feature, or one for all.
        nulls: Score → the scores of wrong directions.
    """

    columns: dict[str, Float[np.ndarray, " f"] | float]
    nulls: dict[str, Float[np.ndarray, " nulls"]]


@dataclass(frozen=True, eq=False)
class ActivationScores(Scores):
    """Scores from the features' activations on the rows of the bank, and these activations."""

    activity: Activity


@dataclass(frozen=True, eq=False)
class _Probes:
    """A feature's activations on its neighbors and on their controls, a line for each feature and each shuffled decoder."""

    neighbors: Float[np.ndarray, "f k"]
    same_token: Float[np.ndarray, "f controls"]
    any_token: Float[np.ndarray, "f controls"]


def similarity_scores(
    selection: FeatureSelection, index: ContextualIndex, neighbors: SearchResult, top_k: int, rng: np.random.Generator
) -> Scores:
    """The mean cosine of each feature's neighbors, and its p-value against the neighbors of random directions."""
    random = torch.from_numpy(rng.standard_normal((N_NULL_DIRECTIONS, selection.decoder.shape[1]), np.float32))
    null = index.search(random, top_k, selection.searched_hook).similarities.mean(-1).cpu().numpy()
    similarity = neighbors.similarities.mean(-1).cpu().numpy()
    return Scores({"similarity": similarity, "p_similarity": p_values(similarity, null)}, {"similarity": null})


def activation_scores(
    selection: FeatureSelection,
    index: ContextualIndex,
    hook_name: str,
    neighbors: Int[np.ndarray, "f k"],
    top_k: int,
    rng: np.random.Generator,
    seed: int,
    progress: bool,
) -> ActivationScores:
    """Density, AUROCs and overlap of each feature, from one pass of the encoder over the rows of a hook name."""
    shuffled = draw_shuffled_decoders(selection, index, top_k, rng)
    own_ids = np.array(selection.ids, np.int64)
    feature_ids = np.concatenate([own_ids, shuffled.feature_ids])
    rows = np.concatenate([neighbors, shuffled.neighbors])
    null_keys = len(selection.decoder) + np.arange(len(shuffled.feature_ids))
    controls = draw_control_rows(index, hook_name, rows, np.concatenate([own_ids, null_keys]), seed)
    probe_rows = np.concatenate([rows, controls.same_token, controls.any_token], -1)
    kept_ids, kept_places = np.unique(feature_ids, return_inverse=True)
    activity = bank_activity(
        selection.sae,
        index,
        hook_name,
        kept_ids.tolist(),
        top_k=_HELD_OUT_FACTOR * top_k,
        probe_rows=probe_rows.flatten(),
        probe_features=np.repeat(feature_ids, probe_rows.shape[1]),
        progress=progress,
    )
    k = rows.shape[1]
    split = np.split(activity.probed.reshape(probe_rows.shape), [k, k + CONTROLS_PER_NEIGHBOR * k], -1)
    is_alive = (activity.count > 0)[shuffled.feature_ids]
    aurocs = _auroc_scores(_Probes(*split), len(own_ids), is_alive)
    null_top = activity.top.select(kept_places[len(own_ids) :])
    activity = activity.select(kept_places[: len(own_ids)])
    columns = {
        **_density_columns(activity, selection.ids),
        **aurocs.columns,
        "overlap": _overlap(index, activity.top, neighbors, top_k),
        "overlap_null": _mean_of_known(_overlap(index, null_top, shuffled.neighbors, top_k)),
    }
    return ActivationScores(columns, aurocs.nulls, activity)


def _density_columns(activity: Activity, feature_ids: list[int]) -> dict[str, Float[np.ndarray, " f"] | float]:
    n_active = activity.count[feature_ids]
    return {
        "density": n_active / activity.n_rows,
        "mean_activation": activity.total[feature_ids] / np.maximum(n_active, 1),
        "max_activation": np.maximum(activity.top.activations[:, 0], 0),
    }


def _auroc_scores(probes: _Probes, n_features: int, is_alive: Bool[np.ndarray, " n"]) -> Scores:
    """AUROC of neighbors against both kinds of controls; the lines after the first `n_features` are the null."""
    columns: dict[str, Float[np.ndarray, " f"] | float] = {}
    nulls = {}
    for name, controls in (("auroc", probes.any_token), ("auroc_same_token", probes.same_token)):
        values = auroc(probes.neighbors, controls)
        own, null = values[:n_features], values[n_features:][is_alive]
        half_width = _NORMAL_975 * auroc_standard_error(own, probes.neighbors.shape[1], controls.shape[1])
        columns[name] = own
        columns[f"{name}_low"] = (own - half_width).clip(0, 1)
        columns[f"{name}_high"] = (own + half_width).clip(0, 1)
        columns[f"{name}_null"] = null.mean() if len(null) else math.nan
        columns[f"p_{name}"] = p_values(own, null)
        nulls[name] = null
    return Scores(columns, nulls)


def _overlap(
    index: ContextualIndex, top: MaxActivating, neighbors: Int[np.ndarray, "f k"], top_k: int
) -> Float[np.ndarray, " f"]:
    """The share of each feature's held-out max-activating rows whose token its neighbors have; NaN where there are none."""
    token_ids, prompts = index.bank_rows.token_ids(), index.bank_rows.prompts
    is_held_out = top.is_active & ~_any_equal(prompts[top.rows], prompts[neighbors])
    is_held_out &= is_held_out.cumsum(-1) <= top_k
    n_held_out = is_held_out.sum(-1)
    n_same_token = (is_held_out & _any_equal(token_ids[top.rows], token_ids[neighbors])).sum(-1)
    return np.where(n_held_out > 0, n_same_token / np.maximum(n_held_out, 1), np.nan)


def _mean_of_known(values: Float[np.ndarray, " n"]) -> float:
    """The mean of the values that are not NaN; NaN where there are none."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def _any_equal(values: Int[np.ndarray, "f n"], others: Int[np.ndarray, "f k"]) -> Bool[np.ndarray, "f n"]:
    """True for values that are among the others of their line."""
    return (values[:, :, None] == others[:, None]).any(-1)
