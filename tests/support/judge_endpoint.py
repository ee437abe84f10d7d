"""An endpoint that answers questions of a judge, or fails in the usual ways, and questions that it can answer."""

import base64
import io
import json
import random
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import tl_latentlens as tll
from tl_latentlens.vision.judge.questions import Question

FAILURES = ["429", "500", "slow", "malformed", "truncated", "no choices", "html", "error in a 200"]
TIMEOUT = 2.0


class Stub:
    """An endpoint that reads what the judge is shown, says "concrete" of a word that names the gray of the crop, and fails.

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

    def answered(self) -> Counter[str]:
        with self._lock:
            return Counter(question for _, question, what in self.asked if what not in FAILURES and not what.isdigit())

    def reply(self, handler: Any, body: dict[str, Any]) -> None:
        *pictures, text = body["messages"][0]["content"]
        words = re.findall(r'^\d+\. "(.*)"$', text["text"], re.MULTILINE)
        crop = Image.open(io.BytesIO(base64.b64decode(pictures[1]["image_url"]["url"].split(",")[1])))
        gray = np.asarray(crop)[:, :, 0].mean()
        question = f"{words[0]} on {gray:.0f}"
        with self._lock:
            self.bodies.append(body)
            what = self.plan(question, sum(one == question for _, one, _ in self.asked))
            self.asked.append((time.monotonic(), question, what))
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            time.sleep(self.delay)
            self._send(handler, what, {str(k): "concrete" if w == f"g{gray:.0f}" else "none" for k, w in enumerate(words, 1)})
        except OSError:  # the judge was killed
            pass
        finally:
            with self._lock:
                self._now -= 1

    def _send(self, handler: Any, what: str, relations: dict[str, str]) -> None:
        if what == "slow":
            time.sleep(TIMEOUT + 1)
            return
        content: dict[str, Any] = {"content": f"So:\n```json\n{json.dumps(relations)}\n```"}
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
    """30 % of all requests fail, each in one of the usual ways; of two questions the answer says nothing."""
    rng = random.Random(f"{question} {attempt}")
    if rng.random() < 0.3:
        return rng.choice(FAILURES)
    return {"g3 on 3": "talk", "g8 on 8": "refusal"}.get(question, "answer")


def questions_on_grays(n: int = 50) -> tll.JudgeQuestions:
    """A patch of each image, as gray inside as its number; the first of its words names that; the control shows the next."""
    pictures, questions = [], []
    for image in range(n):
        picture = np.full((40, 60, 3), 200, np.uint8)
        picture[10:22, 30:48] = image
        pictures.append(picture)
        for shown in (image, (image + 1) % n):
            words = (f"g{image}", "sky", "ing", 'a "quoted"', "↵")
            questions.append(Question(image, 7, "latentlens", "blocks.1.hook_resid_post", words, shown, (30, 10, 48, 22)))
    return tll.JudgeQuestions(tuple(pictures), tuple(questions))


def judge_at(url: str, path: Path, **settings: Any) -> tll.Judge:
    """A judge that asks an endpoint, quickly."""
    defaults = {"base_url": url, "api_key": "none", "timeout": TIMEOUT, "attempts": 10, "concurrency": 4}
    return tll.Judge("m", path, **{**defaults, **settings})
