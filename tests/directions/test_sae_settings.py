"""Configurations of SAELens folders: each setting is followed as SAELens follows it, or the error names it."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tl_latentlens as tll

HOOK = "blocks.1.hook_resid_post"
D_IN, D_SAE, D_OUT = 12, 40, 16
COMMON = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "hook_name": HOOK, "apply_b_dec_to_input": True}
BEFORE_6 = {**COMMON, "architecture": "standard", "normalize_activations": "none", "model_name": "gpt2-small"}
SINCE_6 = {
    **{name: value for name, value in COMMON.items() if name != "hook_name"},
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {"sae_lens_version": "6.54.12", "hook_name": HOOK, "model_name": "gpt2-small", "note": "of our own"},
}
TRANSCODER = {**SINCE_6, "d_out": D_OUT, "apply_b_dec_to_input": False}


def tensors_of(architecture: str) -> dict[str, torch.Tensor]:
    """Random tensors of an architecture; about half of its features are active."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / 2

    d_out = D_OUT if "transcoder" in architecture else D_IN
    tensors = {"W_enc": random(D_IN, D_SAE), "b_enc": random(D_SAE), "W_dec": random(D_SAE, d_out), "b_dec": random(d_out)}
    if "jumprelu" in architecture:
        tensors["threshold"] = random(D_SAE).abs()
    if "skip" in architecture:
        tensors["W_skip"] = random(d_out, D_IN)
    if architecture == "gated":
        del tensors["b_enc"]
        tensors |= {name: random(D_SAE) for name in ("b_gate", "b_mag", "r_mag")}
    if architecture == "matching_pursuit":
        del tensors["W_enc"], tensors["b_enc"]
        tensors["W_dec"] = torch.nn.functional.normalize(tensors["W_dec"], dim=-1)
    return tensors


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A folder as SAELens saves it."""
    folder.mkdir(exist_ok=True)
    save_file(tensors or tensors_of(config.get("architecture") or "standard"), folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def inputs(*shape: int) -> torch.Tensor:
    return 2 * torch.randn(*(shape or (60, D_IN)), generator=torch.Generator().manual_seed(4))


def with_saelens(folder: Path, x: torch.Tensor) -> torch.Tensor:
    """What SAELens' own object encodes."""
    sae_lens = pytest.importorskip("sae_lens", exc_type=ImportError)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        encoded = sae_lens.SAE.load_from_disk(str(folder), device="cpu").encode(x)
    return encoded.to_dense() if encoded.is_sparse else encoded


