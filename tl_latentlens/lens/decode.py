"""Readings of captured activations: neighbors, logit and embedding lens, and the ranks of chosen tokens in each."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.contextual import ContextualIndex, require_top_k
from tl_latentlens.index.search_result import SearchResult
from tl_latentlens.index.word_search import WordSearchResult
from tl_latentlens.lens.batches import indexed_hook_name, vector_batches
from tl_latentlens.lens.captures import Captures, RunTokens
from tl_latentlens.lens.followed import FollowedTokens, TokenRanks, context_ranks, neighbor_ranks
from tl_latentlens.lens.lenses import embedding_lens, embedding_ranks, logit_lens, logit_ranks
from tl_latentlens.lens.other_words import other_words, own_words, words_around
from tl_latentlens.lens.positions import decoded_positions
from tl_latentlens.lens.result import LensResult
from tl_latentlens.lens.settings import LensSettings
from tl_latentlens.model.heads import head_result_layer
from tl_latentlens.model.hook_points import in_residual_stream
from tl_latentlens.model.image_tokens import placeholder_ids
from tl_latentlens.model.readout import readout_problem
from tl_latentlens.model.token_strings import single_tokens, token_bytes, token_strings
from tl_latentlens.search.ambient import own_arithmetic
from tl_latentlens.views.data import TokenReading

_Reading = TypeVar("_Reading", TokenReading, TokenRanks)


@own_arithmetic(full_products=True)
def decode_captures(captures: Captures, index: ContextualIndex, settings: LensSettings) -> LensResult:
    """The reading of every decoded token of a run.

    Raises:
        InvalidInputError: Nothing was captured, the model is needed and not known, or a NaN activation.
    """
    _require_captures(captures)
    _require_model_where_needed(captures, settings)
    keeps_special_tokens = any(bank.plan.settings.keep_special_tokens for bank in index.banks)
    model, run_tokens = captures.model, captures.run_tokens(keeps_special_tokens)
    decoded = decoded_positions(settings, captures, run_tokens)
    if run_tokens is not None:
        _warn_of_two_bos(model, run_tokens.ids)
    if isinstance(settings.positions, str):
        hook_name = captures.hook_names[0]
        _warn_where_no_image_was(hook_name, captures.vectors(hook_name, decoded))
    settings = _without_missing_readout(captures, settings)
    tokens = None if run_tokens is None else _DecodedTokens.of(run_tokens, model, decoded)
    neighbors, words, around, logits, embeddings = {}, {}, {}, {}, {}
    for batch in vector_batches(captures, decoded, index):
        asked = {"query_hook_name": batch.query_hook_name, "distinct": settings.distinct}
        search_result = index.search(batch.vectors, settings.top_k, **asked)
        found = {name: search_result[i] for i, name in enumerate(batch.hook_names)}
        if settings.calibrate:
            vectors = dict(zip(batch.hook_names, batch.vectors, strict=True))
            found = {name: _with_known(one, vectors[name], name, tokens, index) for name, one in found.items()}
        if settings.calibrate is True:
            found = {name: one.with_chances() for name, one in found.items()}
        neighbors |= found
        if settings.words:
            for name, vectors in zip(batch.hook_names, batch.vectors, strict=True):
                words[name] = _other_words(vectors, name, tokens, index, settings)
                indexed = indexed_hook_name(name, index)
                if tokens is not None and indexed is not None:
                    around[name] = words_around(vectors, indexed, index, tokens.words)
        if model is not None and batch.is_residual:
            if settings.logit_lens:
                logits |= _by_hook_name(batch.hook_names, logit_lens(model, batch.vectors, settings.top_k))
            if settings.embedding_lens:
                embeddings |= _by_hook_name(batch.hook_names, embedding_lens(model, batch.vectors, settings.top_k))
    strings = is_special = None
    if run_tokens is not None:
        is_special = run_tokens.is_skipped.cpu().numpy() | _is_placeholder(run_tokens, model)
        strings = _token_strings(run_tokens, model)
    return LensResult(tuple(captures.hook_names), strings, decoded, neighbors, logits, embeddings, is_special, words, around)


@dataclass(frozen=True)
class _DecodedTokens:
    """The token id at each decoded cell, whether it stands for a part of an image, and the word that it belongs to."""

    ids: Int[np.ndarray, " cells"]
    is_placeholder: Bool[np.ndarray, " cells"]
    words: list[str]

    @classmethod
    def of(cls, run_tokens: RunTokens, model: Any, decoded: Bool[np.ndarray, "batch pos"]) -> "_DecodedTokens":
        is_placeholder, is_skipped = _is_placeholder(run_tokens, model), run_tokens.is_skipped.cpu().numpy()
        ids = run_tokens.ids.cpu().numpy()
        words = own_words(ids, token_bytes(model, np.unique(ids).tolist()), is_skipped | is_placeholder, decoded)
        return cls(ids[decoded], is_placeholder[decoded], words)


def _token_strings(run_tokens: RunTokens, model: Any) -> list[list[str]]:
    """[batch][pos] texts of the run's tokens."""
    string_of = token_strings(model, run_tokens.ids.unique().tolist())
    return [[string_of[i] for i in ids] for ids in run_tokens.ids.tolist()]


