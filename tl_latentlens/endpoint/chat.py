"""A language model behind an OpenAI-compatible endpoint, asked many questions whose answers a file keeps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tl_latentlens.endpoint.keyed_lines import LineKind, append_lines
from tl_latentlens.endpoint.requests import RequestRun
from tl_latentlens.errors import InvalidInputError, MissingExtraError

ANSWER = LineKind("an answer of an endpoint", ("answer", "input_tokens", "output_tokens"))
_Question = TypeVar("_Question")
Messages = list[dict[str, Any]]  # as `chat.completions.create` takes them


@dataclass(frozen=True)
class ChatEndpoint:
    """A language model behind an OpenAI-compatible endpoint.

    Attributes:
        model: Name of the model at the endpoint.
        base_url: The endpoint; None: OpenAI's, or OPENAI_BASE_URL.
        api_key: None: OPENAI_API_KEY. Endpoints that need none take any.
        options: Further fields of each request, such as {"reasoning_effort": "low"} or {"temperature": 0, "seed": 0}.
        concurrency: Number of requests under way at once.
        attempts: Number of attempts of each question, before it is left unanswered for this run.
        timeout: Seconds of an attempt. An endpoint may bill an answer that comes too late, so rather give too much time.
    """

    model: str
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

    def ask(
        self,
        answers: Path,
        questions: Mapping[str, _Question],
        messages: Callable[[_Question], Messages],
        *,
        task: str,
        progress: bool = True,
    ) -> dict[str, str]:
        """Send the questions that a file has no answer to; returns the last problem of each that stays without one, by key.

        Rate limits (429), server errors, timeouts, and replies cut short or without an answer in them are tried again, after
        the time that the endpoint names or one that doubles. Each answer is in the file before the next question of its
        thread is sent.

        Args:
            answers: The file of `ANSWER` lines; made where there is none.
            questions: Key → a question; equal questions have equal keys.
            messages: Question → the messages of its request.
            task: What is done, for the progress bar.
            progress: Show a progress bar.

        Raises:
            MissingExtraError: openai is not installed.
            InvalidInputError: The endpoint refuses every question (key, money, model), or the file is no file of answers, or is
                being written by another process. What was answered is kept.
        """
        client = self.client()
        with append_lines(answers, ANSWER) as (writer, stored):
            missing = {key: question for key, question in questions.items() if key not in stored.by_key}
            run: RequestRun[_Question] = RequestRun(
                client,
                lambda question: self.request(messages(question)),
                writer,
                concurrency=self.concurrency,
                attempts=self.attempts,
            )
            return run.send_all(missing, task, progress)

    def request(self, messages: Messages) -> dict[str, Any]:
        """The arguments of `chat.completions.create` for some messages."""
        return {"model": self.model, "messages": messages, "extra_body": dict(self.options)}

    def client(self) -> Any:
        """An `openai.OpenAI`.

        Raises:
            MissingExtraError: openai is not installed.
            InvalidInputError: There is no key.
        """
        try:
            import openai
        except ImportError as error:
            raise MissingExtraError('asking an endpoint needs openai: pip install "tl-latentlens[judge]"') from error
        try:
            return openai.OpenAI(api_key=self.api_key, base_url=self.base_url, max_retries=0, timeout=self.timeout)
        except openai.OpenAIError as error:
            raise InvalidInputError(f"{error}; give api_key (any, where the endpoint needs none)") from error
