"""A model without numbers in its weights is refused before it runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import TEXTS

import tl_latentlens as tll

USES: dict[str, Callable[[Any, tll.ContextualIndex, Path], Any]] = {
    "build": lambda model, index, folder: tll.build_bank(model, TEXTS, folder / "a.h5", progress=False),
    "check": lambda model, index, folder: index.check_model(model),
    "direction": lambda model, index, folder: tll.difference_of_means(model, TEXTS[0], TEXTS[1], index.hook_names[0]),
    "evaluate": lambda model, index, folder: tll.evaluate(model, index.banks[0], progress=False),
}


@pytest.fixture(scope="module", params=["all", "one"])
def empty(request: pytest.FixtureRequest) -> Any:
    """A model with all its weights on the meta device, or one of them."""
    model = tll.load_demo_model()
    if request.param == "all":
        return model.to("meta")
    owner = model.blocks[3].mlp
    name, weight = next(iter(owner.named_parameters()))
    owner_of = owner.get_submodule(name.rpartition(".")[0])
    owner_of._parameters[name.rpartition(".")[2]] = torch.nn.Parameter(weight.to("meta"))
    return model


@pytest.mark.parametrize("use", USES)
def test_weights_on_the_meta_device(empty: Any, use: str, index: tll.ContextualIndex, tmp_path: Path) -> None:
    with pytest.raises(tll.InvalidInputError, match="got a model with weights on the meta device, which holds no numbers"):
        USES[use](empty, index, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "use",
    [
        lambda index, vector: index.search(vector),
        lambda index, vector: tll.VectorSearch(vector[None], "cpu"),
        lambda index, vector: tll.decode_directions(vector, index),
        lambda index, vector: tll.SteeringLens(vector, index, index.hook_names[0]),
    ],
)
def test_vectors_on_the_meta_device(use: Callable[..., Any], index: tll.ContextualIndex) -> None:
    with pytest.raises(tll.InvalidInputError, match="got a tensor on the meta device"):
        use(index, torch.ones(256, device="meta"))


def test_a_run_without_numbers(index: tll.ContextualIndex) -> None:
    model, hooks = tll.load_demo_model().to("meta"), tll.latentlens_hooks(index)
    model.run_with_hooks(torch.zeros(1, 4, dtype=torch.long, device="meta"), fwd_hooks=hooks)
    with pytest.raises(tll.InvalidInputError, match="weights on the meta device"):
        _ = hooks.result
