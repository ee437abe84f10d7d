"""Layers in place of hook names, wherever a hook name is asked for: numbers, ranges, lists, from the end, all of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import TEXTS

import tl_latentlens as tll
from tl_latentlens.model.layers import expand_layers, one_hook_name


def posts(*layers: int) -> list[str]:
    return [f"blocks.{layer}.hook_resid_post" for layer in layers]


@pytest.mark.parametrize(
    ("choice", "layers"),
    [
        (3, (3,)),
        (-1, (11,)),
        (np.int64(-12), (0,)),
        (torch.tensor(3), (3,)),
        ("3", (3,)),
        (" -1 ", (11,)),
        ("3-8", (3, 4, 5, 6, 7, 8)),
        ("9--1", (9, 10, 11)),
        ("-3--1", (9, 10, 11)),
        ("3,5,7", (3, 5, 7)),
        ("7, 3-4 ,-1", (7, 3, 4, 11)),
        ("all", tuple(range(12))),
        (range(3, 9), (3, 4, 5, 6, 7, 8)),
        (range(-2, 0), (10, 11)),
        ([3, "5", -1], (3, 5, 11)),
        (["3-5", "7"], (3, 4, 5, 7)),
        ((7, 5), (7, 5)),
        (np.array([3, 5]), (3, 5)),
        (np.array([3]), (3,)),
        (torch.tensor([3, 5]), (3, 5)),
        ((layer for layer in (1, 2)), (1, 2)),
        ([], ()),
    ],
)
def test_layers_stand_for_their_residual_stream(choice: Any, layers: tuple[int, ...]) -> None:
    assert expand_layers(choice, 12) == posts(*layers)


def test_hook_names_stay_as_they_are() -> None:
    names = ["blocks.0.attn.hook_z", "blocks.3.attn.hook_z[5]", "hook_embed", "encoder.blocks.1-2", ""]
    assert expand_layers(names, 12) == names
    assert expand_layers([2, *names], 12) == posts(2) + names
    assert expand_layers("hook_embed", 12) == ["hook_embed"]


@pytest.mark.parametrize("layer", [12, -13, "12", "-13", "3-12", "1,99", [3, 12]])
def test_a_layer_that_the_model_does_not_have(layer: Any) -> None:
    with pytest.raises(tll.UnknownHookError, match=r"got layer -?\d+; the model has layers 0 to 11, or -12 to -1 counted"):
        expand_layers(layer, 12)


def test_choices_that_mean_nothing() -> None:
    with pytest.raises(tll.InvalidInputError, match="got the layers '8-3', which end before they start"):
        expand_layers("8-3", 12)
    for choice in (True, 3.0, None, [None], [[3]], np.array([1.5])):
        with pytest.raises(tll.InvalidInputError, match="expected a hook name, the number of a layer"):
            expand_layers(choice, 12)
    with pytest.raises(tll.InvalidInputError, match="got '3-5', which stands for 3 hook names; expected one"):
        one_hook_name("3-5", 12)


def test_a_bank_an_index_and_hooks_of_layers(demo_model: Any, tmp_path: Path) -> None:
    bank = tll.build_bank(demo_model, TEXTS, tmp_path / "bank.h5", hook_names=range(2, 5), progress=False)
    assert bank.hook_names == tuple(posts(2, 3, 4))
    one = tll.build_bank(demo_model, TEXTS, tmp_path / "one.h5", hook_names=-1, progress=False)
    assert one.hook_names == tuple(posts(5))
    mixed = tll.build_bank(demo_model, TEXTS, tmp_path / "z.h5", hook_names=["0", "blocks.1.attn.hook_z"], progress=False)
    assert mixed.hook_names == (*posts(0), "blocks.1.attn.hook_z")
    assert tll.ContextualIndex(bank, 3).hook_names == tuple(posts(3))
    assert tll.ContextualIndex(bank, "2-3").hook_names == tuple(posts(2, 3))
    assert tll.ContextualIndex(bank, [-2, "3"]).hook_names == tuple(posts(4, 3))
    assert tll.ContextualIndex(mixed, "all").hook_names == tuple(posts(0))
    index = tll.ContextualIndex(bank, "all")
    assert index.hook_names == tuple(posts(2, 3, 4))
    hooks = tll.latentlens_hooks(index, 3)
    demo_model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
    assert hooks.result.hook_names == tuple(posts(3))
    assert hooks.result.cell(3, -1) == hooks.result.cell(-3, -1) == hooks.result.cell(posts(3)[0], -1)
    assert tll.latentlens_hooks(index, "all").hook_names == tuple(posts(2, 3, 4))
    assert tll.latentlens_hooks(index, "all", model=demo_model).hook_names == tuple(posts(*range(6)))
    assert tll.latentlens_hooks(index, range(3), model=demo_model).hook_names == tuple(posts(0, 1, 2))


def test_layers_that_are_not_there(demo_model: Any, index: tll.ContextualIndex, tmp_path: Path) -> None:
    with pytest.raises(tll.UnknownHookError, match="got layer 6; the model has layers 0 to 5"):
        tll.build_bank(demo_model, TEXTS, tmp_path / "bank.h5", hook_names=6, progress=False)
    with pytest.raises(tll.InvalidInputError, match="a hook name was given twice"):
        tll.build_bank(demo_model, TEXTS, tmp_path / "bank.h5", hook_names=[-1, 5], progress=False)
    z = tll.build_bank(demo_model, TEXTS, tmp_path / "z.h5", hook_names="blocks.1.attn.hook_z", progress=False)
    with pytest.raises(tll.UnknownHookError, match=r"'blocks.1.hook_resid_post'; it has \['blocks.1.attn.hook_z'\]"):
        tll.ContextualIndex(z, 1)
    with pytest.raises(tll.UnknownHookError, match="got 'all', which stands for every hook_resid_post; the index has only"):
        tll.ContextualIndex(z, "all")
    with pytest.raises(tll.UnknownHookError, match="got layer 9"):
        tll.latentlens_hooks(index, 9)


def test_searches_and_directions_of_layers(any_model: Any, index: tll.ContextualIndex) -> None:
    name = posts(3)[0]
    vector = tll.difference_of_means(any_model, "A boat", "Some money", 3)
    torch.testing.assert_close(vector, tll.difference_of_means(any_model, "A boat", "Some money", name))
    by_layer, by_name = index.search(vector, 2, hook_names=3), index.search(vector, 2, hook_names=[name])
    assert by_layer.rows.tolist() == by_name.rows.tolist()
    centered = tll.ContextualIndex(index.banks, transform="center")
    by_layer, by_name = (centered.search(vector, 2, query_hook_name=query) for query in (-3, name))
    assert by_layer.similarities.tolist() == by_name.similarities.tolist()
    assert tll.decode_directions(vector, index, hook_name="3-4").positive.rows.shape == (1, 10)
    steer = tll.SteeringLens(vector, index, 3, read="4,5")
    assert (steer.hook_name, steer.read) == (name, tuple(posts(4, 5)))
    labels = [tll.label_features(tll.load_sae("demo"), index, [3], hook_name=hook, progress=False) for hook in (3, name)]
    assert labels[0].table["auroc"].tolist() == labels[1].table["auroc"].tolist()
