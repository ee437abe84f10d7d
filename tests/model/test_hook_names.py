"""Hook names: validation with near ones, defaults, filters, and names that fire under another name on a bridge."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import TEXTS

import tl_latentlens as tll
from tl_latentlens.model.hook_names import check_hook_names, expand_hook_names


def fake_model(n_layers: int) -> Any:
    """As much of a model as hook names need."""
    names = [f"blocks.{layer}.hook_{part}" for layer in range(n_layers) for part in ("resid_pre", "resid_post")]
    return SimpleNamespace(cfg=SimpleNamespace(n_layers=n_layers), hook_dict=dict.fromkeys(names))


@pytest.mark.parametrize("n_layers", [1, 2, 7, 8, 9, 12, 15, 16, 31, 32, 80])
def test_default_is_eight_spread_layers(n_layers: int) -> None:
    names = expand_hook_names(fake_model(n_layers), None)
    layers = [int(name.split(".")[1]) for name in names]
    assert names == [f"blocks.{layer}.hook_resid_post" for layer in layers]
    assert len(set(layers)) == len(layers) == min(8, n_layers)
    assert layers == sorted(layers)
    assert layers[0] == 0
    assert layers[-1] == n_layers - 1
    gaps = [b - a for a, b in pairwise(layers)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_given_names_keep_their_order() -> None:
    model = fake_model(3)
    wanted = ["blocks.2.hook_resid_post", "blocks.0.hook_resid_pre"]
    assert expand_hook_names(model, wanted) == wanted
    assert expand_hook_names(model, tuple(wanted)) == wanted
    assert expand_hook_names(model, wanted[0]) == wanted[:1]


def test_empty_and_repeated_choices_are_refused() -> None:
    with pytest.raises(tll.InvalidInputError, match="no hook name was chosen; give at least one"):
        expand_hook_names(fake_model(2), [])
    with pytest.raises(tll.InvalidInputError, match="no hook name was chosen"):
        expand_hook_names(fake_model(2), lambda name: False)
    with pytest.raises(tll.InvalidInputError, match=r"given twice: \['blocks.0.hook_resid_pre', 'blocks.0.hook_resid_pre'\]"):
        expand_hook_names(fake_model(2), ["blocks.0.hook_resid_pre"] * 2)


def test_filters_give_forward_order(demo_model: Any) -> None:
    posts = expand_hook_names(demo_model, lambda name: name.startswith("blocks.") and name.endswith("hook_resid_post"))
    assert posts == [f"blocks.{layer}.hook_resid_post" for layer in range(demo_model.cfg.n_layers)]
    parts = [f"blocks.1.hook_resid_{part}" for part in ("pre", "mid", "post")]
    assert expand_hook_names(demo_model, lambda name: name in parts) == parts


def test_unknown_names_list_near_ones(demo_model: Any) -> None:
    with pytest.raises(tll.UnknownHookError, match=r"has no hook name 'blocks.0.hook_resid_pst'; did you mean '.*resid_p.*'"):
        expand_hook_names(demo_model, ["blocks.0.hook_resid_pst"])
    with pytest.raises(KeyError):
        check_hook_names(["zzzz"], ["a"], "it")
    with pytest.raises(tll.UnknownHookError, match=r"^it has no hook name 'zzzz'; it has \['a'\] and so on$"):
        check_hook_names(["zzzz"], ["a"], "it")


def test_unknown_names_in_build_bank(demo_model: Any, tmp_path: Path) -> None:
    with pytest.raises(tll.UnknownHookError, match=r"'blocks.99.hook_resid_post'; did you mean 'blocks\.\d\.hook_resid_post'"):
        tll.build_bank(demo_model, TEXTS, tmp_path / "bank.h5", hook_names="blocks.99.hook_resid_post", progress=False)
    assert not list(tmp_path.iterdir())


def test_unknown_names_in_latentlens_hooks(demo_model: Any, index: tll.ContextualIndex) -> None:
    with pytest.raises(tll.UnknownHookError, match=r"has no hook name 'blocks.0.hook_resid_pots'; did you mean 'blocks.0"):
        tll.latentlens_hooks(index, "blocks.0.hook_resid_pots")
    with pytest.raises(tll.UnknownHookError, match=r"without model=, the index has no hook name 'blocks.1.hook_attn_out'"):
        tll.latentlens_hooks(index, ["blocks.1.hook_attn_out"])
    kind = type(demo_model).__name__
    with pytest.raises(tll.UnknownHookError, match=f"{kind} has no hook name 'blocks.1.hook_attn_ot'; did you mean"):
        tll.latentlens_hooks(index, "blocks.1.hook_attn_ot", model=demo_model)
    hooks = tll.latentlens_hooks(index, "blocks.1.hook_attn_out", model=demo_model)
    assert [name for name, _ in hooks] == ["blocks.1.hook_attn_out"]


def test_aliases_answer_under_the_requested_name(demo_model: Any, tmp_path: Path) -> None:
    names = ["hook_embed", *(f"blocks.1.hook_{part}" for part in ("resid_pre", "resid_mid", "mlp_out", "resid_post"))]
    bank = tll.build_bank(demo_model, TEXTS, tmp_path / "bank.h5", hook_names=names, progress=False)
    assert list(bank.hook_names) == names
    index = tll.ContextualIndex(bank, device="cpu")
    hooks = tll.latentlens_hooks(index, names)
    demo_model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
    assert list(hooks.result.hook_names) == names
    cache = demo_model.run_with_cache(TEXTS[0])[1]
    for name in names:
        vectors = torch.from_numpy(bank.vectors(name)[:]).float()
        position = bank.row(0).position
        assert bank.row(0).prompt_index == 0
        expected = cache[name][0, position].detach()
        assert torch.allclose(vectors[0], expected / expected.norm(), atol=1e-3)
        cell = hooks.result.cell(name, position)
        assert cell.neighbors[0].similarity > 0.999
        best = {n.hook_name for n in cell.neighbors if n.similarity > 0.999 and n.row == 0}
        assert name in best
