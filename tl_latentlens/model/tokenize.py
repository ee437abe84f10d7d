"""Prompts of texts: the tokens that a model's `to_tokens` makes, without padding or a second BOS, cut at its context length.

`prompt_parts` measures what stands before and after each text; here the parts are put together and checked.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from tl_latentlens.corpus.plan import Prompts
from tl_latentlens.corpus.unicode import require_unicode
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.activations import pad_prompts
from tl_latentlens.model.describe import model_device, require_embedded
from tl_latentlens.model.direction import is_bidirectional
from tl_latentlens.model.prompt_parts import PromptParts, PromptSplitter
from tl_latentlens.model.special_tokens import special_token_ids

_TOKENIZER_BATCH_CHARACTERS = 2**18


def tokenize(model: Any, texts: Iterable[str], *, repeat: bool = False, keep_special_tokens: bool = False) -> Prompts:
    """The prompts of texts: the tokens of `model.to_tokens`, without padding, cut at n_ctx.

    A text that begins with its own BOS gets no second one, which `to_tokens` would put before it.

    Args:
        model: The model whose tokenizer is used.
        texts: Texts, read one by one.
        repeat: Cut each text so that BOS text text fits n_ctx.
        keep_special_tokens: Do not mark the special tokens of the texts themselves, such as those of a chat template, nor
            those that `to_tokens` puts after a text.

    Raises:
        InvalidInputError: The model has no tokenizer, or cannot read a text twice: it is bidirectional, or puts tokens
            after a text. A text that cannot be encoded, or a token that the model cannot embed.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InvalidInputError("the model has no tokenizer; give it one (model.set_tokenizer) to build a bank from text")
    if repeat and is_bidirectional(model):
        raise _cannot_repeat("it sees the whole text at once")
    splitter = PromptSplitter(model)
    buffer, lengths, n_before, n_after, n_truncated, n_own_bos = array("i"), array("q"), array("i"), array("i"), 0, 0
    for batch in _in_batches(texts):
        require_unicode(batch, len(lengths))
        for parts in splitter.split(batch):
            if repeat and parts.after:
                raise _cannot_repeat(f"to_tokens puts {parts.after} after a text")
            text_ids = parts.text[: _room_for_text(model, parts, repeat)]
            prompt = [*parts.before, *text_ids, *parts.after]
            buffer.fromlist(prompt)
            lengths.append(len(prompt))
            n_before.append(len(parts.before))
            n_after.append(len(parts.after))
            n_truncated += parts.is_cut or len(text_ids) < len(parts.text)
            n_own_bos += parts.has_own_bos
    tokens = np.asarray(buffer, np.int32)
    starts = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    require_embedded(model, tokens, starts)
    text_start = min(n_before, default=0)
    special = _special_mask(tokenizer, tokens, starts, np.asarray(n_before), np.asarray(n_after), keep_special_tokens)
    return Prompts(tokens, starts, special, n_truncated, text_start, n_own_bos)


def _cannot_repeat(why: str) -> InvalidInputError:
    return InvalidInputError(f"got repeat=True for a model that cannot read a text twice: {why}; leave repeat out")


def _room_for_text(model: Any, parts: PromptParts, repeat: bool) -> int:
    """The most tokens that a text may have beside what stands before and after it."""
    return (model.cfg.n_ctx - len(parts.before) - len(parts.after)) // (1 + repeat)


def _special_mask(
    tokenizer: Any,
    tokens: Int[np.ndarray, " tokens"],
    starts: Int[np.ndarray, " prompts_and_end"],
    n_before: Int[np.ndarray, " prompts"],
    n_after: Int[np.ndarray, " prompts"],
    keep_special_tokens: bool,
) -> Bool[np.ndarray, " tokens"]:
    """True at the tokens that are no text."""
    special = np.zeros(len(tokens), bool)
    for position in range(int(n_before.max(initial=0))):
        special[starts[:-1][n_before > position] + position] = True
    if keep_special_tokens:
        pad = tokenizer.pad_token_id
        return special if pad in (None, tokenizer.bos_token_id, tokenizer.eos_token_id) else special | (tokens == pad)
    for position in range(int(n_after.max(initial=0))):
        special[starts[1:][n_after > position] - 1 - position] = True
    return special | np.isin(tokens, list(special_token_ids(tokenizer)))


@dataclass(frozen=True)
class RunInput:
    """The input of a run of several texts, for `model.run_with_hooks(run.input, attention_mask=run.attention_mask)`.

    Attributes:
        input: The texts as they are; or their tokens, padded at the right, where a text brings its own BOS.
        attention_mask: True at tokens; None with texts, of which the model makes its own.
    """

    input: list[str] | Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"] | None


def run_input(model: Any, texts: Sequence[str]) -> RunInput:
    """Texts as a model is to read them: without the second BOS that it would put before a text with its own."""
    prompts = tokenize(model, texts)
    if not prompts.n_own_bos:
        return RunInput(list(texts), None)
    return RunInput(*pad_prompts(prompts.as_lists(), model_device(model)))


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
