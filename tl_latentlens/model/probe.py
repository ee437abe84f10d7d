"""Short prompts of random tokens, with which a model's own behaviour is measured."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_latentlens.model.describe import model_device
from tl_latentlens.search.ambient import own_arithmetic


@own_arithmetic()
def probe_tokens(model: Any, n_prompts: int, n_tokens: int) -> Int[Tensor, "n_prompts n_tokens"]:
    """Random token ids of the model's vocabulary, the same at every call, on its device.

    Special and added tokens are left out: a model may mask them, or expect an image in their place. The ids differ from each
    other where the vocabulary is large enough. There are at most n_ctx in a prompt.
    """
    n_tokens = min(n_tokens, int(model.cfg.n_ctx))
    n_ids, special = int(model.cfg.d_vocab), set()
    if (tokenizer := model.tokenizer) is not None:
        n_ids = min(n_ids, len(tokenizer))
        special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    order = torch.randperm(n_ids, generator=torch.Generator().manual_seed(0)).tolist()
    ids = [i for i in order if i not in special] or order
    n = n_prompts * n_tokens
    chosen = (ids * (n // len(ids) + 1))[:n]
    return torch.tensor(chosen, device=model_device(model)).view(n_prompts, n_tokens)