FOLLOWED: dict[str, dict[str, Any]] = {
    "standard": {**SINCE_6, "architecture": "standard"},
    "no b_dec": {**SINCE_6, "architecture": "standard", "apply_b_dec_to_input": False},
    "gated": {**SINCE_6, "architecture": "gated"},
    "jumprelu": {**SINCE_6, "architecture": "jumprelu"},
    "topk": {**SINCE_6, "architecture": "topk", "k": 5},
    "topk, rescaled": {**SINCE_6, "architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": True},
    "abstopk": {**SINCE_6, "architecture": "abstopk", "k": 7},
    "abstopk, rescaled": {**SINCE_6, "architecture": "abstopk", "k": 7, "rescale_acts_by_decoder_norm": True},
    "matching pursuit": {**SINCE_6, "architecture": "matching_pursuit", "residual_threshold": 0.5},
    "matching pursuit, five steps": {
        **SINCE_6, "architecture": "matching_pursuit", "residual_threshold": 0.0, "max_iterations": 5,
        "stop_on_duplicate_support": False,
    },
    "matching pursuit, defaults": {**SINCE_6, "architecture": "matching_pursuit", "apply_b_dec_to_input": False},
    "transcoder": {**TRANSCODER, "architecture": "transcoder"},
    "skip transcoder": {**TRANSCODER, "architecture": "skip_transcoder"},
    "jumprelu transcoder": {**TRANSCODER, "architecture": "jumprelu_transcoder"},
    "jumprelu skip transcoder": {**TRANSCODER, "architecture": "jumprelu_skip_transcoder"},
    "layer norm": {**SINCE_6, "architecture": "standard", "normalize_activations": "layer_norm"},
    "constant norm": {**SINCE_6, "architecture": "jumprelu", "normalize_activations": "constant_norm_rescale"},
    "layer norm of a transcoder": {**TRANSCODER, "architecture": "transcoder", "normalize_activations": "layer_norm"},
    "average norm": {**SINCE_6, "architecture": "topk", "k": 3, "normalize_activations": "expected_average_only_in"},
    "bfloat16": {**SINCE_6, "architecture": "jumprelu", "dtype": "bfloat16"},
    "torch.float64": {**SINCE_6, "architecture": "gated", "dtype": "torch.float64"},
    "before 6": BEFORE_6,
    "before 6, as little as can be": {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32"},
    "before 6, relu": {**BEFORE_6, "activation_fn_str": "relu", "activation_fn_kwargs": {}, "sae_lens_version": "5.10.7"},
    "before 6, topk by its function": {**BEFORE_6, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}},
    "before 6, topk by the newer name": {**BEFORE_6, "activation_fn": "topk", "activation_fn_kwargs": {"k": 4}},
    "before 6, topk without architecture": {**COMMON, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 6}},
    "before 6, topk by both": {
        **BEFORE_6, "architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}},
    "before 6, topk by architecture": {**BEFORE_6, "architecture": "topk", "k": 9},
    "before 6, normalized": {**BEFORE_6, "normalize_activations": "layer_norm"},
    "before 6, normalized by a boolean": {**BEFORE_6, "normalize_activations": True},
    "before 6, not normalized": {**BEFORE_6, "normalize_activations": None},
    "before 6, no b_dec": {**BEFORE_6, "apply_b_dec_to_input": False},
    "before 6, gated": {**BEFORE_6, "architecture": "gated", "finetuning_scaling_factor": False},
    "before 6, of a training run": {
        **BEFORE_6, "hook_layer": 1, "hook_point_layer": 1, "noise_scale": 0.1, "lp_norm": 1.0, "l1_coefficient": 8e-5,
        "normalize_sae_decoder": True, "use_ghost_grads": False, "finetuning_scaling_factor": True, "seed": 42, "lr": 4e-4,
        "use_error_term": False, "context_size": 128, "dataset_path": "texts", "prepend_bos": True, "wandb_project": "x",
        "neuronpedia_id": None, "something_unset": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("config", FOLLOWED.values(), ids=FOLLOWED)
def test_a_folder_encodes_as_saelens_does(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = write(tmp_path / "sae", config)
    ours, expected = tll.load_sae(folder).encode(inputs()), with_saelens(folder, inputs())
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected)
    assert 0 < float((expected != 0).float().mean()) < 0.95


@pytest.mark.parametrize("name", ["reshape_activations", "before 6"])
def test_an_sae_of_all_heads_takes_them_apart_or_side_by_side(tmp_path: Path, name: str) -> None:
    hook = "blocks.1.attn.hook_z"
    metadata = {**SINCE_6["metadata"], "hook_name": hook}
    since_6 = {**SINCE_6, "architecture": "standard", "reshape_activations": "hook_z", "metadata": metadata}
    folder = write(tmp_path / "sae", since_6 if name != "before 6" else {**BEFORE_6, "hook_name": hook})
    heads = inputs(7, 3, 4)
    ours = tll.load_sae(folder)
    torch.testing.assert_close(ours.encode(heads), with_saelens(folder, heads))
    torch.testing.assert_close(ours.encode(heads.flatten(1)), ours.encode(heads))
    assert ours.hook_name == hook


def test_an_sae_of_one_head_names_it(tmp_path: Path) -> None:
    config = {**BEFORE_6, "hook_name": "blocks.1.attn.hook_z", "hook_head_index": 2}
    assert tll.load_sae(write(tmp_path / "sae", config)).hook_name == "blocks.1.attn.hook_z[2]"
    since_6 = {**SINCE_6, "architecture": "standard", "metadata": {**SINCE_6["metadata"], "hook_head_index": None}}
    assert tll.load_sae(write(tmp_path / "other", since_6)).hook_name == HOOK


def test_a_scaling_factor_of_ones_changes_nothing(tmp_path: Path) -> None:
    tensors = tensors_of("standard")
    folder = write(tmp_path / "ones", BEFORE_6, {**tensors, "scaling_factor": torch.ones(D_SAE)})
    torch.testing.assert_close(tll.load_sae(folder).encode(inputs()), with_saelens(folder, inputs()))
    twice = {**tensors, "scaling_factor": torch.full((D_SAE,), 2.0)}
    folder = write(tmp_path / "other", {**BEFORE_6, "finetuning_scaling_factor": True}, twice)
    with pytest.raises(tll.InvalidInputError, match=r"got a tensor scaling_factor \[40\]"):
        tll.load_sae(folder)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "topk without k": ({**SINCE_6, "architecture": "topk"}, "has no k"),
    "topk without k, before 6": ({**BEFORE_6, "architecture": "topk"}, "has no k"),
    "topk function without k": ({**BEFORE_6, "activation_fn_str": "topk"}, "has no k"),
    "topk function, empty arguments": ({**BEFORE_6, "activation_fn_str": "topk", "activation_fn_kwargs": {}}, "has no k"),
    "k where SAELens 6 does not read it": (
        {**SINCE_6, "architecture": "topk", "activation_fn_kwargs": {"k": 4}}, "has no k",
    ),
    "two k": ({**BEFORE_6, "architecture": "topk", "k": 3, "activation_fn_kwargs": {"k": 4}}, r"k=\[3, 4\]"),
    "half a feature": ({**SINCE_6, "architecture": "topk", "k": 2.5}, "k=2.5"),
    "no feature": ({**SINCE_6, "architecture": "topk", "k": 0}, "k=0"),
    "more than there are": ({**SINCE_6, "architecture": "topk", "k": 41}, "got k=41; the SAE has 40 features"),
    "k of a ReLU SAE": ({**SINCE_6, "architecture": "standard", "k": 4}, "k=4.*none for the architecture 'standard'"),
    "batchtopk in training": ({**SINCE_6, "architecture": "batchtopk", "k": 4}, "architecture='batchtopk'"),
    "matryoshka in training": (
        {**SINCE_6, "architecture": "matryoshka_batchtopk", "k": 4}, "architecture='matryoshka_batchtopk'",
    ),
    "temporal": ({**SINCE_6, "architecture": "temporal"}, "architecture='temporal'"),
    "no architecture since 6": (SINCE_6, "architecture=None"),
    "architecture of another kind": ({**SINCE_6, "architecture": ["standard"]}, r"architecture=\['standard'\]"),
    "another activation function": ({**BEFORE_6, "activation_fn_str": "tanh-relu"}, "activation_fn='tanh-relu'"),
    "two activation functions": ({**BEFORE_6, "activation_fn_str": "topk", "activation_fn": "relu"}, "activation_fn="),
    "topk function of a JumpReLU SAE": (
        {**BEFORE_6, "architecture": "jumprelu", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}},
        "activation_fn='topk'",
    ),
    "topk function since 6": (
        {**SINCE_6, "architecture": "standard", "activation_fn": "topk", "activation_fn_kwargs": {"k": 4}},
        "activation_fn='topk'",
    ),
    "arguments of the activation function": (
        {**BEFORE_6, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4, "postact_fn": "identity"}},
        r"activation_fn_kwargs=\{'postact_fn': 'identity'\}",
    ),
    "whitening": (
        {**SINCE_6, "architecture": "standard", "normalize_activations": "covariance_whitening"}, "normalize_activations=",
    ),
    "another normalization": ({**BEFORE_6, "normalize_activations": "rms_norm"}, "normalize_activations='rms_norm'"),
    "reshaping": ({**BEFORE_6, "reshape_activations": "hook_q"}, "reshape_activations='hook_q'"),
    "heads of a hook without them": ({**BEFORE_6, "reshape_activations": "hook_z"}, "reshape_activations='hook_z'"),
    "b_dec of a transcoder": (
        {**TRANSCODER, "architecture": "transcoder", "apply_b_dec_to_input": True}, "apply_b_dec_to_input=True",
    ),
    "b_dec by a number": ({**SINCE_6, "architecture": "standard", "apply_b_dec_to_input": 0.5}, "apply_b_dec_to_input=0.5"),
    "rescaling of a ReLU SAE": (
        {**SINCE_6, "architecture": "standard", "rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm=True",
    ),
    "a dtype": ({**SINCE_6, "architecture": "standard", "dtype": "float8"}, "dtype='float8'"),
    "a version": ({**BEFORE_6, "sae_lens_version": "newest"}, "sae_lens_version='newest'"),
    "pursuit of another architecture": (
        {**SINCE_6, "architecture": "standard", "residual_threshold": 0.1}, "residual_threshold=0.1",
    ),
    "steps of pursuit": ({**SINCE_6, "architecture": "matching_pursuit", "max_iterations": "all"}, "max_iterations='all'"),
    "a setting that nobody knows": ({**SINCE_6, "architecture": "standard", "encoder_scale": 2.0}, "encoder_scale=2.0"),
    "one that is off": ({**BEFORE_6, "use_relu": False}, "use_relu=False"),
    "a setting among the metadata": (
        {**SINCE_6, "architecture": "standard", "metadata": {**SINCE_6["metadata"], "normalize_activations": "layer_norm"}},
        "metadata.normalize_activations='layer_norm'",
    ),
    "another width": ({**SINCE_6, "architecture": "standard", "d_in": 13}, "got d_in=13 in cfg.json; its tensors have 12"),
    "another number of features": ({**SINCE_6, "architecture": "standard", "d_sae": 41}, "got d_sae=41"),
    "metadata that are none": ({**SINCE_6, "architecture": "standard", "metadata": "x"}, "metadata='x'"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "named"), REFUSED.values(), ids=REFUSED)