def _is_placeholder(run_tokens: RunTokens, model: Any) -> Bool[np.ndarray, "batch pos"]:
    return np.isin(run_tokens.ids.cpu().numpy(), list(placeholder_ids(model)))


def _with_known(
    found: SearchResult,
    vectors: Float[Tensor, "cells d"],
    hook_name: str,
    tokens: _DecodedTokens | None,
    index: ContextualIndex,
) -> SearchResult:
    """What was found, and how well the bank knows the tokens; visual tokens are no tokens of text, which it could know."""
    name = indexed_hook_name(hook_name, index)
    known = None if name is None else index.known(vectors, found, name)
    use_chances = None if name is None or tokens is None else index.use_chances(vectors, found, name, tokens.ids)
    if known is not None and tokens is not None:
        known = known.masked_fill(torch.from_numpy(tokens.is_placeholder).to(known.device), torch.nan)
    return replace(found, known=known, use_chances=use_chances)


def _other_words(
    vectors: Float[Tensor, "cells d"],
    hook_name: str,
    tokens: _DecodedTokens | None,
    index: ContextualIndex,
    settings: LensSettings,
) -> WordSearchResult:
    words, is_visual = (None, np.ones(len(vectors), bool)) if tokens is None else (tokens.words, tokens.is_placeholder)
    name = indexed_hook_name(hook_name, index) or hook_name
    return other_words(vectors, name, index, settings.words, words, is_visual, calibrate=settings.calibrate is True)


