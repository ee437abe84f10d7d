"""SAEs in eight bits, as they come with the package."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tl_latentlens as tll
from tl_latentlens.directions.features.sae import SAES
from tl_latentlens.directions.features.sae_int8 import dequantize, quantize


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {"W_enc": torch.randn(16, 40, generator=generator), "W_dec": torch.randn(40, 16, generator=generator)}
    drawn["W_enc"][:, 3] *= 1000  # each feature has a scale of its own
    drawn["W_dec"][7] = 0
    return {**drawn, "b_enc": torch.randn(40, generator=generator), "b_dec": torch.ones(16)}


def test_weights_come_back_to_half_a_step_of_each_feature(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    quantized = quantize(tensors)
    assert (quantized["W_enc"].dtype, quantized["W_dec"].dtype) == (torch.int8, torch.int8)
    save_file(quantized, tmp_path / "sae_weights.safetensors")
    sae = tll.load_sae(tmp_path)
    for matrix, axis, name in ((sae.weights["W_enc"], 0, "W_enc"), (sae.W_dec, 1, "W_dec")):
        error = (matrix - tensors[name]).abs()
        step = tensors[name].abs().amax(axis, keepdim=True) / 127
        assert bool((error <= 0.501 * step).all())
        assert float(error.max()) > 0
    torch.testing.assert_close(sae.weights["b_enc"], tensors["b_enc"])
    assert not sae.W_dec[7].any()


def test_other_tensors_are_left_alone(tensors: dict[str, torch.Tensor]) -> None:
    assert dequantize(tensors) == tensors
    whole = {"W_dec": torch.ones(3, 2, dtype=torch.int8)}
    assert dequantize(whole) == whole


def test_a_scale_that_does_not_fit_is_named(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    quantized = {**quantize(tensors), "W_enc_scale": torch.ones(16)}
    save_file(quantized, tmp_path / "sae_weights.safetensors")
    with pytest.raises(tll.InvalidInputError, match=r"got W_enc_scale of shape \(16,\); expected \(40,\)"):
        tll.load_sae(tmp_path)


def test_the_sae_of_smollm2_comes_with_the_package() -> None:
    sae = tll.load_sae("smollm2")
    assert (tuple(sae.W_dec.shape), sae.architecture, sae.hook_name) == ((4608, 576), "jumprelu", "blocks.14.hook_resid_post")
    assert sae.model_name == "smollm2"
    assert sae.W_dec.dtype == sae.weights["W_enc"].dtype == torch.float32
    assert (SAES["smollm2"] / "sae_weights.safetensors").stat().st_size < 8e6
