"""The logit lens and the embedding lens: what the model's own unembedding and embedding read from a vector."""

from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model import evaluating, is_bidirectional, token_bytes, without_hooks
from tl_latentlens.results import TokenReading
from tl_latentlens.search import VectorSearch

_LOGIT_BYTES = 128 * 2**20
_embeddings: WeakKeyDictionary[Any, VectorSearch] = WeakKeyDictionary()


def logit_lens(model: Any, vectors: Float[Tensor, "... d_model"], top_k: int = 5) -> TokenReading:
    """The likeliest next tokens if the model ended here: softmax(unembed(ln_final(v))).

    Uses `logit_readout` of TransformerLens 4.3 where there is one, else `ln_final`, `W_U`, `b_U` and the model's own logit
    transform (softcap, logit scale).

    Args:
        model: A decoder-only TransformerLens model.
        vectors: Residual-stream vectors, any leading shape.
        top_k: Tokens of each.

    Returns:
        Token ids and probabilities in [0, 1], the leading shape flattened.

    Raises:
        InvalidInputError: An encoder, whose MLM head this would skip, or a wrong width.
    """
    if is_bidirectional(model):
        raise InvalidInputError("the logit lens needs a decoder: an encoder's MLM head would be skipped; pass logit_lens=False")
    flat = vectors.detach().reshape(-1, vectors.shape[-1])
    if flat.shape[-1] != model.cfg.d_model:
        raise InvalidInputError(f"got vectors of width {flat.shape[-1]}; the logit lens reads d_model = {model.cfg.d_model}")
    parameter = next(model.ln_final.parameters(), None)
    weight = model.W_U
    flat = flat.to(weight.device, weight.dtype if parameter is None else parameter.dtype)
    ids, scores = [], []
    with evaluating(model), torch.no_grad(), without_hooks(model.ln_final):
        for part in flat.split(max(1, _LOGIT_BYTES // (4 * model.cfg.d_vocab))):
            top = _logits(model, part).float().softmax(-1).topk(min(top_k, model.cfg.d_vocab), dim=-1)
            ids.append(top.indices.cpu())
            scores.append(top.values.cpu())
    return _reading(model, torch.cat(ids), torch.cat(scores))


def _logits(model: Any, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
    readout = _native_readout(model)
    if readout is not None and len(vectors):  # it refuses none at all
        return readout(model, vectors, chunk_size=len(vectors)).values
    logits = model.ln_final(vectors[:, None])[:, 0] @ model.W_U + model.b_U
    adapter = getattr(model, "adapter", None)
    if adapter is not None and hasattr(adapter, "apply_output_logits_transform"):
        return adapter.apply_output_logits_transform(logits)
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    return cap * torch.tanh(logits / cap) if cap is not None and cap > 0 else logits


def _native_readout(model: Any) -> Any:
    """TransformerLens's own readout, for the bridges of versions that have it."""
    if not hasattr(model, "adapter"):
        return None
    try:
        return getattr(import_module("transformer_lens.tools.analysis"), "logit_readout", None)
    except ImportError:
        return None


def embedding_lens(model: Any, vectors: Float[Tensor, "... d_model"], top_k: int = 5) -> TokenReading:
    """The input embeddings (rows of W_E) nearest to each vector by cosine, in [-1, 1], the leading shape flattened."""
    if model not in _embeddings:
        weight = model.W_E.detach()
        _embeddings[model] = VectorSearch(weight, weight.device, unit_length=False)
    found = _embeddings[model].top_k(vectors.detach().reshape(-1, vectors.shape[-1]), top_k)
    return _reading(model, found.rows.cpu(), found.similarities.cpu())


def _reading(model: Any, ids: Tensor, scores: Tensor) -> TokenReading:
    texts = token_bytes(model, ids.unique().tolist())
    strings = {i: text.decode("utf-8", errors="replace") for i, text in texts.items()}
    return TokenReading(ids.numpy(), scores.numpy(), strings)
