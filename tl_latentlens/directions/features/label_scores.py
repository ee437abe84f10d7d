"""Scores that say whether the neighbors of a feature tell what it is about, beside the scores of wrong directions.

`steering_scores` has those that run the model. Each function returns columns of the table; none changes a table.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from tl_latentlens.directions.features.activity import Activity, MaxActivating, bank_activity, sampled_counts
from tl_latentlens.directions.features.controls import (
    CONTROLS_PER_NEIGHBOR,
    draw_control_rows,
    draw_other_features,
    draw_shuffled_decoders,
)
from tl_latentlens.directions.features.density_bins import DensityBins
from tl_latentlens.directions.features.label_choice import ChosenLabels, LabelChooser
from tl_latentlens.directions.features.near_words import near_words
from tl_latentlens.directions.features.row_texts import RowTexts
from tl_latentlens.directions.features.selection import FeatureSelection
from tl_latentlens.directions.features.similar_contexts import similarity_of_contexts
from tl_latentlens.directions.significance import direction_scores
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.index.search_result import SearchResult
from tl_latentlens.statistics.auroc import auroc, auroc_interval
from tl_latentlens.statistics.p_values import p_values_by_bin

_HELD_OUT_FACTOR = 4  # This many times `top_k` max-activating rows are kept: `overlap` leaves the neighbors' prompts out.


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
    """Scores from the features' activations on the rows of the bank.

    Attributes:
        activity: These activations.
        chosen: The labels that they speak for.
        near: For each feature words that stand near the rows of its label.
    """

    activity: Activity
    chosen: ChosenLabels
    near: list[list[str]]


@dataclass(frozen=True, eq=False)
class _Probes:
    """A feature's activations on its neighbors and on their controls, a line for each feature and each shuffled decoder."""

    neighbors: Float[np.ndarray, "f k"]
    same_token: Float[np.ndarray, "f controls"]
    any_token: Float[np.ndarray, "f controls"]


def similarity_scores(
    selection: FeatureSelection, index: ContextualIndex, neighbors: SearchResult, seed: int, progress: bool
) -> Scores:
    """How near each feature's neighbors are, and its p-value against the neighbors of random directions."""
    scores = direction_scores(index, selection.directions, neighbors, selection.searched_hook, seed=seed, progress=progress)
    null = scores.null
    columns: dict[str, Float[np.ndarray, " f"] | float]
    columns = {"similarity": scores.similarity, "z": scores.z, "p_similarity": scores.p}
    return Scores(columns, {"similarity": null.similarities, "z": np.concatenate([null.isotropic, null.covariance])})


def activation_scores(
    selection: FeatureSelection,
    index: ContextualIndex,
    hook_name: str,
    neighbors: Int[np.ndarray, "f k"],
    texts: RowTexts,
    top_k: int,
    seed: int,
    progress: bool,
) -> ActivationScores:
    """Labels of features and their scores, from one pass of the encoder over the rows of a hook name."""
    rng = np.random.default_rng(seed)
    shuffled = draw_shuffled_decoders(selection, index, top_k, rng)
    pair_ids = draw_other_features(selection, shuffled, sampled_counts(selection.sae, index, hook_name), rng)
    own_ids = np.array(selection.ids, np.int64)
    rows = np.concatenate([neighbors, shuffled.neighbors])
    null_keys = len(selection.decoder) + np.arange(len(shuffled.neighbors))
    controls = draw_control_rows(index, hook_name, rows, np.concatenate([own_ids, null_keys]), seed)
    lines = np.concatenate([rows, controls.same_token, controls.any_token], -1)
    # A line of neighbors and controls for each feature, and for each pair of a feature and another one's neighbors.
    probe_rows = np.concatenate([lines[: len(own_ids)], np.repeat(lines[len(own_ids) :], pair_ids.shape[1], 0)])
    probe_ids = np.concatenate([own_ids, pair_ids.ravel()])
    kept_ids, kept_places = np.unique(np.concatenate([own_ids, shuffled.feature_ids]), return_inverse=True)
    activity = bank_activity(
        selection.sae,
        index,
        hook_name,
        kept_ids.tolist(),
        top_k=_HELD_OUT_FACTOR * top_k,
        probe_rows=probe_rows.flatten(),
        probe_features=np.repeat(probe_ids, probe_rows.shape[1]),
        seed=seed,
        progress=progress,
    )
    k = rows.shape[1]
    probes = _Probes(*np.split(activity.probed.reshape(probe_rows.shape), [k, k + CONTROLS_PER_NEIGHBOR * k], -1))
    aurocs = _auroc_scores(probes, len(own_ids), activity.count[probe_ids] / activity.n_rows)
    own_places, null_places = np.split(kept_places, [len(own_ids)])
    chosen = LabelChooser(activity.evidence, texts, activity.top.activations[:, 0]).choose(own_places, null_places)
    null_top = activity.top.select(null_places)
    activity = activity.select(own_places)
    near = near_words(index.bank_rows, activity.evidence.rows, chosen.stems, seed)
    columns = {
        **_density_columns(activity, selection.ids),
        **_detection_columns(chosen),
        **_similarity_columns(selection, index, hook_name, activity, seed),
        **aurocs.columns,
        "overlap": _overlap(index, activity.top, neighbors, top_k),
        "overlap_null": _mean_of_known(_overlap(index, null_top, shuffled.neighbors, top_k)),
    }
    return ActivationScores(columns, {**aurocs.nulls, "detection": chosen.null}, activity, chosen, near)


