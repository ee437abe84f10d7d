"""The reading hooks: they change nothing, keep nothing, and read what a brute force over the cache reads."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.models import TEXTS, available_kinds
from torch.nn.functional import normalize

import tl_latentlens as tll
from tl_latentlens.lens import batches
from tl_latentlens.lens.lens_hooks import LensHooks

TEXT = "The red ball lay on the river bank."


@pytest.fixture
def hooks(index: tll.ContextualIndex) -> LensHooks:
    """Hooks at all of the index's names."""
    return tll.latentlens_hooks(index, top_k=3)


@pytest.fixture(params=available_kinds())
def own_model(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A model of one's own, free to be changed."""
    return tll.load_demo_model(request.param)


def similarities(result: tll.LensResult) -> np.ndarray:
    """[hook name, cell, rank]."""
    return np.stack([result.found[name].similarities.numpy() for name in result.hook_names])


def rows(result: tll.LensResult) -> np.ndarray:
    return np.stack([result.found[name].rows.numpy() for name in result.hook_names])


def test_logits_are_bit_identical(demo_model: Any, hooks: Any) -> None:
    with torch.no_grad():
        plain = demo_model(TEXT)
        assert torch.equal(demo_model.run_with_hooks(TEXT, fwd_hooks=hooks), plain)
    assert torch.equal(demo_model.run_with_hooks(TEXT, fwd_hooks=hooks), demo_model(TEXT))
    assert torch.equal(demo_model(TEXT), plain)


def test_hooks_return_none_and_keep_no_graph(demo_model: Any, hooks: Any) -> None:
    assert all(isinstance(name, str) and callable(function) for name, function in hooks)
    assert len(hooks) == len(hooks[:]) == len(list(hooks))
    returned = []

    def watch(function: Any) -> Any:
        return lambda activation, hook: returned.append((activation.requires_grad, function(activation, hook=hook)))

    demo_model.run_with_hooks(TEXT, fwd_hooks=[(name, watch(function)) for name, function in hooks])
    assert returned == [(True, None)] * len(hooks)  # the activations had a graph, what was kept has none
    captures = hooks.hook.captures
    kept = [captures.activation(name) for name in captures.hook_names]
    assert len(kept) == len(hooks)
    assert not any(activation.requires_grad or activation.grad_fn for activation in kept)


def test_result_is_a_brute_force_over_the_cache(demo_model: Any, hooks: Any, index: tll.ContextualIndex) -> None:
    demo_model.run_with_hooks(TEXT, fwd_hooks=hooks)
    result = hooks.result
    tokens = demo_model.to_tokens(TEXT)
    assert result.hook_names == index.hook_names
    assert result.decoded.tolist() == [[False] + [True] * (tokens.shape[1] - 1)]
    assert "".join(result.tokens[0][1:]) == TEXT
    cache = demo_model.run_with_cache(TEXT)[1]
    (bank,) = index.banks
    stored = {name: normalize(torch.from_numpy(np.array(bank.vectors(name))).double(), dim=-1) for name in index.hook_names}
    for name in index.hook_names:
        for pos in range(1, tokens.shape[1]):
            query = cache[name][0, pos].detach().double()
            scores = torch.stack([stored[other] @ (query / query.norm()) for other in index.hook_names])
            best = scores.amax(0).sort(descending=True).values[:3]  # each row once, at its best hook name
            cell = result.cell(name, pos)
            np.testing.assert_allclose([n.similarity for n in cell.neighbors], best, atol=1e-5)
            for n in cell.neighbors:
                assert abs(float(scores[index.hook_names.index(n.hook_name), n.row]) - n.similarity) < 1e-5
                is_within = scores[:, n.row] > cell.neighbors[-1].similarity - 1e-6
                assert set(n.hook_names) == {other for other, is_in in zip(index.hook_names, is_within, strict=True) if is_in}
                assert n.hook_names[0] == n.hook_name
                row = bank.row(n.row)
                assert (n.token, n.context) == (row.token, row.context())
                assert (n.position, n.prompt_index) == (row.position, row.prompt_index)


def test_activation_is_kept_as_it_was(demo_model: Any, hooks: Any) -> None:
    demo_model.run_with_hooks(TEXT, fwd_hooks=hooks)
    expected = similarities(hooks.result)

    def spoil(activation: torch.Tensor, hook: Any) -> None:
        activation.mul_(torch.randn_like(activation))

    last = hooks[-1][0]
    with torch.no_grad():
        demo_model.run_with_hooks(TEXT, fwd_hooks=[*hooks, (last, spoil)])
    np.testing.assert_allclose(similarities(hooks.result), expected, atol=1e-5)


def test_hooks_context_around_run_with_cache(demo_model: Any, hooks: Any) -> None:
    demo_model.run_with_hooks(TEXT, fwd_hooks=hooks)
    expected = hooks.result
    hooks.clear()
    plain = demo_model.run_with_cache(TEXT)[1]
    with demo_model.hooks(fwd_hooks=hooks):
        cache = demo_model.run_with_cache(TEXT)[1]
        inside = hooks.result
    np.testing.assert_allclose(similarities(inside), similarities(expected), atol=1e-5)
    assert inside.tokens == expected.tokens
    for name, _ in hooks:
        assert torch.equal(cache[name], plain[name])


def test_add_hook(own_model: Any, hooks: Any) -> None:
    own_model.run_with_hooks(TEXT, fwd_hooks=hooks)
    expected = similarities(hooks.result)
    hooks.clear()
    for name, function in hooks:
        own_model.add_hook(name, function)
    own_model(TEXT)
    np.testing.assert_allclose(similarities(hooks.result), expected, atol=1e-5)
    own_model.reset_hooks()
    hooks.clear()
    own_model(TEXT)
    with pytest.raises(tll.InvalidInputError, match="nothing was captured"):
        _ = hooks.result


@pytest.mark.parametrize("cached", [True, False])
def test_generate(demo_model: Any, hooks: Any, cached: bool) -> None:
    tokens = demo_model.to_tokens(TEXT)
    with demo_model.hooks(fwd_hooks=hooks):
        generated = demo_model.generate(
            tokens, max_new_tokens=4, do_sample=False, verbose=False, stop_at_eos=False, use_past_kv_cache=cached
        )
    result = hooks.result
    assert generated.shape[1] == tokens.shape[1] + 4
    seen = generated[:, :-1].clone()  # the last token was never run
    assert result.decoded.shape == seen.shape
    hooks.clear()
    demo_model.run_with_hooks(seen, fwd_hooks=hooks)
    plain = hooks.result
    assert result.tokens == plain.tokens
    assert (result.decoded == plain.decoded).all()
    if version("transformer-lens").startswith("2."):
        return  # its generate masks made-up tokens of id 0, which is padding here, so its activations are others
    np.testing.assert_allclose(similarities(result), similarities(plain), atol=1e-3)


def test_generate_from_a_string_twice(demo_model: Any, hooks: Any) -> None:
    for text in ("A small boat", TEXT):
        with demo_model.hooks(fwd_hooks=hooks):
            demo_model.generate(text, max_new_tokens=3, do_sample=False, verbose=False, stop_at_eos=False)
        assert hooks.result.decoded.shape[1] == demo_model.to_tokens(text).shape[1] + 2
        assert "".join(hooks.result.tokens[0][1:]).startswith(text)


def test_generate_past_an_end_of_text(own_model: Any, hooks: Any) -> None:
    """GPT-2's end of text is its BOS too: inside a generation it starts no new prompt."""
    eos = own_model.tokenizer.eos_token_id
    tokens = own_model.to_tokens(TEXT)

    def force_eos(logits: torch.Tensor, hook: Any) -> torch.Tensor:
        logits = logits.clone()
        logits[..., eos] += 1e4
        return logits

    if hasattr(own_model, "adapter"):
        forcing = [("unembed.hook_out", force_eos)]
    else:  # a HookedTransformer has no hook behind its unembedding
        forcing = []
        with torch.no_grad():
            own_model.b_U[eos] += 1e4
    with own_model.hooks(fwd_hooks=[*hooks, *forcing]):
        generated = own_model.generate(tokens, max_new_tokens=3, do_sample=False, verbose=False, stop_at_eos=False)
    assert generated[0, -3:].tolist() == [eos] * 3
    captures = hooks.hook.captures
    assert {captures.activation(name).shape[1] for name in captures.hook_names} == {tokens.shape[1] + 2}


def test_nothing_captured(hooks: Any) -> None:
    with pytest.raises(tll.InvalidInputError, match=r"nothing was captured: run the model with these hooks first, model\.run_"):
        _ = hooks.result


def test_a_second_run_replaces_the_first(demo_model: Any, hooks: Any) -> None:
    demo_model.run_with_hooks(TEXTS[1], fwd_hooks=hooks)
    first = hooks.result
    assert hooks.result is first  # decoded once
    demo_model.run_with_hooks(TEXT, fwd_hooks=hooks)
    second = hooks.result
    assert "".join(first.tokens[0][1:]) == TEXTS[1]
    assert "".join(second.tokens[0][1:]) == TEXT
    hooks.clear()
    demo_model.run_with_hooks(TEXT, fwd_hooks=hooks)
    np.testing.assert_allclose(similarities(second), similarities(hooks.result), atol=1e-5)


def test_a_second_run_of_one_token_replaces_the_first(demo_model: Any, hooks: Any) -> None:
    demo_model.run_with_hooks(TEXT, fwd_hooks=hooks)
    token = demo_model.to_tokens(" bank", prepend_bos=False)[:, -1:]
    demo_model.run_with_hooks(token, fwd_hooks=hooks)
    assert hooks.result.decoded.shape == (1, 1)


def test_a_hook_that_fires_three_times_drops_no_other(demo_model: Any, index: tll.ContextualIndex) -> None:
    """HookedTransformer runs ln1 for query, key and value apart."""
    names = ["blocks.0.hook_resid_pre", "blocks.0.ln1.hook_normalized", "blocks.0.hook_resid_post"]
    hooks = tll.latentlens_hooks(index, names, model=demo_model)
    for text in (TEXT, "Another river"):
        demo_model.run_with_hooks(text, fwd_hooks=hooks)
        assert list(hooks.result.hook_names) == names
        assert hooks.result.decoded.shape == tuple(demo_model.to_tokens(text).shape)


def test_a_shorter_run_leaves_nothing_of_the_last(demo_model: Any, hooks: Any, index: tll.ContextualIndex) -> None:
    """Layers that the second run did not reach must not show what the first run left there."""
    demo_model.run_with_hooks(TEXTS[1], fwd_hooks=hooks)
    demo_model.run_with_hooks(TEXT, fwd_hooks=hooks, stop_at_layer=1, return_type=None)
    assert hooks.result.hook_names == index.hook_names[:1]
    assert "".join(hooks.result.tokens[0][1:]) == TEXT


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (3, [3]),
        (-1, [-1]),
        (0, [0]),
        ([1, 4, -2], [1, 4, -2]),
        ((2,), [2]),
        (slice(2, 5), [2, 3, 4]),
        (slice(None, None, 3), [0, 3, 6, 9]),
        (slice(-2, None), [-2, -1]),
        (np.int64(3), [3]),
        (np.array([1, 2]), [1, 2]),
        (range(1, 3), [1, 2]),
    ],
)
def test_positions(any_model: Any, index: tll.ContextualIndex, positions: Any, expected: list[int]) -> None:
    tokens = any_model.to_tokens("The red ball lay on the river bank again.")[:, :10]
    assert tokens.shape[1] == 10
    hooks = tll.latentlens_hooks(index, positions=positions, logit_lens=False)
    any_model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert np.flatnonzero(hooks.result.decoded[0]).tolist() == sorted(p % 10 for p in expected)
    everything = tll.latentlens_hooks(index, positions=slice(None), logit_lens=False)
    any_model.run_with_hooks(tokens, fwd_hooks=everything)
    for p in expected:
        name = index.hook_names[-1]
        ours, theirs = (read.result.cell(name, p).neighbors for read in (hooks, everything))
        assert [n.row for n in ours] == [n.row for n in theirs]


