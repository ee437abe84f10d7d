"""A judge for visual tokens: a vision model says of each word that a lens read whether it tells what a patch shows.

The protocol is that of LatentLens (arXiv 2602.00462), with a prompt of our own; docs/judge.md says what differs. Reading the
patches is left to `hooks`, where they lie to `vision`.
"""

import base64
import hashlib
import io
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from jaxtyping import UInt8
from tqdm.auto import tqdm

from tl_latentlens.errors import InvalidInputError, MissingExtraError
from tl_latentlens.lens.result import LensResult
from tl_latentlens.views.page import target
from tl_latentlens.views.sheet import Sheet, whole_words
from tl_latentlens.views.text import visible
from tl_latentlens.vision.image_page import pillow, pixels, read_patches
from tl_latentlens.vision.judgments import RELATIONS, UNANSWERED, UNPARSED, Judgments
from tl_latentlens.vision.patches import PatchGrid

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
_PROTOCOL = 1  # raised when the pictures change for the same box
_LONGEST, _CROP = 512, 256  # pixels of the longer side of the framed picture and of what the frame holds
_RECORD = b'{"key": "'  # how each line of a file of answers begins
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds between attempts, doubled each time, where the endpoint names none
_HOPELESS = (401, 402, 404)  # no key, no money, no such model: true of every question