def _detection_columns(chosen: ChosenLabels) -> dict[str, Float[np.ndarray, " f"] | float]:
    found = chosen.detection
    return {
        "detection": found.score,
        "detection_low": found.low,
        "detection_high": found.high,
        "detection_null": _mean_of_known(chosen.null),
        "detection_top": found.top,
        "precision": chosen.precision,
    }


def _similarity_columns(
    selection: FeatureSelection, index: ContextualIndex, hook_name: str, activity: Activity, seed: int
) -> dict[str, Float[np.ndarray, " f"] | float]:
    mean = index.bank_rows.of(hook_name)[0].bank.mean(hook_name)
    ids = np.array(selection.ids, np.int64)
    found = similarity_of_contexts(activity.evidence, index.bank_rows, hook_name, selection.directions, ids, mean, seed)
    return {"intruder": found.intruder, "embedding": found.embedding}


def _density_columns(activity: Activity, feature_ids: list[int]) -> dict[str, Float[np.ndarray, " f"] | float]:
    n_active = activity.count[feature_ids]
    return {
        "density": n_active / activity.n_rows,
        "mean_activation": activity.total[feature_ids] / np.maximum(n_active, 1),
        "max_activation": np.maximum(activity.top.activations[:, 0], 0),
    }


def _auroc_scores(probes: _Probes, n_features: int, densities: Float[np.ndarray, " f"]) -> Scores:
    """AUROC of neighbors against both kinds of controls; the lines after the first `n_features` are the null.

    Each feature is held against the null lines whose feature is active about as often. Chance moves the AUROC of a feature that
    is active on many rows further from 0.5 than that of a rare one, which is inactive on most rows that it is tried on.
    """
    is_alive = densities[n_features:] > 0
    null_densities = densities[n_features:][is_alive]
    bins = DensityBins.of_nulls(null_densities)
    null_bins, own_bins = bins.places(null_densities), bins.places(densities[:n_features])
    columns: dict[str, Float[np.ndarray, " f"] | float] = {}
    nulls = {"density": null_densities}
    for name, controls in (("auroc", probes.any_token), ("auroc_same_token", probes.same_token)):
        values = auroc(probes.neighbors, controls)
        own, null = values[:n_features], values[n_features:][is_alive]
        interval = auroc_interval(own, probes.neighbors.shape[1], controls.shape[1])
        columns |= {name: own, f"{name}_low": interval.low, f"{name}_high": interval.high}
        of_bins = [null[null_bins == place] for place in range(len(bins))]
        columns[f"{name}_null"] = np.array([_mean_of_known(of_bin) for of_bin in of_bins])[own_bins]
        columns[f"p_{name}"] = p_values_by_bin(own, own_bins, of_bins)
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
