"""Lens hooks in a model that `torch.compile` compiled: they read what they read in the model itself, and change nothing."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.models import TEXTS

import tl_latentlens as tll

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: Any) -> Any:
    """The model in one graph; a bridge cannot be compiled to one."""
    return torch.compile(model, backend="eager", fullgraph=not hasattr(model, "adapter"))


def two_layers(model: Any) -> dict[str, int]:
    """Options of a run that ends after two layers, where a compiled model takes them: each layer takes seconds to compile."""
    return {} if hasattr(model, "adapter") else {"stop_at_layer": 2}


def similarities(result: tll.LensResult) -> np.ndarray:
    return np.stack([result.found[name].similarities.numpy() for name in result.hook_names])


@torch.no_grad()
def test_a_compiled_model_is_read_like_a_plain_one(any_model: Any, index: tll.ContextualIndex) -> None:
    hooks, tokens = tll.latentlens_hooks(index, top_k=2), any_model.to_tokens(TEXTS[0])
    any_model.run_with_hooks(tokens, fwd_hooks=hooks)
    plain = hooks.result
    hooks.clear()
    with any_model.hooks(fwd_hooks=hooks):
        compiled(any_model)(tokens)
    assert hooks.result.hook_names == plain.hook_names
    assert hooks.result.tokens == plain.tokens
    assert hooks.result.logit_lens.keys() == plain.logit_lens.keys()
    np.testing.assert_allclose(similarities(hooks.result), similarities(plain), atol=1e-5)


@torch.no_grad()
def test_hooks_that_are_added_twice_around_one_that_changes(any_model: Any, index: tll.ContextualIndex) -> None:
    hooks = tll.latentlens_hooks(index, logit_lens=False)
    tokens = any_model.to_tokens(TEXTS[0])
    around = [*hooks, (HOOK, lambda activation, hook: 2 * activation), *hooks]
    plain = any_model.run_with_hooks(tokens, fwd_hooks=around, **two_layers(any_model))
    expected = hooks.hook.captures.activation(HOOK)
    hooks.clear()
    with any_model.hooks(fwd_hooks=around):
        torch.testing.assert_close(compiled(any_model)(tokens, **two_layers(any_model)), plain, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(hooks.hook.captures.activation(HOOK), expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_steering_at_positions(any_model: Any, index: tll.ContextualIndex) -> None:
    vector = torch.randn(any_model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    steer = tll.SteeringLens(vector, index, HOOK, positions=-1, logit_lens=False)
    tokens = any_model.to_tokens(TEXTS[0])
    plain = any_model.run_with_hooks(tokens, fwd_hooks=steer.hooks(2), **two_layers(any_model))
    assert not torch.allclose(plain, any_model(tokens, **two_layers(any_model)), atol=0.1)
    with any_model.hooks(fwd_hooks=steer.hooks(2)):
        torch.testing.assert_close(compiled(any_model)(tokens, **two_layers(any_model)), plain, atol=1e-3, rtol=1e-3)
