"""Hooks that are on the model more than once, as when a notebook cell runs again: each activation is held once."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.models import TEXTS, available_kinds

import tl_latentlens as tll


@pytest.fixture(params=available_kinds())
def model(request: pytest.FixtureRequest, demo_models: dict[str, Any]) -> Iterator[Any]:
    yield demo_models[request.param]
    demo_models[request.param].reset_hooks()


def check(model: Any, hooks: Any, text: str) -> None:
    """All layers, with the activations of this text."""
    result = hooks.result
    assert sorted(result.hook_names) == sorted(hooks.hook_names)
    tokens = model.to_tokens(text)
    assert result.decoded.shape == tokens.shape
    captures = hooks.hook.captures
    held = {name: captures.activation(name) for name in captures.hook_names}
    model.reset_hooks()
    cache = model.run_with_cache(text)[1]
    assert all(torch.equal(activation, cache[name]) for name, activation in held.items())


@pytest.mark.parametrize("names", [None, "blocks.2.hook_resid_post", ["blocks.2.hook_resid_post", "blocks.2.hook_resid_pre"]])
@pytest.mark.parametrize("times", [2, 3])
def test_added_again(model: Any, index: tll.ContextualIndex, names: Any, times: int) -> None:
    hooks = tll.latentlens_hooks(index, names, model=model, logit_lens=False)
    for _ in range(times):
        for name, function in hooks:
            model.add_hook(name, function)
    for text in TEXTS[:2]:
        model(text)
    check(model, hooks, TEXTS[1])


def test_contexts_in_each_other_and_a_run_with_hooks(model: Any, index: tll.ContextualIndex) -> None:
    hooks = tll.latentlens_hooks(index, logit_lens=False)
    with model.hooks(fwd_hooks=hooks), model.hooks(fwd_hooks=hooks):
        model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
    check(model, hooks, TEXTS[0])


def test_an_edit_between_the_two(model: Any, index: tll.ContextualIndex) -> None:
    """The later of the two is read: the activation as the next layer gets it."""
    name = "blocks.2.hook_resid_post"
    hooks = tll.latentlens_hooks(index, logit_lens=False)
    pairs = dict(hooks)
    fwd_hooks = [*hooks, (name, lambda activation, hook: 2 * activation), *hooks]
    model.run_with_hooks(TEXTS[0], fwd_hooks=fwd_hooks)
    assert pairs.keys() == set(hooks.hook.captures.hook_names)
    plain = model.run_with_cache(TEXTS[0])[1][name]
    assert torch.equal(hooks.hook.captures.activation(name), 2 * plain)


def test_generated_tokens_are_joined_once(model: Any, index: tll.ContextualIndex) -> None:
    hooks = tll.latentlens_hooks(index, logit_lens=False)
    tokens = model.to_tokens(TEXTS[0])
    with model.hooks(fwd_hooks=hooks), model.hooks(fwd_hooks=hooks):
        model.generate(tokens, max_new_tokens=4, do_sample=False, verbose=False, stop_at_eos=False)
    assert hooks.result.hook_names == tuple(hooks.hook_names)
    assert hooks.result.decoded.shape == (1, tokens.shape[1] + 3)


def test_ln1_in_generation(model: Any, index: tll.ContextualIndex) -> None:
    """HookedTransformer runs ln1 for query, key and value apart."""
    names = ["blocks.0.ln1.hook_normalized", "blocks.1.hook_resid_post"]
    hooks = tll.latentlens_hooks(index, names, model=model, logit_lens=False)
    tokens = model.to_tokens(TEXTS[0])
    with model.hooks(fwd_hooks=hooks):
        model.generate(tokens, max_new_tokens=3, do_sample=False, verbose=False, stop_at_eos=False)
    assert hooks.result.decoded.shape == (1, tokens.shape[1] + 2)


def test_two_names_of_one_hook_point(index: tll.ContextualIndex, demo_models: dict[str, Any]) -> None:
    if "bridge" not in demo_models:
        pytest.skip("aliases are the bridge's")
    model, names = demo_models["bridge"], ["blocks.1.hook_resid_post", "blocks.1.hook_out"]
    hooks = tll.latentlens_hooks(index, names, model=model, logit_lens=False)
    with model.hooks(fwd_hooks=hooks), model.hooks(fwd_hooks=hooks):
        for text in TEXTS[:2]:
            model(text)
    assert set(hooks.result.hook_names) == set(names)
    assert hooks.result.decoded.shape == model.to_tokens(TEXTS[1]).shape
