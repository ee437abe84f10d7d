"""Keys behind visual tokens: their spread from image to image, and hooks for runs in which some of them are blocked."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor

from tl_latentlens.errors import InvalidInputError

_KEY_HOOKS = ("hook_k", "hook_rot_k")


def key_spread(keys: Float[Tensor, "image pos ... d_head"]) -> Float[Tensor, "pos ..."]:
    """The spread of the keys at each position from image to image: their variance over their mean squared length, in [0, 1].

    Keys with a low spread are input-agnostic (Liu et al. 2025, arXiv 2510.04819): they depend on the position of a token and
    not on what it shows. There is no absolute threshold. Compare with the other positions of the same layer and head.

    Args:
        keys: `blocks.L.attn.hook_k` at the visual positions of several images, in the same order; one batch of a run.

    Returns:
        For keys [image, pos, kv_head, d_head], the spread of each position and head.

    Raises:
        InvalidInputError: Fewer than two images.
    """
    if len(keys) < 2:
        raise InvalidInputError(
            f"got keys of shape {tuple(keys.shape)}; expected [image, pos, kv_head, d_head], two images or more"
        )
    keys = keys.detach().double()
    mean_squared_length = keys.square().sum(-1).mean(0)
    return (1 - keys.mean(0).square().sum(-1) / mean_squared_length.clamp(min=torch.finfo(torch.float64).tiny)).clamp(0, 1)


def block_attention(
    blocked: Mapping[str, Bool[Tensor, "pos kv_head"]], *, first_query: int = 0
) -> list[tuple[str, Callable[..., Tensor]]]:
    """Hooks for a run in which no later token attends to some keys. The attention that they had goes to the other keys.

    >>> spread = tll.key_spread(keys)  # [patch, kv_head]                                       # doctest: +SKIP
    >>> mask = torch.zeros(n_pos, spread.shape[1], dtype=torch.bool)                            # doctest: +SKIP
    >>> mask[visual] = spread < spread.median()  # at the positions of the patches              # doctest: +SKIP
    >>> hooks = tll.block_attention({"blocks.3.attn.hook_k": mask}, first_query=after_image)    # doctest: +SKIP
    >>> model.run_with_hooks(tokens, fwd_hooks=hooks)                                           # doctest: +SKIP

    The scores (`blocks.L.attn.hook_attn_scores`) of blocked keys become -inf before the softmax. A token can always attend to
    itself.

    Args:
        blocked: For each hook name of keys, `blocks.L.attn.hook_k`, a mask that is True where a key is blocked. Its shape is
            [pos, kv_head], with positions from the first token of the prompt (BOS) on; [pos] for all heads; or
            [batch, pos, kv_head] for a mask of each prompt. Keys behind the last position of a mask are not blocked. With
            grouped queries, a key is blocked for its group.
        first_query: Tokens before this position attend to all keys. Give the position behind the image to block only what the
            text sees of it; the visual tokens then stay as they are.

    Returns:
        Hook names and functions, for `fwd_hooks` of either model class.

    Raises:
        InvalidInputError: The hook name is not one of keys, or the mask has another type or shape. While the model runs: the
            number of heads of the mask does not divide that of the model.
    """
    hooks = []
    for name, mask in blocked.items():
        prefix, _, last = name.rpartition(".")
        mask = torch.as_tensor(mask)
        if last not in _KEY_HOOKS or not prefix.endswith(".attn") or mask.dtype != torch.bool or mask.ndim not in (1, 2, 3):
            raise InvalidInputError(
                f"got {name!r} with a mask {mask.dtype} of shape {tuple(mask.shape)}; expected 'blocks.L.attn.hook_k' and a "
                "bool mask [pos, kv_head], [pos] for all heads, or [batch, pos, kv_head]"
            )
        mask = mask[:, None] if mask.ndim == 1 else mask
        hooks.append((f"{prefix}.hook_attn_scores", _blocking(mask.mT if mask.ndim == 3 else mask.mT[None], first_query)))
    return hooks


def _blocking(mask: Bool[Tensor, "batch kv_head pos"], first_query: int) -> Callable[..., Tensor]:
    def hook_function(scores: Float[Tensor, "batch head query key"], hook: Any) -> Tensor:
        n_heads, n_queries, n_keys = scores.shape[-3:]
        if n_heads % mask.shape[1] or mask.shape[0] not in (1, len(scores)):
            raise InvalidInputError(
                f"got a mask of {mask.shape[1]} heads (batch {mask.shape[0]}) for scores of {n_heads} (batch {len(scores)}); "
                "expected as many as the keys have: [pos, kv_head]"
            )
        grouped = repeat(mask, "batch kv pos -> batch (kv group) 1 pos", group=n_heads // mask.shape[1])
        padded = F.pad(grouped[..., :n_keys], (0, max(0, n_keys - mask.shape[-1]))).to(scores.device)
        # While the model generates, the keys of earlier tokens are cached: the queries are the last ones.
        query = torch.arange(n_keys - n_queries, n_keys, device=scores.device)[:, None]
        is_always_seen = (query == torch.arange(n_keys, device=scores.device)) | (query < first_query)
        return scores.masked_fill(padded & ~is_always_seen, -torch.inf)

    return hook_function
