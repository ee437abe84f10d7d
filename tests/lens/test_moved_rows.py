"""Generation that reorders, repeats, drops or takes back what it runs: the texts' own activations, or an error."""

import copy
from typing import Any

import pytest
import torch
import transformer_lens
import transformers
from support.models import TEXTS

import tl_latentlens as tll
from tl_latentlens.model.key_cache import first_keys, n_cached_tokens

MOVED = r"rows of the batch.*; decode the returned tokens with a run of their own: model\.run_with_hooks\(returned"


@pytest.fixture
def hooks(index: tll.ContextualIndex) -> Any:
    return tll.latentlens_hooks(index, top_k=1, logit_lens=False)


@pytest.fixture(scope="module")
def bridge(demo_models: dict[str, Any]) -> Any:
    if "bridge" not in demo_models:
        pytest.skip("no bridge")
    return demo_models["bridge"]


def check_like_a_plain_run(model: Any, hooks: Any, tokens: torch.Tensor) -> None:
    """The hooks hold the activations of these tokens as a run of their own gives them."""
    captures = hooks.hook.captures
    held = {name: captures.activation(name) for name in captures.hook_names}
    result = hooks.result
    with torch.no_grad():
        cache = model.run_with_cache(tokens, names_filter=list(held))[1]
    assert held.keys() == set(hooks.hook_names)
    for name, activation in held.items():
        torch.testing.assert_close(activation, cache[name], atol=1e-3, rtol=1e-3)
    strings = [[model.tokenizer.decode([i]) for i in row[1:]] for row in tokens.tolist()]
    assert [row[1:] for row in result.tokens] == strings


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"num_beams": 3, "use_cache": False},
        {"prompt_lookup_num_tokens": 3},
    ],
)
def test_a_search_that_moves_rows_is_refused(bridge: Any, hooks: Any, settings: dict[str, Any]) -> None:
    with bridge.hooks(fwd_hooks=hooks):
        returned = bridge.hf_generate(TEXTS[0], max_new_tokens=5, return_type="tokens", **{"do_sample": False, **settings})
    with pytest.raises(tll.InvalidInputError, match=MOVED):
        _ = hooks.result
    bridge.run_with_hooks(returned, fwd_hooks=hooks)
    assert hooks.result.decoded.shape == returned.shape, "the run that the error asks for"


@pytest.mark.parametrize("settings", [{"num_return_sequences": 3, "do_sample": True}, {"use_cache": False}, {}])
def test_generation_that_keeps_its_rows(bridge: Any, hooks: Any, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    for text in (TEXTS[1], TEXTS[0]):
        with bridge.hooks(fwd_hooks=hooks):
            returned = bridge.hf_generate(
                text, max_new_tokens=4, return_type="tokens", **{"do_sample": False, "eos_token_id": None, **settings}
            )
        check_like_a_plain_run(bridge, hooks, returned[:, :-1])


def test_a_prompt_of_one_token_begins_anew(bridge: Any, hooks: Any) -> None:
    bridge.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
    for cached in (True, False):
        with bridge.hooks(fwd_hooks=hooks):
            returned = bridge.hf_generate(
                bridge.to_tokens(" bank", prepend_bos=False)[:, -1:],
                max_new_tokens=3,
                return_type="tokens",
                do_sample=False,
                eos_token_id=None,
                use_cache=cached,
            )
        assert hooks.result.decoded.shape == (1, returned.shape[1] - 1)


# ------------------------------------------------------------------------------------------------------------- loops by hand


class Loop:
    """A loop of one's own, that feeds a model one part after the other with its cache of keys and values."""

    def __init__(self, model: Any, n_rows: int) -> None:
        self.model, self.is_bridge = model, hasattr(model, "adapter")
        if self.is_bridge:
            self.cache: Any = transformers.DynamicCache()
        else:
            names = ("TransformerLensKeyValueCache", "HookedTransformerKeyValueCache")
            kind = next(getattr(transformer_lens, name) for name in names if name in dir(transformer_lens))
            self.cache = kind.init_cache(model.cfg, model.cfg.device, n_rows)

    def run(self, tokens: torch.Tensor) -> None:
        with torch.no_grad():
            if self.is_bridge:
                self.model(tokens, past_key_values=self.cache, use_cache=True)
            else:
                self.model(tokens, past_kv_cache=self.cache)

    def select(self, rows: list[int]) -> None:
        """Reorder, repeat or drop the rows of the cache."""
        chosen = torch.tensor(rows)
        if self.is_bridge:
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[chosen], layer.values[chosen]
            return
        for entry in self.cache.entries:
            entry.past_keys, entry.past_values = entry.past_keys[chosen], entry.past_values[chosen]
        self.cache.previous_attention_mask = self.cache.previous_attention_mask[chosen]

    def cut(self, n_tokens: int) -> None:
        if self.is_bridge:
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, :n_tokens], layer.values[:, :, :n_tokens]
            return
        for entry in self.cache.entries:
            entry.past_keys, entry.past_values = entry.past_keys[:, :n_tokens], entry.past_values[:, :n_tokens]
        self.cache.previous_attention_mask = self.cache.previous_attention_mask[:, :n_tokens]


