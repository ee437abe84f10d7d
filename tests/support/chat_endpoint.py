"""An OpenAI-compatible endpoint that answers questions, or fails in the usual ways."""

import json
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAILURES = ["429", "500", "slow", "malformed", "truncated", "no choices", "html", "error in a 200"]
TIMEOUT = 2.0


class ChatStub:
    """An endpoint. A subclass says in `read` what a request asks, and what the answer to it is.

    `plan(question, attempt)` names what happens to a request; `asked` has each as (time, question, what happened).
    """

    def __init__(self) -> None:
        self.asked: list[tuple[float, str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.plan = lambda question, attempt: "answer"
        self.delay = 0.0
        self.most, self._now, self._lock = 0, 0, threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                stub.reply(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def read(self, body: dict[str, Any]) -> tuple[str, str]:
        """A name of the question of a request, and the text of its answer."""
        raise NotImplementedError

    def answered(self) -> Counter[str]:
        with self._lock:
            return Counter(question for _, question, what in self.asked if what not in FAILURES and not what.isdigit())

    def reply(self, handler: Any, body: dict[str, Any]) -> None:
        question, answer = self.read(body)
        with self._lock:
            self.bodies.append(body)
            what = self.plan(question, sum(one == question for _, one, _ in self.asked))
            self.asked.append((time.monotonic(), question, what))
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            time.sleep(self.delay)
            self._send(handler, what, answer)
        except OSError:  # who asked was killed
            pass
        finally:
            with self._lock:
                self._now -= 1

    def _send(self, handler: Any, what: str, answer: str) -> None:
        if what == "slow":
            time.sleep(TIMEOUT + 1)
            return
        content: dict[str, Any] = {"content": answer}
        content = {"talk": {"content": "A nice patch."}, "refusal": {"content": None, "refusal": "I cannot."}}.get(
            what, content
        )
        usage = {"prompt_tokens": 1000, "completion_tokens": 10}
        whole = {"model": "m-1", "choices": [{"message": content, "finish_reason": "stop"}], "usage": usage}
        data = {
            "malformed": b'{"choices": [{"mess',
            "no choices": b'{"choices": []}',
            "html": b"<html>Bad gateway</html>",
            "error in a 200": b'{"error": {"message": "overloaded"}}',
        }.get(what, json.dumps(whole).encode())
        status = int(what.split()[0]) if what[:3].isdigit() else 200
        if status != 200:
            code = "insufficient_quota" if "quota" in what else None
            data = json.dumps({"error": {"message": f"made up {what}", "code": code}}).encode()
        handler.send_response(status)
        if what.startswith("429 after"):
            handler.send_header("Retry-After", what.removeprefix("429 after "))
        handler.send_header("Content-Type", "text/html" if what == "html" else "application/json")
        handler.send_header("Content-Length", str(len(data) + 50 * (what == "truncated")))
        handler.end_headers()
        handler.wfile.write(data)


def fails_often(question: str, attempt: int) -> str:
    """30 % of all requests fail, each in one of the usual ways."""
    rng = random.Random(f"{question} {attempt}")
    return rng.choice(FAILURES) if rng.random() < 0.3 else "answer"
