"""Steering vectors against per-prompt caches."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tl_latentlens as tll
from tl_latentlens.model.loading import load_model

HOOK = "blocks.2.hook_resid_post"
POSITIVE = ["The boat crossed the wide blue sea", "Waves", "A fish swam in the river and out to the sea"]
NEGATIVE = ["The fox ran into the forest", "An owl sat in the old oak tree above us all"]


def mean_by_hand(model: Any, texts: list[str], name: str, positions: int | None) -> torch.Tensor:
    means = []
    for text in texts:
        with torch.no_grad():
            rows = model.run_with_cache(text)[1][name][0].flatten(1)
        means.append(rows[1:].mean(0) if positions is None else rows[positions])
    return torch.stack(means).double().mean(0)


@pytest.mark.parametrize("name", [HOOK, "blocks.5.hook_resid_post", "blocks.1.attn.hook_z", "blocks.0.hook_resid_pre"])
@pytest.mark.parametrize("positions", [-1, -2, None])
def test_difference_of_means(demo_model: Any, name: str, positions: int | None) -> None:
    sides = [[text + " again" for text in side] for side in (POSITIVE, NEGATIVE)]  # each has a token before its last
    expected = mean_by_hand(demo_model, sides[0], name, positions) - mean_by_hand(demo_model, sides[1], name, positions)
    found = tll.difference_of_means(demo_model, *sides, name, positions=positions)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=1e-4)


def test_difference_of_means_of_other_architectures(model_folder: Path) -> None:
    model = load_model(str(model_folder), kind=None)
    for name in ("blocks.1.hook_resid_post", "blocks.2.attn.hook_z"):
        expected = mean_by_hand(model, POSITIVE, name, -1) - mean_by_hand(model, NEGATIVE, name, -1)
        torch.testing.assert_close(
            tll.difference_of_means(model, POSITIVE, NEGATIVE, name).double(), expected, atol=1e-4, rtol=1e-4
        )


def test_difference_of_means_in_batches(any_model: Any) -> None:
    """More tokens than one batch holds, a str for one prompt, and no layer after the hook."""
    many = [f"{a} {b} by the {c}" for a in ("Boats", "A ship", "We") for b in ("lay", "slept", "sang") for c in POSITIVE] * 6
    once = tll.difference_of_means(any_model, many[:27], NEGATIVE[0], HOOK)
    torch.testing.assert_close(tll.difference_of_means(any_model, many, NEGATIVE[0], HOOK), once, atol=1e-4, rtol=1e-4)
    expected = mean_by_hand(any_model, many[:27], HOOK, -1) - mean_by_hand(any_model, NEGATIVE[:1], HOOK, -1)
    torch.testing.assert_close(once.double(), expected, atol=2e-4, rtol=1e-4)
    ran: list[int] = []
    handle = any_model.blocks[3].register_forward_hook(lambda *_: ran.append(3))
    try:
        tll.difference_of_means(any_model, POSITIVE, NEGATIVE, HOOK)
    finally:
        handle.remove()
    assert not ran
    assert not any(point.fwd_hooks for point in any_model.hook_dict.values())


def test_difference_of_means_refusals(demo_model: Any) -> None:
    with pytest.raises(tll.InvalidInputError, match="got no negative prompts; expected at least one"):
        tll.difference_of_means(demo_model, POSITIVE, [], HOOK)
    with pytest.raises(tll.InvalidInputError, match="positive prompt 1, '', has 0 tokens besides BOS; expected at least 1"):
        tll.difference_of_means(demo_model, ["A", ""], "B", HOOK)
    with pytest.raises(tll.InvalidInputError, match="positive prompt 1, 'A', has 1 tokens besides BOS; expected at least 2"):
        tll.difference_of_means(demo_model, ["A sea", "A"], NEGATIVE, HOOK, positions=-2)
    with pytest.raises(tll.InvalidInputError, match="got positions=0; expected -1"):
        tll.difference_of_means(demo_model, "A", "B", HOOK, positions=0)
    with pytest.raises(tll.UnknownHookError, match=r"did you mean 'blocks\.2\.hook_resid_post'"):
        tll.difference_of_means(demo_model, "A", "B", "blocks.2.hook_resid_past")
    with pytest.warns(UserWarning, match="1 positive prompts were longer than n_ctx"):
        tll.difference_of_means(demo_model, ["boat " * 2000, "sea"], "B", HOOK)


def test_difference_of_means_of_one_head(demo_model: Any) -> None:
    name, sides = "blocks.2.attn.hook_z", (["The river"], ["Some money", "A coin"])
    for positions in (-1, None):
        whole = tll.difference_of_means(demo_model, *sides, name, positions=positions)
        head = tll.difference_of_means(demo_model, *sides, f"{name}[1]", positions=positions)
        assert torch.allclose(head, whole.view(demo_model.cfg.n_heads, -1)[1], atol=1e-5)
    with pytest.raises(tll.InvalidInputError, match=r"hook_z has heads 0 to 3"):
        tll.difference_of_means(demo_model, *sides, f"{name}[9]")
    with pytest.raises(tll.InvalidInputError, match="expected texts, each a str"):
        tll.difference_of_means(demo_model, [1, 2], sides[0], name)
