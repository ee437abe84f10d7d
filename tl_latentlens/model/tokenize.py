"""Prompts of texts: the tokens that a model's `to_tokens` makes, without padding, cut at its context length."""

from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from tl_latentlens.corpus.plan import Prompts
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.describe import is_bidirectional

_TOKENIZER_BATCH_CHARACTERS = 2**18


def tokenize(model: Any, texts: Iterable[str], *, repeat: bool = False) -> Prompts:
    """The prompts of texts: the tokens of `model.to_tokens`, without padding, cut at n_ctx.

    Args:
        model: The model whose tokenizer is used.
        texts: Texts, read one by one.
        repeat: Cut each text so that BOS text text fits n_ctx.

    Raises:
        InvalidInputError: The model has no tokenizer, or cannot read a text twice: it is bidirectional, or puts tokens
            after a text.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InvalidInputError("the model has no tokenizer; give it one (model.set_tokenizer) to build a bank from text")
    before, after = tokens_around_text(model)
    if repeat and (after or is_bidirectional(model)):
        why = f"to_tokens puts {after} after a text" if after else "it sees the whole text at once"
        raise InvalidInputError(f"got repeat=True for a model that cannot read a text twice: {why}; leave repeat out")
    max_text_tokens = (model.cfg.n_ctx - len(before) - len(after)) // (1 + repeat)
    buffer, lengths, n_truncated = array("i"), array("q"), 0
    for batch in _in_batches(texts):
        for ids in tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]:
            prompt = [*before, *ids[:max_text_tokens], *after]
            buffer.fromlist(prompt)
            lengths.append(len(prompt))
            n_truncated += len(ids) > max_text_tokens
    tokens = np.asarray(buffer, np.int32)
    starts = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    special = np.zeros(len(tokens), bool)
    for position in range(len(before)):
        special[starts[:-1] + position] = True
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        special |= tokens == tokenizer.pad_token_id
    return Prompts(tokens, starts, special, n_truncated)


def tokens_around_text(model: Any) -> tuple[list[int], list[int]]:
    """The ids that `model.to_tokens` puts before a text (BOS) and after it; they depend on model and tokenizer.

    Raises:
        InvalidInputError: `to_tokens` splits a text otherwise than the tokenizer does.
    """
    bare = model.tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = model.to_tokens("a")[0].tolist()
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise InvalidInputError(
        f"model.to_tokens('a') gives {whole}, which does not hold the tokenizer's own {bare}; plan your own tokens (make_plan)"
    )


def _in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists, each of which is tokenized at once."""
    batch, n_characters = [], 0
    for text in texts:
        batch.append(text)
        n_characters += len(text) + 1  # an empty text counts as one, so that a batch of empty texts ends too
        if n_characters >= _TOKENIZER_BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch
