"""A model with other weights is refused, both sides named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.fingerprints import OTHER_WEIGHTS, check, fine_tune, furthest, know, load_small, refusal
from support.models import TEXTS, available_kinds

import tl_latentlens as tll
from tl_latentlens.model.describe import describe_model
from tl_latentlens.model.fingerprint import fingerprint
from tl_latentlens.model.fingerprint_check import check_fingerprint


@pytest.mark.parametrize("kind", available_kinds())
def test_other_weights_under_the_same_name(bank: tll.Bank, kind: str) -> None:
    model = tll.load_demo_model(kind)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.5 * weight.std() * torch.randn_like(weight)
    with pytest.raises(tll.ModelMismatchError) as refused:
        tll.ContextualIndex(bank, device="cpu").check_model(model)
    one, other = (
        f"demo_model ({name}, 6 layers, d_model 256, float32)" for name in (bank.model_info.class_name, type(model).__name__)
    )
    assert str(refused.value) == (
        f"the bank is of {one}, the model is {other}, and their activations differ at "
        "blocks.0.hook_resid_post, blocks.1.hook_resid_post, blocks.2.hook_resid_post …: its weights are others under the same "
        f"name (a fine-tune, another revision or another checkpoint){OTHER_WEIGHTS}"
    )


def test_other_weights_under_another_name(tmp_path: Path) -> None:
    name = "blocks.2.hook_resid_post"
    one, other = (load_small(tmp_path / name, seed=seed) for name, seed in (("one", 1), ("other", 2)))
    message = refusal(other, know(one, [name]))
    assert message.startswith("the bank is of one (")
    assert ", the model is other (" in message
    assert message.endswith(f"their activations differ at {name}: its weights are others{OTHER_WEIGHTS}")


@pytest.mark.parametrize(
    ("optimizer", "rate"), [(torch.optim.SGD, 1e-3), (torch.optim.AdamW, 1e-5), (torch.optim.AdamW, 1e-4)], ids=str
)
def test_one_step_of_fine_tuning_is_noticed(any_model: Any, optimizer: Any, rate: float) -> None:
    known, model = know(any_model), tll.load_demo_model()
    check(model, known)
    fine_tune(model, optimizer(model.parameters(), rate), TEXTS[4:])  # not the texts of the fingerprint
    assert "its weights are others under the same name (a fine-tune, " in refusal(model, known)


def test_a_fine_tune_is_noticed_from_half_a_percent_on() -> None:
    """Of the activation that changed most; what changes less is let through."""
    model = tll.load_demo_model()
    known, optimizer = know(model), torch.optim.AdamW(model.parameters(), 1e-6)
    noticed = []
    for _ in range(3):
        fine_tune(model, optimizer, TEXTS[:2])
        change = furthest(known, model)
        assert abs(change - 5e-3) > 1e-4, "too near to tell"
        noticed.append(change > 5e-3)
        if noticed[-1]:
            assert "a fine-tune" in refusal(model, known)
        else:
            check(model, known)
    assert noticed == [False, False, True]


def test_fingerprint_is_not_blinded_by_one_massive_activation() -> None:
    """Real models have activations at BOS a hundred times larger than elsewhere; the other tokens must still be compared."""
    kind = available_kinds()[0]
    model = tll.load_demo_model(kind)
    with torch.no_grad():
        model.W_E[model.tokenizer.bos_token_id, 3] += 3000.0
    name = "blocks.1.hook_resid_post"
    known = fingerprint(model, [model.to_tokens(TEXTS[0])[0].tolist()], [name])
    assert np.abs(known.activations[name][0]).max() > 1000
    check_fingerprint(model, known, describe_model(model))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.shape[0] != model.cfg.d_vocab:
                weight += weight.std() * torch.randn_like(weight)
    other = fingerprint(model, known.prompts, [name])
    a, b = known.activations[name][1:], other.activations[name][1:]
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert cosines.max() < 0.95  # the activations of every token but BOS have changed
    with pytest.raises(tll.ModelMismatchError, match="activations differ"):
        check_fingerprint(model, known, describe_model(model))
