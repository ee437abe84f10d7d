"""The data of the page of labelled features, taken from the bank, the SAE and the model; `views.features` writes the page."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from tl_latentlens.directions.features.activations_around import activations_around
from tl_latentlens.directions.features.activity import HISTOGRAM_EDGES, Activity
from tl_latentlens.directions.features.density_bins import DensityBins
from tl_latentlens.directions.features.label_summary import CHANCE, is_labelled
from tl_latentlens.directions.features.sae import decoder_of
from tl_latentlens.directions.features.token_places import token_places
from tl_latentlens.directions.features.token_stream import token_stream
from tl_latentlens.index.page_head import index_call, index_head
from tl_latentlens.index.search_result import SearchResult
from tl_latentlens.lens.lenses import top_logits
from tl_latentlens.views.chance import geometry_note
from tl_latentlens.views.features import UNKNOWN_SHADE, FeaturePage, ScoreAxis
from tl_latentlens.views.label_kinds import MIXED
from tl_latentlens.views.page_head import PageHead
from tl_latentlens.views.text import visible

N_BEFORE, N_AFTER = 24, 8  # Tokens that are shown around a row.
_NULL_BINS = 40
_SCORE_HEADINGS = {
    "detection": "detection",
    "detection_top": "detection, top ten",
    "intruder": "intruder",
    "embedding": "embedding",
    "auroc_same_token": "AUROC, same token",
    "auroc": "AUROC",
    "z": "nearness (z)",
    "overlap": "overlap",
    "steered": "steered",
    "steered_next": "steered, next token",
    "steered_words": "steered, words",
    "steered_logit_tokens": "steered, logit lens",
}
_NULL_COLUMNS = {"detection_top": "detection_null"}
_LABEL_NOTE = (
    "A label names what carries at least half of a feature's activation over the bank, strong activations above all, alone or "
    "with one or two others, each with its share: the token on which it fires, the token before it or after it, or a place in "
    "the text. Where three do not reach half, or do not tell its contexts from others, the label is mixed, faint, and names "
    "the largest. Near: words that stand around. Other lines say what kept a label back."
)
_NEIGHBOR_LABEL_NOTE = (
    "A label names what at least half of the nearest rows are, where these are nearer than those of random directions; else it "
    "is mixed, faint, or the line says what kept it back."
)
_WRITES_NOTE = (
    "Writes: the words nearest to the direction, and the tokens that its logit lens promotes, with their logits above the mean "
    "of the vocabulary. Opposite: the same of −v, and what at least half of its nearest rows are."
)
_CARD_NOTE = (
    "A card shows each score in color, with its 95 % interval, among those of wrong labels or directions in gray. p is the "
    "share of these that score as high."
)
_CONTEXT_NOTE = (
    "The number before a context is the activation (where it is most active) or the cosine (nearest rows). The more orange a "
    "token, the more it activates the feature, up to its most active one."
)
_SCORE_NOTES = {
    "detection": (
        "detection: how well the label tells contexts in which the feature is active from silent ones, in prompts that the "
        "label was not made from: balanced accuracy over the tenths of its activation, and for its ten most active contexts. "
        "Its null are labels of other features; chance is 0.5."
    ),
    "intruder": (
        "intruder: how often the one silent row is found among rows on which the feature is active; embedding: how often an "
        "active row is nearer to them than a silent one. Both by the rows less what the feature writes; chance is 0.2 and 0.5."
    ),
    "density": "density: the share of the bank's rows on which the feature is active. max: its largest activation.",
    "auroc": "AUROC: the chance that a nearest row activates the feature more than a random row does; 0.5 says nothing.",
    "auroc_same_token": (
        "same token: the same against rows of the same tokens; at 0.5 the feature is about the token and not its context."
    ),
    "similarity": "cosine: of the direction with its nearest rows, their mean. z: how far that is above random rows.",
    "overlap": "overlap: the share of the most active rows, in other prompts, whose token is that of a nearest row.",
    "steered_next": (
        "steered next: the direction is added to a run; the rank, from 0 to 1, of the tokens that follow the nearest rows in "
        "the change of the logits; 0.5 says nothing."
    ),
    "steered_words": "steered words, logit lens: the same for the words and the next tokens that the feature writes.",
}
_SCORES_BY_DENSITY = ("auroc", "auroc_same_token")
_P_NAMES = {"z": "p_similarity"}
_LOGIT_ARRAYS = {"logit_tokens": "logit_positive", "logit_tokens_negative": "logit_negative"}


def feature_page_data(
    table: pd.DataFrame,
    places: Mapping[int, int],
    neighbors: Mapping[str, SearchResult],
    activity: Activity | None,
    nulls: Mapping[str, Float[np.ndarray, " nulls"]],
    *,
    sae: Any = None,
    model: Any = None,
    n_contexts: int = 20,
    call: str = "",
    progress: bool = True,
) -> FeaturePage:
    """The data of the page of labelled features; tokens around max-activating rows are encoded for it.

    Args:
        table: The table of the `FeatureResult`.
        places: Feature number → its place among neighbors and max-activating rows.
        neighbors: "positive" and "negative" → neighbors of v and of -v.
        activity: Max-activating rows and histograms; None without an encoder.
        nulls: Score → what wrong directions score.
        sae: What the features were labelled with.
        model: The bank's model, which runs the texts again for tokens that are no rows of the bank; None: those stay unknown.
        n_contexts: Max-activating contexts of each feature.
        call: The command that made the labels; empty: the call of `label_features`.
        progress: Show a progress bar.
    """
    index = neighbors["positive"].index
    all_tokens = token_places(index)
    rows = {sign: found.rows.cpu().numpy() for sign, found in neighbors.items()}
    arrays = {f"{sign}_cosines": _ten_thousandths(found.similarities.cpu().numpy()) for sign, found in neighbors.items()}
    if len(index.hook_names) > 1:
        arrays |= {f"{sign}_hooks": found.hook_ids.cpu().numpy() for sign, found in neighbors.items()}
    if activity is not None:
        activations = activity.top.activations[:, :n_contexts]
        rows["top"] = np.where(activity.top.is_active, activity.top.rows, -1)[:, :n_contexts]
        window, run = {"before": N_BEFORE, "after": N_AFTER}, {"model": model, "progress": progress}
        around = activations_around(sae, all_tokens, activity.hook_name, list(places), rows["top"], **window, **run)
        arrays |= {"top_values": activations, "histogram": activity.histogram}
        arrays["shades"] = _shades(around, activations)
    stream = token_stream(all_tokens, np.concatenate([row_ids.ravel() for row_ids in rows.values()]), N_BEFORE, N_AFTER)
    ends = np.cumsum([row_ids.size for row_ids in rows.values()])[:-1]
    arrays["tokens"] = stream.tokens
    for (name, row_ids), row_places in zip(rows.items(), np.split(stream.row_places, ends), strict=True):
        arrays[name] = row_places.reshape(row_ids.shape)
    string_ids = dict(stream.string_ids)
    arrays |= _logit_token_arrays(table, string_ids) | _logit_arrays(table, sae, model, list(places))
    names = [name for name in _SCORE_HEADINGS if name in table]
    null_densities = nulls.get("density", np.zeros(0))
    bins = DensityBins.of_nulls(null_densities)
    null_bins = {name: bins.places(null_densities) for name in _SCORES_BY_DENSITY}
    return FeaturePage(
        head=_head(table, neighbors["positive"], call),
        table=table,
        array_rows=[places.get(feature, -1) for feature in table["feature"].tolist()],
        hook_names=index.hook_names,
        score_axes=[_score_axis(table, name, nulls.get(name, np.zeros(0)), null_bins.get(name)) for name in names],
        density_bins=bins.places(table["density"].to_numpy(float)).tolist() if "density" in table else [],
        histogram_edges=HISTOGRAM_EDGES.tolist(),
        n_before=N_BEFORE,
        n_after=N_AFTER,
        strings=list(string_ids),
        arrays=arrays,
    )


def _head(table: pd.DataFrame, neighbors: SearchResult, call: str) -> PageHead:
    n_named, n_mixed = int(is_labelled(table).sum()), np.count_nonzero(table["label_kind"] == MIXED)
    n_none, has_activity = len(table) - n_named - n_mixed, "density" in table
    evidence = "where they fire" if has_activity else "their nearest rows"
    index, n_neighbors = neighbors.index, neighbors.rows.shape[-1]
    return index_head(
        index,
        "Features and what they are about",
        f"{len(table):,} features of an SAE: {n_named:,} named by {evidence}, {n_mixed:,} mixed, {n_none:,} without a label. "
        "Choose one to see its contexts.",
        call=call or f"label_features(sae, {index_call(index)}, top_k={n_neighbors})",
        notes=[
            _LABEL_NOTE if has_activity else _NEIGHBOR_LABEL_NOTE,
            _WRITES_NOTE,
            f"Directions are {geometry_note(index.transform)}.",
            *(note for name, note in _SCORE_NOTES.items() if name in table),
            _CARD_NOTE,
            _CONTEXT_NOTE,
        ],
    )


def _logit_token_arrays(table: pd.DataFrame, string_ids: dict[str, int]) -> dict[str, Int[np.ndarray, "f k"]]:
    """The tokens of the logit lens as string numbers; new strings are added to `string_ids`."""
    arrays = {}
    for column, name in _LOGIT_ARRAYS.items():
        if column in table:
            lines = [
                [string_ids.setdefault(visible(token), len(string_ids)) for token in tokens]
                for tokens in table[column].dropna()
            ]
            arrays[name] = np.array(lines, np.int64).reshape(len(lines), -1)
    return arrays


def _logit_arrays(table: pd.DataFrame, sae: Any, model: Any, features: list[int]) -> dict[str, Float[np.ndarray, "f k"]]:
    """The logits of these tokens, above the mean of the vocabulary; none without the model, or its SAE."""
    if sae is None or model is None or not features:
        return {}
    directions = decoder_of(sae)[features]
    signs = {"logit_tokens": 1, "logit_tokens_negative": -1}
    return {
        f"{_LOGIT_ARRAYS[column]}_values": top_logits(model, sign * directions, len(table[column].dropna().iloc[0])).scores
        for column, sign in signs.items()
        if column in table
    }


def _score_axis(
    table: pd.DataFrame,
    name: str,
    null: Float[np.ndarray, " nulls"],
    null_bins: Int[np.ndarray, " nulls"] | None,
) -> ScoreAxis:
    """A score's axis, the mean of its nulls, and how many stand in each bin of the axis; for each density bin, if any."""
    low, high = 0.0, 1.0
    scores = np.concatenate([table[name].dropna().to_numpy(float), null])
    if name == "z" and len(scores):
        low, high = float(scores.min()), float(scores.max()) + 1e-6
    parts = [null] if null_bins is None else [null[null_bins == place] for place in range(null_bins.max(initial=0) + 1)]
    means = [float(part.mean()) if len(part) else math.nan for part in parts] if len(null) else []
    counts = [np.histogram(part, _NULL_BINS, (low, high))[0].tolist() for part in parts] if len(null) else []
    null_column = _NULL_COLUMNS.get(name, f"{name}_null")
    if null_column in table and not means:
        means = table[null_column].dropna().tolist()[:1]
    heading, p_name, is_chance = _SCORE_HEADINGS[name], _P_NAMES.get(name, f"p_{name}"), name in CHANCE
    return ScoreAxis(name, heading, p_name, low, high, [CHANCE[name]] if is_chance else means, counts, is_chance)


def _shades(around: Float[np.ndarray, "f n window"], activations: Float[np.ndarray, "f n"]) -> Int[np.ndarray, "f n window"]:
    """Activations as shares of the feature's largest, 0 to 254; `UNKNOWN_SHADE` where they are not known."""
    largest = np.ones((len(activations), 1, 1))
    if activations.size:
        largest = np.maximum(activations[:, :1, None], 1e-12)
    shares = np.ceil(254 * (around / largest).clip(0, 1))
    return np.where(np.isnan(around), UNKNOWN_SHADE, np.nan_to_num(shares)).astype(np.uint8)


def _ten_thousandths(cosines: Float[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    return np.rint(cosines * 10_000.0).astype(np.int64)
