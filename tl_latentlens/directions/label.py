"""SAE features read from a bank: neighbors, max-activating rows, a label, and figures that say whether to believe it.

One pass of the SAE's encoder over the stored activations (vector × norm) gives all features' activations without running the
model. Whether a feature's neighbors say something about it is measured (do they activate it more than other rows, and than
other uses of their tokens?) and held against the same figure of wrong directions; what does not beat those gets no label.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from tl_latentlens.directions.activity import Activity, bank_activity
from tl_latentlens.directions.decode import decode_directions
from tl_latentlens.directions.feature_result import FeatureResult
from tl_latentlens.directions.sae import can_encode, decoder_of, hook_names_of, require_sae
from tl_latentlens.errors import InvalidInputError, UnknownHookError
from tl_latentlens.index.contextual import ContextualIndex, require_index
from tl_latentlens.index.words import labels_of
from tl_latentlens.lens.lenses import logit_lens
from tl_latentlens.model.describe import is_bidirectional, model_device, require_model
from tl_latentlens.model.running import evaluating
from tl_latentlens.search.ranking import TopK
from tl_latentlens.statistics.intervals import mean_of

_NULLS = 1000
_CONTROLS = 5  # rows of the same token for each neighbor
_ALPHA = 0.01
_HELD_OUT = 4  # times top_k max-activating rows are kept, to leave enough when the neighbors' own prompts are left out
_STEERED_PROMPTS, _STEERED_TOKENS = 4, 12
_STEERED_BYTES = 2**26  # of logits at once
_ZERO = "its decoder row is zero"
_OTHERS = 100  # other features, at least, whose neighbors stand for chance
_NORMS = 2000  # rows whose median length is that of a typical activation


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

    With a model, `steered` is the mean rank, from 0 to 1, of the neighbors' tokens in the change of the next token's logits
    when the direction is added at the hook, and `steered_next` that of the tokens that follow the neighbors, beside
    the means for another feature's neighbors (`_null`).

    `similarity`, the neighbors' mean cosine, is held against that of random directions. A p-value is the share of 1000 nulls
    that come as far. A label is given where the neighbors are nearer than a random direction's, and beat the null of one AUROC,
    both at p < 0.01 (the smaller p of the two AUROCs doubled, for two tries); else `why_not` says what failed. A feature whose
    decoder row is zero has a line of NaN in the table and no neighbors: it is not among the `ids` of the result.

    The label: the words (subwords merged) of the evidence rows, neighbors and max-activating rows, their tokens where those are
    parts of words ("…ing"), and the words within eight tokens at half the weight; those that stand in 15 % of the rows and four
    times as often as in the bank, by share x log2(share / share in the bank); at most three.

    Args:
        sae: An SAELens SAE (anything with `W_dec` [d_sae, d_in]), what `load_sae` returns, or W_dec itself.
        index: What to decode against. With transform "center" directions are compared with what tells rows from their mean, as
            an SAE's decoder does: random directions then come less near, and more features earn a label.
        features: Feature numbers, each counted once; None: all.
        top_k: Neighbors of each sign, and max-activating rows.
        hook_name: The activation that the SAE writes; None: what the SAE says. Where the index holds it, only that is searched.
        model: The bank's model, for the logit lens of each direction and for steering with it; None: without.
        seed: Of the nulls and controls.
        progress: Show progress bars.

    Raises:
        InvalidInputError: No decoder, index or model, a feature out of range, another width than the index, NaN or inf.
        UnknownHookError: `hook_name` is not in the index.
        ModelMismatchError: `model` is not the bank's.
    """
    require_index(index)
    if model is not None:
        require_model(model)
    require_sae(sae)
    weight = decoder_of(sae)
    if not bool(torch.isfinite(weight).all()):
        bad = torch.nonzero(~torch.isfinite(weight).all(-1))[:, 0].tolist()
        raise InvalidInputError(
            f"W_dec holds NaN or inf in {len(bad)} rows, first {bad[:5]}; check the SAE's weights and dtype"
        )
    asked = list(range(len(weight))) if features is None else _numbers(features)
    outside = [f for f in asked if not 0 <= f < len(weight)]
    if outside:
        raise InvalidInputError(f"got feature {outside[0]}; the SAE has features 0 to {len(weight) - 1}")
    pointing = (weight[asked] != 0).any(-1).cpu().numpy()
    numbers = [f for f, points in zip(asked, pointing, strict=True) if points]
    if hook_name is not None and hook_name not in index.hook_names:
        raise UnknownHookError(f"the index has no hook name {hook_name!r}; it has {list(index.hook_names)}")
    read, written = hook_names_of(sae) if hook_name is None else (hook_name, hook_name)
    searched = written if written in index.hook_names else None
    if can_encode(sae) and (read not in index.hook_names or read != searched):
        warnings.warn(
            f"no activations to encode, so no density, no AUROC and no max-activating rows: the SAE reads {read} and writes "
            f"{written}, the index holds {list(index.hook_names)}; pass hook_name= where it is one of those",
            stacklevel=2,
        )
    found = decode_directions(weight[numbers], index, top_k=top_k, hook_name=searched, ids=numbers)
    table = pd.DataFrame({"feature": numbers})
    rng = np.random.default_rng(seed)

    random = torch.from_numpy(rng.standard_normal((_NULLS, weight.shape[1]), np.float32))
    nearest = index.search(random, top_k, searched)
    table["similarity"] = found.positive.similarities.mean(-1).cpu().numpy()
    nulls = {"similarity": nearest.similarities.mean(-1).cpu().numpy()}
    table["p_similarity"] = _p_values(table["similarity"].to_numpy(), nulls["similarity"])
    evidence = found.positive.rows.cpu().numpy()
    activity = None
    if can_encode(sae) and read in index.hook_names and read == searched:
        assert read is not None
        activity = _score(table, nulls, sae, index, read, numbers, evidence, top_k, rng, progress)
        largest = activity.top.rows[:, :top_k].cpu().numpy()
        evidence = np.concatenate([evidence, largest], -1)
    table["label"] = labels_of(index, evidence, np.random.default_rng((seed, 1)), progress)
    table["why_not"] = [_why_not(line) for line in table.to_dict("records")]
    table.loc[table["why_not"] != "", "label"] = ""
    if model is not None and not is_bidirectional(model):
        index.check_model(model)
        if weight.shape[1] == model.cfg.d_model:
            for name, directions in (("logit_tokens", weight[numbers]), ("logit_tokens_negative", -weight[numbers])):
                reading = logit_lens(model, directions)
                table[name] = [reading.tokens(i) for i in range(len(numbers))]
        if searched is not None:
            others = _others(weight, index, searched, numbers, top_k, rng)
            _steer(table, weight[numbers], index, model, searched, found.positive.rows.cpu().numpy(), others, rng, progress)
    table = table.astype({"label": str, "why_not": str})  # also where there is no line
    table = table.set_axis(np.flatnonzero(pointing)).reindex(range(len(asked)))
    table["feature"] = np.array(asked, np.int64)
    table.loc[~pointing, ["label", "why_not"]] = "", _ZERO
    first = ["feature", "label", "why_not"]
    table = table.reindex(columns=[*first, *(name for name in table.columns if name not in first)])
    return FeatureResult(found.ids, found.positive, found.negative, table, activity, nulls, sae, model)


