"""Lens hooks in a model that `torch.compile` compiled: they read what they read in the model itself, and change nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.fingerprints import load_small
from support.models import TEXTS

import tl_latentlens as tll

HOOK = "blocks.0.hook_resid_post"


def indexed(folder: Path, n_layers: int) -> tuple[Any, tll.ContextualIndex]:
    """A model of few layers, each of which takes seconds to compile, and an index of its bank."""
    model = load_small(folder / "model", n_layer=n_layers)
    bank = tll.build_bank(model, TEXTS, folder / "bank.h5", dtype="float32", progress=False)
    return model, tll.ContextualIndex(bank, device="cpu")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: Any) -> Any:
    """The model in one graph; a bridge cannot be compiled to one."""
    return torch.compile(model, backend="eager", fullgraph=not hasattr(model, "adapter"))


def similarities(result: tll.LensResult) -> np.ndarray:
    return np.stack([result.found[name].similarities.numpy() for name in result.hook_names])


@torch.no_grad()
def test_a_compiled_model_is_read_like_a_plain_one(tmp_path: Path) -> None:
    model, index = indexed(tmp_path, 2)
    hooks, tokens = tll.latentlens_hooks(index, top_k=2), model.to_tokens(TEXTS[0])
    model.run_with_hooks(tokens, fwd_hooks=hooks)
    plain = hooks.result
    hooks.clear()
    with model.hooks(fwd_hooks=hooks):
        compiled(model)(tokens)
    assert hooks.result.hook_names == plain.hook_names
    assert hooks.result.tokens == plain.tokens
    assert hooks.result.logit_lens.keys() == plain.logit_lens.keys()
    np.testing.assert_allclose(similarities(hooks.result), similarities(plain), atol=1e-5)


@torch.no_grad()
def test_hooks_that_are_added_twice_around_one_that_changes(tmp_path: Path) -> None:
    model, index = indexed(tmp_path, 1)
    hooks = tll.latentlens_hooks(index, logit_lens=False)
    tokens = model.to_tokens(TEXTS[0])
    around = [*hooks, (HOOK, lambda activation, hook: 2 * activation), *hooks]
    plain = model.run_with_hooks(tokens, fwd_hooks=around)
    expected = hooks.hook.captures.activation(HOOK)
    hooks.clear()
    with model.hooks(fwd_hooks=around):
        torch.testing.assert_close(compiled(model)(tokens), plain, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(hooks.hook.captures.activation(HOOK), expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_steering_at_positions(tmp_path: Path) -> None:
    model, index = indexed(tmp_path, 1)
    vector = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    steer = tll.SteeringLens(vector, index, HOOK, positions=-1, logit_lens=False)
    tokens = model.to_tokens(TEXTS[0])
    plain = model.run_with_hooks(tokens, fwd_hooks=steer.hooks(2))
    assert not torch.allclose(plain, model(tokens), atol=0.01)
    with model.hooks(fwd_hooks=steer.hooks(2)):
        torch.testing.assert_close(compiled(model)(tokens), plain, atol=1e-3, rtol=1e-3)
