"""Questions for a judge from lens readings: which patches are drawn, and which words each lens read there."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.lens.result import LensResult
from tl_latentlens.views.grids import LensGrid
from tl_latentlens.views.text import visible
from tl_latentlens.vision.image_page import Pixels, pixels, read_patches
from tl_latentlens.vision.judge.questions import Box, JudgeQuestions, Question, scale_box
from tl_latentlens.vision.patch_grid import PatchGrid


def judge_questions(
    images: Iterable[tuple[LensResult, PatchGrid, Any]],
    *,
    per_image: int = 1,
    top_k: int = 5,
    around: int = 1,
    control: bool = True,
    seed: int = 0,
) -> JudgeQuestions:
    """Questions on patches drawn from some images: what every lens read there at every hook name.

    The drawn patches depend on the seed, the image's number, its grid and the decoded positions. So lenses, layers and runs are
    judged on the same patches.

    Args:
        images: For each image its readings (`latentlens_hooks(index, positions="image")`), its grid (`patch_grids`), and the
            picture, in the forms that `image_to_html` takes.
        per_image: Number of patches drawn from each image.
        top_k: Number of words of each patch.
        around: The frame also holds this many patches on each side. Only patches that have those are drawn.
        control: Ask each question a second time with the frame on another image, the same one for all lenses and hook names.
        seed: Seed of the patches and of the images of the control.

    Raises:
        InvalidInputError: Fewer words read than `top_k`, fewer patches than `per_image`, the same picture twice, fewer than two
            pictures for the control; or a picture that does not fit its grid.
    """
    pictures, readings_and_frames = [], []
    for image, (result, grid, picture) in enumerate(images):
        pictures.append(pixels(picture))
        rng = np.random.default_rng([seed, image])
        readings_and_frames.append(_draw_patches(result, grid, pictures[-1], per_image, around, rng))
    if not pictures or (control and len(pictures) < 2):
        raise InvalidInputError(
            f"got {len(pictures)} images; expected one, and two at least for the control (or control=False)"
        )
    control_image = _pair_images(len(pictures), seed)
    questions: list[Question] = []
    for image, (lens_grid, frames) in enumerate(readings_and_frames):
        shown_images = [image, control_image[image]] if control else [image]
        boxes = {
            (column, shown): scale_box(frame, _size(pictures[image]), _size(pictures[shown]))
            for column, frame in frames.items()
            for shown in shown_images
        }
        questions += (
            Question(image, lens_grid.positions[column], lens, hook_name, words, shown, boxes[column, shown])
            for column in frames
            for lens, hook_name, words in _read_words(lens_grid, column, top_k)
            for shown in shown_images
        )
    result = JudgeQuestions(tuple(pictures), tuple(questions))
    if len(set(result.digests)) < len(pictures):
        raise InvalidInputError("got the same picture twice; give each once, and draw more of its patches with per_image")
    return result


def _pair_images(n_images: int, seed: int) -> dict[int, int]:
    """Image → the other image that is shown in its place in the control."""
    order = np.random.default_rng(seed).permutation(n_images)
    return dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))


def _size(picture: Pixels) -> tuple[int, int]:
    """Width and height."""
    return picture.shape[1], picture.shape[0]


def _draw_patches(
    result: LensResult, grid: PatchGrid, picture: Pixels, n_patches: int, around: int, rng: np.random.Generator
) -> tuple[LensGrid, dict[int, Box]]:
    """The readings of an image, and for each drawn patch its column in them and its frame on the picture."""
    grid, lens_grid, tokens = read_patches(result, grid, picture)
    frames = _frames(grid, around)
    columns = [column for column, token in enumerate(tokens.tolist()) if token in frames]
    if len(columns) < n_patches:
        raise InvalidInputError(
            f"got {len(columns)} decoded patches with {around} more on every side; expected {n_patches}: "
            "lower per_image or around"
        )
    drawn = rng.permutation(columns)[:n_patches].tolist()
    return lens_grid, {column: frames[int(tokens[column])] for column in drawn}


def _frames(grid: PatchGrid, around: int) -> dict[int, Box]:
    """For each token with `around` patches on every side, the box that holds all of them, in whole pixels."""
    has_area = (grid.boxes[:, 2] > grid.boxes[:, 0]) & (grid.boxes[:, 3] > grid.boxes[:, 1])  # not NaN, not padding
    places = zip(grid.levels.tolist(), grid.rows.tolist(), grid.columns.tolist(), strict=True)
    token_at = {place: token for token, place in enumerate(places) if has_area[token]}
    steps = range(-around, around + 1)
    frames = {}
    for (level, row, column), token in token_at.items():
        tokens_in_frame = [token_at.get((level, row + i, column + j)) for i in steps for j in steps]
        if None not in tokens_in_frame:
            boxes = grid.boxes[np.array(tokens_in_frame)]
            (left, top), (right, bottom) = boxes[:, :2].min(0).tolist(), boxes[:, 2:].max(0).tolist()
            frames[token] = (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
    return frames


def _read_words(lens_grid: LensGrid, column: int, top_k: int) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Lens, hook name and words of a patch: whole words of neighbors, tokens of the other lenses."""
    whole = lens_grid.row_words(lens_grid.rows[:, column, :top_k])
    for layer, hook_name in enumerate(lens_grid.hook_names):
        words_by_lens = {"latentlens": [whole[row] for row in lens_grid.rows[layer, column, :top_k].tolist()]}
        for lens, readings in lens_grid.readings.items():
            if hook_name in readings:
                words_by_lens[lens] = [visible(token).strip() for token in readings[hook_name].tokens(column)[:top_k]]
        for lens, words in words_by_lens.items():
            if len(words) < top_k:
                raise InvalidInputError(
                    f"got {len(words)} words of {lens} at {hook_name}; expected {top_k}: decode with that top_k"
                )
            yield lens, hook_name, tuple(words)
