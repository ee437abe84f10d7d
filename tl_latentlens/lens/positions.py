"""The positions of a run that are decoded: those that the user selected, else all but padding and BOS."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.lens.captures import Captures, RunTokens
from tl_latentlens.lens.settings import LensSettings
from tl_latentlens.model.image_tokens import image_positions


def decoded_positions(
    settings: LensSettings, captures: Captures, run_tokens: RunTokens | None
) -> Bool[np.ndarray, "batch pos"]:
    """True at the positions to decode.

    Raises:
        InvalidInputError: Positions outside the run, a mask of another shape or without True, or image tokens in a run that
            did not show its tokens.
    """
    positions: Any = settings.positions
    if isinstance(positions, str):
        return _image_positions(captures.model, run_tokens)
    if getattr(positions, "ndim", 1) == 2:
        return _as_mask(positions, captures.shape)
    if positions is None:
        everywhere = np.ones(captures.shape, bool)
        return everywhere if run_tokens is None else everywhere & ~run_tokens.is_skipped.cpu().numpy()
    return _selected_positions(positions, captures.shape)


def _image_positions(model: Any, run_tokens: RunTokens | None) -> Bool[np.ndarray, "batch pos"]:
    if run_tokens is None:
        raise InvalidInputError(
            "positions='image' looks for the image tokens among the input ids, which this run did not show (it was given "
            "embeddings, say); give a mask, True at the visual tokens: positions=mask [batch, pos]"
        )
    return image_positions(model, run_tokens.ids).cpu().numpy()


def _as_mask(positions: Any, shape: tuple[int, int]) -> Bool[np.ndarray, "batch pos"]:
    mask = torch.as_tensor(positions).cpu().numpy()
    if mask.shape != shape or mask.dtype != bool:
        raise InvalidInputError(f"got positions of shape {mask.shape}, {mask.dtype}; expected bool of [batch, pos], {shape}")
    if not mask.any():
        raise InvalidInputError("got positions that are False everywhere; expected True at the tokens to decode")
    return mask


def _selected_positions(positions: Any, shape: tuple[int, int]) -> Bool[np.ndarray, "batch pos"]:
    """True at the same positions of each text, negative ones counted from the end."""
    selected = np.zeros(shape, bool)
    try:
        selected[:, positions if isinstance(positions, slice) else list(positions)] = True
    except IndexError as error:
        raise InvalidInputError(f"positions={positions!r} is outside the run's {shape[1]} positions") from error
    return selected


def why_not_decoded(decoded: Bool[np.ndarray, "batch pos"], pos: int, batch: int) -> str:
    """What is wrong with a position that was not decoded, and which were."""
    n_texts, n_positions = decoded.shape
    got = f"batch {batch}, position {pos} was not decoded"
    if not (0 <= batch < n_texts and 0 <= pos < n_positions):
        return f"{got}: the run had {n_texts} texts of {n_positions} positions"
    of_text = np.flatnonzero(decoded[batch]).tolist()
    span = f"{of_text[0]} to {of_text[-1]}, {len(of_text)} of them" if of_text else "none"
    return f"{got}; decoded of this text: {span} (special tokens and padding only where `positions` names them)"