def _warn_of_two_bos(model: Any, ids: Int[Tensor, "batch pos"]) -> None:
    """Warn where a text brought its BOS and the run put another before it, which changes all activations."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None or bos == tokenizer.pad_token_id or ids.shape[1] < 2:
        return
    if n_texts := int((ids[:, :2] == bos).all(-1).sum()):
        warnings.warn(
            f"{n_texts} of {len(ids)} texts of the run begin with two BOS: they bring their own (a chat template?), and the "
            "model added one; run them with prepend_bos=False",
            stacklevel=6,
        )


@own_arithmetic(full_products=True)
def follow_tokens(
    captures: Captures,
    index: ContextualIndex,
    settings: LensSettings,
    result: LensResult,
    tokens: str | int | Sequence[str | int],
    top_k: int,
) -> FollowedTokens:
    """Score and rank of chosen tokens in each lens, at every layer and decoded position of a run.

    Args:
        captures: The run.
        index: The rows whose tokens are counted.
        settings: Which lenses are read.
        result: The reading of the same run.
        tokens: Single tokens, as text with their leading space or as ids.
        top_k: How many of the nearest rows to count in.

    Raises:
        InvalidInputError: A text that is not one token, an id outside the vocabulary, or a model that is not known.
    """
    model = captures.model
    if model is None:
        raise InvalidInputError("tokens are followed with the model: LatentLensHook(index, model=model)")
    require_top_k(top_k)
    ids = single_tokens(model, [tokens] if isinstance(tokens, str | int) else list(tokens))
    token_ids, row_token_ids = torch.tensor(ids), index.bank_rows.token_ids()
    shares, logits, embeddings = {}, {}, {}
    for batch in vector_batches(captures, result.decoded, index):
        found = index.search(batch.vectors, top_k, query_hook_name=batch.query_hook_name, distinct=settings.distinct)
        rows = found.rows.cpu().numpy()
        shares |= _by_hook_name(batch.hook_names, neighbor_ranks(row_token_ids[rows], ids))
        if batch.is_residual:
            if result.logit_lens:
                logits |= _by_hook_name(batch.hook_names, logit_ranks(model, batch.vectors, token_ids))
            if result.embedding_lens:
                embeddings |= _by_hook_name(batch.hook_names, embedding_ranks(model, batch.vectors, token_ids))
    string_of = token_strings(model, ids)
    return FollowedTokens(tuple(string_of[i] for i in ids), result, top_k, shares, logits, embeddings)


@own_arithmetic(full_products=True)
def follow_words(
    captures: Captures,
    index: ContextualIndex,
    settings: LensSettings,
    result: LensResult,
    words: str | Sequence[str],
    top_k: int,
    language: str | None,
) -> FollowedTokens:
    """The share of the nearest contexts that hold chosen words, at every layer and decoded position of a run.

    Args:
        captures: The run.
        index: The rows whose contexts are counted.
        settings: Whether each row counts once.
        result: The reading of the same run.
        words: Words of three letters or more.
        top_k: How many of the nearest rows to count in.
        language: Of the stemmer; None: the same letters only.

    Raises:
        InvalidInputError: No word, or something that is not one such word.
    """
    require_top_k(top_k)
    chosen = tuple(dict.fromkeys([words] if isinstance(words, str) else words))
    if not chosen:
        raise InvalidInputError("got no words; expected at least one")
    index.contexts_hold(np.zeros(0, np.int64), chosen, language=language)  # refuses what is no word before the search
    shares = {}
    for batch in vector_batches(captures, result.decoded, index):
        found = index.search(batch.vectors, top_k, query_hook_name=batch.query_hook_name, distinct=settings.distinct)
        holds = index.contexts_hold(found.rows, chosen, language=language)
        shares |= _by_hook_name(batch.hook_names, context_ranks(holds))
    return FollowedTokens(chosen, result, top_k, {}, {}, {}, shares)


def _require_captures(captures: Captures) -> None:
    if not captures:
        raise InvalidInputError(
            "nothing was captured: run the model with these hooks first, "
            "model.run_with_hooks(text, fwd_hooks=latentlens_hooks(index)); where it ran, none of the hook names fired"
        )
    captures.require_whole()


def _require_model_where_needed(captures: Captures, settings: LensSettings) -> None:
    if captures.model is not None:
        return
    if settings.logit_lens or settings.embedding_lens:
        raise InvalidInputError("the logit lens needs the model: LatentLensHook(index, model=model), or logit_lens=False")
    if any(head_result_layer(name) is not None for name in captures.hook_names):
        raise InvalidInputError("hook_result[head] is computed with the model's W_O: LatentLensHook(index, model=model)")


def _without_missing_readout(captures: Captures, settings: LensSettings) -> LensSettings:
    """The settings, without the logit lens where it cannot read the model; a warning says why."""
    if not settings.logit_lens or captures.model is None or not any(map(in_residual_stream, captures.hook_names)):
        return settings
    if problem := readout_problem(captures.model):
        warnings.warn(f"the result is without the logit lens: {problem}; logit_lens=False says so at once", stacklevel=5)
        return replace(settings, logit_lens=False)
    return settings


def _warn_where_no_image_was(hook_name: str, vectors: Float[Tensor, "cells d"]) -> None:
    """Warn of visual tokens that are all alike: a model that was given only the ids of an image runs on its placeholders."""
    if len(vectors) > 1 and bool((vectors == vectors[:1]).all()):
        warnings.warn(
            f"all {len(vectors)} visual tokens are the same at {hook_name}: was the image given to the model (pixel_values=)?",
            stacklevel=5,
        )


def _by_hook_name(hook_names: Sequence[str], reading: _Reading) -> dict[str, _Reading]:
    """A reading of the vectors of several hook names, split into one of each."""
    arrays = {key: np.split(value, len(hook_names)) for key, value in vars(reading).items() if isinstance(value, np.ndarray)}
    return {name: replace(reading, **{key: parts[i] for key, parts in arrays.items()}) for i, name in enumerate(hook_names)}