@pytest.mark.parametrize("positions", [99, -99, [1, 50]])
def test_positions_outside(any_model: Any, index: tll.ContextualIndex, positions: Any) -> None:
    hooks = tll.latentlens_hooks(index, positions=positions)
    any_model.run_with_hooks(TEXT, fwd_hooks=hooks)
    n = any_model.to_tokens(TEXT).shape[1]
    with pytest.raises(tll.InvalidInputError, match=rf"positions=.* is outside the run's {n} positions"):
        _ = hooks.result


def test_nothing_to_decode(demo_model: Any, index: tll.ContextualIndex) -> None:
    """A lone BOS, and a slice past the end, give an empty result."""
    for positions, tokens in ((None, demo_model.to_tokens("")), (slice(200, 300), demo_model.to_tokens(TEXT))):
        hooks = tll.latentlens_hooks(index, positions=positions, embedding_lens=True)
        demo_model.run_with_hooks(tokens, fwd_hooks=hooks)
        assert hooks.result.cells() == []
        assert not hooks.result.decoded.any()
        assert len(hooks.result.to_dataframe()) == 0
        assert "similarity" in hooks.result.to_dataframe().columns


def test_top_k_is_checked(index: tll.ContextualIndex) -> None:
    with pytest.raises(tll.InvalidInputError, match="got top_k=0; expected at least 1"):
        tll.latentlens_hooks(index, top_k=0)


