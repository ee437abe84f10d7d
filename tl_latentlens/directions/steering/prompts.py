"""Texts that the directions are made of or read on, as tokens; the model's own tokenizer is called in `model`."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from tl_latentlens.corpus.plan import Prompts
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.tokenize import tokenize


def tokenize_prompts(model: Any, texts: str | Sequence[str], name: str, min_tokens: int = 1) -> Prompts:
    """The tokens of one or more texts. Warns two calls up where a text is longer than the context window.

    Args:
        model: A TransformerLens model with a tokenizer.
        texts: A text, or texts.
        name: The name of the texts in errors and warnings: "positive".
        min_tokens: The number of tokens besides BOS that each text must have.

    Raises:
        InvalidInputError: No texts, something that is no str, or a text with fewer tokens.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise InvalidInputError(f"got no {name} prompts; expected at least one text")
    if not all(isinstance(text, str) for text in texts):
        raise InvalidInputError(f"got {name} prompts {str(texts)[:60]}; expected texts, each a str")
    prompts = tokenize(model, texts)
    n_tokens = np.diff(np.r_[0, np.cumsum(~prompts.special)][prompts.starts])
    if (n_tokens < min_tokens).any():
        short = int(np.argmax(n_tokens < min_tokens))
        raise InvalidInputError(
            f"{name} prompt {short}, {texts[short]!r}, has {n_tokens[short]} tokens besides BOS; expected at least {min_tokens}"
        )
    if prompts.n_truncated:
        message = f"{prompts.n_truncated} {name} prompts were longer than n_ctx = {model.cfg.n_ctx} tokens and were cut"
        warnings.warn(message, stacklevel=3)
    return prompts
