"""Results of features and directions as copies and in other processes: without the model, without code of other libraries."""

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import TEXTS

import tl_latentlens as tll

pytestmark = pytest.mark.usefixtures("few_random_directions")

HOOK = "blocks.3.hook_resid_post"


class OtherSAE(torch.nn.Module):
    """As SAELens': a module that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.W_dec = torch.nn.Parameter(torch.eye(256)[:8])
        self.reshape = lambda activations: activations

    def encode(self, activations: torch.Tensor) -> torch.Tensor:
        return self.reshape(activations)[:, :8].relu()


def sent(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@pytest.fixture
def unpicklable_model(any_model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model of which no copy can be made."""
    monkeypatch.setattr(type(any_model), "__getstate__", lambda self: pytest.fail("the model was copied"), raising=False)
    return any_model


def test_features(unpicklable_model: Any, index: tll.ContextualIndex, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"hook_name": HOOK, "progress": False}
    own = tll.label_features(tll.load_sae("demo"), index, [1, 5], model=unpicklable_model, **settings)
    again = sent(own)
    assert again.table.equals(own.table)
    assert again.model is None
    assert again.sae.W_dec.equal(own.sae.W_dec)
    assert again.neighbors_of(5) == own.neighbors_of(5)
    assert again.to_html(tmp_path / "a.html", progress=False).stat().st_size > 1000
    twin = copy.deepcopy(own)
    assert twin.sae is own.sae
    assert twin.model is own.model
    assert twin.table is not own.table


def test_features_of_an_sae_that_stays(index: tll.ContextualIndex, tmp_path: Path) -> None:
    own = tll.label_features(OtherSAE(), index, [1, 5], hook_name=HOOK, progress=False)
    again = sent(own)
    assert again.neighbors_of(5) == own.neighbors_of(5)
    with pytest.raises(tll.InvalidInputError, match=r"came without its SAE; give it back: dataclasses\.replace"):
        again.to_html(tmp_path / "a.html")
    dataclasses.replace(again, sae=own.sae).to_html(tmp_path / "a.html", progress=False)


def test_steering(unpicklable_model: Any, index: tll.ContextualIndex) -> None:
    steer = tll.SteeringLens(torch.ones(256), index, HOOK, multiples=(0, 2), model=unpicklable_model)
    result = steer.run(unpicklable_model, TEXTS[0])
    assert str(sent(result)) == str(result)
    for again in (sent(steer), copy.deepcopy(steer)):
        assert again.index is index
        assert str(again.run(unpicklable_model, TEXTS[0])) == str(result)


def test_lens_hooks_before_and_after_a_reading(unpicklable_model: Any, index: tll.ContextualIndex) -> None:
    hooks = tll.latentlens_hooks(index, model=unpicklable_model, embedding_lens=True)
    unpicklable_model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
    twin, again = copy.deepcopy(hooks), sent(hooks)
    assert str(again.result) == str(hooks.result) == str(twin.result)
    assert again.hook is again[0][1].func
    unpicklable_model.run_with_hooks(TEXTS[1], fwd_hooks=twin)
    assert twin.result.tokens != hooks.result.tokens
    unpicklable_model.run_with_hooks(TEXTS[1], fwd_hooks=again)
    assert str(again.result) == str(twin.result)
    followed = twin.follow_tokens([" bank"])
    assert sent(followed).to_dataframe().equals(followed.to_dataframe())


def test_a_deep_copy_of_a_hooked_model(index: tll.ContextualIndex) -> None:
    model = tll.load_demo_model()
    hooks = tll.latentlens_hooks(index)
    for name, function in hooks:
        model.add_hook(name, function)
    with torch.no_grad():  # a bridge keeps tensors of a run, which cannot be copied with their gradients
        model(TEXTS[0])
        twin = copy.deepcopy(model)
        twin(TEXTS[1])
    assert hooks.result.tokens is not None
    assert "money" in "".join(hooks.result.tokens[0]), "the hooks see the run of the copy"
    assert hooks.hook.captures.model is twin