def _numbers(features: Sequence[int]) -> list[int]:
    array = np.asarray(features)
    if array.ndim != 1 or (len(array) and not np.issubdtype(array.dtype, np.integer)):
        raise InvalidInputError(f"got features {features!r}; expected a list of feature numbers, or None for all")
    return list(dict.fromkeys(array.tolist()))


def _score(
    table: pd.DataFrame,
    nulls: dict[str, np.ndarray],
    sae: Any,
    index: ContextualIndex,
    hook_name: str,
    numbers: list[int],
    neighbors: Int[np.ndarray, "f k"],
    top_k: int,
    rng: np.random.Generator,
    progress: bool,
) -> Activity:
    """Add density, AUROC and overlap, with their nulls, to the table, and the AUROCs of shuffled decoders to `nulls`."""
    weight = decoder_of(sae)
    usable = np.flatnonzero((weight != 0).any(-1).cpu().numpy())
    first = rng.choice(usable, _NULLS)
    second = usable[(np.searchsorted(usable, first) + rng.integers(1, max(2, len(usable)), _NULLS)) % len(usable)]
    shuffled = index.search(weight[second], top_k, hook_name).rows.cpu().numpy()
    rows = np.concatenate([neighbors, shuffled])
    k = rows.shape[1]
    same, anywhere = _controls(index, hook_name, rows, rng)
    all_rows = np.concatenate([rows, same, anywhere], -1)
    of = np.concatenate([np.array(numbers, np.int64), first])
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
        nulls[name] = null
        half = 1.96 * _auroc_error(own, k, controls)
        table[name], table[f"{name}_low"], table[f"{name}_high"] = own, (own - half).clip(0, 1), (own + half).clip(0, 1)
        table[f"{name}_null"] = null.mean() if len(null) else np.nan
        table[f"p_{name}"] = _p_values(own, null)
    table["overlap"], table["overlap_null"] = _overlap(index, activity.top, neighbors, shuffled, top_k)
    return activity


