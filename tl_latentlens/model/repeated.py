"""Texts that a model reads twice, so that each token of the second copy has seen what comes after it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tl_latentlens.model.describe import model_device, require_model
from tl_latentlens.model.tokenize import tokenize
from tl_latentlens.search.ambient import own_arithmetic


@dataclass(frozen=True)
class RepeatedTexts:
    """Texts as the model of a repeat bank reads them: each twice, padded at the right.

    Attributes:
        tokens: BOS text text, [batch, pos].
        attention_mask: 1 at tokens, 0 at padding.
        second_copy: True at the text in the second copy, whose tokens know what comes after them: the `positions` for
            `latentlens_hooks`.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    second_copy: Bool[Tensor, "batch pos"]


@own_arithmetic()
def repeated(model: Any, texts: str | Sequence[str], *, keep_special_tokens: bool = False) -> RepeatedTexts:
    """Texts to run twice, as for a bank that was built with `repeat=True`.

    >>> run = repeated(model, "A boat by the bank.")                              # doctest: +SKIP
    >>> hooks = latentlens_hooks(index, positions=run.second_copy)
    >>> model.run_with_hooks(run.tokens, attention_mask=run.attention_mask, fwd_hooks=hooks)

    Args:
        model: A causal HookedTransformer or TransformerBridge.
        texts: One text or several, of any lengths; each is cut so that both copies fit n_ctx.
        keep_special_tokens: Read the special tokens of the texts too, as for a bank that was built with it.

    Raises:
        InvalidInputError: The model has no tokenizer, is bidirectional, or puts tokens after a text.
    """
    require_model(model)
    texts = [texts] if isinstance(texts, str) else texts
    plan_prompts = tokenize(model, texts, repeat=True, keep_special_tokens=keep_special_tokens)
    text_start, inner_starts = plan_prompts.text_start or 0, plan_prompts.starts[1:-1]
    prompts = [torch.from_numpy(prompt) for prompt in np.split(plan_prompts.tokens, inner_starts)]
    is_text = [torch.from_numpy(prompt) for prompt in np.split(~plan_prompts.special, inner_starts)]
    runs = [torch.cat([prompt, prompt[text_start:]]).long() for prompt in prompts]
    tokens = pad_sequence(runs, batch_first=True, padding_value=model.tokenizer.pad_token_id or 0)
    positions = torch.arange(tokens.shape[1])
    is_token = positions < torch.tensor([len(run) for run in runs])[:, None]
    is_read = [torch.cat([torch.zeros_like(text), text[text_start:]]) for text in is_text]
    is_second_copy = pad_sequence(is_read, batch_first=True, padding_value=False)
    device = model_device(model)
    return RepeatedTexts(tokens.to(device), is_token.long().to(device), is_second_copy.to(device))
