"""Scenes rendered by code: colored shapes on a grid of patches, one to a cell, so that the truth of every patch is known."""

from dataclasses import dataclass

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, Int

from tl_latentlens.vision.scenes.phrases import RETELLINGS, article, joined

GRID = 6  # patches to a side
PATCH = 12  # pixels to a side of a patch
OBJECTS = (2, 6)  # Fewest and most in a scene: those of the lists that the embedded model has learnt to retell.
RGB = {
    "red": (0.85, 0.10, 0.10),
    "blue": (0.10, 0.20, 0.90),
    "green": (0.10, 0.65, 0.15),
    "yellow": (0.95, 0.90, 0.10),
    "black": (0.05, 0.05, 0.05),
    "white": (0.98, 0.98, 0.98),
    "orange": (0.98, 0.55, 0.05),
    "purple": (0.50, 0.10, 0.60),
    "brown": (0.45, 0.27, 0.10),
    "pink": (1.00, 0.60, 0.75),
}
COLORS = tuple(RGB)
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "line", "oval", "diamond", "heart", "arrow")
_FINER = 2  # samples to a pixel's side
_SIZES = (0.7, 1.0)  # The least and the largest size of a shape, as a share of the half patch.


@dataclass(frozen=True, eq=False)
class Scenes:
    """Scenes and their truth, cells in reading order.

    Attributes:
        colors: Of the object in each cell, an index into COLORS; -1 where the cell is background.
        shapes: The same for SHAPES.
        images: Values in [0, 1].
    """

    colors: Int[np.ndarray, "scene cell"]
    shapes: Int[np.ndarray, "scene cell"]
    images: Float[np.ndarray, "scene height width rgb"]

    @property
    def filled(self) -> Bool[np.ndarray, "scene cell"]:
        """True where a cell holds an object."""
        return self.colors >= 0

    def objects(self, scene: int) -> list[str]:
        """The objects of one scene in reading order: ["red circle", "blue star"]."""
        return [self.words(scene, cell) for cell in np.flatnonzero(self.filled[scene]).tolist()]

    def words(self, scene: int, cell: int) -> str:
        """Color and shape of the object in a cell; empty where there is none."""
        return "" if self.colors[scene, cell] < 0 else f"{COLORS[self.colors[scene, cell]]} {SHAPES[self.shapes[scene, cell]]}"


def draw_scenes(n: int, rng: np.random.Generator, objects: tuple[int, int] = OBJECTS) -> Scenes:
    """Random scenes: number of objects, cells, colors, shapes, sizes and places within the cell, all uniform."""
    counts = rng.integers(objects[0], objects[1] + 1, (n, 1))
    filled = rng.random((n, GRID**2)).argsort(1).argsort(1) < counts
    colors = np.where(filled, rng.integers(0, len(COLORS), filled.shape), -1)
    shapes = np.where(filled, rng.integers(0, len(SHAPES), filled.shape), -1)
    return scenes_with(colors, shapes, rng)


def scenes_with(
    colors: Int[np.ndarray, "scene cell"], shapes: Int[np.ndarray, "scene cell"], rng: np.random.Generator
) -> Scenes:
    """Scenes of given objects in given cells; their sizes and places within the cells are drawn."""
    return Scenes(colors, shapes, _render(colors, shapes, rng))


def caption(scenes: Scenes, scene: int, rng: np.random.Generator) -> str:
    """All objects of a scene in reading order: "We can see a red circle and a blue star."."""
    told = joined([article(words) for words in scenes.objects(scene)])
    sentence = rng.choice(RETELLINGS).format(told)
    return sentence[0].upper() + sentence[1:]


def _render(
    colors: Int[np.ndarray, "scene cell"], shapes: Int[np.ndarray, "scene cell"], rng: np.random.Generator
) -> Float[np.ndarray, "scene height width rgb"]:
    ground = rng.uniform(0.5, 0.75, (*colors.shape, 1, 1, 1)) + rng.normal(0, 0.02, (*colors.shape, PATCH, PATCH, 3))
    at = colors >= 0
    size = rng.uniform(*_SIZES, (at.sum(), 1, 1))
    line = (np.arange(PATCH * _FINER) + 0.5) / (PATCH * _FINER) * 2 - 1
    shift = rng.uniform(-1, 1, (2, *size.shape)) * (1 - size)
    x, y = (line[None, None, :] - shift[0]) / size, (-line[None, :, None] - shift[1]) / size
    kinds, fine = shapes[at], np.zeros(np.broadcast_shapes(x.shape, y.shape))
    for kind, name in enumerate(SHAPES):
        fine[kinds == kind] = _inside(name, x[kinds == kind], y[kinds == kind])
    cover = rearrange(fine, "object (h a) (w b) -> object h w (a b)", a=_FINER, b=_FINER).mean(-1)[..., None]
    paint = np.array(list(RGB.values()))[colors[at]][:, None, None] + rng.normal(0, 0.03, (at.sum(), 1, 1, 3))
    ground[at] = cover * paint + (1 - cover) * ground[at]
    return rearrange(ground.clip(0, 1), "n (r c) h w rgb -> n (r h) (c w) rgb", r=GRID).astype(np.float32)


def _inside(shape: str, x: Float[np.ndarray, "n 1 w"], y: Float[np.ndarray, "n h 1"]) -> Bool[np.ndarray, "n h w"]:
    """A mask of the points that a shape covers; both coordinates run from -1 to 1, y upwards."""
    ax, ay, r = np.abs(x), np.abs(y), np.hypot(x, y)
    widest = np.maximum(ax, ay)
    if shape == "circle":
        return r < 0.8
    if shape == "square":
        return widest < 0.7
    if shape == "triangle":
        return (y > -0.7) & (y < 0.85 - 1.75 * ax)
    if shape == "star":
        turn = np.abs((np.arctan2(x, y) / (2 * np.pi / 5) + 0.5) % 1 - 0.5) * 2  # 0 at a point, 1 between two
        return r < 0.95 - 0.6 * turn**0.7
    if shape == "ring":
        return (r > 0.5) & (r < 0.85)
    if shape == "cross":
        return (np.minimum(ax, ay) < 0.22) & (widest < 0.85)
    if shape == "line":
        return (ay < 0.17) & (ax < 0.95)
    if shape == "oval":
        return np.hypot(x / 0.95, y / 0.5) < 1
    if shape == "diamond":
        return ax / 0.6 + ay / 0.95 < 1
    if shape == "heart":
        u, v = 1.25 * x, 1.2 * y + 0.1
        return (u**2 + v**2 - 1) ** 3 < u**2 * v**3
    if shape == "arrow":
        return ((ay < 0.17) & (x > -0.95) & (x < 0.2)) | ((x > 0.1) & (ay < 0.75 * (0.95 - x) / 0.85))
    raise ValueError(f"got the shape {shape!r}; expected one of {', '.join(SHAPES)}")