def _others(
    weight: Float[Tensor, "d_sae d"],
    index: ContextualIndex,
    hook_name: str,
    numbers: list[int],
    top_k: int,
    rng: np.random.Generator,
) -> Int[np.ndarray, "f others"]:
    """Neighbors of other features for each of some: of one other each, of more where so few are asked that means waver."""
    usable = np.flatnonzero((weight != 0).any(-1).cpu().numpy())
    times = max(1, _OTHERS // max(1, len(numbers)))
    places = np.searchsorted(usable, numbers)[:, None]
    if len(usable) < 2 or not numbers:
        return np.zeros((len(numbers), 0), np.int64)
    other = usable[(places + rng.integers(1, len(usable), (len(numbers), times))) % len(usable)]
    asked, place = np.unique(other, return_inverse=True)
    return (
        index.search(weight[asked], top_k, hook_name)
        .rows.cpu()
        .numpy()[place.reshape(len(numbers), -1)]
        .reshape(len(numbers), -1)
    )


@torch.no_grad()
def _steer(
    table: pd.DataFrame,
    directions: Float[Tensor, "f d"],
    index: ContextualIndex,
    model: Any,
    hook_name: str,
    neighbors: Int[np.ndarray, "f k"],
    others: Int[np.ndarray, "f others"],
    rng: np.random.Generator,
    progress: bool,
) -> None:
    """Add what each direction does to the model's own prediction, and the same for other features' neighbors.

    The direction, as long as a typical activation, is added at the last token of some of the bank's prompts. The change of each
    token's logit, averaged over the prompts, is turned into its rank in the vocabulary.
    """
    _, bank = index.banks_of(hook_name)[0]
    lengths = np.diff(bank.plan.prompt_starts)
    length = int(min(_STEERED_TOKENS, lengths.max()))
    chosen = rng.choice(np.flatnonzero(lengths >= length), _STEERED_PROMPTS)
    device = model_device(model)
    tokens = torch.tensor([bank.prompt(prompt)[:length] for prompt in chosen], device=device)
    size = float(np.median(bank.norms(hook_name)[:_NORMS]))
    steps = size * directions / directions.norm(dim=-1, keepdim=True)

    def logits(added: Float[Tensor, "n d"]) -> Float[Tensor, "n prompts d_vocab"]:
        def add(activation: Tensor, hook: Any) -> Tensor:
            changed = activation.clone()
            each = added.to(activation).repeat_interleave(len(tokens), 0)
            changed[:, -1] += each.view(changed[:, -1].shape)
            return changed

        with evaluating(model):
            out = model.run_with_hooks(tokens.repeat(len(added), 1), fwd_hooks=[(hook_name, add)], return_type="logits")
        return out[:, -1].float().unflatten(0, (len(added), len(tokens)))

    before = logits(steps.new_zeros(1, steps.shape[1]))
    at, after = (index.row_token_ids(ahead) for ahead in (0, 1))
    figures = {
        "steered": at[neighbors],
        "steered_next": after[neighbors],
        "steered_null": at[others],
        "steered_next_null": after[others],
    }
    found = {name: np.zeros(len(neighbors)) for name in figures}
    step = max(1, _STEERED_BYTES // (4 * model.cfg.d_vocab * tokens.numel()))
    with tqdm(total=len(steps), desc="steering", unit=" features", delay=2, disable=not progress) as bar:
        for first in range(0, len(steps), step):
            part = slice(first, min(first + step, len(steps)))
            change = (logits(steps[part]) - before).mean(1)
            ranks = (change.argsort(-1).argsort(-1).float() / (change.shape[-1] - 1)).cpu().numpy()
            for name, ids in figures.items():
                values = np.take_along_axis(ranks, np.maximum(ids[part], 0), 1)
                known = (ids[part] >= 0).sum(-1)
                found[name][part] = np.where(ids[part] >= 0, values, 0).sum(-1) / np.where(known, known, np.nan)
            bar.update(part.stop - first)
    for name, values in found.items():
        whole = np.nanmean(values) if np.isfinite(values).any() else math.nan
        table[name] = whole if name.endswith("_null") else values


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
    token_ids = index.row_token_ids()
    by_token = having[np.argsort(token_ids[having], kind="stable")]
    tokens = token_ids[by_token]
    place = np.empty(index.n_rows, np.int64)
    place[by_token] = np.arange(len(by_token))
    asked = np.repeat(rows, _CONTROLS, -1)
    start, end = (np.searchsorted(tokens, token_ids[asked], side) for side in ("left", "right"))
    others = end - start - 1
    chosen = start + (place[asked] - start + 1 + rng.integers(0, np.maximum(others, 1))) % (end - start)
    first, second = (by_token[rng.integers(0, len(by_token), asked.shape)] for _ in range(2))
    return np.where(others > 0, by_token[chosen], first), second


def _overlap(
    index: ContextualIndex, top: TopK, neighbors: np.ndarray, shuffled: np.ndarray, top_k: int
) -> tuple[np.ndarray, float]:
    """Share of held-out max-activating rows whose token the neighbors have, and the mean for another feature's neighbors."""
    tokens, prompts = index.row_token_ids(), index.row_prompts
    known = (top.similarities > -torch.inf).cpu().numpy()
    rows = np.where(known, top.rows.cpu().numpy(), 0)
    times = max(1, _OTHERS // max(1, len(rows)))
    others = [shuffled[(i * len(rows) + np.arange(len(rows))) % len(shuffled)] for i in range(times)]
    shares = []
    for against in (neighbors, *others):
        held_out = known & ~(prompts[rows][:, :, None] == prompts[against][:, None]).any(-1)
        held_out &= held_out.cumsum(-1) <= top_k
        same = (tokens[rows][:, :, None] == tokens[against][:, None]).any(-1)
        n = held_out.sum(-1)
        shares.append(np.where(n > 0, (same & held_out).sum(-1) / np.maximum(n, 1), np.nan))
    null = np.concatenate(shares[1:])
    return shares[0], float(np.nanmean(null)) if np.isfinite(null).any() else math.nan


def _why_not(line: dict[str, Any]) -> str:
    if line.get("density") == 0:
        return "never active on this bank"
    if line["p_similarity"] >= _ALPHA:
        return f"no nearer to its neighbors than random directions are to theirs (p = {line['p_similarity']:.2g})"
    p_auroc = min(1.0, 2 * min(line.get("p_auroc", 0), line.get("p_auroc_same_token", 0)))  # two tries (Bonferroni)
    if p_auroc >= _ALPHA:
        return f"its neighbors activate it no more than another feature's do (p = {p_auroc:.2g})"
    return "" if line["label"] else "no word is common among its rows and rare in the bank"


def summarize(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Means over living features beside their nulls, and shares, with 95 % bootstrap intervals over features."""
    table = table.dropna(subset="similarity")  # of those whose decoder row is zero
    alive = table["density"].to_numpy() > 0 if "density" in table else np.ones(len(table), bool)
    column = {str(name): table[name].to_numpy()[alive] for name in table}
    figures: dict[str, tuple[np.ndarray, float]] = {"labelled": (column["label"] != "", math.nan)}
    for name, null in (("similarity", "random directions"), ("auroc", "shuffled"), ("auroc_same_token", "shuffled")):
        if f"p_{name}" in column:
            figures[f"{name} beats {null}, p < {_ALPHA}"] = column[f"p_{name}"] < _ALPHA, _ALPHA
    for name in ("auroc", "auroc_same_token", "overlap", "steered", "steered_next"):
        if name in column:
            figures[name] = column[name], next(iter(table[f"{name}_null"].tolist()), math.nan)
    lines = []
    for name, (values, null) in figures.items():
        mean = mean_of(values, seed)
        lines.append({"figure": name, "mean": mean.mean, "low": mean.low, "high": mean.high, "null": null, "features": mean.n})
    return pd.DataFrame(lines)
