"""The questions that a judge is asked: the words that a lens read from a patch, the prompt around them, and the two pictures.

Drawing the patches is left to `sampling`, sending the questions to `judge`.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import UInt8

from tl_latentlens.views.optional import pillow

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels

RELATIONS = ("concrete", "abstract", "global", "none")  # a patch gets the first of these that one of its words has
_PROMPT = """\
The first picture has a red frame. The second one is what the frame holds, enlarged.
A method that looks into a vision model's inner state gave the numbered words below for what is inside the frame.
It may be right, partly right, or wrong throughout. Tell how each word relates to the picture:

"concrete": it names something to be seen inside the frame: a thing, a part or material of one, a color, a shape, a pattern,
or letters, words or digits written there.
"abstract": it is not itself to be seen, but what is inside the frame stands for it or calls it to mind: an activity, a
purpose, a mood, a quality, a kind of place or of thing.
"global": it names something to be seen in the picture, but only outside of the frame.
"none": none of these.

If several fit, take the first of them. A piece of a word counts as the word that it plainly belongs to.
Words of any language count.

{words}

Answer with one JSON object that has a relation for each number, such as {{"1": "none", "2": "concrete"}}."""
PICTURES_VERSION = 1  # is part of every answer's key; raise it when `look` draws other pictures for the same question
_FRAMED_PIXELS, _CROP_PIXELS = 512, 256  # longer sides of the two pictures


@dataclass(frozen=True)
class Question:
    """Words that a lens read from a patch, and what the judge is shown.

    Attributes:
        image: Number of the image that the patch is of, in the order in which the images were given.
        position: Position of the patch's token in its prompt.
        lens: "latentlens", "logit_lens" or "embedding_lens".
        hook_name: The activation that was read.
        words: The words, best first. A neighbor counts with the whole word that it belongs to.
        shown: Number of the image that the judge sees: `image`, or another one in the control.
        box: The frame on the shown image, in pixels: left, top, right, bottom.
    """

    image: int
    position: int
    lens: str
    hook_name: str
    words: tuple[str, ...]
    shown: int
    box: Box

    @property
    def control(self) -> bool:
        """True where the judge sees another image than the words are from."""
        return self.shown != self.image

    @property
    def prompt(self) -> str:
        """The text that goes with the two pictures."""
        return _PROMPT.format(words="\n".join(f"{k}. {json.dumps(w, ensure_ascii=False)}" for k, w in enumerate(self.words, 1)))


@dataclass(frozen=True, eq=False)
class JudgeQuestions:
    """Questions on the same patches for every lens and hook name, patch after patch.

    Attributes:
        pictures: The images, bytes [height, width, 3].
        questions: A question for each patch, hook name, lens, and image shown.
    """

    pictures: tuple[UInt8[np.ndarray, "height width 3"], ...] = field(repr=False)
    questions: tuple[Question, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.questions)

    def __repr__(self) -> str:
        n_controls = sum(question.control for question in self.questions)
        return f"JudgeQuestions({len(self)} questions on {len(self.pictures)} images, {n_controls} of them controls)"

    @cached_property
    def digests(self) -> list[str]:
        """The sha256 of each picture."""
        return [hashlib.sha256(str(picture.shape).encode() + picture.tobytes()).hexdigest() for picture in self.pictures]

    def look(self, number: int) -> tuple[Any, Any]:
        """The two Pillow images that go with a question: the picture with its frame, and what the frame holds.

        Raises:
            MissingExtraError: Pillow is not installed.
        """
        image = pillow()
        from PIL import ImageDraw

        question = self.questions[number]
        picture = image.fromarray(self.pictures[question.shown])
        framed_size, crop_size = self.sizes(number)
        framed = picture.resize(framed_size, image.Resampling.BICUBIC)
        left, top, right, bottom = scale_box(question.box, picture.size, framed_size)
        ImageDraw.Draw(framed).rectangle((left, top, right - 1, bottom - 1), outline=(255, 0, 0), width=3)
        return framed, picture.crop(question.box).resize(crop_size, image.Resampling.BICUBIC)

    def sizes(self, number: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Width and height of both pictures of a question."""
        question = self.questions[number]
        left, top, right, bottom = question.box
        height, width = self.pictures[question.shown].shape[:2]
        return _resize(width, height, _FRAMED_PIXELS), _resize(right - left, bottom - top, _CROP_PIXELS)

    def to_dataframe(self) -> pd.DataFrame:
        """A line a question: image, position, lens, hook_name, words, shown, box, control. Humans may add a `category`."""
        return pd.DataFrame([{**asdict(question), "control": question.control} for question in self.questions])


def scale_box(box: Sequence[int], size: tuple[int, int], new_size: tuple[int, int]) -> Box:
    """The box at the same place of an image of another width and height; it is at least one pixel wide and high."""
    left, top, right, bottom = (round(edge * new_size[k % 2] / size[k % 2]) for k, edge in enumerate(box))
    left, top = min(left, new_size[0] - 1), min(top, new_size[1] - 1)
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _resize(width: int, height: int, longer_side: int) -> tuple[int, int]:
    scale = longer_side / max(width, height)
    return max(1, round(scale * width)), max(1, round(scale * height))
