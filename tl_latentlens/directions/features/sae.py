"""Sparse autoencoders: SAELens objects as they are, and SAEs read from files and tensors without SAELens.

`sae_settings` reads the configuration of a file, `sae_encoders` has what each architecture computes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_latentlens.directions.features.sae_encoders import ENCODERS, NORMALIZATIONS
from tl_latentlens.directions.features.sae_int8 import dequantize
from tl_latentlens.directions.features.sae_settings import SAESettings, read_settings
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.search.ambient import own_arithmetic
from tl_latentlens.search.tensors import as_tensor

SAES = {name: Path(__file__).parents[2] / "data" / f"{name}_sae" for name in ("demo", "smollm2")}
"""The SAEs that come with this package, by the names of their models."""
ENCODED_BYTES = 2**26


@dataclass(frozen=True, eq=False)
class TensorSAE:
    """An SAE or transcoder from its tensors alone; encodes as SAELens does.

    Attributes:
        W_dec: Decoder, [d_sae, d_in]; [d_sae, d_out] of a transcoder.
        weights: Tensors of the encoder: W_enc [d_in, d_sae] and biases [d_sae]; empty where only a decoder is known.
        architecture: One of SAELens' names: "standard", "jumprelu", "topk", "gated", "skip_transcoder", ...
        hook_name: The activation that it was trained on, where known.
        b_dec: Subtracted from the activation before encoding, [d_in]; None: nothing is.
        k: Features that stay active (topk, abstopk).
        rescale: Whether pre-activations are multiplied by the decoder's norms (topk, abstopk).
        normalization: What is done to an activation first: "none", "layer_norm" or "constant_norm_rescale".
        reads_heads: Whether it reads all heads of an activation; their axes may be given flattened or not.
        residual_threshold, max_iterations, stops_at_known_support: When matching pursuit ends.
        hook_name_out: The activation that a transcoder writes, where known; None: the one that it reads.
        model_name: The model that it was trained on, where known.
    """

    W_dec: Float[Tensor, "d_sae d_in"]
    weights: dict[str, Tensor]
    architecture: str = "standard"
    hook_name: str | None = None
    b_dec: Float[Tensor, " d_in"] | None = None
    k: int | None = None
    rescale: bool = False
    normalization: str = "none"
    reads_heads: bool = False
    residual_threshold: float = 1e-2
    max_iterations: int | None = None
    stops_at_known_support: bool = True
    hook_name_out: str | None = None
    model_name: str | None = None

    def __repr__(self) -> str:
        kind = self.architecture if self.weights else "decoder only"
        return f"TensorSAE({kind}, {' × '.join(map(str, self.W_dec.shape))}, {self.hook_name})"

    def encode(self, activations: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Feature activations, 0 where a feature is not active.

        Raises:
            InvalidInputError: Only the decoder is known.
        """
        if not self.weights:
            raise InvalidInputError("this SAE is W_dec alone; give W_enc and its biases too to encode")
        inputs = activations.to(self.W_dec)
        if self.reads_heads and inputs.shape[-1] != len(self.weights["W_enc"]):
            inputs = inputs.flatten(-2)
        inputs = NORMALIZATIONS[self.normalization](inputs)
        return ENCODERS[self.architecture].encode(inputs if self.b_dec is None else inputs - self.b_dec, self)


