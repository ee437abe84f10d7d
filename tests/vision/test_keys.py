"""Keys: a planted spread is found, blocked keys get no attention in any architecture, and nothing else is touched."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import TEXTS, available_kinds, load_any

import tl_latentlens as tll

KEYS, SCORES, PATTERN = (f"blocks.1.attn.hook_{part}" for part in ("k", "attn_scores", "pattern"))


@pytest.fixture(scope="module")
def models(model_folder: Path) -> dict[str, Any]:
    return {kind: load_any(model_folder, kind) for kind in available_kinds()}


def test_a_planted_spread_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    share = torch.tensor([[0.0, 1.0], [0.25, 0.5]], dtype=torch.float64)  # of the squared length, [pos, head]
    common = torch.nn.functional.normalize(torch.randn(2, 2, 16, generator=generator).double(), dim=-1)
    own = torch.randn(4000, 2, 2, 16, generator=generator).double() / 4
    keys = common * (1 - share).sqrt()[..., None] + own * share.sqrt()[..., None]
    spread = tll.key_spread(7.0 * keys)
    assert spread.shape == (2, 2)
    torch.testing.assert_close(spread, share, atol=0.02, rtol=0)
    assert tll.key_spread(keys[:1].expand(3, -1, -1, -1)).max() < 1e-6
    with pytest.raises(tll.InvalidInputError, match=r"got keys of shape \(1, 2, 2, 16\); expected .* two images or more"):
        tll.key_spread(keys[:1])


def test_the_spread_is_the_variance_across_images(demo_model: Any) -> None:
    tokens = torch.cat([demo_model.to_tokens(text)[:, :8] for text in TEXTS])
    keys = demo_model.run_with_cache(tokens)[1][KEYS].detach().double()
    variance = keys.var(0, correction=0).sum(-1) / keys.square().sum(-1).mean(0)
    torch.testing.assert_close(tll.key_spread(keys), variance, atol=1e-6, rtol=1e-6)
    assert tll.key_spread(keys)[0].max() < 1e-6  # BOS


def test_nothing_attends_to_blocked_keys(models: dict[str, Any]) -> None:
    logits = []
    for model in models.values():
        tokens = model.to_tokens(TEXTS[0])
        n_keys = getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads
        mask = torch.zeros(4, n_keys, dtype=torch.bool)
        mask[1, 0] = mask[2, :] = mask[3, -1] = True
        found: dict[str, torch.Tensor] = {}

        def keep(name: str, found: dict[str, torch.Tensor] = found) -> Any:
            return PATTERN, lambda activation, hook: found.update({name: activation.detach()})

        model.run_with_hooks(tokens, fwd_hooks=[keep("before")])
        logits.append(model.run_with_hooks(tokens, fwd_hooks=[*tll.block_attention({KEYS: mask}), keep("after")]))
        blocked = mask.T.repeat_interleave(model.cfg.n_heads // n_keys, 0)  # [head, pos]
        wide = torch.zeros(model.cfg.n_heads, tokens.shape[1], tokens.shape[1], dtype=torch.bool)
        wide[:, :, :4] = blocked[:, None]
        wide &= ~torch.eye(tokens.shape[1], dtype=torch.bool)
        expected = found["before"].masked_fill(wide, 0)
        torch.testing.assert_close(found["after"], expected / expected.sum(-1, keepdim=True), atol=1e-6, rtol=1e-5)
        assert not torch.allclose(found["before"], found["after"], atol=1e-3)
        assert not any(point.fwd_hooks for point in model.hook_dict.values())
    for one in logits[1:]:
        torch.testing.assert_close(one.log_softmax(-1), logits[0].log_softmax(-1), atol=1e-4, rtol=0)


def test_queries_before_the_first_see_as_ever(demo_model: Any) -> None:
    tokens = demo_model.to_tokens(TEXTS[0])
    mask = torch.tensor([False, True, True])
    hooks = tll.block_attention(
        {f"blocks.{layer}.attn.hook_k": mask for layer in range(demo_model.cfg.n_layers)}, first_query=5
    )
    plain, blocked = demo_model(tokens), demo_model.run_with_hooks(tokens, fwd_hooks=hooks)
    torch.testing.assert_close(blocked[:, :5], plain[:, :5])
    assert (blocked[:, 5:] - plain[:, 5:]).abs().amax((0, 2)).min() > 1e-2
    # With all that text sees of two tokens blocked in every layer, it cannot matter which tokens they are.
    other = tokens.clone()
    other[:, 1:3] = tokens[:, 3:5]
    hooks = tll.block_attention(
        {f"blocks.{layer}.attn.hook_k": mask for layer in range(demo_model.cfg.n_layers)}, first_query=3
    )
    swapped = demo_model.run_with_hooks(other, fwd_hooks=hooks)
    torch.testing.assert_close(swapped[:, 3:], demo_model.run_with_hooks(tokens, fwd_hooks=hooks)[:, 3:], atol=1e-4, rtol=0)


def test_a_mask_of_each_prompt(demo_model: Any) -> None:
    tokens = torch.cat([demo_model.to_tokens(text)[:, :8] for text in TEXTS[:2]])
    mask = torch.zeros(2, 8, demo_model.cfg.n_heads, dtype=torch.bool)
    mask[0, 2], mask[1, 3, 1] = True, True
    together = demo_model.run_with_hooks(tokens, fwd_hooks=tll.block_attention({KEYS: mask}))
    for prompt in range(2):
        alone = demo_model.run_with_hooks(tokens[[prompt]], fwd_hooks=tll.block_attention({KEYS: mask[prompt]}))
        torch.testing.assert_close(together[[prompt]], alone, atol=1e-4, rtol=0)


def test_blocked_while_generating(demo_model: Any) -> None:
    tokens = demo_model.to_tokens(TEXTS[0])
    hooks = tll.block_attention({KEYS: torch.tensor([False, True, True, True, True, True])})
    settings = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False}
    with demo_model.hooks(fwd_hooks=hooks):
        generated = demo_model.generate(tokens, **settings).clone()  # of a run in inference mode
    for end in range(tokens.shape[1], generated.shape[1]):
        logits = demo_model.run_with_hooks(generated[:, :end], fwd_hooks=hooks)
        assert logits[0, -1].argmax() == generated[0, end]


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("blocks.1.attn.hook_v", torch.ones(3, dtype=torch.bool)),
        ("blocks.1.hook_k", torch.ones(3, dtype=torch.bool)),
        (KEYS, torch.ones(3)),
        (KEYS, torch.ones(1, 1, 3, 4, dtype=torch.bool)),
    ],
)
def test_what_is_no_mask_of_keys_is_refused(name: str, mask: torch.Tensor) -> None:
    with pytest.raises(
        tll.InvalidInputError, match=r"got 'blocks.1(.attn)?.hook_.' with a mask .*; expected 'blocks.L.attn.hook_k'"
    ):
        tll.block_attention({name: mask})


def test_a_mask_of_other_heads_is_refused(demo_model: Any) -> None:
    hooks = tll.block_attention({KEYS: torch.ones(3, 3, dtype=torch.bool)})
    with pytest.raises(tll.InvalidInputError, match=r"got a mask of 3 heads \(batch 1\) for scores of 4"):
        demo_model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)


def test_keys_are_banked_before_and_after_rotation(models: dict[str, Any], tmp_path: Path) -> None:
    rotated = KEYS.replace("hook_k", "hook_rot_k")
    for kind, model in models.items():
        if rotated not in model.hook_dict:
            continue
        names = [KEYS, rotated, KEYS.replace("hook_k", "hook_v")]
        bank = tll.build_bank(model, TEXTS, tmp_path / f"{kind}.h5", hook_names=names, dtype="float32", progress=False)
        n_heads = getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads
        assert [bank.n_heads(name) for name in names] == [n_heads] * 3
        before, after = (bank.activations(name, range(bank.n_rows)) for name in names[:2])
        np.testing.assert_allclose(np.linalg.norm(before, axis=-1), np.linalg.norm(after, axis=-1), rtol=1e-5)
        at_start = [bank.row(row).position == 0 for row in range(bank.n_rows)]
        assert not np.allclose(before, after, atol=1e-3)
        np.testing.assert_allclose(before[at_start], after[at_start], rtol=1e-5)
        index = tll.ContextualIndex(bank, [f"{name}[:]" for name in names], device="cpu")
        hooks = tll.latentlens_hooks(index, top_k=1)
        model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
        assert set(hooks.result.hook_names) == {f"{name}[{head}]" for name in names for head in range(n_heads)}
        for name in hooks.result.hook_names:
            [neighbor] = hooks.result.cell(name, -1).neighbors
            assert (neighbor.prompt_index, neighbor.hook_name) == (0, name)
            assert neighbor.similarity > 1 - 1e-5
