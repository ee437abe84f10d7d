"""The judge: a vision model behind an endpoint, what asking it costs, and its answers as `Judgments`.

Sending, and keeping the answers, is left to the room `endpoint`.
"""

import base64
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from tl_latentlens.corpus.paths import absolute_path
from tl_latentlens.endpoint.chat import ANSWER, ChatEndpoint, Messages
from tl_latentlens.endpoint.keyed_lines import read_lines
from tl_latentlens.views.files import output_path
from tl_latentlens.views.optional import pillow
from tl_latentlens.vision.judge.judgments import UNANSWERED, UNPARSED, Judgments
from tl_latentlens.vision.judge.questions import PICTURES_VERSION, RELATIONS, JudgeQuestions, Question
from tl_latentlens.vision.judge.replies import parse_relations


@dataclass(frozen=True)
class JudgeEstimate:
    """The cost of the questions that have no answer yet, by the rules of `Judge.estimate`.

    Attributes:
        requests: Number of requests to be sent.
        answered: Number of answers that the file already has.
        image_tokens, text_tokens, output_tokens: Tokens of all these requests.
        cost: Price of them, in the unit of the given prices.
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
    """A vision model behind an OpenAI-compatible endpoint, and the file that keeps its answers.

    No question is paid twice. Each answer is in the file before the next question is sent, under a key made of the model, the
    options, the prompt, the picture and the frame. A run that was killed, or another run with the same questions, asks only
    those that have no answer.

    Attributes:
        model: Name of the model at the endpoint.
        answers: A file of JSON lines; made where there is none.
        base_url: The endpoint; None: OpenAI's, or OPENAI_BASE_URL.
        api_key: None: OPENAI_API_KEY. Endpoints that need none take any.
        options: Further fields of each request, such as {"reasoning_effort": "low"} or {"temperature": 0, "seed": 0}.
        concurrency: Number of requests under way at once.
        attempts: Number of attempts of each question, before it is left unanswered for this run.
        timeout: Seconds of an attempt. An endpoint may bill an answer that comes too late, so rather give too much time.
    """

    model: str
    answers: str | Path
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    attempts: int = 6
    timeout: float = 300.0
    _path: Path = field(init=False, repr=False, compare=False)
    _endpoint: ChatEndpoint = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        settings = {name: getattr(self, name) for name in ("options", "concurrency", "attempts", "timeout")}
        object.__setattr__(self, "_endpoint", ChatEndpoint(self.model, self.base_url, self.api_key, **settings))
        object.__setattr__(self, "_path", absolute_path(self.answers))

    def estimate(
        self,
        questions: JudgeQuestions,
        *,
        input_price: float,
        output_price: float,
        output_tokens: int = 300,
        image_tokens: Callable[[int, int], int] | None = None,
    ) -> JudgeEstimate:
        """The requests that `ask` will send, and their cost; nothing is sent.

        Args:
            questions: From `judge_questions`.
            input_price: Price of a million input tokens.
            output_price: Price of a million output tokens.
            output_tokens: Tokens of an answer, those that the judge thinks before it included.
            image_tokens: (width, height) → tokens of a picture, as the endpoint counts; None: one for every 32 × 32 pixels.

        A text counts as one token for every four characters.
        """
        tokens_of_picture = image_tokens or (lambda width, height: math.ceil(width / 32) * math.ceil(height / 32))
        stored = read_lines(self._path, ANSWER)
        numbers = self._distinct_keys(questions)
        missing = [number for key, number in numbers.items() if key not in stored.by_key]
        n_image = sum(tokens_of_picture(*size) for number in missing for size in questions.sizes(number))
        n_text = sum(math.ceil(len(questions.questions[number].prompt) / 4) for number in missing)
        n_output = output_tokens * len(missing)
        cost = (input_price * (n_image + n_text) + output_price * n_output) / 1e6
        return JudgeEstimate(len(missing), len(numbers) - len(missing), n_image, n_text, n_output, cost)

    def ask(self, questions: JudgeQuestions, *, progress: bool = True) -> Judgments:
        """The judgments of all questions, after those without an answer were sent.

        Rate limits (429), server errors, timeouts, and replies cut short or without an answer in them are tried again, after
        the time that the endpoint names or one that doubles. A question that stays without an answer is "unanswered", with the
        last problem; the next run asks it again.

        Raises:
            MissingExtraError: openai or Pillow is not installed.
            InvalidInputError: The endpoint refuses every question (key, money, model), or the file is no file of answers, or is
                being written by another process. What was answered is kept.
        """
        pillow()
        problems = self._endpoint.ask(
            output_path(self._path),
            self._distinct_keys(questions),
            lambda number: judge_messages(questions, number),
            task="judging",
            progress=progress,
        )
        return self._judgments(questions, problems)

    def judged(self, questions: JudgeQuestions) -> Judgments:
        """The judgments by the answers in the file; nothing is sent. A question without an answer is "unanswered"."""
        return self._judgments(questions, {})

    def _judgments(self, questions: JudgeQuestions, problems: Mapping[str, str]) -> Judgments:
        """The judgments by the answers in the file; `problems` says by key why there is none."""
        answers = read_lines(self._path, ANSWER).by_key
        keys = [self._key(questions, number) for number in range(len(questions))]
        lines = [
            _judged_line(question, answers.get(key), problems.get(key, "not asked"))
            for question, key in zip(questions.questions, keys, strict=True)
        ]
        used = [answers[key] for key in dict.fromkeys(keys) if key in answers]
        n_input, n_output = (sum(answer[name] or 0 for answer in used) for name in ("input_tokens", "output_tokens"))
        table = pd.concat([questions.to_dataframe(), pd.DataFrame(lines)], axis=1)
        return Judgments(self.model, table, n_input, n_output)

    def _key(self, questions: JudgeQuestions, number: int) -> str:
        """The name of a question in the file: equal for questions that the judge cannot tell apart."""
        question = questions.questions[number]
        digest = questions.digests[question.shown]
        parts = [PICTURES_VERSION, self.model, dict(self.options), question.prompt, digest, question.box]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _distinct_keys(self, questions: JudgeQuestions) -> dict[str, int]:
        """Key → the first question that has it: equal words at several layers are one request."""
        numbers: dict[str, int] = {}
        for number in range(len(questions)):
            numbers.setdefault(self._key(questions, number), number)
        return numbers


def judge_messages(questions: JudgeQuestions, number: int) -> Messages:
    """The message of one question: both pictures, then the prompt."""
    pictures = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in questions.look(number)]
    prompt = {"type": "text", "text": questions.questions[number].prompt}
    return [{"role": "user", "content": [*pictures, prompt]}]


def _data_url(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _judged_line(question: Question, answer: Mapping[str, Any] | None, problem: str) -> dict[str, Any]:
    """Category, relations, answer and problem of one question; None: there is no answer."""
    if answer is None:
        return {"category": UNANSWERED, "relations": None, "answer": None, "problem": problem}
    relations = parse_relations(answer["answer"], len(question.words))
    category = next((name for name in RELATIONS if name in (relations or ())), UNPARSED)
    return {"category": category, "relations": relations, "answer": answer["answer"], "problem": None}
