"""The SAE features that write the meaning of a word in its context."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.directions.features.label import label_features
from tl_latentlens.directions.features.sae import (
    can_encode,
    decoder_of,
    encode,
    hook_names_of,
    nonzero_features,
    require_sae,
    rows_per_step,
)
from tl_latentlens.directions.features.sae_fit import require_encoder_of_rows, require_width, warn_of_other_model
from tl_latentlens.directions.find.component_ranking import Contributions, RankedComponents, rank_components
from tl_latentlens.directions.find.other_meanings import other_meanings, unlike_the_word
from tl_latentlens.directions.find.result import FindResult
from tl_latentlens.directions.find.word_in_context import (
    MAX_STORED_ROWS,
    N_NEIGHBORS,
    WordInContext,
    locate_word,
    stored_activations,
)
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.model.layers import one_hook_name
from tl_latentlens.search.ambient import own_arithmetic


def find_features(
    text: str,
    at: int | str,
    sae: Any,
    index: ContextualIndex,
    *,
    model: Any,
    hook_name: int | str | None = None,
    top_k: int = 10,
    label: bool = True,
    seed: int = 0,
) -> FindResult:
    """The SAE features that write the meaning of a word in its context, the largest share first.

    Take the other uses of the word's token in the bank, and their activations (vector x norm) less the mean of those uses.
    The third with the largest cosine to this use, at most ten, are the similar uses. Project the rest on (mean of the similar
    uses - mean of the rest): those on the far side of the midpoint are the contrast uses. The meaning's direction m [d] is
    the mean of the similar uses less that of the contrast uses, scaled to length 1. So m has what this use shares with others
    like it, and not all that happens to stand before it. With fewer than six other uses, m is a, the activation at the word,
    less the bank's mean.

    A feature's `contribution` is its part of a along m, acts_f (W_dec[f] · m), in units of the activation. `usual` is its mean
    at the contrast uses. `share`, by which the table is ranked, is (contribution - usual) / (a · m - mean of a · m over the
    contrast uses). The shares of all features and of the reconstruction error add up to 1. A feature that adds as much
    everywhere has share 0.

    Each feature is compared with its own contributions along the same m at two sets of rows, up to 1000 each, from the bank's
    stored activations: the contrast uses (`_same_token`) and random rows (`_random`). p = (1 + nulls at least as large) /
    (1 + n). p_random also tells how particular a feature is: a meaning that many tokens share is written at many. Each of
    these is the p of one feature; among many, some reach it by chance.

    `p_family` knows of all features. It compares the feature's contribution - usual with the largest of any active feature
    along the meaning of another word, made as m is: of the 199 tokens that are nearest to this one, without those whose meaning
    is nearly m (a cosine above 0.5); there are `n_family`. Each is turned so that the word has more of it than usual.
    `beats_null`: p_family is at most 0.05, and p_same_token (p_random where the bank has too few uses of the token) at most
    0.05 or the smallest that n allows. `why_not` says what failed otherwise.

    Args:
        text: The text. It is run up to the word.
        at: A position (BOS counted; negative: from the end), or a word: the last token that ends it.
        sae: An SAELens SAE, or what `load_sae` returns, with an encoder.
        index: Holds the activation that the SAE reads. Directions are read by its centered rows, unless it was made with
            another transform than "auto".
        model: The bank's model.
        hook_name: The activation that the SAE reads and writes, or its layer; None: the one that the SAE names.
        top_k: Features to return, of those that are active at the word.
        label: Add labels (`label_features`: one pass of the encoder over the bank).
        seed: Seed of the sampled rows.

    Returns:
        A table with a line a feature: feature, activation, contribution, usual, share, beats_null, why_not, p, z and n against
        each null (p_same_token, ..., p_random, ...), p_family and n_family, label, label_kind, label_why_not, density.
        `parts`: the share of all features active at the word, and the rest: features active at other uses alone, and the
        reconstruction error. Neighbors are those of the decoder row.

    Raises:
        InvalidInputError: No such position or word; no encoder; a transcoder; another width than the activation; a bank that
            was built with repeat.
        UnknownHookError: The index lacks the activation.
        ModelMismatchError: `model` is not the bank's.
    """
    named = None if hook_name is None else one_hook_name(hook_name, index.model_info.n_layers)
    read_hook = _require_encoder_of_one_hook(sae, named)
    word = locate_word(text, at, index, model, read_hook, MAX_STORED_ROWS, seed)
    decoder = decoder_of(sae)
    require_width(sae, index, read_hook)
    if not label:
        warn_of_other_model(sae, index)  # `label_features` does so too.
    require_encoder_of_rows(sae, word.activation[None])
    activations = encode(sae, word.activation[None])[0].cpu()
    active = torch.from_numpy(np.flatnonzero((activations != 0).numpy() & nonzero_features(sae)))
    if not len(active):
        raise InvalidInputError(
            f"no feature of the SAE is active at {word.token_strings[-1]!r}; is {read_hook} what it was trained on?"
        )
    ranked = rank_features(word, other_meanings(word, index, seed), sae, index, active, top_k)
    features, table = active[ranked.places], ranked.table
    table.insert(0, "feature", features.numpy())
    table.insert(1, "activation", activations[features].numpy())
    if label and len(features):
        labels = label_features(sae, index, features.tolist(), hook_name=read_hook, progress=False).table
        table["label"], table["label_kind"], table["label_why_not"] = labels["label"], labels["label_kind"], labels["why_not"]
        table["density"] = labels["density"]
    active_share = float(ranked.shares.sum())
    parts = {"features active here": active_share, "the rest": 1 - active_share}
    neighbors = index.for_directions.search(decoder[features], N_NEIGHBORS, read_hook)
    return FindResult("feature", word.meaning(index), table, parts, neighbors)


def rank_features(
    word: WordInContext,
    others: Float[Tensor, "meanings d"],
    sae: Any,
    index: ContextualIndex,
    active: Int[Tensor, " active"],
    top_k: int,
) -> RankedComponents:
    """The features with the largest shares, of those that are active at the word.

    Args:
        word: The word.
        others: The meanings of other words (`other_meanings`).
        sae: The SAE, with an encoder.
        index: Holds the activation that the SAE reads.
        active: The features that are active at the word.
        top_k: At least 1.
    """
    decoder = decoder_of(sae)
    with own_arithmetic(full_products=True):
        directions = torch.cat([word.direction[None], unlike_the_word(others, word)]).to(decoder.device)
        own, along_others = (decoder[active].float() @ directions.float().T).cpu().tensor_split([1], dim=1)
    at_word = encode(sae, word.activation[None])[0, active].cpu()
    at_contrast, at_random = (
        _activations_at_rows(sae, index, word.hook_name, rows, active) for rows in (word.contrast_rows, word.random_rows)
    )
    excess = at_word - (at_contrast if word.has_contrast else at_random).mean(0)
    contributions = Contributions(
        (at_word * own[:, 0]).numpy(),
        (at_contrast * own[:, 0]).numpy(),
        (at_random * own[:, 0]).numpy(),
        (excess[:, None] * along_others).amax(0).numpy(),
    )
    return rank_components(contributions, word, word.strength, top_k)


def _require_encoder_of_one_hook(sae: Any, hook_name: str | None) -> str:
    """The hook name that an SAE both reads and writes.

    Raises:
        InvalidInputError: No SAE, one without an encoder, or one that reads and writes different activations.
    """
    require_sae(sae)
    if not can_encode(sae):
        raise InvalidInputError("got an SAE without an encoder; give W_enc and its biases too: its activations are needed")
    encoder_hook, decoder_hook = hook_names_of(sae) if hook_name is None else (hook_name, hook_name)
    if encoder_hook is None or encoder_hook != decoder_hook:
        raise InvalidInputError(
            f"got an SAE that reads {encoder_hook} and writes {decoder_hook}; expected one activation, or pass hook_name="
        )
    return encoder_hook


def _activations_at_rows(
    sae: Any, index: ContextualIndex, hook_name: str, rows: Int[np.ndarray, " n"], features: Int[Tensor, " f"]
) -> Float[Tensor, "n f"]:
    """The activation of each feature at each row, from the bank's stored activations."""
    if not len(rows):
        return torch.zeros(0, len(features))
    stored = stored_activations(index, hook_name, rows)
    return torch.cat([encode(sae, part)[:, features].cpu() for part in stored.split(rows_per_step(sae))])
