"""A run for its hooks only computes nothing that no hook sees, and leaves no hook behind."""

from typing import Any

import pytest
import torch

from tl_latentlens.model.running import run_hooked


@pytest.mark.parametrize("layer", [2, 5])
def test_no_logits_are_computed(demo_model: Any, layer: int) -> None:
    seen: list[torch.Size] = []
    calls: list[str] = []
    behind = demo_model.blocks[layer + 1] if layer < 5 else demo_model.unembed
    handle = behind.register_forward_hook(lambda *_: calls.append("ran"))
    name = f"blocks.{layer}.hook_resid_post"
    try:
        tokens = demo_model.to_tokens("The river ran over its bank.")
        run_hooked(demo_model, tokens, None, [(name, lambda x, hook: seen.append(x.shape))])
    finally:
        handle.remove()
    assert seen == [torch.Size([*tokens.shape, 256])]
    assert not calls
    assert not any(point.fwd_hooks for point in demo_model.hook_dict.values())
    assert torch.equal(demo_model(tokens), demo_model(tokens)), "the model still runs to its end"
    assert demo_model(tokens).shape[-1] == 4096
