"""Perception by vectors of patches alone: foreground, co-segmentation, referring, correspondence; only a probe is trained.

Every task is judged by the scenes' truth and comes with what chance would give. It takes any vectors: keys, values, the
residual stream, or the vision encoder's own features.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_latentlens.vision.scenes.render import COLORS, SHAPES, Scenes, scenes_with

Vectors = Float[Tensor, "scene cell d"]
Scores = Float[np.ndarray, " scene"]
_RIDGE = 0.1  # of features with variance 1 and weights that sum to 1
_CLUSTERS, _STARTS, _ITERATIONS = 16, 3, 10


@dataclass(frozen=True)
class Score:
    """How well a task goes, scene by scene, and the same where there is nothing to find.

    Attributes:
        right: In [0, 1].
        null: Labels shuffled, other images, or other texts; see the task.
    """

    right: Scores
    null: Scores


def iou(found: Bool[np.ndarray, "scene cell"], truth: Bool[np.ndarray, "scene cell"]) -> Scores:
    """Intersection over union of each scene."""
    return (found & truth).sum(1) / np.maximum((found | truth).sum(1), 1)


def foreground(
    train: Vectors, shown: Bool[np.ndarray, "few cell"], test: Vectors, truth: Bool[np.ndarray, "scene cell"]
) -> Score:
    """Object or background, by a linear probe on the patches of a few scenes. Null: their labels shuffled."""
    shuffled = np.random.default_rng(0).permutation(shown.ravel()).reshape(shown.shape)
    return Score(*(iou(_probe(train, labels, test), truth) for labels in (shown, shuffled)))


def _probe(train: Vectors, labels: Bool[np.ndarray, "few cell"], test: Vectors) -> Bool[np.ndarray, "scene cell"]:
    """Ridge regression on ±1, both classes with the same weight; features brought to mean 0 and variance 1."""
    x, y = train.flatten(0, 1).double(), torch.from_numpy(labels.ravel())
    mean, std = x.mean(0), x.std(0).clamp(min=1e-9)
    weights = torch.where(y, 0.5 / y.sum(), 0.5 / (~y).sum())
    x = F.pad((x - mean) / std, (0, 1), value=1.0)
    ridge = _RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
    direction = torch.linalg.solve(x.T @ (weights[:, None] * x) + ridge, x.T @ (weights * torch.where(y, 1.0, -1.0).double()))
    return (F.pad((test.double() - mean) / std, (0, 1), value=1.0) @ direction > 0).numpy()


def cosegment(
    vectors: Float[Tensor, "group scene cell d"], truth: Bool[np.ndarray, "group scene cell"], seed: int = 0
) -> Score:
    """The object that all scenes of a group share: the smallest of the clusters of their patches that every scene has.

    Clusters are of k-means, enough for each object and some for the background. Null: the object of the next group.

    Returns:
        A score for each group.
    """
    points = vectors.flatten(1, 2)
    tries = [_kmeans(points, torch.Generator().manual_seed(_STARTS * seed + start)) for start in range(_STARTS)]
    inertia, labels = (torch.stack(one) for one in zip(*tries, strict=True))
    best = labels[inertia.argmin(0), torch.arange(len(points))].view(truth.shape).numpy()
    counts = (best[..., None] == np.arange(_CLUSTERS)).sum(2)
    smallest = np.lexsort((counts.sum(1), -(counts > 0).sum(1)))[:, 0]
    found = best == smallest[:, None, None]
    return Score(
        *(
            iou(found.reshape(-1, found.shape[2]), of.reshape(-1, found.shape[2])).reshape(found.shape[:2]).mean(1)
            for of in (truth, np.roll(truth, 1, 0))
        )
    )


def _kmeans(
    points: Float[Tensor, "group point d"], generator: torch.Generator
) -> tuple[Float[Tensor, " group"], Int[Tensor, "group point"]]:
    """Inertia and clusters of each group, from k-means++; a cluster that loses all its points keeps its center."""
    group = torch.arange(len(points))
    centers = points[group, torch.randint(points.shape[1], (len(points),), generator=generator)][:, None]
    for _ in range(_CLUSTERS - 1):
        away = torch.cdist(points, centers).amin(2).square() + 1e-12
        centers = torch.cat([centers, points[group, torch.multinomial(away, 1, generator=generator)[:, 0]][:, None]], 1)
    for _ in range(_ITERATIONS):
        one_hot = F.one_hot(torch.cdist(points, centers).argmin(2), _CLUSTERS).to(points.dtype)
        counts = one_hot.sum(1)[..., None]
        centers = torch.where(counts > 0, one_hot.mT @ points / counts.clamp(min=1), centers)
    nearest = torch.cdist(points, centers).min(2)
    return nearest.values.square().sum(1), nearest.indices


def refer(vectors: Vectors, texts: Float[Tensor, "phrase d"], scenes: Scenes) -> Score:
    """Is the patch with the largest dot product with "red circle" a red circle? Null: phrases of objects that are not there.

    Args:
        vectors: Of the patches.
        texts: Of every color with every shape.
        scenes: The truth.
    """
    chosen = torch.einsum("scd,td->sct", vectors, texts).argmax(1).numpy()
    right, null = [], []
    for scene, at in enumerate(chosen):
        words = phrase_ids(scenes)[scene]
        cells = np.flatnonzero(words >= 0)
        there = np.unique(words[cells])
        absent = np.setdiff1d(np.arange(len(texts)), there)
        right.append(np.mean([words[at[phrase]] == phrase for phrase in there]))
        null.append(np.mean([np.isin(at[absent], np.flatnonzero(words == phrase)).mean() for phrase in there]))
    return Score(np.array(right), np.array(null))


def correspond(source: Vectors, target: Vectors, source_ids: Int[np.ndarray, "scene cell"], target_ids: np.ndarray) -> Score:
    """Does each object's patch have the same object's for its nearest in a scene where it stands elsewhere?

    Null: objects of the next scene, and how often each of this one's is hit.
    """
    nearest = _nearest(source, target)
    landed = np.take_along_axis(target_ids, nearest, 1)
    astray = np.take_along_axis(target_ids, _nearest(source.roll(1, 0), target), 1)
    right, null = [], []
    for mine, at, foreign, others in zip(source_ids, landed, astray, np.roll(source_ids, 1, 0), strict=True):
        right.append((at == mine)[mine >= 0].mean())
        null.append(np.mean([foreign[others >= 0] == one for one in mine[mine >= 0]]))
    return Score(np.array(right), np.array(null))


def propagate(source: Vectors, target: Vectors, source_ids: Int[np.ndarray, "scene cell"], target_ids: np.ndarray) -> Score:
    """Masks carried to a scene where the objects stand elsewhere: each patch takes the label of its nearest there.

    Mean IoU of the objects. Null: masks carried from the next scene, its objects matched to these in any order.
    """
    carried = np.take_along_axis(source_ids, _nearest(target, source), 1)
    order = [np.unique(ids[ids >= 0]) for ids in source_ids]
    foreign = np.take_along_axis(np.roll(source_ids, 1, 0), _nearest(target, source.roll(1, 0)), 1)
    right, null = [], []
    for ids, mine, other, mine_ids, other_ids in zip(target_ids, carried, foreign, order, order[-1:] + order[:-1], strict=True):
        truth = mine_ids[:, None] == ids
        right.append(iou(mine_ids[:, None] == mine, truth).mean())
        null.append(np.mean([iou(np.broadcast_to(other == one, truth.shape), truth) for one in other_ids]))
    return Score(np.array(right), np.array(null))


def _nearest(vectors: Vectors, among: Vectors) -> Int[np.ndarray, "scene cell"]:
    return torch.cdist(vectors, among).argmin(-1).numpy()  # lengths count: cosines of background are those of its noise


def phrase_ids(scenes: Scenes) -> Int[np.ndarray, "scene cell"]:
    """Which of all colors with all shapes stands in each cell; -1 for background."""
    return np.where(scenes.filled, scenes.colors * len(SHAPES) + scenes.shapes, -1)


def scenes_of(ids: Int[np.ndarray, "scene cell"], rng: np.random.Generator) -> Scenes:
    """Scenes with given objects in given cells; their sizes and places within the cells are drawn anew."""
    colors, shapes = (np.where(ids >= 0, one, -1) for one in np.divmod(ids, len(SHAPES)))
    return scenes_with(colors, shapes, rng)


def placed(objects: Int[np.ndarray, "scene n"], n_cells: int, rng: np.random.Generator) -> Int[np.ndarray, "scene cell"]:
    """Objects in random cells."""
    ids = np.full((len(objects), n_cells), -1)
    cells = rng.random(ids.shape).argsort(1)[:, : objects.shape[1]]
    np.put_along_axis(ids, cells, objects, 1)
    return ids


def distinct_objects(n: int, each: int, rng: np.random.Generator) -> Int[np.ndarray, "n each"]:
    """For each of n scenes, objects that differ from each other in color or shape, or both."""
    return rng.random((n, len(COLORS) * len(SHAPES))).argsort(1)[:, :each]
