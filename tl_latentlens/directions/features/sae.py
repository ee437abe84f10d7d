"""Sparse autoencoders: SAELens objects as they are, and SAEs read from files and tensors without SAELens."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.search.tensors import as_tensor

DEMO_SAE = Path(__file__).parents[2] / "data" / "demo_sae"
ENCODED_BYTES = 2**26
_ENCODERS = {
    "standard": {"W_enc", "b_enc"},
    "jumprelu": {"W_enc", "b_enc", "threshold"},
    "topk": {"W_enc", "b_enc"},
    "gated": {"W_enc", "b_gate", "b_mag", "r_mag"},
}


@dataclass(frozen=True, eq=False)
class TensorSAE:
    """An SAE of the architectures standard, jumprelu, topk and gated, from its tensors alone; encodes as SAELens does.

    Attributes:
        W_dec: Decoder, [d_sae, d_in].
        weights: Tensors of the encoder: W_enc [d_in, d_sae] and biases [d_sae]; empty where only a decoder is known.
        architecture: "standard", "jumprelu", "topk" or "gated".
        hook_name: The activation that it was trained on, where known.
        b_dec: Subtracted from the activation before encoding, [d_in]; None: nothing is.
        k: Features that stay active (topk).
        rescale: Whether pre-activations are multiplied by the decoder's norms (topk).
    """

    W_dec: Float[Tensor, "d_sae d_in"]
    weights: dict[str, Tensor]
    architecture: str = "standard"
    hook_name: str | None = None
    b_dec: Float[Tensor, " d_in"] | None = None
    k: int | None = None
    rescale: bool = False

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
        inputs = activations.to(self.W_dec) if self.b_dec is None else activations.to(self.W_dec) - self.b_dec
        before = inputs @ self.weights["W_enc"]
        if self.architecture == "gated":
            magnitudes = before * self.weights["r_mag"].exp() + self.weights["b_mag"]
            return magnitudes.relu() * (before + self.weights["b_gate"] > 0)
        before = before + self.weights["b_enc"]
        if self.architecture == "jumprelu":
            return before.relu() * (before > self.weights["threshold"])
        if self.architecture == "topk":
            before = before * self.W_dec.norm(dim=-1) if self.rescale else before
            best = before.topk(self.k or 1, dim=-1)
            return torch.zeros_like(before).scatter_(-1, best.indices, best.values.relu())
        return before.relu()


def load_sae(source: str | Path | dict[str, Tensor], *, hook_name: str | None = None) -> TensorSAE:
    """An SAE from a file or from tensors, without SAELens.

    Args:
        source: "demo" (the embedded SAE), a folder as SAELens saves it (`cfg.json`, `sae_weights.safetensors`), a
            safetensors file, or tensors by SAELens' names (`W_dec`, `W_enc`, `b_enc`, ...; `W_dec` alone will do).
        hook_name: The activation it was trained on; None: what the configuration says.

    Raises:
        InvalidInputError: No such file, no `W_dec`, shapes that do not fit, or an architecture or input normalisation that
            is not known here; load such an SAE with SAELens and pass the object.
    """
    config: dict[str, Any] = {}
    if not isinstance(source, str | Path | dict):
        raise InvalidInputError(f"got {type(source).__name__}; expected a path or tensors. An SAELens SAE is used as it is")
    if isinstance(source, dict):
        tensors = {name: as_tensor(tensor) for name, tensor in source.items()}
    else:
        path = DEMO_SAE if str(source) == "demo" else Path(source).expanduser()
        file = path / "sae_weights.safetensors" if path.is_dir() else path
        if not file.is_file():
            raise InvalidInputError(f"no SAE at {path}: expected a safetensors file, or a folder with sae_weights.safetensors")
        tensors = _read(file)
        if (file.parent / "cfg.json").is_file():
            config = json.loads((file.parent / "cfg.json").read_text())
    metadata = config.get("metadata") or {}
    # SAELens 2 wrote "hook_point".
    name = hook_name or metadata.get("hook_name") or config.get("hook_name") or config.get("hook_point")
    return _from_tensors(tensors, config, name)


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise InvalidInputError(f"{file} is no safetensors file: {error}") from error


def _from_tensors(tensors: dict[str, Tensor], config: dict[str, Any], hook_name: str | None) -> TensorSAE:
    if "W_dec" not in tensors or tensors["W_dec"].ndim != 2:
        raise InvalidInputError(f"got tensors {sorted(tensors)}; expected W_dec [d_sae, d_in] among them")
    decoder = tensors["W_dec"]
    architecture = config.get("architecture") or ("jumprelu" if "threshold" in tensors else "standard")
    if architecture == "standard" and "r_mag" in tensors:
        architecture = "gated"
    changed = [f"{key}={config[key]!r}" for key in ("normalize_activations", "reshape_activations") if _is_set(config, key)]
    if architecture not in _ENCODERS or changed:
        raise InvalidInputError(
            f"got an SAE of architecture {architecture!r} {' and '.join(changed)}; without SAELens expected one of "
            f"{list(_ENCODERS)} and activations as they are. Load it with sae_lens.SAE.load_from_disk and pass the object"
        )
    d_sae, d_in = decoder.shape
    weights = {name: tensors[name].to(decoder) for name in _ENCODERS[architecture] & tensors.keys()}
    if weights and weights.keys() != _ENCODERS[architecture]:
        raise InvalidInputError(f"got an encoder of {sorted(weights)}; expected {sorted(_ENCODERS[architecture])}")
    for name, tensor in weights.items():
        expected = (d_in, d_sae) if name == "W_enc" else (d_sae,)
        if tuple(tensor.shape) != expected:
            raise InvalidInputError(f"got {name} of shape {tuple(tensor.shape)}; expected {expected} for W_dec {(d_sae, d_in)}")
    bias = tensors["b_dec"].to(decoder) if "b_dec" in tensors and config.get("apply_b_dec_to_input", True) else None
    if bias is not None and tuple(bias.shape) != (d_in,):
        raise InvalidInputError(f"got b_dec of shape {tuple(bias.shape)}; expected {(d_in,)} for W_dec {(d_sae, d_in)}")
    rescale = bool(config.get("rescale_acts_by_decoder_norm", False))
    return TensorSAE(decoder, weights, architecture, hook_name, bias, config.get("k"), rescale)


def _is_set(config: dict[str, Any], key: str) -> bool:
    return config.get(key) not in (None, "none", "expected_average_only_in" if key == "normalize_activations" else "none")


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
    metadata = getattr(getattr(sae, "cfg", None), "metadata", None)
    read = getattr(metadata, "hook_name", None) or getattr(sae, "hook_name", None)
    return read, getattr(metadata, "hook_name_out", None) or read


def can_encode(sae: Any) -> bool:
    """True where an SAE has an encoder, not W_dec alone."""
    return bool(sae.weights) if isinstance(sae, TensorSAE) else callable(getattr(sae, "encode", None))


def rows_per_step(sae: Any) -> int:
    """The number of activations to encode at once: their features take 64 MB."""
    return max(1, ENCODED_BYTES // (4 * len(decoder_of(sae))))


def encode(sae: Any, activations: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
    """Feature activations in float32, for activations [n, d_in] in the model's own basis and length."""
    flat = getattr(getattr(sae, "cfg", None), "reshape_activations", "none") == "hook_z"
    with torch.no_grad():
        weight = decoder_of(sae)
        acts = sae.encode((activations[:, None] if flat else activations).to(weight.device, weight.dtype))
    return (acts.to_dense() if acts.is_sparse else acts).float()
