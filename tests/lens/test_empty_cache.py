"""A bridge that generates without its earlier tokens, as with transformers 5.24, is refused, and read without a cache."""

from typing import Any

import pytest
from support.models import available_kinds

import tl_latentlens as tll

pytestmark = pytest.mark.skipif("bridge" not in available_kinds(), reason="no bridge in this TransformerLens")
PROMPT = "The river ran over its"


@pytest.fixture
def forgetful() -> Any:
    """A bridge whose attention passes over the cache that it is given."""
    model = tll.load_model("demo", kind="bridge")
    for block in model.blocks:
        block.attn._update_kv_cache = lambda k, v, **_: (k, v)
    return model


@pytest.mark.parametrize("layer", [0, 3, -1])
def test_an_empty_cache_is_refused(forgetful: Any, index: tll.ContextualIndex, layer: int) -> None:
    hooks = tll.latentlens_hooks(index, layer)
    message = r"as if it had not read the prompt: .* is empty, .* pass generate\(\.\.\., use_past_kv_cache=False\)"
    with forgetful.hooks(fwd_hooks=hooks), pytest.raises(tll.InvalidInputError, match=message):
        forgetful.generate(PROMPT, max_new_tokens=3, do_sample=False, verbose=False)


def test_it_is_read_without_a_cache(forgetful: Any, index: tll.ContextualIndex) -> None:
    hooks = tll.latentlens_hooks(index, 3)
    with forgetful.hooks(fwd_hooks=hooks):
        text = forgetful.generate(PROMPT, max_new_tokens=3, do_sample=False, verbose=False, use_past_kv_cache=False)
    assert hooks.result.tokens is not None
    assert "".join(hooks.result.tokens[0][1:]) == text[: len("".join(hooks.result.tokens[0][1:]))]
    plain = tll.latentlens_hooks(index, 3)
    forgetful.run_with_hooks(text, fwd_hooks=plain)
    n_read = hooks.result.decoded.shape[1]
    for pos in range(1, n_read):
        assert hooks.result.cell(3, pos).neighbors[0].row == plain.result.cell(3, pos).neighbors[0].row


def test_plain_runs_are_read(forgetful: Any, index: tll.ContextualIndex) -> None:
    hooks = tll.latentlens_hooks(index, 3)
    forgetful.run_with_hooks(PROMPT, fwd_hooks=hooks)
    assert hooks.result.tokens is not None
