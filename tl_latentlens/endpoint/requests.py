"""Requests to an OpenAI-compatible endpoint: several at once, each tried until it has an answer or no hope of one."""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Generic, TypeVar

from tqdm.auto import tqdm

from tl_latentlens.endpoint.keyed_lines import LineWriter
from tl_latentlens.endpoint.replies import MalformedError, read_reply
from tl_latentlens.endpoint.retry import backoff, is_worth_retrying, retry_after
from tl_latentlens.errors import InvalidInputError

_REFUSES_ALL = (401, 402, 404)  # no key, no money, no such model: every question would get the same status
_Question = TypeVar("_Question")


class RequestRun(Generic[_Question]):
    """The requests of one run. Each answer is in the file before the next question of its thread is sent."""

    def __init__(
        self,
        client: Any,
        make_request: Callable[[_Question], dict[str, Any]],
        writer: LineWriter,
        *,
        concurrency: int,
        attempts: int,
    ) -> None:
        """Keep what the threads share.

        Args:
            client: An `openai.OpenAI`.
            make_request: Question → arguments of `chat.completions.create`.
            writer: Keeps the answers.
            concurrency: Number of requests under way at once.
            attempts: Number of attempts of each question.
        """
        self._client, self._make_request, self._writer = client, make_request, writer
        self._concurrency, self._attempts = concurrency, attempts
        self._stop = threading.Event()
        self._paused_until = 0.0  # on the monotonic clock; set by the endpoint for all threads
        self._has_heard = False  # whether the endpoint has ever replied

    def send_all(self, questions: Mapping[str, _Question], task: str, progress: bool) -> dict[str, str]:
        """Send questions, given by key; returns the last problem of each that stays without an answer.

        `task` says on the progress bar what is done.

        Raises:
            InvalidInputError: The endpoint refuses every question, or never replies.
        """
        problems = {}
        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                futures = {pool.submit(self._send_until_answered, key, one): key for key, one in questions.items()}
                for future in tqdm(as_completed(futures), task, len(futures), unit=" questions", disable=not progress):
                    if (problem := future.result()) is not None:
                        problems[futures[future]] = problem
            except BaseException:
                self._stop.set()
                raise
        return problems

    def _send_until_answered(self, key: str, question: _Question) -> str | None:
        """Send one question until its answer is in the file; returns the last problem where it never is."""
        import openai

        request = self._make_request(question)
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
                if not is_worth_retrying(error.status_code):
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
                self._stop.wait(backoff(attempt) if wait is None else wait)
        return problem

    def _send(self, key: str, request: dict[str, Any]) -> None:
        reply = self._client.chat.completions.with_raw_response.create(**request)
        self._has_heard = True
        self._writer.append(key, read_reply(reply.http_response.text))
