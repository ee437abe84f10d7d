"""The other way round: which SAE features, attention heads and MLP neurons write what a word means in its context.

What the context adds to a word is a direction; what each component adds along it is measured here, and held against what the
same component adds elsewhere. `writers` runs the model for its heads and neurons.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tl_latentlens.corpus.words import find_position
from tl_latentlens.directions.component_outputs import (
    WritingWeights,
    Written,
    attention_at_end,
    layers_before,
    run_written,
    writing_weights,
)
from tl_latentlens.directions.find_result import FindResult, Meaning
from tl_latentlens.directions.label import label_features
from tl_latentlens.directions.sae import can_encode, decoder_of, encode, hook_names_of, require_sae
from tl_latentlens.errors import InvalidInputError, UnknownHookError
from tl_latentlens.index.contextual import ContextualIndex, require_index
from tl_latentlens.model.activations import activations_at
from tl_latentlens.model.describe import is_bidirectional, require_model
from tl_latentlens.model.hook_points import in_residual_stream
from tl_latentlens.model.token_strings import token_bytes
from tl_latentlens.model.tokenize import tokenize

_FEW = 6  # uses of a token, below which they cannot be told apart
_ALIKE = 10  # nearest uses, at most
_ROWS = 1000  # uses of the token, and random rows, where no model has to run
_RUNS = 64  # of each, where it has to
_NEIGHBORS = 5
_ALPHA = 0.05
_ENCODED_BYTES = 2**26  # of feature activations at once


def find_features(
    text: str,
    at: int | str,
    sae: Any,
    index: ContextualIndex,
    *,
    model: Any,
    hook_name: str | None = None,
    top_k: int = 10,
    label: bool = True,
    seed: int = 0,
) -> FindResult:
    """The SAE features that write what a word means in its context, ranked, each held against its nulls.

    *What it means here* is a direction m [d], of length 1: the mean activation (vector x norm) of the uses of the token in the
    bank that are nearest to this one, less that of its uses of another kind. Nearest: by cosine of a_r - ā with a - ā, where a
    is the activation at the word, a_r that at a row and ā the mean of all uses; a third of them, at most ten. Of another kind:
    those of the rest that, along the difference of nearest and rest, lie beyond the middle. So m is what this use shares with
    others like it, and not all that happens to stand before it. Below six other uses m is a less the bank's mean.

    A feature's `contribution` is its part of a along m, c = acts_f (W_dec[f] · m), in units of the activation. `usual` is its
    mean at the uses of another kind. Its `share`, by which the table is ranked, is (c - usual) / (a · m - mean of a_r · m over
    those uses): shares of all features, with that of what the SAE does not rebuild, add up to 1. What adds as much everywhere
    has share 0.

    Nulls: the same feature along the same m, from the bank's stored activations, without running the model,
    - at the token's uses of another kind (a feature of the meaning writes it at like uses too: those are no null), and
    - at random rows, up to 1000 of each.
    p = (1 + nulls at least as large) / (1 + n). `beats_null`: p_same_token is at most 0.05, or the smallest that n can reach;
    where the bank has too few uses of the token, p_random. Else `why_not` says what failed. p_random also says how particular
    the component is: a meaning that many tokens share is written at many. Each p is that of one component: among many, some
    come this far by chance.

    Args:
        text: The text; it is run up to the word.
        at: A position (BOS counted; negative: from the end), or a word: the last token that ends it.
        sae: An SAELens SAE, or what `load_sae` returns, with an encoder.
        index: Holds the activation that the SAE reads. With transform "center" neighbors of directions say more.
        model: The bank's model.
        hook_name: The activation that the SAE reads and writes; None: what the SAE says.
        top_k: Features to return, of those that are active at the word.
        label: Label them too (`label_features`: one pass of the encoder over the bank).
        seed: Of the sampled rows.

    Returns:
        A table with a line a feature: feature, activation, contribution, usual, share, beats_null, why_not, p, z and n against
        each null (p_same_token, ..., p_random, ...), label, label_why_not, density. `parts`: the share of all features active
        at the word; the rest is that of features active at other uses alone, and of what the SAE does not rebuild. Neighbors
        are those of the decoder row.

    Raises:
        InvalidInputError: No such position or word; no encoder; a transcoder; another width than the activation; a bank that
            was built with repeat.
        UnknownHookError: The index lacks the activation.
        ModelMismatchError: `model` is not the bank's.
    """
    require_sae(sae)
    if not can_encode(sae):
        raise InvalidInputError("got an SAE without an encoder; give W_enc and its biases too: its activations are needed")
    read, written = hook_names_of(sae) if hook_name is None else (hook_name, hook_name)
    if read is None or read != written:
        raise InvalidInputError(
            f"got an SAE that reads {read} and writes {written}; expected one activation, or pass hook_name="
        )
    here = _meaning(text, at, index, model, read, _ROWS, seed)
    weight = decoder_of(sae)
    if weight.shape[1] != len(here.activation):
        raise InvalidInputError(f"got W_dec of width {weight.shape[1]}; {read} has width {len(here.activation)}")
    activations = encode(sae, here.activation[None])[0]
    active = ((activations != 0) & (weight != 0).any(-1)).nonzero()[:, 0]
    if not len(active):
        raise InvalidInputError(f"no feature of the SAE is active at {here.strings[-1]!r}; is {read} what it was trained on?")
    along = (weight[active].float() @ here.direction.to(weight.device)).cpu()

    def contributions(rows: np.ndarray) -> np.ndarray:
        step = max(1, _ENCODED_BYTES // (4 * len(weight)))
        parts = [encode(sae, part)[:, active].cpu() for part in _activations(index, read, rows).split(step)]
        return (torch.cat(parts) * along).numpy() if parts else np.zeros((0, len(active)), np.float32)

    values = (activations[active].cpu() * along).numpy()
    best, table, shares = _ranked(values, contributions(here.uses), contributions(here.random), here, here.strength, top_k)
    chosen = active.cpu()[best]
    table.insert(0, "feature", chosen.numpy())
    table.insert(1, "activation", activations.cpu()[chosen].numpy())
    if label and len(chosen):
        labels = label_features(sae, index, chosen.tolist(), hook_name=read, progress=False).table
        table["label"], table["label_why_not"], table["density"] = labels["label"], labels["why_not"], labels["density"]
    total = float(shares.sum())
    parts = {"features active here": total, "the rest": 1 - total}
    return FindResult("feature", here.meaning(index), table, parts, index.search(weight[chosen], _NEIGHBORS, read))


def find_heads(
    text: str,
    at: int | str,
    index: ContextualIndex,
    *,
    model: Any,
    hook_name: str | None = None,
    top_k: int = 10,
    seed: int = 0,
) -> FindResult:
    """The attention heads that write what a word means in its context, ranked, each held against its nulls.

    As `find_features`, with the output z_h @ W_O[layer, h] of every head before the read activation as component: its
    `contribution` is that output along m. The model runs on up to 64 of the bank's prompts that hold the token, cut after it,
    and on as many of random rows. Shares of all heads, all neurons and the embedding add up to 1 (`parts`): the residual
    stream is their sum. Only what a head writes at the word itself is counted, not what it writes elsewhere for others to move.

    Args:
        text: The text; it is run up to the word.
        at: A position (BOS counted; negative: from the end), or a word: the last token that ends it.
        index: Holds the activation that is read.
        model: The bank's model.
        hook_name: Where the meaning is read, blocks.L.hook_resid_pre, _mid or _post; None: the index's resid_post nearest to
            two thirds of the layers.
        top_k: Heads to return.
        seed: Of the sampled rows.

    Returns:
        A table with a line a head: layer, head, attends_to and attention (the token that it looks at most, and how much, in
        [0, 1]), then the columns of `find_features` from `contribution` to `n_random`. Neighbors are those of what the head
        adds here over its usual output.

    Raises:
        InvalidInputError: No such position or word; an activation outside the residual stream; a model that adds the outputs
            of heads or neurons otherwise than as they are (Gemma 2's norms), or has no mlp.hook_post.
        UnknownHookError: The index lacks the activation.
        ModelMismatchError: `model` is not the bank's.
    """
    runs = _run(text, at, index, model, hook_name, seed)
    best, table, _ = runs.ranked(runs.weights.heads, top_k)
    layers, heads = np.divmod(best, runs.written.z.shape[2])
    table.insert(0, "layer", layers)
    table.insert(1, "head", heads)
    pattern = attention_at_end(model, runs.here.tokens, len(runs.written.z))
    if pattern is not None:
        most = pattern[layers, heads].max(-1)
        table.insert(2, "attends_to", [runs.here.strings[i] for i in most.indices.tolist()])
        table.insert(3, "attention", most.values.numpy())
    z = runs.written.z[layers, :, heads]
    excess = z[:, 0] - z[:, runs.baseline].mean(1)
    places = list(zip(layers.tolist(), heads.tolist(), strict=True))
    out = torch.stack([runs.weights.out_heads[layer][head].float().cpu() for layer, head in places])
    added = einsum(excess, out, "head d_head, head d_head d_model -> head d_model")
    return FindResult(
        "head", runs.here.meaning(index), table, runs.parts(), index.search(added, _NEIGHBORS, runs.here.hook_name)
    )


def find_neurons(
    text: str,
    at: int | str,
    index: ContextualIndex,
    *,
    model: Any,
    hook_name: str | None = None,
    top_k: int = 10,
    seed: int = 0,
) -> FindResult:
    """The MLP neurons that write what a word means in its context, ranked, each held against its nulls.

    As `find_heads`, with post_i * W_out[layer, i] of every neuron before the read activation as component; `mlp.hook_post` is
    what W_out takes, in gated MLPs (Llama) too. There are thousands of neurons: with p at most 0.05 for each, many beat their
    nulls by chance, so look at the share and at z.

    Args:
        text: The text; it is run up to the word.
        at: A position (BOS counted; negative: from the end), or a word: the last token that ends it.
        index: Holds the activation that is read.
        model: The bank's model.
        hook_name: As in `find_heads`.
        top_k: Neurons to return.
        seed: Of the sampled rows.

    Returns:
        A table with a line a neuron: layer, neuron, activation, then the columns of `find_features` from `contribution` to
        `n_random`. Neighbors are those of W_out[layer, neuron], turned round where the neuron is below its usual activation.

    Raises:
        InvalidInputError: As `find_heads`.
        UnknownHookError: The index lacks the activation.
        ModelMismatchError: `model` is not the bank's.
    """
    runs = _run(text, at, index, model, hook_name, seed)
    best, table, _ = runs.ranked(runs.weights.neurons, top_k)
    layers, neurons = np.divmod(best, runs.written.post.shape[2])
    post = runs.written.post[layers, :, neurons]
    table.insert(0, "layer", layers)
    table.insert(1, "neuron", neurons)
    table.insert(2, "activation", post[:, 0].numpy())
    below = post[:, 0] < post[:, runs.baseline].mean(1)
    places = list(zip(layers.tolist(), neurons.tolist(), strict=True))
    out = torch.stack([runs.weights.out_neurons[layer][neuron].float().cpu() for layer, neuron in places])
    added = out * torch.where(below, -1.0, 1.0)[:, None]
    return FindResult(
        "neuron", runs.here.meaning(index), table, runs.parts(), index.search(added, _NEIGHBORS, runs.here.hook_name)
    )


@dataclass(frozen=True, eq=False)
class _Here:
    """A word in its context, what the context adds to it, and the rows to compare it with.

    Attributes:
        tokens, strings: The text up to the word.
        direction: m, [d], of length 1.
        strength: How much more of m this use has than those it is compared with.
        alike, cosines: Rows of the nearest uses of the token, and how near they are.
        uses: Rows of its uses of another kind.
        by_token: m and `usual` come from the token's uses, not from the bank.
        random: Rows of any token.
    """

    tokens: list[int]
    strings: list[str]
    hook_name: str
    activation: Float[Tensor, " d"]
    direction: Float[Tensor, " d"]
    strength: float
    alike: Int[np.ndarray, " alike"]
    cosines: Float[np.ndarray, " alike"]
    uses: Int[np.ndarray, " uses"]
    by_token: bool
    random: Int[np.ndarray, " random"]

    def meaning(self, index: ContextualIndex) -> Meaning:
        """What the result says of it."""
        near = index.search(self.direction, _NEIGHBORS, self.hook_name)
        compared = (self.alike, self.cosines, len(self.uses), self.by_token)
        return Meaning(self.strings, self.hook_name, self.direction.numpy(), self.strength, *compared, near)


def _meaning(text: str, at: int | str, index: ContextualIndex, model: Any, hook_name: str, most: int, seed: int) -> _Here:
    """What the context adds to a word, and at most so many other uses and random rows."""
    require_index(index)
    require_model(model)
    if not isinstance(text, str):
        raise InvalidInputError(f"got a text of type {type(text).__name__}; expected one str")
    if is_bidirectional(model):
        raise InvalidInputError("got an encoder; expected a causal model, which has seen the text up to the word and no more")
    if any(bank.plan.settings.repeat for bank in index.banks):
        raise InvalidInputError("got a bank of texts read twice (repeat); expected one of texts read once: build it without")
    if hook_name not in index.hook_names:
        raise UnknownHookError(f"the index has no hook name {hook_name!r}; it has {list(index.hook_names)}")
    index.check_model(model)
    prompt = tokenize(model, [text])
    texts = token_bytes(model, prompt.tokens.tolist())
    strings = [texts[i].decode("utf-8", errors="replace") for i in prompt.tokens.tolist()]
    tokens = prompt.tokens[: find_position(at, strings, prompt.special) + 1]
    activation = activations_at(model, [tokens.tolist()], [-1], [hook_name])[hook_name][0]

    rng = np.random.default_rng(seed)
    uses = rng.permutation(_other_uses(index, hook_name, tokens))[:_ROWS]
    having = np.concatenate([first + np.arange(bank.n_rows) for first, bank in index.banks_of(hook_name)])
    random = rng.permutation(having)[:_ROWS]
    stored, anywhere = _activations(index, hook_name, uses), _activations(index, hook_name, random)
    by_token = len(uses) >= _FEW
    offsets, offset = stored - stored.mean(0), activation - stored.mean(0)
    cosines = cosine_similarity(offsets, offset[None], -1)
    order = cosines.argsort(descending=True, stable=True)
    nearest, rest = order.tensor_split([min(_ALIKE, len(uses) // 3) if by_token else 0])
    if by_token:
        alike = stored[nearest].mean(0)
        along = stored[rest] @ (alike - stored[rest].mean(0))
        rest = rest[along < (along.mean() + (stored[nearest] @ (alike - stored[rest].mean(0))).mean()) / 2]
        usual = stored[rest].mean(0)
        added = alike - usual
    else:
        usual = anywhere.mean(0)
        added = activation - usual
    if index.transform == "center_writing" and in_residual_stream(hook_name):
        added = added - added.mean()  # the bank's vectors may have a mean over d_model that the model's have not
    direction = added / added.norm()
    strength = float((activation - usual) @ direction)
    if not strength > 0:
        raise InvalidInputError(
            f"nothing tells this use of {strings[len(tokens) - 1]!r} from the bank's others; give more text"
        )
    return _Here(
        tokens.tolist(),
        strings[: len(tokens)],
        hook_name,
        activation,
        direction,
        strength,
        uses[nearest.numpy()],
        cosines[nearest].numpy(),
        rng.permutation(uses[rest.numpy()])[:most],
        by_token,
        random[:most],
    )


def _other_uses(index: ContextualIndex, hook_name: str, tokens: Int[np.ndarray, " pos"]) -> Int[np.ndarray, " rows"]:
    """Rows of the last token, without the one that has these very tokens before it."""
    found = []
    for first, bank in index.banks_of(hook_name):
        plan = bank.plan
        rows = np.flatnonzero(plan.tokens[plan.row_tokens] == tokens[-1])
        at = plan.row_tokens[rows]
        same = at - plan.prompt_starts[plan.row_prompts[rows]] == len(tokens) - 1
        same[same] = (plan.tokens[at[same][:, None] + np.arange(1 - len(tokens), 1)] == tokens).all(-1)
        found.append(first + rows[~same])
    return np.concatenate(found)


def _activations(index: ContextualIndex, hook_name: str, rows: Int[np.ndarray, " n"]) -> Float[Tensor, "n d"]:
    """The banked activations, of whichever bank each row is."""
    out = torch.zeros(len(rows), index.d(hook_name))
    for first, bank in index.banks_of(hook_name):
        mine = (rows >= first) & (rows < first + bank.n_rows)
        out[torch.from_numpy(mine)] = torch.from_numpy(bank.activations(hook_name, rows[mine] - first))
    return out


def _ranked(
    values: Float[np.ndarray, " c"],
    at_uses: Float[np.ndarray, "uses c"],
    at_random: Float[np.ndarray, "random c"],
    here: _Here,
    total: float,
    top_k: int,
) -> tuple[Int[np.ndarray, " best"], pd.DataFrame, Float[np.ndarray, " c"]]:
    """The components with the largest shares, their figures, and the shares of all."""
    if top_k < 1:
        raise InvalidInputError(f"got top_k={top_k}; expected at least 1")
    usual = (at_uses if here.by_token else at_random).mean(0)
    shares = (values - usual) / total
    best = np.argsort(-shares, kind="stable")[:top_k]
    table = pd.DataFrame({"contribution": values[best], "usual": usual[best], "share": shares[best]})
    table["beats_null"], table["why_not"] = False, ""
    for name, null in (("same_token", at_uses[:, best]), ("random", at_random[:, best])):
        n = len(null)
        spread = null.std(0) if n > 1 else np.zeros(len(best))
        table[f"p_{name}"] = (1 + (null >= values[best]).sum(0)) / (1 + n) if n else np.nan
        table[f"z_{name}"] = (values[best] - null.mean(0)) / np.where(spread > 0, spread, np.nan) if n else np.nan
        table[f"n_{name}"] = n
    judge, where = ("same_token", "other uses of the token") if here.by_token else ("random", "random rows")
    p, n = table[f"p_{judge}"], table[f"n_{judge}"]
    table["beats_null"] = p <= np.maximum(_ALPHA, 1 / (1 + n))
    table["why_not"] = [
        "" if beats else f"adds as much at {where} (p = {value:.2g})"
        for beats, value in zip(table["beats_null"], p, strict=True)
    ]
    return best, table, shares


@dataclass(frozen=True, eq=False)
class _Runs:
    """What heads and neurons write at the word (place 0), at other uses of its token, and at random rows."""

    here: _Here
    weights: WritingWeights
    written: Written

    @property
    def uses(self) -> slice:
        return slice(1, 1 + len(self.here.uses))

    @property
    def random(self) -> slice:
        return slice(1 + len(self.here.uses), None)

    @property
    def baseline(self) -> slice:
        return self.uses if self.here.by_token else self.random

    @property
    def total(self) -> float:
        after = self.written.after @ self.here.direction
        return float(after[0] - after[self.baseline].mean())

    def ranked(
        self, contributions: Callable[[Written, Tensor], Tensor], top_k: int
    ) -> tuple[np.ndarray, pd.DataFrame, np.ndarray]:
        values = contributions(self.written, self.here.direction).flatten(1).numpy()
        return _ranked(values[0], values[self.uses], values[self.random], self.here, self.total, top_k)

    def parts(self) -> dict[str, float]:
        """The share of all heads, of all neurons, and of the embedding, which is what is left."""
        kinds = {"heads": self.weights.heads, "neurons": self.weights.neurons}
        sums = {kind: each(self.written, self.here.direction).flatten(1).sum(1) for kind, each in kinds.items()}
        shares = {kind: float(each[0] - each[self.baseline].mean()) / self.total for kind, each in sums.items()}
        return {**shares, "embedding": 1 - sum(shares.values())}


def _run(text: str, at: int | str, index: ContextualIndex, model: Any, hook_name: str | None, seed: int) -> _Runs:
    require_index(index)
    read = _read_hook(index) if hook_name is None else hook_name
    layers_before(read)
    here = _meaning(text, at, index, model, read, _RUNS, seed)
    rows = [index.row(row) for row in [*here.uses.tolist(), *here.random.tolist()]]
    prompts = [row.bank.prompt(row.prompt_index)[: row.position + 1] for row in rows]
    runs = _Runs(here, writing_weights(model, read), run_written(model, [here.tokens, *prompts], read))
    runs.weights.require_sum(runs.written, read)
    return runs


def _read_hook(index: ContextualIndex) -> str:
    """The resid_post of the index nearest to two thirds of the layers: context is in, and the next token not yet all."""
    layers = {int(name.split(".")[1]): name for name in index.hook_names if re.fullmatch(r"blocks\.\d+\.hook_resid_post", name)}
    if not layers:
        raise InvalidInputError(f"the index has no resid_post, only {list(index.hook_names)}; pass hook_name=")
    return layers[min(layers, key=lambda layer: abs(layer - 2 / 3 * (index.model_info.n_layers - 1)))]
