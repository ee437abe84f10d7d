"""Requests to an OpenAI-compatible endpoint: several at once, each tried until it has an answer or no hope of one."""

import base64
import io
import math
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime
from typing import Any

from tqdm.auto import tqdm

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.vision.judge.answers import AnswerWriter
from tl_latentlens.vision.judge.questions import JudgeQuestions
from tl_latentlens.vision.judge.replies import MalformedError, read_reply

_FIRST_BACKOFF, _MAX_BACKOFF = 1.0, 60.0  # seconds between attempts, doubled each time, where the endpoint names none
_REFUSES_ALL = (401, 402, 404)  # no key, no money, no such model: every question would get the same status
_WORTH_RETRYING = (408, 409, 429)  # Every status of 500 and above is retried too.


def chat_request(model: str, options: Mapping[str, Any], questions: JudgeQuestions, number: int) -> dict[str, Any]:
    """The arguments of `chat.completions.create` for one question: both pictures, then the prompt."""
    pictures = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in questions.look(number)]
    prompt = {"type": "text", "text": questions.questions[number].prompt}
    messages = [{"role": "user", "content": [*pictures, prompt]}]
    return {"model": model, "messages": messages, "extra_body": dict(options)}


class RequestRun:
    """The requests of one run. Each answer is in the file before the next question of its thread is sent."""

    def __init__(
        self,
        client: Any,
        make_request: Callable[[int], dict[str, Any]],
        writer: AnswerWriter,
        *,
        concurrency: int,
        attempts: int,
    ) -> None:
        """Keep what the threads share.

        Args:
            client: An `openai.OpenAI`.
            make_request: Number of a question → arguments of `chat.completions.create`.
            writer: Keeps the answers.
            concurrency: Number of requests under way at once.
            attempts: Number of attempts of each question.
        """
        self._client, self._make_request, self._writer = client, make_request, writer
        self._concurrency, self._attempts = concurrency, attempts
        self._stop = threading.Event()
        self._paused_until = 0.0  # on the monotonic clock; set by the endpoint for all threads
        self._has_heard = False  # whether the endpoint has ever replied

    def send_all(self, numbers: Mapping[str, int], progress: bool) -> dict[str, str]:
        """Send questions, given by key; returns the last problem of each that stays without an answer.

        Raises:
            InvalidInputError: The endpoint refuses every question, or never replies.
        """
        problems = {}
        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                futures = {pool.submit(self._send_until_answered, key, number): key for key, number in numbers.items()}
                for future in tqdm(as_completed(futures), "judging", len(futures), unit=" questions", disable=not progress):
                    if (problem := future.result()) is not None:
                        problems[futures[future]] = problem
            except BaseException:
                self._stop.set()
                raise
        return problems

    def _send_until_answered(self, key: str, number: int) -> str | None:
        """Send one question until its answer is in the file; returns the last problem where it never is."""
        import openai

        request = self._make_request(number)
        problem = "stopped before it was asked"
        for attempt in range(self._attempts):
            self._stop.wait(max(0.0, self._paused_until - time.monotonic()))
            if self._stop.is_set():
                break
            wait: float | None = None
            try:
                self._send(key, request)
                return None
            except openai.APIStatusError as error:
                self._has_heard = True
                problem = f"{type(error).__name__}: {error}"
                if error.status_code in _REFUSES_ALL or error.code == "insufficient_quota":
                    raise InvalidInputError(f"the endpoint refuses all; see to base_url, api_key, model: {problem}") from error
                if error.status_code not in _WORTH_RETRYING and error.status_code < 500:
                    break
                wait = retry_after(error.response.headers)
                if error.status_code == 429 and wait is not None:
                    self._paused_until = max(self._paused_until, time.monotonic() + wait)
            except (openai.APIConnectionError, MalformedError) as error:
                problem = f"{type(error).__name__}: {error}"
                is_unreachable = isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError)
                if is_unreachable and not self._has_heard and attempt + 1 == self._attempts:
                    raise InvalidInputError(f"nobody answers at {self._client.base_url}; see to base_url: {problem}") from error
            if attempt + 1 < self._attempts:
                self._stop.wait(_backoff(attempt) if wait is None else wait)
        return problem

    def _send(self, key: str, request: dict[str, Any]) -> None:
        reply = self._client.chat.completions.with_raw_response.create(**request)
        self._has_heard = True
        self._writer.append({"key": key, **read_reply(reply.http_response.text)})


def _backoff(attempt: int) -> float:
    """Seconds to wait after an attempt, with some jitter so that threads do not come back together."""
    return min(_MAX_BACKOFF, _FIRST_BACKOFF * 2**attempt) * random.uniform(0.5, 1)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds until the time that `retry-after` names, as a number or a date; None where it names none."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        wait = float(value)
    except ValueError:
        try:
            wait = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return wait if 0 <= wait < math.inf else None


def _data_url(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
