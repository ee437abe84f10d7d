"""The way from the residual stream to the logits: final norm, unembedding, and what the model does to its logits.

Models lack parts of it, so what is missing is found before anything is read, and the way is compared with the model's output.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.direction import is_bidirectional
from tl_latentlens.model.probe import probe_tokens
from tl_latentlens.model.state import evaluating, without_hooks
from tl_latentlens.search.ambient import own_arithmetic

_N_TOKENS = 8
_MAX_DIFFERENCE = 0.1  # as a share of the logits' spread; rounding to bfloat16 stays below
_problems: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


def readout_problem(model: Any) -> str | None:
    """Why logits cannot be read from the model's residual stream; None where they can.

    The last layer is read once for each model, and compared with the logits that the model itself gives.
    """
    if is_bidirectional(model):
        return "the logit lens needs a decoder: an encoder's MLM head would be skipped"
    if model not in _problems:
        _problems[model] = _missing_part(model) or _difference_from_output(model)
    return _problems[model]


def require_readout(model: Any) -> None:
    """Check that logits can be read from the model's residual stream.

    Raises:
        InvalidInputError: An encoder, a model without unembedding, or one that makes its logits in another way.
    """
    if problem := readout_problem(model):
        raise InvalidInputError(f"{problem}; pass logit_lens=False")


def residual_logits(model: Any, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
    """The logits if the model ended at these vectors, as `on_readout` gives them.

    Where a model has no final norm (normalization_type None, GPT-1), none is applied.
    """
    norm = _final_norm(model)
    native = _native_readout(model)
    # The native one refuses an empty batch, and does not move what its norm gives to another device.
    if native is not None and norm is not None and len(vectors) and vectors.device == model.W_U.device:
        return native(model, vectors, chunk_size=len(vectors)).values
    normed = vectors if norm is None else norm(vectors[:, None])[:, 0]
    logits = normed.to(model.W_U.device) @ model.W_U  # the norm of a model on several devices may be on another
    if (bias := getattr(model, "b_U", None)) is not None:
        logits = logits + bias.to(logits.device)
    adapter = getattr(model, "adapter", None)
    if adapter is not None and hasattr(adapter, "apply_output_logits_transform"):
        return adapter.apply_output_logits_transform(logits)
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    return cap * torch.tanh(logits / cap) if cap is not None and cap > 0 else logits


def on_readout(model: Any, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    """The vectors in the device and dtype of the parts that read them."""
    norm = _final_norm(model)
    first = None if norm is None else next(norm.parameters(), None)
    return vectors.to(first if first is not None else model.W_U)


@contextmanager
def reading_logits(model: Any) -> Iterator[None]:
    """A context for `residual_logits`: evaluation mode, no gradient, and no hook of the final norm fires."""
    norm = _final_norm(model)
    with evaluating(model), torch.no_grad(), nullcontext() if norm is None else without_hooks(norm):
        yield


def embedding_matrix(model: Any) -> Float[Tensor, "d_vocab d_model"]:
    """The model's input embeddings, W_E.

    Raises:
        InvalidInputError: The model has none.
    """
    weight = _weight(model, "W_E")
    if weight is None:
        raise InvalidInputError(
            f"this {type(model).__name__} has no input embeddings (W_E), which the embedding lens reads; pass "
            "embedding_lens=False"
        )
    return weight


def _missing_part(model: Any) -> str | None:
    """The part of the way that the model lacks; None where it has all."""
    kind, weight, d_model = type(model).__name__, _weight(model, "W_U"), int(model.cfg.d_model)
    if weight is None:
        return f"this {kind} has no unembedding (W_U), by which the logit lens reads"
    if weight.shape[0] != d_model:
        return f"the unembedding of this {kind} reads width {weight.shape[0]}, and its residual stream has d_model = {d_model}"
    return None


def _difference_from_output(model: Any) -> str | None:
    """How far logits that are read at the last layer are from the model's own; None where they agree."""
    hook_name = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    if hook_name not in model.hook_dict:  # an attached SAE took its place, so that the two need not agree
        return None
    kept: list[Tensor] = []
    tokens = probe_tokens(model, 1, _N_TOKENS)
    with evaluating(model), torch.no_grad(), without_hooks(model):
        own = model.run_with_hooks(tokens, fwd_hooks=[(hook_name, lambda activation, hook: kept.append(activation))])
        if not kept:  # it does not fire, or another thread took the hook off
            return None
        try:
            with own_arithmetic():
                read = residual_logits(model, on_readout(model, kept[-1].reshape(-1, kept[-1].shape[-1])))
        except (ValueError, NotImplementedError) as error:  # TransformerLens' own readout refuses some models
            return f"the logit lens does not serve this {type(model).__name__}: {error}"
    if not isinstance(own, Tensor) or own.numel() != read.numel():
        return f"this {type(model).__name__} gives no logits for each token, which the logit lens reads"
    centered = [logits.reshape(read.shape).float().cpu() for logits in (own, read)]
    centered = [logits - logits.mean(-1, keepdim=True) for logits in centered]  # center_unembed moves all logits alike
    difference, spread = float((centered[1] - centered[0]).abs().max()), float(centered[0].abs().max())
    if difference > _MAX_DIFFERENCE * spread:
        return (
            f"final norm and unembedding at {hook_name} give other logits than this {type(model).__name__} itself (off by "
            f"{difference / spread:.0%} of their spread), so the logit lens would mislead"
        )
    return None


def _final_norm(model: Any) -> Any:
    """The norm before the unembedding; None for a model without one."""
    return getattr(model, "ln_final", None)


def _weight(model: Any, name: str) -> Tensor | None:
    """A weight of the model; None where the model, or the part that holds it, is missing."""
    try:
        return getattr(model, name).detach()
    except (AttributeError, AssertionError, RuntimeError):  # a bridge's component without its Hugging Face module
        return None


def _native_readout(model: Any) -> Any:
    """The `logit_readout` of TransformerLens, for bridges and for versions that have it; else None."""
    if not hasattr(model, "adapter"):
        return None
    try:
        return getattr(import_module("transformer_lens.tools.analysis"), "logit_readout", None)
    except ImportError:
        return None