def test_a_setting_that_is_not_followed_is_named(tmp_path: Path, config: dict[str, Any], named: str) -> None:
    architecture = config.get("architecture")
    tensors = tensors_of(architecture if isinstance(architecture, str) else "standard")
    with pytest.raises(tll.InvalidInputError, match=named):
        tll.load_sae(write(tmp_path / "sae", config, tensors))


@pytest.mark.parametrize("extra", ["threshold", "topk_threshold", "log_threshold", "W_skip"])
def test_a_tensor_that_the_architecture_lacks_is_named(tmp_path: Path, extra: str) -> None:
    tensors = {**tensors_of("standard"), extra: torch.ones(D_SAE)}
    with pytest.raises(tll.InvalidInputError, match=rf"got a tensor {extra} \[40\]; expected those of a standard SAE"):
        tll.load_sae(write(tmp_path / "sae", BEFORE_6, tensors))
    if extra in ("topk_threshold", "log_threshold"):
        with pytest.raises(tll.InvalidInputError, match=f"got a tensor {extra}"):
            tll.load_sae(tensors)


def test_a_missing_b_dec_and_a_broken_configuration_are_named(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in tensors_of("standard").items() if name != "b_dec"}
    with pytest.raises(tll.InvalidInputError, match="without the tensor b_dec"):
        tll.load_sae(write(tmp_path / "sae", BEFORE_6, tensors))
    for text, message in (("{", "is no JSON"), ("[]", "an object"), ("{}", "an object")):
        (write(tmp_path / "sae", BEFORE_6) / "cfg.json").write_text(text)
        with pytest.raises(tll.InvalidInputError, match=message):
            tll.load_sae(tmp_path / "sae")


def test_a_transcoder_says_what_it_writes(tmp_path: Path) -> None:
    metadata = {**SINCE_6["metadata"], "hook_name": "blocks.1.hook_mlp_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    sae = tll.load_sae(write(tmp_path / "sae", {**TRANSCODER, "architecture": "skip_transcoder", "metadata": metadata}))
    assert (sae.hook_name, sae.hook_name_out, sae.model_name) == ("blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out", "gpt2-small")
    assert tuple(sae.W_dec.shape) == (D_SAE, D_OUT)
    assert tll.load_sae(tensors_of("jumprelu_skip_transcoder")).architecture == "jumprelu_skip_transcoder"
