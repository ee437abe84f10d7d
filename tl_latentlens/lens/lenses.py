"""The logit lens and the embedding lens: the tokens whose unembedding or embedding a vector is nearest to."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.lens.followed import TokenRanks
from tl_latentlens.model.readout import embedding_matrix, on_readout, reading_logits, require_readout, residual_logits
from tl_latentlens.model.token_strings import token_strings
from tl_latentlens.search.ambient import own_arithmetic
from tl_latentlens.search.vectors import VectorSearch
from tl_latentlens.views.data import TokenReading

_MAX_SCORE_BYTES = 128 * 2**20  # logits, or cosines with embeddings, that are held at once
_embedding_searches: WeakKeyDictionary[Any, VectorSearch] = WeakKeyDictionary()


@own_arithmetic(full_products=True)
def logit_lens(model: Any, vectors: Float[Tensor, "... d_model"], top_k: int = 5) -> TokenReading:
    """The likeliest next tokens if the model ended at these vectors: softmax(unembed(ln_final(v))).

    Uses `logit_readout` of TransformerLens 4.3 where there is one, else `ln_final`, `W_U`, `b_U` and the model's own logit
    transform (softcap, logit scale). A model without a final norm is read without one. Before the first reading, what is read
    at the last layer is compared with the logits that the model itself gives.

    Args:
        model: A decoder-only TransformerLens model.
        vectors: Residual-stream vectors, any leading shape.
        top_k: Number of tokens of each vector.

    Returns:
        Token ids and probabilities in [0, 1], the leading shape flattened.

    Raises:
        InvalidInputError: An encoder, whose MLM head this would skip; a model that lacks an unembedding, or makes its logits in
            another way; or a wrong width.
    """
    ids, scores = _read_logits(
        model, vectors, lambda logits: logits.softmax(-1).topk(min(top_k, logits.shape[-1]), dim=-1)[::-1]
    )
    return _token_reading(model, ids, scores)


@own_arithmetic(full_products=True)
def top_logits(model: Any, vectors: Float[Tensor, "... d_model"], top_k: int = 5) -> TokenReading:
    """The tokens of `logit_lens`, with their logits above the mean of the vocabulary in place of probabilities.

    Raises:
        InvalidInputError: As `logit_lens`.
    """

    def largest(logits: Float[Tensor, "n d_vocab"]) -> tuple[Tensor, ...]:
        return (logits - logits.mean(-1, keepdim=True)).topk(min(top_k, logits.shape[-1]), dim=-1)[::-1]

    ids, scores = _read_logits(model, vectors, largest)
    return _token_reading(model, ids, scores)


@own_arithmetic(full_products=True)
def logit_ranks(model: Any, vectors: Float[Tensor, "... d_model"], token_ids: Int[Tensor, " tokens"]) -> TokenRanks:
    """Probability and rank of chosen tokens among the whole vocabulary, as `logit_lens` reads it.

    Raises:
        InvalidInputError: As `logit_lens`.
    """

    def probabilities_and_ranks(logits: Float[Tensor, "n d_vocab"]) -> tuple[Tensor, Tensor]:
        chosen = logits[:, token_ids.to(logits.device)]
        n_above = torch.stack([(logits > column[:, None]).sum(-1) for column in chosen.unbind(-1)], -1)
        return (chosen - logits.logsumexp(-1, keepdim=True)).exp(), n_above + 1

    scores, ranks = _read_logits(model, vectors, probabilities_and_ranks)
    return TokenRanks(scores.numpy(), ranks.numpy())


def _read_logits(
    model: Any, vectors: Float[Tensor, "... d_model"], read: Callable[[Float[Tensor, "n d_vocab"]], tuple[Tensor, ...]]
) -> list[Tensor]:
    """The tensors that `read` makes of the logits of all vectors, on the CPU; a part of the logits is held at a time."""
    require_readout(model)
    flat = vectors.detach().reshape(-1, vectors.shape[-1])
    if flat.shape[-1] != model.cfg.d_model:
        raise InvalidInputError(f"got vectors of width {flat.shape[-1]}; the logit lens reads d_model = {model.cfg.d_model}")
    with reading_logits(model):
        chunks = on_readout(model, flat).split(max(1, _MAX_SCORE_BYTES // (4 * model.cfg.d_vocab)))
        readings = [[tensor.cpu() for tensor in read(residual_logits(model, chunk).float())] for chunk in chunks]
    return [torch.cat(parts) for parts in zip(*readings, strict=True)]


@own_arithmetic()
def embedding_lens(model: Any, vectors: Float[Tensor, "... d_model"], top_k: int = 5) -> TokenReading:
    """The input embeddings (rows of W_E) nearest to each vector by cosine, in [-1, 1], the leading shape flattened.

    Raises:
        InvalidInputError: A model without W_E, or vectors of another width.
    """
    if model not in _embedding_searches:
        weight = embedding_matrix(model)
        _embedding_searches[model] = VectorSearch(weight, weight.device, unit_length=False)
    nearest = _embedding_searches[model].top_k(vectors.detach().reshape(-1, vectors.shape[-1]), top_k)
    return _token_reading(model, nearest.rows.cpu(), nearest.similarities.cpu())


@own_arithmetic(full_products=True)
def embedding_ranks(model: Any, vectors: Float[Tensor, "... d_model"], token_ids: Int[Tensor, " tokens"]) -> TokenRanks:
    """Cosine of chosen tokens' input embeddings with each vector, and their ranks among all rows of W_E."""
    weight = embedding_matrix(model)
    units = normalize(vectors.detach().reshape(-1, vectors.shape[-1]).to(weight.device).float(), dim=-1)
    token_ids = token_ids.to(weight.device)
    chosen = units @ normalize(weight[token_ids].float(), dim=-1).T
    ranks = torch.ones_like(chosen, dtype=torch.long)
    for rows in torch.arange(len(weight), device=weight.device).split(max(1, _MAX_SCORE_BYTES // (4 * max(1, len(units))))):
        cosines = units @ normalize(weight[rows].float(), dim=-1).T
        for i, token_id in enumerate(token_ids):  # the token itself is left out: its cosine may differ here in the last bit
            ranks[:, i] += ((cosines > chosen[:, i, None]) & (rows != token_id)).sum(-1)
    return TokenRanks(chosen.cpu().numpy(), ranks.cpu().numpy())


def _token_reading(model: Any, ids: Tensor, scores: Tensor) -> TokenReading:
    return TokenReading(ids.numpy(), scores.numpy(), token_strings(model, ids.unique().tolist()))
