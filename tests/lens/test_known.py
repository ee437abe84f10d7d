"""What a calibrated reading says of each cell: whether the bank knows the token, and whether the nearest row is its use."""

from typing import Any

import numpy as np
import pytest
import torch

import tl_latentlens as tll

TEXTS = ["She put the money in the bank, and the money was gone", "The boat by the bank of the river"]
NAMES = ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post", "blocks.3.attn.hook_z"]


@pytest.fixture(scope="module")
def own_bank(any_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tll.Bank:
    path = tmp_path_factory.mktemp("known") / "bank.h5"
    return tll.build_bank(any_model, list(tll.load_corpus("demo", limit=120)), path, hook_names=NAMES, progress=False)


@pytest.mark.parametrize("transform", ["raw", "center"])
def test_cells_have_the_figures_of_their_own_hook_name(any_model: Any, own_bank: tll.Bank, transform: str) -> None:
    """Several hook names are searched at once; each activation is centered by the mean of its own."""
    index = tll.ContextualIndex(own_bank, [1, 3], device="cpu", transform=transform)
    hooks = tll.latentlens_hooks(index, calibrate=True)
    _, cache = any_model.run_with_cache(TEXTS)  # the batch is padded as in the run with hooks
    any_model.run_with_hooks(TEXTS, fwd_hooks=hooks)
    result, token_ids = hooks.result, any_model.to_tokens(TEXTS).numpy()
    decoded, table = result.decoded, result.to_dataframe()
    for name in index.hook_names:
        vectors = cache[name][torch.from_numpy(decoded)]
        found = index.search(vectors, 5, query_hook_name=name, distinct=True, calibrate=True)
        torch.testing.assert_close(result.found[name].known, found.known)
        assert torch.equal(result.found[name].chances, found.chances)
        uses = index.use_chances(vectors, found, name, token_ids[decoded])
        torch.testing.assert_close(result.found[name].use_chances, uses, equal_nan=True)
        assert not uses.isnan().all()
        lines = table[(table["hook_name"] == name) & (table["rank"] == 1)]
        np.testing.assert_allclose(lines["known"], found.known)
        np.testing.assert_allclose(lines["use_chance"].astype(float), uses)
    cell = result.cell(3, 2)
    assert cell.known == result.found[NAMES[1]].known_of(1)


def test_hook_names_that_the_index_does_not_hold_have_no_figure(any_model: Any, own_bank: tll.Bank) -> None:
    index = tll.ContextualIndex(own_bank, [1, 3], device="cpu")
    names = [3, "blocks.2.hook_resid_post", "blocks.3.attn.hook_result[1]"]
    hooks = tll.latentlens_hooks(index, names, calibrate=True, model=any_model)
    any_model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
    result = hooks.result
    assert {name: result.found[name].known is None for name in result.hook_names} == {
        "blocks.2.hook_resid_post": True,
        "blocks.3.attn.hook_result[1]": True,
        NAMES[1]: False,
    }
    assert all(found.chances is not None for found in result.found.values())
    assert result.cell("blocks.2.hook_resid_post", 3).known is None
    grid = result.grid(0)
    assert grid.known is not None
    assert np.isnan(grid.known).all(-1).tolist() == [name != NAMES[1] for name in result.hook_names]
    table = result.to_dataframe()
    assert table.groupby("hook_name")["known"].count().to_dict() == {
        name: (0 if name != NAMES[1] else 5 * len(result.positions)) for name in result.hook_names
    }


def test_heads_are_known_among_their_own_rows(any_model: Any, own_bank: tll.Bank) -> None:
    index = tll.ContextualIndex(own_bank, [f"{NAMES[2]}[:]"], device="cpu")
    hooks = tll.latentlens_hooks(index, [f"{NAMES[2]}[1]"], calibrate=True, model=any_model)
    any_model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
    alone = tll.ContextualIndex(own_bank, f"{NAMES[2]}[1]", device="cpu")
    hooks_of_one = tll.latentlens_hooks(alone, calibrate=True, model=any_model)
    any_model.run_with_hooks(TEXTS[0], fwd_hooks=hooks_of_one)
    [found], [expected] = hooks.result.found.values(), hooks_of_one.result.found.values()
    assert found.known is not None
    torch.testing.assert_close(found.known, expected.known)
    assert found.known.min() > 0


def test_without_tokens_there_is_no_use_of_a_token(any_model: Any, own_bank: tll.Bank) -> None:
    index = tll.ContextualIndex(own_bank, 3, device="cpu")
    hook = tll.LatentLensHook(index, logit_lens=False, calibrate=True)
    hook(torch.from_numpy(own_bank.activations(NAMES[1], [5, 9]))[None], None, NAMES[1])
    [found] = hook.result.found.values()
    assert (found.known.tolist(), found.use_chances) == ([1, 1], None), "rows of the bank find themselves"


def test_readings_can_do_without_the_figures(any_model: Any, own_bank: tll.Bank) -> None:
    index = tll.ContextualIndex(own_bank, 3, device="cpu")
    hooks = tll.latentlens_hooks(index, calibrate=False)
    any_model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
    assert not {"known", "use_chance", "chance"} & set(hooks.result.to_dataframe())
    assert hooks.result.grid(0).known is None
    assert not index._known_tokens, "nothing is searched for it"