def load_sae(source: str | Path | dict[str, Tensor], *, hook_name: int | str | None = None) -> TensorSAE:
    """An SAE from a file or from tensors, without SAELens.

    A folder gives what `sae_lens.SAE.load_from_disk` gives, for SAEs and transcoders of any version of SAELens; or an error
    that names the setting, where its configuration holds one that is not known here.

    Args:
        source: "demo" (the embedded model's SAE), "smollm2" (one of SmolLM2-135M's layer 14), a folder as SAELens saves it
            (`cfg.json`, `sae_weights.safetensors`), a safetensors file, or tensors by SAELens' names (`W_dec`, `W_enc`,
            `b_enc`, ...; `W_dec` alone will do). Tensors without a configuration are a gated SAE where there is `r_mag`, a
            JumpReLU one where there is `threshold`, and else a ReLU one.
        hook_name: The activation it was trained on, or the layer of its `hook_resid_post`; None: what the configuration says.

    Raises:
        InvalidInputError: No such file, no `W_dec`, shapes that do not fit, tensors that the architecture does not have, or a
            setting that is not known here; load such an SAE with SAELens and pass the object.
    """
    if not isinstance(source, str | Path | dict):
        raise InvalidInputError(f"got {type(source).__name__}; expected a path or tensors. An SAELens SAE is used as it is")
    if isinstance(hook_name, int):
        if hook_name < 0:
            raise InvalidInputError(f"got layer {hook_name}; expected one counted from the first, 0, or a hook name")
        hook_name = f"blocks.{hook_name}.hook_resid_post"
    if isinstance(source, dict):
        return _from_tensors({name: as_tensor(tensor) for name, tensor in source.items()}, {}, hook_name)
    path = SAES.get(str(source), Path(source).expanduser())
    file = path / "sae_weights.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise InvalidInputError(f"no SAE at {path}: expected a safetensors file, or a folder with sae_weights.safetensors")
    return _from_tensors(_read(file), _read_config(file.parent / "cfg.json"), hook_name)


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dequantize(load_file(file))
    except (SafetensorError, OSError) as error:
        raise InvalidInputError(f"{file} is no safetensors file: {error}") from error


def _read_config(file: Path) -> dict[str, Any]:
    """The configuration beside the tensors; empty where there is none."""
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInputError(f"{file} is no JSON: {error}; expected the configuration of an SAE") from error
    if not isinstance(config, dict) or not config:
        raise InvalidInputError(f"{file} holds {str(config)[:60]!r}; expected the configuration of an SAE, an object")
    return config


def _from_tensors(tensors: dict[str, Tensor], config: dict[str, Any], hook_name: str | None) -> TensorSAE:
    if "W_dec" not in tensors or tensors["W_dec"].ndim != 2:
        raise InvalidInputError(f"got tensors {sorted(tensors)}; expected W_dec [d_sae, d_in] among them")
    settings = vars(read_settings(config) if config else _settings_of_tensors(tensors)).copy()
    dtype, subtracts_b_dec = settings.pop("dtype") or tensors["W_dec"].dtype, settings.pop("subtracts_b_dec")
    tensors = {name: tensor.to(tensors["W_dec"].device, dtype) for name, tensor in tensors.items()}
    weights = _encoder_weights(tensors, settings["architecture"])
    _check_widths(tensors, config, settings["architecture"])
    if settings["k"] is not None and settings["k"] > len(tensors["W_dec"]):
        raise InvalidInputError(f"got k={settings['k']}; the SAE has {len(tensors['W_dec'])} features")
    bias = tensors.get("b_dec") if subtracts_b_dec else None
    if config and weights and subtracts_b_dec and bias is None:
        raise InvalidInputError("got an SAE that subtracts b_dec (apply_b_dec_to_input), without the tensor b_dec; add it")
    settings["hook_name"] = hook_name or settings["hook_name"]
    return TensorSAE(tensors["W_dec"], weights, b_dec=bias, **settings)


def _settings_of_tensors(tensors: dict[str, Tensor]) -> SAESettings:
    """The settings of tensors that have no configuration."""
    if "W_skip" in tensors:
        architecture = "jumprelu_skip_transcoder" if "threshold" in tensors else "skip_transcoder"
        return SAESettings(architecture, subtracts_b_dec=False)
    return SAESettings("gated" if "r_mag" in tensors else "jumprelu" if "threshold" in tensors else "standard")


