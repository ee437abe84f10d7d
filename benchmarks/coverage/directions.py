"""p-values of directions: of random ones of two kinds, and of the features of the embedded SAE, which are something."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import tl_latentlens as tll
from benchmarks.coverage.demo import demo_bank
from benchmarks.coverage.lines import Line
from benchmarks.measure import Settings

TITLE = "Directions, share with p < 0.01"
_LEVEL, _WANTED = 0.01, (0.0, 0.02)
_SEARCHES_OF_DIRECTION = 2  # both ends are decoded
_SEED = 100  # of the directions that are tried; those of the null have seed 0


def lines(settings: Settings) -> list[Line]:
    """By transform, for one hook name and for all."""
    sae, bank = tll.load_sae("demo"), demo_bank()
    assert sae.hook_name is not None
    found = []
    for transform in ("raw", "center"):
        for hook_names in ([sae.hook_name], bank.hook_names):
            index = tll.ContextualIndex(bank, hook_names, device=settings.device, transform=transform)
            found += of_index(index, sae.W_dec, max(1, settings.draws // _SEARCHES_OF_DIRECTION))
    return found


def of_index(index: tll.ContextualIndex, features: Float[Tensor, "f d"], draws: int) -> list[Line]:
    """Random directions of each kind, and features."""
    names = index.hook_names
    generator = torch.Generator().manual_seed(_SEED)
    kinds = {
        "isotropic": torch.randn(draws, features.shape[1], generator=generator),
        "covariance of the rows": index.random_directions(draws, names, _SEED),
        "SAE features": features[:draws],
    }
    what = f"{index.transform}, {len(names)} hook name{'s' * (len(names) > 1)}"
    return [
        _line(f"{what}: {kind}", names, index, tried, None if kind == "SAE features" else _WANTED)
        for kind, tried in kinds.items()
    ]


def _line(
    what: str,
    hook_names: Sequence[str],
    index: tll.ContextualIndex,
    tried: Float[Tensor, "n d"],
    wanted: tuple[float, float] | None,
) -> Line:
    scores = tll.decode_directions(tried, index, hook_name=hook_names, calibrate=True, progress=False).scores
    assert scores is not None
    p = scores["p"].to_numpy()[::2]  # of +v
    return Line(what, index.n_rows, _LEVEL, float(np.mean(p < _LEVEL)), len(p), wanted)