@pytest.fixture
def tokens(demo_model: Any) -> torch.Tensor:
    return demo_model.to_tokens([TEXTS[0], TEXTS[2], TEXTS[4]])[:, :8]


@pytest.mark.parametrize("cuts", [(6, 7, 8), (3, 6, 8), (2, 3, 8)])
def test_parts_of_any_size_are_joined(demo_model: Any, tokens: torch.Tensor, hooks: Any, cuts: tuple[int, ...]) -> None:
    for _ in range(2):  # the second time other texts go the same way through hooks that were used
        loop = Loop(demo_model, 3)
        with loop.model.hooks(fwd_hooks=hooks):
            for start, end in zip((0, *cuts[:-1]), cuts, strict=True):
                loop.run(tokens[:, start:end])
        check_like_a_plain_run(loop.model, hooks, tokens)
        tokens = tokens.flip(0)


@pytest.mark.parametrize("rows", [[1, 0, 2], [0, 0, 2], [2, 2, 2], [2, 1, 0], [0, 2], [0, 1, 2, 2]])
def test_rows_that_are_moved_in_the_cache_are_noticed(
    demo_model: Any, tokens: torch.Tensor, hooks: Any, rows: list[int]
) -> None:
    assert (tokens[0, :5] == tokens[1, :5]).all()
    assert tokens[0, 5] != tokens[1, 5], "these two differ in the last token before they are moved"
    loop = Loop(demo_model, 3)
    with loop.model.hooks(fwd_hooks=hooks):
        for part in (tokens[:, :5], tokens[:, 5:6]):
            loop.run(part)
        loop.select(rows)
        for part in (tokens[rows, 6:7], tokens[rows, 7:8]):
            loop.run(part)
    with pytest.raises(tll.InvalidInputError, match=MOVED):
        _ = hooks.result
    loop.model.run_with_hooks(tokens, fwd_hooks=hooks)
    check_like_a_plain_run(loop.model, hooks, tokens)


def test_tokens_that_are_taken_back_are_left_out(demo_model: Any, tokens: torch.Tensor, hooks: Any) -> None:
    loop = Loop(demo_model, 1)
    with loop.model.hooks(fwd_hooks=hooks):
        loop.run(tokens[:1, :4])
        loop.run(tokens[1:2, 4:7])  # a guess, of which one token is kept
        loop.cut(5)
        loop.run(tokens[:1, 5:])
    expected = torch.cat([tokens[:1, :4], tokens[1:2, 4:5], tokens[:1, 5:]], 1)
    check_like_a_plain_run(loop.model, hooks, expected)


def test_a_text_after_a_prefix_without_hooks_stands_alone(demo_model: Any, tokens: torch.Tensor, hooks: Any) -> None:
    loop = Loop(demo_model, 1)
    loop.run(tokens[:1, :3])
    start = copy.deepcopy(loop.cache)
    for _ in range(2):
        loop.cache = copy.deepcopy(start)
        with loop.model.hooks(fwd_hooks=hooks):
            loop.run(tokens[:1, 3:])
        assert hooks.result.decoded.shape == (1, 5)


def test_what_a_cache_says() -> None:
    keys = torch.randn(2, 4, 6, 8)
    legacy = ((keys, keys), (keys, keys))
    assert n_cached_tokens(legacy, 2, 1, "blocks.0.hook_resid_pre") == 6
    assert n_cached_tokens(legacy, 2, 1, "blocks.1.hook_resid_post") == 5
    assert n_cached_tokens(((keys, keys), (keys[:, :, :5], keys)), 2, 1, "blocks.1.hook_resid_pre") == 5
    assert n_cached_tokens(((keys, keys),), 2, 6, "blocks.0.hook_resid_post") == 0, "the first layer of a first pass"
    for name, n in (("hook_resid_pre", 6), ("attn.hook_q", 6), ("ln1.hook_normalized", 6), ("attn.hook_z", 5), ("hook_out", 5)):
        assert n_cached_tokens(legacy[:1], 1, 1, f"blocks.0.{name}") == n
    assert n_cached_tokens(object(), 2, 1, "hook_embed") is None
    assert first_keys(legacy, 5).shape == (2, 5, 8)
    assert first_keys(legacy, 7) is None, "a window that forgot the first tokens"
    assert first_keys(None, 0) is None
