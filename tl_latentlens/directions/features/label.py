"""Labels of SAE features: neighbors, scores that say whether to believe them, and a label where the scores allow one.

`selection` checks the arguments, `label_scores` and `steering_scores` compute the scores, `index.words` the words.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.directions.decode import decode_directions
from tl_latentlens.directions.features.label_choice import MIN_CONTEXTS, MIXED, Label, neighbor_labels
from tl_latentlens.directions.features.label_scores import activation_scores, similarity_scores
from tl_latentlens.directions.features.label_summary import SIGNIFICANCE_LEVEL
from tl_latentlens.directions.features.result import FeatureResult
from tl_latentlens.directions.features.row_texts import row_texts
from tl_latentlens.directions.features.selection import FeatureSelection, select_features
from tl_latentlens.directions.features.steering_scores import steering_scores
from tl_latentlens.index.contextual import ContextualIndex, require_index
from tl_latentlens.lens.lenses import logit_lens
from tl_latentlens.model.describe import require_model
from tl_latentlens.model.direction import is_bidirectional
from tl_latentlens.model.layers import one_hook_name
from tl_latentlens.model.readout import readout_problem

_N_WORDS = 8
_NEARNESS_LEVEL = 0.05  # Of features with an encoder, whose label needs more than nearness.
_LABEL_SCORES = ("detection", "detection_low", "detection_high", "detection_top", "precision")
_TEXT_COLUMNS = ["label", "label_kind", "label_negative", "why_not"]
_LIST_COLUMNS = ["label_parts", "label_near", "words", "words_negative"]


def label_features(
    sae: Any,
    index: ContextualIndex,
    features: Sequence[int] | None = None,
    *,
    top_k: int = 10,
    hook_name: int | str | None = None,
    model: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> FeatureResult:
    """The neighbors of SAE features, a label for each that has earned one, and the scores that decide it.

    The neighbors of a feature are the rows nearest to its decoder row. `FeatureResult.table` has a line a feature:

    - `label`: what carries at least half of (activation)⁵ over the bank, alone or with one or two others, with its shares
      ("team 59 %"). `label_kind`: "token" (a word with its inflections, a part of one, or a sign), "before" or "after" (the
      token there), "position" (in the text); "mixed", where three texts do not reach half, or do not tell contexts apart: the
      label then says what it is mixed of. `label_parts`: the texts and their shares. `label_near`: words that stand near.
    - `detection`: how well the label tells contexts in which the feature is active from silent ones, on the third of the
      prompts that the label was not made from: balanced accuracy over the tenths of its largest activation, in [0, 1].
      `detection_top`: with the ten most active contexts. `detection_null`: with labels of other features. `precision`: the
      share of the contexts with what the label names in which that activates the feature most.
    - `intruder`, `embedding`: whether its activating rows are alike in what the feature does not write (see
      `similar_contexts`); chance is 0.2 and 0.5.
    - `similarity`: the mean cosine of the neighbors. `z`: how far it is above that of random rows, in standard deviations. Its
      null: random directions, isotropic ones and ones with the covariance of the rows (see `significance`).
    - `words`: the words nearest to the direction: what it writes. `words_negative`, `label_negative`, `p_similarity_negative`:
      those of its opposite, and what at least half of the opposite's neighbors are.
    - `auroc`, with an encoder: the chance that the feature is more active on a neighbor than on a random row.
      `auroc_same_token`: than on rows of the neighbors' tokens, five for each neighbor, all taken together. Their null: other
      features that are active about as often, with the neighbors of another feature.
    - `overlap`, with an encoder: the share of max-activating rows, in prompts without a neighbor, whose token a neighbor has.
    - `steered`, with a model: the mean rank, in [0, 1], of the neighbors' tokens in the change of the next token's logits
      when the direction is added. `steered_next`: the same for the tokens that follow the neighbors; `steered_words` for
      `words`, `steered_logit_tokens` for the tokens of its logit lens.

    A feature gets no label where it is active in fewer than three contexts, its neighbors are no nearer than random directions'
    (p < 0.05), or they do not beat the null of one AUROC at p < 0.01 (the smaller p of the two AUROCs is doubled). Without an
    encoder a label is what half of the neighbors are, and `similarity` must beat its null at p < 0.01. `why_not` says what
    failed.

    A p-value is the share of nulls at least as large. The scores of a feature do not depend on which others are asked for.
    A feature whose decoder row is zero has a line of NaN and no neighbors: it is not among the `ids` of the result.

    Args:
        sae: An SAELens SAE (anything with `W_dec` [d_sae, d_in]), what `load_sae` returns, or W_dec itself.
        index: The rows to decode against. The mean of the rows is subtracted, as an SAE's b_dec is, unless the index was made
            with another transform than "auto" (`ContextualIndex.for_directions`).
        features: Feature numbers, each counted once; None: all.
        top_k: Neighbors of each sign, and max-activating rows.
        hook_name: The activation that the SAE writes, or its layer; None: the one that the SAE names. If the index holds it,
            only its rows are searched.
        model: The bank's model, for the logit lens of each direction and for steering; None: neither.
        seed: Seed of the nulls and controls.
        progress: Show progress bars.

    Raises:
        InvalidInputError: No decoder, index or model; a feature out of range; another width than the index; NaN or inf.
        UnknownHookError: `hook_name` is not in the index.
        ModelMismatchError: `model` is not the bank's.
    """
    require_index(index)
    if model is not None:
        require_model(model)
    named = None if hook_name is None else one_hook_name(hook_name, index.model_info.n_layers)
    index = index.for_directions
    selected = select_features(sae, index, features, named)
    neighbors = decode_directions(
        selected.directions, index, top_k=top_k, hook_name=selected.searched_hook, ids=selected.ids, calibrate=False
    )
    sides = {"": neighbors.positive, "_negative": neighbors.negative}
    nearness = {end: similarity_scores(selected, index, found, seed, progress) for end, found in sides.items()}
    columns, nulls, activity = dict(nearness[""].columns), dict(nearness[""].nulls), None
    columns["p_similarity_negative"] = nearness["_negative"].columns["p_similarity"]
    texts, neighbor_rows = row_texts(index.bank_rows), neighbors.positive.rows.cpu().numpy()
    by_neighbors = {end: neighbor_labels(found.rows.cpu().numpy(), texts) for end, found in sides.items()}
    if selected.encoded_hook is None:
        labels, near = by_neighbors[""], None
        reasons = [_refusal_by_neighbors(p) for p in np.asarray(columns["p_similarity"]).tolist()]
    else:
        hook, rows = selected.encoded_hook, neighbor_rows
        scores = activation_scores(selected, index, hook, rows, texts, top_k, seed, progress)
        columns, nulls, activity = columns | scores.columns, nulls | scores.nulls, scores.activity
        labels, near = scores.chosen.labels, scores.near
        n_contexts = (activity.evidence.fitted.rows >= 0).sum(-1).tolist()
        lines = pd.DataFrame(columns).to_dict("records")
        reasons = [_refusal_by_activations(line, n) for line, n in zip(lines, n_contexts, strict=True)]
        has_label = np.array([not reason for reason in reasons], bool)
        columns |= {name: np.where(has_label, columns[name], np.nan) for name in _LABEL_SCORES}
    columns |= _label_columns(labels, reasons, near, _MIXED_NEIGHBORS if activity is None else _MIXED_REASON)
    opposite = [_refusal_by_neighbors(p) for p in np.asarray(columns["p_similarity_negative"]).tolist()]
    columns["label_negative"] = _label_columns(by_neighbors["_negative"], opposite, None, "")["label"]
    columns |= _word_columns(selected, index)
    if model is not None and not is_bidirectional(model):
        index.check_model(model)
        columns |= _logit_lens_columns(selected, model)
        if selected.searched_hook is not None:
            written = {
                "steered_words": partial(_word_tokens, index, selected.searched_hook),
                "steered_logit_tokens": partial(_logit_tokens, model),
            }
            if "logit_tokens" not in columns:
                del written["steered_logit_tokens"]
            columns |= steering_scores(
                selected, index, model, selected.searched_hook, neighbor_rows, written, top_k, seed, progress
            )
    table = _assemble_table(selected, columns)
    return FeatureResult(neighbors.ids, neighbors.positive, neighbors.negative, table, activity, nulls, sae, model)


def _label_columns(
    labels: Sequence[Label], reasons: Sequence[str], near: Sequence[list[str]] | None, mixed_reason: str
) -> dict[str, list[Any]]:
    """The columns of labels, empty where there is a reason against one, and the column of reasons."""
    given = [Label() if reason else label for label, reason in zip(labels, reasons, strict=True)]
    near = [[]] * len(given) if near is None else near
    has_near = [label.kind not in ("", MIXED) and bool(words) for label, words in zip(given, near, strict=True)]
    whys = [reason or mixed_reason * (label.kind == MIXED) for label, reason in zip(given, reasons, strict=True)]
    return {
        "label": [
            f"{label.text} · near: {', '.join(words)}" if shown else label.text
            for label, words, shown in zip(given, near, has_near, strict=True)
        ],
        "label_kind": [label.kind for label in given],
        "label_parts": [list(label.parts) for label in given],
        "label_near": [words if shown else [] for words, shown in zip(near, has_near, strict=True)],
        "why_not": whys,
    }


_MIXED_REASON = "no three tokens carry half of its activation, or they do not tell its contexts or rows from others"
_MIXED_NEIGHBORS = "no three tokens are half of its nearest rows"


def _refusal_by_neighbors(p: float) -> str:
    """Why a direction gets no label from its neighbors; empty where it gets one."""
    return "" if p < SIGNIFICANCE_LEVEL else _far_from_neighbors(p)


def _far_from_neighbors(p: float) -> str:
    return f"no nearer to its neighbors than random directions are to theirs (p = {p:.2g})"


def _refusal_by_activations(scores: dict[str, Any], n_contexts: int) -> str:
    """Why a feature gets no label from its activations; empty where it gets one."""
    if scores["density"] == 0:
        return "never active on this bank"
    if n_contexts < MIN_CONTEXTS:
        return f"active in fewer than {MIN_CONTEXTS} contexts that are not held out"
    if scores["p_similarity"] >= _NEARNESS_LEVEL:
        return _far_from_neighbors(scores["p_similarity"])
    p_auroc = min(1.0, 2 * min(scores["p_auroc"], scores["p_auroc_same_token"]))  # Bonferroni, two tests.
    is_activated = p_auroc < SIGNIFICANCE_LEVEL
    return "" if is_activated else f"its neighbors activate it no more than another feature's do (p = {p_auroc:.2g})"


def _word_columns(selected: FeatureSelection, index: ContextualIndex) -> dict[str, list[list[str]]]:
    """The words nearest to each direction and to its opposite."""
    columns = {}
    for name, directions in (("words", selected.directions), ("words_negative", -selected.directions)):
        found = index.search_words(directions, _N_WORDS, selected.searched_hook)
        columns[name] = [found.texts_of(place) for place in range(len(selected.ids))]
    return columns


def _word_tokens(index: ContextualIndex, hook_name: str, directions: Float[Tensor, "n d"]) -> Int[np.ndarray, "n k"]:
    """The token at the nearest row of each word that is near a direction; -1 past the last."""
    rows = index.search_words(directions, _N_WORDS, hook_name).rows.cpu().numpy()
    return np.where(rows >= 0, index.bank_rows.token_ids()[rows], -1)


def _logit_tokens(model: Any, directions: Float[Tensor, "n d"]) -> Int[np.ndarray, "n k"]:
    """The tokens that each direction promotes by the logit lens."""
    return logit_lens(model, directions).token_ids


def _logit_lens_columns(selected: FeatureSelection, model: Any) -> dict[str, list[list[str]]]:
    """The tokens that each direction and its opposite promote; none where the model cannot read them."""
    if selected.decoder.shape[1] != model.cfg.d_model or readout_problem(model):
        return {}
    readings = {
        "logit_tokens": logit_lens(model, selected.directions),
        "logit_tokens_negative": logit_lens(model, -selected.directions),
    }
    return {name: [reading.tokens(i) for i in range(len(selected.ids))] for name, reading in readings.items()}


def _assemble_table(selected: FeatureSelection, columns: dict[str, Any]) -> pd.DataFrame:
    """A line for each requested feature, in the requested order; scores of zero decoder rows are NaN."""
    table = pd.DataFrame({"feature": selected.ids})
    for name, values in columns.items():
        table[name] = values
    table = table.astype(dict.fromkeys(_TEXT_COLUMNS, str))  # The dtype of an empty table's columns is object otherwise.
    has_direction = selected.has_direction
    table = table.set_axis(np.flatnonzero(has_direction)).reindex(range(len(selected.requested)))
    table["feature"] = np.array(selected.requested, np.int64)
    table.loc[~has_direction, _TEXT_COLUMNS] = "", "", "", "its decoder row is zero"
    for name in _LIST_COLUMNS:
        table[name] = [value if isinstance(value, list) else [] for value in table[name]]
    first = ["feature", "label", "label_kind", "why_not"]
    return table.reindex(columns=[*first, *(name for name in table.columns if name not in first)])