def test_hook_called_by_hand(any_model: Any, index: tll.ContextualIndex) -> None:
    name = index.hook_names[2]
    activation = torch.randn(2, 3, index.d(name), requires_grad=True)
    before = activation.detach().clone()
    hook = tll.LatentLensHook(index, top_k=4, logit_lens=False)
    assert hook(activation, hook=SimpleNamespace(name=name)) is None
    assert torch.equal(activation.detach(), before)
    result = hook.result
    assert result.tokens is None
    assert result.hook_names == (name,)
    assert result.decoded.all()
    assert result.logit_lens == {}
    assert result.cell(name, 0).token is None
    expected = index.search(before.reshape(6, -1), 4, distinct=True)
    assert torch.equal(result.found[name].rows, expected.rows)
    needs_model = tll.LatentLensHook(index)
    needs_model(activation, hook=SimpleNamespace(name=name))
    with pytest.raises(tll.InvalidInputError, match=r"the logit lens needs the model: LatentLensHook\(index, model=model\)"):
        _ = needs_model.result
    with_model = tll.LatentLensHook(index, model=any_model, embedding_lens=True)
    with_model(activation, hook=SimpleNamespace(name=name))
    assert with_model.result.logit_lens[name].token_ids.shape == (6, 5)
    assert with_model.result.embedding_lens[name].token_ids.shape == (6, 5)
    with pytest.raises(tll.InvalidInputError, match=rf"{name} has shape \(3, {index.d(name)}\); expected \[batch, pos"):
        hook(activation[0], hook=SimpleNamespace(name=name))