@dataclass(frozen=True)
class Question:
    """Words that a lens read from a patch, and what the judge is shown.

    Attributes:
        image: The image that the patch is of, counted in the order they were given.
        position: Of the patch's token in its prompt.
        lens: "latentlens", "logit_lens" or "embedding_lens".
        hook_name: The activation that was read.
        words: Best first; of neighbors the whole words.
        shown: The image that the judge sees: `image`, or another one in the control.
        box: Of the frame on it, in pixels: left, top, right, bottom.
    """

    image: int
    position: int
    lens: str
    hook_name: str
    words: tuple[str, ...]
    shown: int
    box: tuple[int, int, int, int]

    @property
    def control(self) -> bool:
        """True where the judge sees another image than the words are from."""
        return self.shown != self.image

    @property
    def prompt(self) -> str:
        """What the judge is asked."""
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
        controls = sum(question.control for question in self.questions)
        return f"JudgeQuestions({len(self)} questions on {len(self.pictures)} images, {controls} of them controls)"

    @cached_property
    def digests(self) -> list[str]:
        """The sha256 of each picture."""
        return [hashlib.sha256(str(one.shape).encode() + one.tobytes()).hexdigest() for one in self.pictures]

    def look(self, number: int) -> tuple[Any, Any]:
        """What the judge is shown for a question, as Pillow images: the picture with its frame, and what the frame holds.

        Raises:
            MissingExtraError: Pillow is not installed.
        """
        image = pillow()
        from PIL import ImageDraw

        question = self.questions[number]
        picture = image.fromarray(self.pictures[question.shown])
        framed_size, crop_size = self.sizes(number)
        framed = picture.resize(framed_size, image.Resampling.BICUBIC)
        corners = _scaled_box(question.box, picture.size, framed_size)
        ImageDraw.Draw(framed).rectangle((*corners[:2], corners[2] - 1, corners[3] - 1), outline=(255, 0, 0), width=3)
        return framed, picture.crop(question.box).resize(crop_size, image.Resampling.BICUBIC)

    def sizes(self, number: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Width and height of both pictures of a question."""
        question = self.questions[number]
        left, top, right, bottom = question.box
        height, width = self.pictures[question.shown].shape[:2]
        return _scaled(width, height, _LONGEST), _scaled(right - left, bottom - top, _CROP)

    def to_dataframe(self) -> pd.DataFrame:
        """A line a question: image, position, lens, hook_name, words, shown, box, control. Humans may add a `category`."""
        return pd.DataFrame([{**asdict(question), "control": question.control} for question in self.questions])


def judge_questions(
    images: Iterable[tuple[LensResult, PatchGrid, Any]],
    *,
    per_image: int = 1,
    top_k: int = 5,
    around: int = 1,
    control: bool = True,
    seed: int = 0,
) -> JudgeQuestions:
    """Draw patches of some images, and ask of each what every lens read there at every hook name.

    Which patches are drawn depends on the seed, the image's number, its grid and the decoded positions, so that lenses, layers
    and runs are judged on the same ones.

    Args:
        images: For each image its readings (`latentlens_hooks(index, positions="image")`), its grid (`patch_grids`), and the
            picture, in the forms that `image_to_html` takes.
        per_image: Patches of each image.
        top_k: Words of each patch.
        around: Patches to each side that the frame holds too; only patches that have those are drawn.
        control: Ask each question a second time with the frame on another image, the same one for all lenses and hook names.
        seed: Of the patches and of the images of the control.

    Raises:
        InvalidInputError: Fewer words read than `top_k`, fewer patches than `per_image`, the same picture twice, fewer than two
            pictures for the control; or a picture that does not fit its grid.
    """
    pictures, drawn = [], []
    for image, (result, grid, picture) in enumerate(images):
        pictures.append(pixels(picture))
        drawn.append(_draw(result, grid, pictures[-1], per_image, around, np.random.default_rng([seed, image])))
    if not pictures or (control and len(pictures) < 2):
        raise InvalidInputError(
            f"got {len(pictures)} images; expected one, and two at least for the control (or control=False)"
        )
    order = np.random.default_rng(seed).permutation(len(pictures))
    other = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    questions = []
    for image, (sheet, chosen) in enumerate(drawn):
        height, width = pictures[image].shape[:2]
        for column, box in chosen.items():
            for lens, hook_name, words in _words(sheet, column, top_k):
                for shown in [image, other[image]] if control else [image]:
                    size = pictures[shown].shape[1], pictures[shown].shape[0]
                    there = _scaled_box(box, (width, height), size)
                    position = sheet.positions[column]
                    questions.append(Question(image, position, lens, hook_name, words, shown, there))
    made = JudgeQuestions(tuple(pictures), tuple(questions))
    if len(set(made.digests)) < len(pictures):
        raise InvalidInputError("got the same picture twice; give each once, and draw more of its patches with per_image")
    return made


@dataclass(frozen=True)
class JudgeEstimate:
    """What the questions that have no answer yet will cost, by the rules of `Judge.estimate`.

    Attributes:
        requests: To be sent.
        answered: Answers that the file already has.
        image_tokens, text_tokens, output_tokens: In all of the requests.
        cost: In the unit of the prices.
    """

    requests: int
    answered: int
    image_tokens: int
    text_tokens: int
    output_tokens: int
    cost: float

    def __str__(self) -> str:
        tokens = f"{self.image_tokens:,} image + {self.text_tokens:,} text tokens in, {self.output_tokens:,} out"
        return f"{self.requests:,} requests to send ({self.answered:,} answered already): {tokens}; cost {self.cost:.2f}"


@dataclass(frozen=True)
class Judge:
    """A vision model behind an OpenAI-compatible endpoint, and the file that keeps what it answered.

    A question is asked once: its answer is in the file before the next one is sent, under a key made of the model, the options,
    the prompt, the picture and the frame. A run that was killed, or another run with the same questions, asks the rest.

    Attributes:
        model: Its name at the endpoint.
        answers: A file of JSON lines; made where there is none.
        base_url: The endpoint; None: OpenAI's, or OPENAI_BASE_URL.
        api_key: None: OPENAI_API_KEY. Endpoints that need none take any.
        options: Further fields of each request, such as {"reasoning_effort": "low"} or {"temperature": 0, "seed": 0}.
        concurrency: Requests under way at once.
        attempts: Of each question, before it is left unanswered for this run.
        timeout: Seconds of an attempt. An endpoint may bill what it answered too late: rather too long.
    """

    model: str
    answers: str | Path
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    attempts: int = 6
    timeout: float = 300.0

    def __post_init__(self) -> None:
        if min(self.concurrency, self.attempts, self.timeout) <= 0:
            got = f"concurrency={self.concurrency}, attempts={self.attempts}, timeout={self.timeout}"
            raise InvalidInputError(f"got {got}; expected numbers above 0")

    def estimate(
        self,
        questions: JudgeQuestions,
        *,
        input_price: float,
        output_price: float,
        output_tokens: int = 300,
        image_tokens: Callable[[int, int], int] | None = None,
    ) -> JudgeEstimate:
        """What `ask` will send, and what that will cost; nothing is sent.

        Args:
            questions: From `judge_questions`.
            input_price: Of a million tokens.
            output_price: Of a million tokens.
            output_tokens: Of an answer, what the judge thinks before it included.
            image_tokens: (width, height) → tokens of a picture, as the endpoint counts; None: one for every 32 × 32 pixels.

        A text counts as one token for every four characters.
        """
        rule = image_tokens or (lambda width, height: math.ceil(width / 32) * math.ceil(height / 32))
        answered, _ = _load(self._path)
        asked = self._keys(questions)
        missing = [number for key, number in asked.items() if key not in answered]
        images = sum(rule(*size) for number in missing for size in questions.sizes(number))
        text = sum(math.ceil(len(questions.questions[number].prompt) / 4) for number in missing)
        out = output_tokens * len(missing)
        cost = (input_price * (images + text) + output_price * out) / 1e6
        return JudgeEstimate(len(missing), len(asked) - len(missing), images, text, out, cost)

    def ask(self, questions: JudgeQuestions, *, progress: bool = True) -> "Judgments":
        """Send what has no answer yet, and judge by all answers.

        Rate limits (429), server errors, timeouts, and replies cut short or without an answer in them are tried again, after
        the time that the endpoint names or one that doubles. What stays without an answer is "unanswered", with the last
        problem, and is asked again by the next run.

        Raises:
            MissingExtraError: openai or Pillow is not installed.
            InvalidInputError: The endpoint refuses every question (key, money, model), or the file is no file of answers, or is
                being written by another process. What was answered is kept.
        """
        client = self._client()
        with _appending(target(self._path)) as (file, answered):
            missing = {key: number for key, number in self._keys(questions).items() if key not in answered}
            problems = _Run(self, client, questions, file).settle(missing, progress)
        return self._judged(questions, problems)

    def judged(self, questions: JudgeQuestions) -> "Judgments":
        """Judge by the answers that are in the file, without asking: what has none is "unanswered"."""
        return self._judged(questions, {})

    @property
    def _path(self) -> Path:
        return Path(self.answers).expanduser()

    def _judged(self, questions: JudgeQuestions, problems: Mapping[str, str]) -> "Judgments":
        answers, _ = _load(self._path)
        keys = [self._key(questions, number) for number in range(len(questions))]
        lines = []
        for question, key in zip(questions.questions, keys, strict=True):
            if found := answers.get(key):
                relations = _relations(found["answer"], len(question.words))
                category = next((name for name in RELATIONS if name in relations), UNPARSED) if relations else UNPARSED
                lines.append({"category": category, "relations": relations, "answer": found["answer"], "problem": None})
            else:
                problem = problems.get(key, "not asked")
                lines.append({"category": UNANSWERED, "relations": None, "answer": None, "problem": problem})
        used = [answers[key] for key in dict.fromkeys(keys) if key in answers]
        tokens = (sum(one[name] or 0 for one in used) for name in ("input_tokens", "output_tokens"))
        return Judgments(self.model, pd.concat([questions.to_dataframe(), pd.DataFrame(lines)], axis=1), *tokens)

    def _key(self, questions: JudgeQuestions, number: int) -> str:
        question = questions.questions[number]
        parts = [_PROTOCOL, self.model, dict(self.options), question.prompt, questions.digests[question.shown], question.box]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _keys(self, questions: JudgeQuestions) -> dict[str, int]:
        """Key → the first question that has it: equal words at several layers are one request."""
        keys: dict[str, int] = {}
        for number in range(len(questions)):
            keys.setdefault(self._key(questions, number), number)
        return keys

    def _client(self) -> Any:
        pillow()
        try:
            import openai
        except ImportError as error:
            raise MissingExtraError('asking a judge needs openai: pip install "tl-latentlens[judge]"') from error
        try:
            return openai.OpenAI(api_key=self.api_key, base_url=self.base_url, max_retries=0, timeout=self.timeout)
        except openai.OpenAIError as error:
            raise InvalidInputError(f"{error}; give api_key (any, where the endpoint needs none)") from error


def _draw(
    result: LensResult, grid: PatchGrid, picture: UInt8[np.ndarray, "h w 3"], n: int, around: int, rng: np.random.Generator
) -> tuple[Sheet, dict[int, tuple[int, int, int, int]]]:
    """What was read of an image's patches, and of some of them, drawn at random, the place in it and the frame."""
    grid, sheet, tokens = read_patches(result, grid, picture)
    frames = _frames(grid, around)
    columns = [column for column, token in enumerate(tokens.tolist()) if token in frames]
    if len(columns) < n:
        raise InvalidInputError(
            f"got {len(columns)} decoded patches with {around} more on every side; expected {n}: lower per_image or around"
        )
    chosen = rng.permutation(columns)[:n].tolist()
    return sheet, {column: frames[int(tokens[column])] for column in chosen}


def _frames(grid: PatchGrid, around: int) -> dict[int, tuple[int, int, int, int]]:
    """Of each token that has patches on every side, as far as `around`: the box that holds them all, in whole pixels."""
    shown = (grid.boxes[:, 2] > grid.boxes[:, 0]) & (grid.boxes[:, 3] > grid.boxes[:, 1])  # not NaN, not padding
    places = zip(grid.levels.tolist(), grid.rows.tolist(), grid.columns.tolist(), strict=True)
    token_at = {place: token for token, place in enumerate(places) if shown[token]}
    steps = range(-around, around + 1)
    frames = {}
    for (level, row, column), token in token_at.items():
        near = [token_at.get((level, row + i, column + j)) for i in steps for j in steps]
        if None not in near:
            boxes = grid.boxes[np.array(near)]
            (left, top), (right, bottom) = boxes[:, :2].min(0).tolist(), boxes[:, 2:].max(0).tolist()
            frames[token] = (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
    return frames


def _words(sheet: Sheet, column: int, top_k: int) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Lens, hook name and words of a patch: of neighbors the words that they belong to, of other lenses their tokens."""
    whole = whole_words(sheet.index, np.unique(sheet.rows[:, column, :top_k]).tolist())
    for layer, name in enumerate(sheet.hook_names):
        read = {"latentlens": [whole[row] for row in sheet.rows[layer, column, :top_k].tolist()]}
        for lens, readings in sheet.readings.items():
            if name in readings:
                read[lens] = [visible(token).strip() for token in readings[name].tokens(column)[:top_k]]
        for lens, words in read.items():
            if len(words) < top_k:
                raise InvalidInputError(f"got {len(words)} words of {lens} at {name}; expected {top_k}: decode with that top_k")
            yield lens, name, tuple(words)


def _scaled(width: int, height: int, longest: int) -> tuple[int, int]:
    scale = longest / max(width, height)
    return max(1, round(scale * width)), max(1, round(scale * height))


def _scaled_box(box: Sequence[int], size: tuple[int, int], other: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box of an image at the same place of another one, both given by width and height; a pixel wide at least."""
    left, top, right, bottom = (round(edge * other[k % 2] / size[k % 2]) for k, edge in enumerate(box))
    left, top = min(left, other[0] - 1), min(top, other[1] - 1)
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _relations(answer: str, n: int) -> tuple[str, ...] | None:
    """The relation of each word: of the last JSON object in the answer that has one for each; None without."""
    for found in reversed(re.findall(r"\{[^{}]*\}", answer)):
        try:
            given = json.loads(found)
        except ValueError:
            continue
        relations = tuple(str(given.get(str(k)) or "").strip().lower() for k in range(1, n + 1))
        if set(relations) <= set(RELATIONS):
            return relations
    return None


class _MalformedError(Exception):
    """A reply without an answer in it."""


def _read_reply(text: str) -> dict[str, Any]:
    """What is kept of a chat completion; a refusal is an answer too, and so is a text that was cut at the most tokens."""
    try:
        reply = json.loads(text)
        choice = reply["choices"][0]
        message, usage = choice["message"], reply.get("usage") or {}
        return {
            "answer": str(message.get("content") or message.get("refusal") or ""),
            "finish_reason": choice.get("finish_reason"),
            "model": reply.get("model"),
            "input_tokens": usage.get("prompt_tokens"),
            "output_tokens": usage.get("completion_tokens"),
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _MalformedError(f"a reply without an answer: {text[:200]!r}") from error


def _load(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The answers by key, and the bytes of whole lines: what a kill left of a last line is no answer.

    Raises:
        InvalidInputError: The file holds something else.
    """
    *lines, rest = (path.read_bytes() if path.exists() else b"").split(b"\n")
    answers = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            answers[record["key"]] = {name: record[name] for name in ("answer", "input_tokens", "output_tokens")}
        except (ValueError, LookupError, TypeError) as error:
            raise _foreign(path, number) from error
    if not _RECORD.startswith(rest[: len(_RECORD)]):
        raise _foreign(path, len(lines) + 1)
    return answers, sum(len(line) + 1 for line in lines)


def _foreign(path: Path, line: int) -> InvalidInputError:
    return InvalidInputError(f"line {line} of {path} is no judge's answer; take it out, or give another file")


@contextmanager
def _appending(path: Path) -> Iterator[tuple[BinaryIO, dict[str, dict[str, Any]]]]:
    """A file of answers open for more of them, by no other process, and the answers that it has."""
    import fcntl

    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidInputError(f"{path} is being written by another process; wait for it, or give another file") from error
        answers, end = _load(path)
        file.truncate(end)
        yield file, answers


class _Run:
    """The questions of one run on their way: some at once, each tried until it has an answer or no hope of one."""

    def __init__(self, judge: Judge, client: Any, questions: JudgeQuestions, file: BinaryIO) -> None:
        self._judge, self._client, self._questions, self._file = judge, client, questions, file
        self._writing, self._stop, self._free_at = threading.Lock(), threading.Event(), 0.0
        self._answers = False  # whether anything was heard from the endpoint

    def settle(self, missing: Mapping[str, int], progress: bool) -> dict[str, str]:
        """Ask; returns what kept the others back, by key."""
        problems = {}
        with ThreadPoolExecutor(self._judge.concurrency) as pool:
            try:
                asked = {pool.submit(self._settle_one, key, number): key for key, number in missing.items()}
                for done in tqdm(as_completed(asked), "judging", len(asked), unit=" questions", disable=not progress):
                    if problem := done.result():
                        problems[asked[done]] = problem
            except BaseException:
                self._stop.set()
                raise
        return problems

    def _settle_one(self, key: str, number: int) -> str:
        """What kept a question from its answer; nothing where it has one, which then is in the file."""
        import openai

        request = self._request(number)
        problem = "stopped before it was asked"
        for attempt in range(self._judge.attempts):
            self._stop.wait(max(0.0, self._free_at - time.monotonic()))
            if self._stop.is_set():
                break
            try:
                reply = self._client.chat.completions.with_raw_response.create(**request)
                self._answers = True
                self._store({"key": key, **_read_reply(reply.http_response.text)})
                return ""
            except openai.APIStatusError as error:
                self._answers = True
                problem = f"{type(error).__name__}: {error}"
                if error.status_code in _HOPELESS or error.code == "insufficient_quota":
                    raise InvalidInputError(f"the endpoint refuses all; see to base_url, api_key, model: {problem}") from error
                if error.status_code not in (408, 409, 429) and error.status_code < 500:
                    break
                wait = _retry_after(error.response.headers)
                if error.status_code == 429 and wait is not None:
                    self._free_at = max(self._free_at, time.monotonic() + wait)
            except (openai.APIConnectionError, _MalformedError) as error:
                problem, wait = f"{type(error).__name__.lstrip('_')}: {error}", None
                nobody = isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError)
                if nobody and not self._answers and attempt + 1 == self._judge.attempts:
                    raise InvalidInputError(f"nobody answers at {self._client.base_url}; see to base_url: {problem}") from error
            if attempt + 1 < self._judge.attempts:
                backoff = min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1)
                self._stop.wait(backoff if wait is None else wait)
        return problem

    def _request(self, number: int) -> dict[str, Any]:
        pictures = [{"type": "image_url", "image_url": {"url": _data_url(one)}} for one in self._questions.look(number)]
        text = {"type": "text", "text": self._questions.questions[number].prompt}
        messages = [{"role": "user", "content": [*pictures, text]}]
        return {"model": self._judge.model, "messages": messages, "extra_body": dict(self._judge.options)}

    def _store(self, record: dict[str, Any]) -> None:
        """A whole line or, where the disk is full or the power fails, a part of one, which is no answer."""
        with self._writing:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def _data_url(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that an endpoint asks to wait, named as such or as a date; None where it names none."""
    named = headers.get("retry-after")
    if named is None:
        return None
    try:
        wait = float(named)
    except ValueError:
        try:
            wait = parsedate_to_datetime(named).timestamp() - time.time()
        except ValueError:
            return None
    return wait if 0 <= wait < math.inf else None
