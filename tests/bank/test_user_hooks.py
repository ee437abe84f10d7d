"""A bank of a model with hooks on it says so, and the same rule holds wherever its model is checked."""

import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import TEXTS

import tl_latentlens as tll
from tl_latentlens.model.user_hooks import user_hook_points

HOOK, CHANGED = "blocks.3.hook_resid_post", "blocks.1.hook_resid_post"


def larger(activation: torch.Tensor, hook: Any) -> torch.Tensor:
    return activation * 1.5


def add_to_output(module: Any, inputs: Any, output: Any) -> Any:
    """A hook of torch, as other libraries of a user add them."""
    return output * 1.5


@pytest.fixture(params=["tl", "permanent", "torch"])
def hooked(request: pytest.FixtureRequest) -> tuple[Any, str]:
    """A model that a hook changes, and where."""
    model = tll.load_demo_model()
    if request.param == "torch":
        model.blocks[1].mlp.register_forward_hook(add_to_output)
        return model, r"blocks\.1\.\S*mlp"
    model.add_hook(CHANGED, larger, is_permanent=request.param == "permanent")
    return model, r"blocks\.1\.hook_\w+"


def unhook(model: Any) -> None:
    model.reset_hooks(including_permanent=True)
    model.blocks[1].mlp._forward_hooks.clear()


def read_by_hooks(bank: tll.Bank, model: Any, *user_hooks: Any) -> tll.LensResult:
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank, device="cpu"), top_k=1)
    model.run_with_hooks(TEXTS[0], fwd_hooks=[*user_hooks, *hooks])
    return hooks.result


def read_by_added_hooks(bank: tll.Bank, model: Any) -> tll.LensResult:
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank, device="cpu"), top_k=1)
    for name, function in hooks:
        model.add_hook(name, function)
    model(TEXTS[0])
    return hooks.result


def test_a_bank_of_a_changed_model(hooked: tuple[Any, str], tmp_path: Path) -> None:
    model, where = hooked
    with pytest.warns(UserWarning, match=rf"the model has hooks at {where}: what they change goes into the bank"):
        bank = tll.build_bank(model, TEXTS, tmp_path / "a.h5", hook_names=HOOK, progress=False)
    assert re.fullmatch(where, bank.file.metadata.hooked[0])
    tll.ContextualIndex(bank, device="cpu").check_model(model)
    result = read_by_hooks(bank, model)
    assert result.cell(HOOK, -1).neighbors[0].similarity > 0.999
    assert str(read_by_added_hooks(bank, model)) == str(result), "the check calls the user's hooks and not the lens"

    unhook(model)
    for check in (tll.ContextualIndex(bank, device="cpu").check_model, partial(read_by_hooks, bank)):
        with pytest.raises(
            tll.ModelMismatchError, match=rf"built while hooks were attached at {where}, which may have changed"
        ):
            check(model)


def test_a_bank_of_the_model_itself_is_read_through_hooks(hooked: tuple[Any, str], bank: tll.Bank) -> None:
    """What a user changes in a run is there to be read; the model is still the bank's."""
    model, _ = hooked
    tll.ContextualIndex(bank, device="cpu").check_model(model)
    changed = read_by_hooks(bank, model).cell(HOOK, -1).neighbors[0].similarity
    unhook(model)
    assert changed < read_by_hooks(bank, model).cell(HOOK, -1).neighbors[0].similarity


def test_lens_hooks_are_not_counted(any_model: Any, index: tll.ContextualIndex, tmp_path: Path) -> None:
    hooks = tll.latentlens_hooks(index)
    any_model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
    before = str(hooks.result)
    with warnings.catch_warnings(), any_model.hooks(fwd_hooks=hooks):
        warnings.simplefilter("error")
        assert user_hook_points(any_model) == []
        any_model(TEXTS[0])
        index.check_model(any_model, force=True)
        assert str(hooks.result) == before, "a check is no run"
        bank = tll.build_bank(any_model, TEXTS, tmp_path / "a.h5", hook_names=HOOK, progress=False)
    assert bank.file.metadata.hooked == ()


def test_other_weights_beside_hooks_are_still_other_weights(bank: tll.Bank) -> None:
    model = tll.load_demo_model()
    with torch.no_grad():
        model.W_E.mul_(1.5)
    model.add_hook(CHANGED, larger)
    message = r"its weights are others .*, with the hooks that are attached at blocks\.1\.hook_\w+ as without them; load"
    with pytest.raises(tll.ModelMismatchError, match=message):
        tll.ContextualIndex(bank, device="cpu").check_model(model)


def test_hooks_stay_as_they_were(bank: tll.Bank) -> None:
    model, calls = tll.load_demo_model(), []
    model.blocks[1].mlp.register_forward_hook(lambda *arguments: calls.append("after"))
    model.blocks[1].mlp.register_forward_pre_hook(lambda *arguments: calls.append("before"))
    model.add_hook(HOOK, lambda activation, hook: calls.append("tl"))
    model(TEXTS[0])
    tll.ContextualIndex(bank, device="cpu").check_model(model)
    assert calls == ["before", "after", "tl"], "a model that agrees without its hooks is not run with them"
    model(TEXTS[0])
    assert calls == 2 * ["before", "after", "tl"]


def test_a_build_that_goes_on_with_other_hooks(tmp_path: Path, small_blocks: None) -> None:
    model, path = tll.load_demo_model(), tmp_path / "a.h5"
    arguments: dict[str, Any] = {"hook_names": HOOK, "batch_tokens": 16, "progress": False}

    def stop(activation: torch.Tensor, hook: Any) -> None:
        if len(list(tmp_path.glob("*.partial"))) and next(countdown) == 0:
            raise KeyboardInterrupt

    countdown = iter((2, 1, 0, -1))
    model.add_hook(CHANGED, larger)
    model.add_hook("blocks.2.hook_resid_post", stop)
    with pytest.warns(UserWarning, match="the model has hooks at"), pytest.raises(KeyboardInterrupt):
        tll.build_bank(model, TEXTS, path, **arguments)
    model.reset_hooks()
    with pytest.raises(
        tll.BankError, match=r"or other hooks on it: \['blocks\.1\.\w+', 'blocks\.2\.\w+'\] in the file, \[\] in"
    ):
        tll.build_bank(model, TEXTS, path, **arguments)
