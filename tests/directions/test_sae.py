"""SAEs read from files and tensors, and what is no SAE."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tl_latentlens as tll

HOOK = "blocks.1.hook_resid_post"


def test_a_saelens_folder_reads_the_same_without_saelens(tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens", exc_type=ImportError)
    from sae_lens.saes.sae import SAEMetadata

    common = {"d_in": 16, "d_sae": 40, "device": "cpu", "metadata": SAEMetadata(hook_name=HOOK)}
    kinds = {
        "standard": sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**common)),
        "no_bias": sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**common, apply_b_dec_to_input=False)),
        "jumprelu": sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(**common)),
        "topk": sae_lens.TopKSAE(sae_lens.TopKSAEConfig(**common, k=5)),
        "rescaled": sae_lens.TopKSAE(sae_lens.TopKSAEConfig(**common, k=5, rescale_acts_by_decoder_norm=True)),
        "gated": sae_lens.GatedSAE(sae_lens.GatedSAEConfig(**common)),
    }
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(50, 16, generator=generator)
    for name, sae in kinds.items():
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for parameter in sae.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
            sae.save_model(tmp_path / name)
            expected = sae.encode(x)
        ours = tll.load_sae(tmp_path / name)
        assert ours.hook_name == HOOK
        torch.testing.assert_close(ours.encode(x), expected.to_dense() if expected.is_sparse else expected)
        assert 0 < float((expected.to_dense() if expected.is_sparse else expected).gt(0).float().mean()) < 0.9


def test_the_hook_point_of_an_old_saelens_folder_is_its_hook_name(tmp_path: Path) -> None:
    save_file({"W_dec": torch.ones(3, 2)}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"hook_point": HOOK, "d_in": 2, "d_sae": 3}))
    assert tll.load_sae(tmp_path).hook_name == HOOK


def test_what_is_no_sae_is_named(tmp_path: Path) -> None:
    with pytest.raises(tll.InvalidInputError, match="no SAE at"):
        tll.load_sae(tmp_path / "nowhere")
    (tmp_path / "bad.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(tll.InvalidInputError, match="is no safetensors file"):
        tll.load_sae(tmp_path / "bad.safetensors")
    with pytest.raises(tll.InvalidInputError, match="expected W_dec"):
        tll.load_sae({"W_enc": torch.ones(2, 3)})
    with pytest.raises(tll.InvalidInputError, match=r"got W_enc of shape \(3, 2\); expected \(2, 3\)"):
        tll.load_sae({"W_dec": torch.ones(3, 2), "W_enc": torch.ones(3, 2), "b_enc": torch.ones(3)})
    with pytest.raises(tll.InvalidInputError, match="got an encoder of"):
        tll.load_sae({"W_dec": torch.ones(3, 2), "W_enc": torch.ones(2, 3)})
    with pytest.raises(tll.InvalidInputError, match=r"got b_dec of shape \(3,\); expected \(2,\)"):
        tll.load_sae({"W_dec": torch.ones(3, 2), "b_dec": torch.ones(3)})
    with pytest.raises(tll.InvalidInputError, match="expected a path or tensors"):
        tll.load_sae(None)  # pyright: ignore[reportArgumentType]
    alone = tll.load_sae({"W_dec": torch.ones(3, 2)}, hook_name=HOOK)
    assert repr(alone) == f"TensorSAE(decoder only, 3 × 2, {HOOK})"
    with pytest.raises(tll.InvalidInputError, match="W_dec alone"):
        alone.encode(torch.ones(2))


@pytest.mark.parametrize("wrong", ["demo", {"W_dec": 1}, 3])
def test_what_is_no_sae(index: tll.ContextualIndex, wrong: Any) -> None:
    with pytest.raises(tll.InvalidInputError, match=r"for an SAE; load it|expected an SAE with W_dec"):
        tll.label_features(wrong, index)
    with pytest.raises(tll.InvalidInputError, match=r"for an SAE; load it|expected an SAE with W_dec"):
        tll.find_features("a text", -1, wrong, index, model=None)
    with pytest.raises(tll.InvalidInputError):
        tll.decode_directions(wrong, index)