def test_nan_activations_are_refused(demo_model: Any, hooks: Any, index: tll.ContextualIndex) -> None:
    def spoil(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        changed = activation.clone()
        changed[:, 2] = float("nan")
        return changed

    demo_model.run_with_hooks(TEXT, fwd_hooks=[(index.hook_names[0], spoil), *hooks])
    with pytest.raises(tll.InvalidInputError, match="is NaN or inf"):
        _ = hooks.result


def test_another_model_is_refused(own_model: Any, hooks: Any) -> None:
    with torch.no_grad():
        own_model.W_E.mul_(1 + torch.randn_like(own_model.W_E))
    own_model.run_with_hooks(TEXT, fwd_hooks=hooks)
    with pytest.raises(tll.ModelMismatchError, match="activations differ at blocks"):
        _ = hooks.result


def test_another_model_is_refused_through_add_hook(own_model: Any, hooks: Any) -> None:
    with torch.no_grad():
        own_model.W_E.mul_(1 + torch.randn_like(own_model.W_E))
    for name, function in hooks:
        own_model.add_hook(name, function)
    own_model(TEXT)
    with pytest.raises(tll.ModelMismatchError, match="activations differ at blocks"):
        _ = hooks.result


def test_an_intervention_is_no_other_model(demo_model: Any, index: tll.ContextualIndex) -> None:
    """A user's own hooks change activations; the model is still the bank's."""
    hooks = tll.latentlens_hooks(index)
    steer = torch.randn(demo_model.cfg.d_model)
    demo_model.run_with_hooks(TEXT, fwd_hooks=[("blocks.0.hook_resid_post", lambda a, hook: a + 20 * steer), *hooks])
    steered = hooks.result.found[index.hook_names[-1]].similarities
    demo_model.run_with_hooks(TEXT, fwd_hooks=hooks)
    assert not torch.allclose(steered, hooks.result.found[index.hook_names[-1]].similarities, atol=1e-2)


def test_embeddings_as_input_have_no_tokens(demo_model: Any, hooks: Any) -> None:
    tokens = demo_model.to_tokens(TEXT)
    if hasattr(demo_model, "adapter"):
        embedded = demo_model.run_with_cache(tokens)[1]["hook_embed"].detach()
        demo_model.run_with_hooks(embedded, fwd_hooks=hooks)
    else:
        residual = demo_model.run_with_cache(tokens)[1]["blocks.0.hook_resid_pre"].detach()
        demo_model.run_with_hooks(residual, start_at_layer=0, fwd_hooks=hooks)
    result = hooks.result
    assert result.tokens is None
    assert result.decoded.all()
    found = similarities(result)
    demo_model.run_with_hooks(tokens, fwd_hooks=hooks)
    np.testing.assert_allclose(found[:, 1:], similarities(hooks.result), atol=1e-3)


def test_heads_are_decoded_flat(demo_model: Any, tmp_path: Path) -> None:
    names = ["blocks.1.attn.hook_z", "blocks.2.mlp.hook_post"]
    index = tll.ContextualIndex(
        tll.build_bank(demo_model, TEXTS, tmp_path / "bank.h5", hook_names=names, progress=False), device="cpu"
    )
    hooks = tll.latentlens_hooks(index, top_k=1, logit_lens=False)
    demo_model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
    for name in names:
        for cell in (c for c in hooks.result.cells() if c.hook_name == name):
            assert cell.neighbors[0].similarity > 0.999
            assert cell.neighbors[0].hook_name == name
            assert cell.neighbors[0].token == cell.token


@pytest.mark.parametrize("length", [8, 16])
def test_attention_patterns_are_refused(demo_model: Any, index: tll.ContextualIndex, length: int) -> None:
    """16 × 16 scores are as many as d_model: the width alone would let them through."""
    assert demo_model.cfg.d_model == 256
    hooks = tll.latentlens_hooks(index, "blocks.0.attn.hook_pattern", model=demo_model, logit_lens=False)
    tokens = demo_model.to_tokens(" ".join(TEXTS))[:, :length]

    def run() -> None:
        demo_model.run_with_hooks(tokens, fwd_hooks=hooks)
        _ = hooks.result

    with pytest.raises(tll.InvalidInputError):
        run()


def test_another_width_is_refused(demo_model: Any, index: tll.ContextualIndex) -> None:
    hooks = tll.latentlens_hooks(index, "blocks.0.mlp.hook_post", model=demo_model)
    demo_model.run_with_hooks(TEXT, fwd_hooks=hooks)
    with pytest.raises(tll.InvalidInputError, match=rf"width {demo_model.cfg.d_mlp} .*; the index has width \[256\]"):
        _ = hooks.result


@pytest.mark.skipif("hooked" not in available_kinds(), reason="gated hooks are HookedTransformer's")
def test_a_hook_that_never_fires(index: tll.ContextualIndex) -> None:
    model = tll.load_demo_model("hooked")
    hooks = tll.latentlens_hooks(index, "blocks.0.hook_mlp_in", model=model)

    def run() -> None:
        model.run_with_hooks(TEXT, fwd_hooks=hooks)
        _ = hooks.result

    # Some versions of HookedTransformer refuse the hook themselves; an empty result without a word would be wrong.
    with pytest.raises((tll.InvalidInputError, AssertionError), match=r"nothing was captured|use_hook_mlp_in"):
        run()


def test_lenses_stand_beside_the_neighbors(demo_model: Any, index: tll.ContextualIndex) -> None:
    hooks = tll.latentlens_hooks(index, index.hook_names[-1], top_k=3, embedding_lens=True)
    logits = demo_model.run_with_hooks(TEXT, fwd_hooks=hooks)
    cell = hooks.result.cell(index.hook_names[-1], -1)
    best = logits[0, -1].softmax(-1).topk(3)
    np.testing.assert_allclose([p for _, p in cell.logit_lens], best.values.detach(), atol=1e-5)
    assert len(cell.embedding_lens) == len(cell.neighbors) == 3
    off = tll.latentlens_hooks(index, logit_lens=False)
    demo_model.run_with_hooks(TEXT, fwd_hooks=off)
    assert off.result.cells()[0].logit_lens is None
    assert off.result.cells()[0].embedding_lens is None


@pytest.mark.parametrize("transform", ["raw", "center"])
@pytest.mark.parametrize("together", [1, 20, 10**4])
def test_names_read_together_read_what_each_reads_alone(
    any_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transform: str, together: int
) -> None:
    names = [
        "hook_embed",
        "blocks.0.mlp.hook_post",
        "blocks.0.attn.hook_z",
        "blocks.1.mlp.hook_post",
        "blocks.1.hook_resid_post",
    ]
    bank = tll.build_bank(any_model, TEXTS[:3], tmp_path / "a.h5", hook_names=names, progress=False)
    index = tll.ContextualIndex(bank, device="cpu", transform=transform)
    hooks = tll.latentlens_hooks(index, embedding_lens=True)
    monkeypatch.setattr(batches, "_MAX_VECTORS_PER_SEARCH", together)
    any_model.run_with_hooks(TEXT, fwd_hooks=hooks)
    result, cache = hooks.result, any_model.run_with_cache(TEXT)[1]
    assert list(result.logit_lens) == list(result.embedding_lens) == ["hook_embed", "blocks.1.hook_resid_post"]
    for name in names:
        vectors = cache[name][0, 1:].flatten(1).detach()
        expected = index.search(vectors, query_hook_name=name, distinct=True)
        assert torch.equal(result.found[name].rows, expected.rows)
        assert torch.equal(result.found[name].hook_ids, expected.hook_ids)
        if name in result.logit_lens:
            for lens in (tll.logit_lens, tll.embedding_lens):
                alone, read = lens(any_model, vectors), getattr(result, lens.__name__)[name]
                assert [read.tokens(i) for i in range(len(vectors))] == [alone.tokens(i) for i in range(len(vectors))]
                np.testing.assert_allclose(read.scores, alone.scores, atol=1e-5)
