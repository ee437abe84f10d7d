"""The logit lens and the embedding lens: what the model's own unembedding and embedding read from a vector."""

from collections.abc import Callable
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.lens.followed import TokenRanks
from tl_latentlens.lens.result import TokenReading
from tl_latentlens.model.describe import is_bidirectional
from tl_latentlens.model.running import evaluating, without_hooks
from tl_latentlens.model.token_strings import token_bytes
from tl_latentlens.search.vectors import VectorSearch

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
    ids, scores = _over_logits(
        model, vectors, lambda logits: logits.softmax(-1).topk(min(top_k, logits.shape[-1]), dim=-1)[::-1]
    )
    return _reading(model, ids, scores)


def logit_ranks(model: Any, vectors: Float[Tensor, "... d_model"], token_ids: Int[Tensor, " tokens"]) -> TokenRanks:
    """Probability and rank of chosen tokens among the whole vocabulary, as `logit_lens` reads it.

    Raises:
        InvalidInputError: As `logit_lens`.
    """

    def standing(logits: Float[Tensor, "n d_vocab"]) -> tuple[Tensor, Tensor]:
        chosen = logits[:, token_ids.to(logits.device)]
        above = torch.stack([(logits > one[:, None]).sum(-1) for one in chosen.unbind(-1)], -1)
        return (chosen - logits.logsumexp(-1, keepdim=True)).exp(), above + 1

    scores, ranks = _over_logits(model, vectors, standing)
    return TokenRanks(scores.numpy(), ranks.numpy())


def _over_logits(
    model: Any, vectors: Float[Tensor, "... d_model"], read: Callable[[Float[Tensor, "n d_vocab"]], tuple[Tensor, ...]]
) -> list[Tensor]:
    """What `read` takes from the logits of all vectors, on the CPU; only the logits of some are held at once."""
    if is_bidirectional(model):
        raise InvalidInputError("the logit lens needs a decoder: an encoder's MLM head would be skipped; pass logit_lens=False")
    flat = vectors.detach().reshape(-1, vectors.shape[-1])
    if flat.shape[-1] != model.cfg.d_model:
        raise InvalidInputError(f"got vectors of width {flat.shape[-1]}; the logit lens reads d_model = {model.cfg.d_model}")
    parameter = next(model.ln_final.parameters(), None)
    weight = model.W_U
    flat = flat.to(weight.device, weight.dtype if parameter is None else parameter.dtype)
    with evaluating(model), torch.no_grad(), without_hooks(model.ln_final):
        split = flat.split(max(1, _LOGIT_BYTES // (4 * model.cfg.d_vocab)))
        parts = [[one.cpu() for one in read(_logits(model, part).float())] for part in split]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


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


@torch.no_grad()
def embedding_ranks(model: Any, vectors: Float[Tensor, "... d_model"], token_ids: Int[Tensor, " tokens"]) -> TokenRanks:
    """Cosine of chosen tokens' input embeddings with each vector, and their ranks among all rows of W_E."""
    weight = model.W_E.detach()
    units = normalize(vectors.detach().reshape(-1, vectors.shape[-1]).to(weight.device).float(), dim=-1)
    token_ids = token_ids.to(weight.device)
    chosen = units @ normalize(weight[token_ids].float(), dim=-1).T
    ranks = torch.ones_like(chosen, dtype=torch.long)
    for rows in torch.arange(len(weight), device=weight.device).split(max(1, _LOGIT_BYTES // (4 * max(1, len(units))))):
        cosines = units @ normalize(weight[rows].float(), dim=-1).T
        for i, token_id in enumerate(token_ids):  # its own cosine may come out a last bit higher here
            ranks[:, i] += ((cosines > chosen[:, i, None]) & (rows != token_id)).sum(-1)
    return TokenRanks(chosen.cpu().numpy(), ranks.cpu().numpy())


def _reading(model: Any, ids: Tensor, scores: Tensor) -> TokenReading:
    texts = token_bytes(model, ids.unique().tolist())
    strings = {i: text.decode("utf-8", errors="replace") for i, text in texts.items()}
    return TokenReading(ids.numpy(), scores.numpy(), strings)
