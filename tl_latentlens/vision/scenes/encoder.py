"""A small vision encoder, trained on its own to classify what each patch shows, then frozen: it never sees a word."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tl_latentlens.vision.scenes.render import COLORS, GRID, PATCH, SHAPES, draw_scenes

WIDTH = 64  # A patch has so many features.
_STEPS, _BATCH, _LR = 700, 16, 3e-3
_OBJECTS = (2, 30)  # Captioned scenes have fewer objects; with more of them fewer steps suffice.


class PatchEncoder(nn.Module):
    """A vision transformer: a small convolution to each patch, positions, one block of attention across the patches."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.patches = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, WIDTH, 3, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * WIDTH, WIDTH),
        )  # fmt: skip
        self.positions = nn.Parameter(0.02 * torch.randn(GRID**2, WIDTH))
        self.block = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, images: Float[Tensor, "scene height width rgb"]) -> Float[Tensor, "scene cell width"]:
        """Features of every patch, in reading order."""
        patches = rearrange(images, "n (r h) (c w) rgb -> (n r c) rgb h w", h=PATCH, w=PATCH)
        features = rearrange(self.patches(patches - 0.5), "(n cell) width -> n cell width", cell=GRID**2)
        return self.norm(self.block(features + self.positions))


def train_encoder(seed: int, steps: int = _STEPS) -> tuple[PatchEncoder, float]:
    """A trained encoder, frozen, and the share of object patches of new scenes whose color and shape it tells.

    The classes are numbers, of colors and shapes and of background; the layers that tell them are thrown away afterwards.
    """
    torch.manual_seed(seed)
    encoder = PatchEncoder()
    heads = nn.ModuleList([nn.Linear(WIDTH, len(COLORS) + 1), nn.Linear(WIDTH, len(SHAPES) + 1)])
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=steps)
    for step in range(steps):
        scenes = draw_scenes(_BATCH, np.random.default_rng((seed, step)), _OBJECTS)
        features = encoder(torch.from_numpy(scenes.images))
        truth = torch.from_numpy(np.stack([scenes.colors, scenes.shapes]) + 1)
        loss = torch.stack([F.cross_entropy(head(features).mT, one) for head, one in zip(heads, truth, strict=True)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    encoder.eval().requires_grad_(False)
    scenes = draw_scenes(100, np.random.default_rng((seed, steps)))
    features = encoder(torch.from_numpy(scenes.images))
    truth = np.stack([scenes.colors, scenes.shapes]) + 1
    told = np.stack([head(features).argmax(-1).numpy() for head in heads])
    return encoder, float((told == truth).all(0)[scenes.filled].mean())


def trained_encoder(path: Path, seed: int) -> tuple[PatchEncoder, float]:
    """The encoder of a seed and its accuracy, from `path` where it lies there already."""
    if not path.exists():
        encoder, accuracy = train_encoder(seed)
        torch.save({"encoder": encoder.state_dict(), "accuracy": accuracy}, path)
    state = torch.load(path, weights_only=True)
    encoder = PatchEncoder()
    encoder.load_state_dict(state["encoder"])
    return encoder.eval().requires_grad_(False), state["accuracy"]
