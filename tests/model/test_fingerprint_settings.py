"""A model that runs under other settings of torch than the bank's did: the setting is named, not a fine-tune."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.fingerprints import RESIDUAL, check, know, refusal
from support.models import TEXTS

import tl_latentlens as tll

CPU_BFLOAT16 = {"device_type": "cpu", "dtype": torch.bfloat16}


def test_autocast_of_the_run_is_named(any_model: Any) -> None:
    known = know(any_model)
    with torch.autocast(**CPU_BFLOAT16):
        message = refusal(any_model, known)
    assert message.endswith(
        "torch.autocast was on (cpu, bfloat16) when the model ran, and it agrees without; run it without autocast, or read on "
        "with ContextualIndex(bank, allow_mismatch=True)"
    )
    check(any_model, known)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_of_the_build_is_named(any_model: Any, tmp_path: Path, dtype: str) -> None:
    with torch.autocast("cpu", getattr(torch, dtype)):
        bank = tll.build_bank(any_model, TEXTS, tmp_path / "a.h5", hook_names=RESIDUAL, progress=False)
        tll.ContextualIndex(bank, device="cpu").check_model(any_model)
    known = know(any_model)
    if dtype == "bfloat16":  # what float16 does to the embedded model is within the noise of float32
        with pytest.raises(tll.ModelMismatchError, match=r"the bank was built under torch\.autocast\('cpu', bfloat16\), where"):
            tll.ContextualIndex(bank, device="cpu").check_model(any_model)
    check(any_model, known)


def test_a_run_is_checked_as_it_ran(any_model: Any, bank: tll.Bank) -> None:
    """Wherever the result is asked for, and whatever was checked before."""
    index = tll.ContextualIndex(bank, device="cpu")
    index.check_model(any_model)
    hooks = tll.latentlens_hooks(index)
    with torch.autocast(**CPU_BFLOAT16):
        any_model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
    with pytest.raises(tll.ModelMismatchError, match=r"torch\.autocast was on"):
        _ = hooks.result
    any_model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
    with torch.autocast(**CPU_BFLOAT16):
        assert len(hooks.result.cell(RESIDUAL[0], -1).neighbors) == 5


def test_other_weights_under_autocast_are_other_weights(any_model: Any) -> None:
    known, model = know(any_model), tll.load_demo_model()
    with torch.no_grad():
        model.W_E.mul_(1.5)
    with torch.autocast(**CPU_BFLOAT16):
        assert "its weights are others" in refusal(model, known)


def test_reduced_precision_of_products_is_named(any_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated, since not every machine has it: a hook of the test stands for rounded products."""
    from tl_latentlens.search import ambient

    known = know(any_model)
    rounded = [True]
    monkeypatch.setattr(ambient, "_reduced_precisions", lambda: (None, []) if rounded[0] else None)
    monkeypatch.setattr(ambient, "_set_precision", lambda *before: rounded.__setitem__(0, True))
    monkeypatch.setattr(ambient, "_set_full_precision", lambda: rounded.__setitem__(0, False) or (None, []))
    forward = type(any_model.blocks[0]).forward

    def reduced(self: Any, *arguments: Any, **settings: Any) -> Any:
        output = forward(self, *arguments, **settings)
        return output * 1.01 if rounded[0] and isinstance(output, torch.Tensor) else output

    monkeypatch.setattr(type(any_model.blocks[0]), "forward", reduced)
    message = refusal(any_model, known)
    assert "float32 products were of reduced precision when the model ran (TF32 or bfloat16), and it agrees without" in message


def test_a_few_tokens_that_move_further_do_not_hide_the_dtype(any_model: Any) -> None:
    """In large models rounding moves single tokens by a third of their length."""
    known, model = know(any_model), tll.load_demo_model().to(torch.bfloat16)
    rows = known.fingerprint.activations[RESIDUAL[-1]]
    rows[3] += 0.5 * np.linalg.norm(rows[3]) * np.eye(256, dtype=np.float32)[7]
    message = refusal(model, known)
    assert "their dtypes differ (float32 against bfloat16), and activations moved to a cosine 0.99" in message
    assert "in the median and 0.8" in message
    assert "fine-tune" not in message


def test_another_dtype_does_not_hide_other_weights(any_model: Any) -> None:
    known, model = know(any_model), tll.load_demo_model()
    with torch.no_grad():
        model.blocks[0].mlp.W_out.mul_(-3)
    message = refusal(model.to(torch.bfloat16), known)
    assert "its weights are others under the same name" in message
    assert "beside its dtype: activations moved to a cosine " in message
    assert "further than rounding to bfloat16 does" in message


def test_quantized_weights_are_named(any_model: Any) -> None:
    known, model = know(any_model), tll.load_demo_model()
    weight = model.blocks[0].mlp.W_out
    scale = weight.detach().abs().max() / 3
    codes = (weight.detach() / scale).round()
    with torch.no_grad():
        weight.copy_(codes * scale)
    model.register_buffer("codes", codes.to(torch.int8))
    message = refusal(model, known)
    assert "the model's weights are quantized (int8), with a cosine " in message