def _encoder_weights(tensors: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """The tensors of the encoder; none where only the decoder is there.

    Raises:
        InvalidInputError: One is missing, or there are some that the architecture does not have.
    """
    encoder = ENCODERS[architecture]
    known = encoder.weights | encoder.unread | {"W_dec", "b_dec"}
    for name in sorted(tensors.keys() - known):
        # SAELens 3 to 5 wrote a scaling_factor of ones where there was none.
        if name != "scaling_factor" or not torch.allclose(tensors[name], torch.ones_like(tensors[name])):
            raise InvalidInputError(
                f"got a tensor {name} {list(tensors[name].shape)}; expected those of a {architecture} SAE, {sorted(known)}. "
                "Load it with sae_lens.SAE.load_from_disk and pass the object"
            )
    weights = {name: tensors[name] for name in encoder.weights & tensors.keys()}
    if weights and weights.keys() != encoder.weights:
        raise InvalidInputError(f"got an encoder of {sorted(weights)}; expected {sorted(encoder.weights)}")
    return weights if encoder.weights else {"W_enc": tensors["W_dec"].T}  # Matching pursuit is tied.


def _check_widths(tensors: dict[str, Tensor], config: dict[str, Any], architecture: str) -> None:
    """Check the shapes of tensors against each other and against the configuration.

    Raises:
        InvalidInputError: One does not fit.
    """
    d_sae, d_out = tensors["W_dec"].shape
    is_transcoder = architecture.endswith("transcoder")
    d_in = tensors["W_enc"].shape[0] if is_transcoder and "W_enc" in tensors else d_out
    shapes = {"W_enc": (d_in, d_sae), "b_dec": (d_out,), "W_skip": (d_out, d_in)}
    for name in sorted(tensors.keys() - {"W_dec", "scaling_factor"}):
        expected = shapes.get(name, (d_sae,))
        if tuple(tensors[name].shape) != expected:
            got = tuple(tensors[name].shape)
            raise InvalidInputError(f"got {name} of shape {got}; expected {expected} for W_dec {(d_sae, d_out)}")
    for name, width in (("d_in", d_in), ("d_sae", d_sae), ("d_out", d_out)):
        if config.get(name) not in (None, width):
            raise InvalidInputError(f"got {name}={config[name]!r} in cfg.json; its tensors have {width}")


def require_sae(sae: Any) -> None:
    """Check that something can be an SAE or W_dec.

    Raises:
        InvalidInputError: It is a path, a name, or a dict of tensors, which `load_sae` takes; or nothing of the kind.
    """
    if isinstance(sae, str | Path | dict):
        raise InvalidInputError(f"got {type(sae).__name__} {str(sae)[:60]!r} for an SAE; load it: load_sae(...)")
    if not hasattr(sae, "W_dec") and not isinstance(sae, Tensor | np.ndarray):
        raise InvalidInputError(
            f"got a {type(sae).__name__}; expected an SAE with W_dec, what load_sae returns, or W_dec itself"
        )


def decoder_of(sae: Any) -> Float[Tensor, "d_sae d_in"]:
    """The decoder of an SAE, or of W_dec itself.

    Raises:
        InvalidInputError: It is no matrix.
    """
    weight = as_tensor(getattr(sae, "W_dec", sae))
    if weight.ndim != 2:
        raise InvalidInputError(f"got a decoder of shape {tuple(weight.shape)}; expected W_dec [d_sae, d_in]")
    return weight


def nonzero_features(sae: Any) -> Bool[np.ndarray, " d_sae"]:
    """False for features whose decoder row is zero: they have no direction."""
    return (decoder_of(sae) != 0).any(-1).cpu().numpy()


def hook_names_of(sae: Any) -> tuple[str | None, str | None]:
    """The activations that an SAE reads and writes: the same but for transcoders; None where it does not say."""
    read = _stated(sae, "hook_name")
    return read, _stated(sae, "hook_name_out") or read


def model_name_of(sae: Any) -> str | None:
    """The model that an SAE was trained on; None where it does not say."""
    return _stated(sae, "model_name")


def _stated(sae: Any, name: str) -> str | None:
    """What an SAE says of itself, in the metadata of SAELens or as an attribute."""
    metadata = getattr(getattr(sae, "cfg", None), "metadata", None)
    return getattr(metadata, name, None) or getattr(sae, name, None)


def can_encode(sae: Any) -> bool:
    """True where an SAE has an encoder, not W_dec alone."""
    return bool(sae.weights) if isinstance(sae, TensorSAE) else callable(getattr(sae, "encode", None))


def rows_per_step(sae: Any) -> int:
    """The number of activations to encode at once: their features take 64 MB."""
    return max(1, ENCODED_BYTES // (4 * len(decoder_of(sae))))


@own_arithmetic(full_products=True)
def encode(sae: Any, activations: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
    """Feature activations in float32, for activations [n, d_in] in the model's own basis and length."""
    flat = getattr(getattr(sae, "cfg", None), "reshape_activations", "none") == "hook_z"
    weight = decoder_of(sae)
    acts = sae.encode((activations[:, None] if flat else activations).to(weight.device, weight.dtype))
    return (acts.to_dense() if acts.is_sparse else acts).float()
