"""The judge: questions show the right patch, a misbehaving endpoint costs nothing twice and loses nothing, figures by hand."""

import base64
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from support.models import TEXTS

import tl_latentlens as tll
from tl_latentlens.statistics.intervals import share_of
from tl_latentlens.vision import judge as judge_module
from tl_latentlens.vision.judge import Question, _load, _relations
from tl_latentlens.vision.judgments import cohens_kappa

pytest.importorskip("PIL")
openai = pytest.importorskip("openai")

from PIL import Image  # noqa: E402

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


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setattr(judge_module, "_FIRST_WAIT", 0.01)
    made = Stub()
    yield made
    made.server.shutdown()
    made.server.server_close()


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


def judge_at(stub: Stub, path: Path, **settings: Any) -> tll.Judge:
    defaults = {"base_url": stub.url, "api_key": "none", "timeout": TIMEOUT, "attempts": 10, "concurrency": 4}
    return tll.Judge("m", path, **{**defaults, **settings})


def test_with_30_percent_of_failures_nothing_is_lost_or_paid_twice(stub: Stub, tmp_path: Path) -> None:
    stub.plan = fails_often
    questions = questions_on_grays()
    judge = judge_at(stub, tmp_path / "answers.jsonl")
    judged = judge.ask(questions, progress=False)
    paid = stub.answered()
    assert len(paid) == len(questions) == 100
    assert set(paid.values()) == {1}
    happened = Counter(what for _, _, what in stub.asked)
    assert set(FAILURES) <= set(happened)
    assert sum(happened[what] for what in FAILURES) > 0.2 * len(stub.asked)
    table = judged.to_dataframe()
    assert Counter(table["category"]) == {"concrete": 48, "none": 50, "unparsed": 2}
    assert (table["problem"].isna()).all()
    assert set(table["answer"][table["category"] == "unparsed"]) == {"A nice patch.", "I cannot."}
    assert (judged.input_tokens, judged.output_tokens) == (100_000, 1000)

    n_asked = len(stub.asked)
    again = judge.ask(questions, progress=False)
    pd.testing.assert_frame_equal(again.table, table)
    pd.testing.assert_frame_equal(judge.judged(questions).table, table)
    assert len(stub.asked) == n_asked

    shares = judged.shares().set_index("category")
    assert shares["share"].to_dict() == pytest.approx(
        {"concrete": 0.96, "abstract": 0, "global": 0, "none": 0, "unparsed": 0.04, "interpretable": 0.96}
    )
    assert shares["control"].to_dict() == pytest.approx(
        {"concrete": 0, "abstract": 0, "global": 0, "none": 1, "unparsed": 0, "interpretable": 0}
    )
    wilson = stats.binomtest(48, 50).proportion_ci(method="wilson")
    assert shares.loc["concrete", ["low", "high"]].tolist() == pytest.approx([wilson.low, wilson.high])
    gain = shares.loc["interpretable"]
    assert 0.85 < gain["gain_low"] < gain["gain"] == pytest.approx(0.96)
    assert shares[["patches", "unanswered", "control_unanswered"]].drop_duplicates().to_numpy().tolist() == [[50, 0, 0]]
    assert re.search(r"interpretable +0\.96 \[0\.87, 0\.99\] +0\.00 \[0\.00, 0\.07\] +50 +0$", str(judged), re.MULTILINE)


def test_a_killed_run_goes_on_and_asks_only_what_has_no_answer(stub: Stub, tmp_path: Path) -> None:
    stub.plan, stub.delay = fails_often, 0.03
    path = tmp_path / "answers.jsonl"
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_judge
test_judge.judge_module._FIRST_WAIT = 0.01
test_judge.tll.Judge("m", {str(path)!r}, base_url={stub.url!r}, api_key="none", timeout={TIMEOUT}, concurrency=4).ask(
    test_judge.questions_on_grays(), progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        while len(stub.answered()) < 40:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(TIMEOUT / 2)  # what was under way
    paid, n_asked, kept = stub.answered(), len(stub.asked), path.read_bytes()
    assert set(paid.values()) == {1}
    assert len(paid) - 4 <= kept.count(b"\n") <= len(paid) < 100

    path.write_bytes(kept + b'{"key": "0')  # as a power cut in the middle of a line leaves it
    questions, judge = questions_on_grays(), judge_at(stub, path)
    stored = judge.judged(questions).table
    judged = judge.ask(questions, progress=False)
    assert Counter(judged.table["category"]) == {"concrete": 48, "none": 50, "unparsed": 2}
    asked_later = {question for _, question, _ in stub.asked[n_asked:]}
    has_answer = stored[stored["category"] != "unanswered"]
    assert asked_later.isdisjoint(f"g{line.image} on {line.shown}" for line in has_answer.itertuples())
    paid = stub.answered()
    assert len(paid) == 100
    assert paid.total() <= 104  # beyond one each at most those that were under way
    lines = path.read_bytes().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == 100
    assert path.read_bytes().startswith(kept)


def test_the_endpoint_says_how_long_to_wait(stub: Stub, tmp_path: Path) -> None:
    """All of the run waits, not only the question that was told to; a date is understood too."""
    first = []

    def plan(question: str, attempt: int) -> str:
        if not first:
            first.append(question)
            return "429 after 1.2"
        return "answer"

    stub.plan, stub.delay = plan, 0.2
    judged = judge_at(stub, tmp_path / "a.jsonl", concurrency=2).ask(questions_on_grays(5), progress=False)
    assert "unanswered" not in set(judged.table["category"])
    assert stub.most == 2  # at once
    times = np.array([at for at, _, _ in stub.asked])
    told = times[0] + stub.delay
    assert not ((times > told + 0.1) & (times < told + 1.1)).any()
    assert judge_module._retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)}) == pytest.approx(30, abs=2)
    assert [judge_module._retry_after({"retry-after": one}) for one in ("soon", "nan", "-3")] == [None] * 3


def test_what_cannot_be_judged_has_a_reason_and_is_asked_again(stub: Stub, tmp_path: Path) -> None:
    stub.plan = lambda question, attempt: {"g1 on 1": "400", "g2 on 2": "500", "g2 on 3": "malformed"}.get(question, "answer")
    questions = questions_on_grays(10)
    judge = judge_at(stub, tmp_path / "a.jsonl", attempts=3)
    judged = judge.ask(questions, progress=False)
    times = Counter(question for _, question, _ in stub.asked)
    assert {question: n for question, n in times.items() if n > 1} == {"g2 on 2": 3, "g2 on 3": 3}  # and 400 is final
    missing = judged.table[judged.table["category"] == "unanswered"].set_index(["image", "shown"])["problem"]
    assert missing[1, 1].startswith("BadRequestError: Error code: 400")
    assert missing[2, 2].startswith("InternalServerError: Error code: 500")
    assert 'a reply without an answer: \'{"choices": [{"mess\'' in missing[2, 3]
    shares = judged.shares().set_index("category")
    assert shares.loc["concrete", ["share", "patches", "unanswered", "control_unanswered"]].tolist() == [1, 8, 2, 1]
    stub.plan = lambda question, attempt: "answer"
    n_asked = len(stub.asked)
    assert set(judge.ask(questions, progress=False).table["category"]) == {"concrete", "none"}
    assert len(stub.asked) == n_asked + 3


@pytest.mark.parametrize("refusal", ["401", "402", "404", "429 quota"])
def test_an_endpoint_that_refuses_all_is_asked_no_further(stub: Stub, tmp_path: Path, refusal: str) -> None:
    stub.plan = lambda question, attempt: "answer" if len(stub.asked) < 12 else refusal
    questions = questions_on_grays(20)
    judge = judge_at(stub, tmp_path / "a.jsonl")
    with pytest.raises(tll.InvalidInputError, match=rf"refuses all; see to base_url, api_key, model: .*{refusal[:3]}"):
        judge.ask(questions, progress=False)
    assert len(stub.asked) <= 12 + 4
    assert (judge.judged(questions).table["category"] != "unanswered").sum() == 12
    assert set(judge.judged(questions).table["problem"].dropna()) == {"not asked"}


def test_an_address_at_which_nobody_answers_ends_the_run(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and no one listens
        base_url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        judge = tll.Judge("m", tmp_path / "a.jsonl", base_url=base_url, api_key="k", attempts=1)
        with pytest.raises(tll.InvalidInputError, match=rf"nobody answers at {base_url}/; see to base_url: APIConnectionError"):
            judge.ask(questions_on_grays(3), progress=False)


def test_no_key_is_said_before_anything_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(tll.InvalidInputError, match="give api_key"):
        tll.Judge("m", tmp_path / "a.jsonl").ask(questions_on_grays(2), progress=False)
    assert not (tmp_path / "a.jsonl").exists()
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(tll.MissingExtraError, match=r"tl-latentlens\[judge\]"):
        tll.Judge("m", tmp_path / "a.jsonl").ask(questions_on_grays(2), progress=False)
    with pytest.raises(tll.InvalidInputError, match="attempts=0"):
        tll.Judge("m", tmp_path / "a.jsonl", attempts=0)


def test_a_request_holds_the_options_the_pictures_and_the_words(stub: Stub, tmp_path: Path) -> None:
    questions = questions_on_grays(2)
    judge_at(stub, tmp_path / "a.jsonl", options={"temperature": 0, "top_k": 3}).ask(questions, progress=False)
    body = stub.bodies[0]
    assert (body["model"], body["temperature"], body["top_k"]) == ("m", 0, 3)
    framed, crop, text = body["messages"][0]["content"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(one["image_url"]["url"].split(",")[1]))).size for one in (framed, crop)]
    assert sizes == [(512, 341), (256, 171)]
    assert re.search(r'^4\. "a \\"quoted\\""\n5\. "↵"$', text["text"], re.MULTILINE)


def test_another_model_option_word_picture_or_box_is_another_question(tmp_path: Path) -> None:
    base = questions_on_grays(2)
    one = base.questions[0]
    keys = []
    for judge in (tll.Judge("m", "a"), tll.Judge("n", "a"), tll.Judge("m", "a", options={"seed": 1})):
        keys.append(judge._key(base, 0))
    changed = [{"words": ("g1",)}, {"shown": 1}, {"box": (30, 10, 48, 21)}]
    for change in changed:
        keys.append(tll.Judge("m", "a")._key(tll.JudgeQuestions(base.pictures, (Question(**{**vars(one), **change}),)), 0))
    assert len(set(keys)) == 6
    same = tll.JudgeQuestions(base.pictures, (Question(**{**vars(one), "hook_name": "other", "lens": "logit_lens"}),))
    assert tll.Judge("m", "a", base_url="http://other", concurrency=1)._key(same, 0) == keys[0]


def test_estimate_counts_what_will_be_sent(stub: Stub, tmp_path: Path) -> None:
    questions = questions_on_grays(10)
    twice = tll.JudgeQuestions(questions.pictures, questions.questions * 2)  # equal words at two layers are asked once
    judge = judge_at(stub, tmp_path / "a.jsonl")
    prices = {"input_price": 2.0, "output_price": 8.0, "output_tokens": 100}
    estimate = judge.estimate(twice, **prices)
    text = sum(-(-len(question.prompt) // 4) for question in questions.questions)
    assert (estimate.requests, estimate.answered, estimate.output_tokens) == (20, 0, 2000)
    assert (estimate.image_tokens, estimate.text_tokens) == (20 * (16 * 11 + 8 * 6), text)
    assert estimate.cost == pytest.approx((2 * (estimate.image_tokens + text) + 8 * 2000) / 1e6)
    assert str(estimate).startswith("20 requests to send (0 answered already): 4,480 image + ")
    assert judge.estimate(twice, **prices, image_tokens=lambda width, height: 85).image_tokens == 20 * 2 * 85
    assert not stub.asked
    judge.ask(tll.JudgeQuestions(questions.pictures, questions.questions[:5]), progress=False)
    assert (after := judge.estimate(twice, **prices)).requests == 15
    assert after.answered == 5
    judge.ask(twice, progress=False)
    assert len(stub.asked) == 20
    assert judge.estimate(twice, **prices).cost == 0


def test_a_file_of_something_else_is_left_alone(stub: Stub, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for content in (b"my notes", b"my notes\n", b'{"key": "a"}\n', b"[]\n"):
        path.write_bytes(content)
        with pytest.raises(tll.InvalidInputError, match=r"line 1 of .*a\.jsonl is no judge's answer"):
            judge_at(stub, path).ask(questions_on_grays(2), progress=False)
        assert path.read_bytes() == content
    path.unlink()
    with (
        judge_module._appending(path),
        pytest.raises(tll.InvalidInputError, match="is being written by another process"),
    ):
        judge_at(stub, path).ask(questions_on_grays(2), progress=False)
    with pytest.raises(tll.InvalidInputError, match="there is no folder"):
        judge_at(stub, tmp_path / "none" / "a.jsonl").ask(questions_on_grays(2), progress=False)
    assert not stub.asked


def test_a_full_disk_ends_the_run(stub: Stub, tmp_path: Path) -> None:
    """What cannot be kept is not paid for: /dev/full stands for the disk."""
    stub.delay = 0.05
    judge = judge_at(stub, tmp_path / "a.jsonl", concurrency=2)
    missing = judge._keys(questions := questions_on_grays())
    with Path("/dev/full").open("wb", buffering=0) as full:
        run = judge_module._Run(judge, judge._client(), questions, full)
        with pytest.raises(OSError, match="No space"):
            run.settle(missing, False)
    assert len(stub.asked) <= 6


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"1": "concrete", "2": "none"}', ("concrete", "none")),
        ('First {"1": "none", "2": "none"}, no: {"2": " Global", "1": "ABSTRACT"}.', ("abstract", "global")),
        ('```json\n{"relations": {"1": "none", "2": "none"}, "why": "…"}\n```', ("none", "none")),
        ('{"1": "concrete"}', None),
        ('{"1": "concrete", "2": null}', None),
        ('{"1": "concrete", "2": "maybe"}', None),
        ('{"1": "concrete", "2":', None),
        ("", None),
    ],
)
def test_answers_are_read(answer: str, expected: tuple[str, ...] | None) -> None:
    assert _relations(answer, 2) == expected


def test_shares_go_by_image(tmp_path: Path) -> None:
    """Three patches of one image and one of another: each image counts once."""
    categories = ["concrete", "concrete", "none", "abstract"]
    table = pd.DataFrame(
        {"image": [0, 0, 0, 1], "position": range(4), "lens": "logit_lens", "hook_name": "a", "category": categories}
    )
    judged = tll.Judgments("m", table.assign(shown=table["image"], control=False), 0, 0)
    shares = judged.shares().set_index("category")
    assert shares["share"].to_dict() == pytest.approx(
        {"concrete": 1 / 3, "abstract": 1 / 2, "global": 0, "none": 1 / 6, "unparsed": 0, "interpretable": 5 / 6}
    )
    assert shares["control"].isna().all()
    nothing = share_of(np.zeros(30))
    wilson = stats.binomtest(0, 30).proportion_ci(method="wilson")
    assert (nothing.mean, nothing.low, nothing.high, nothing.n) == pytest.approx((0, wilson.low, wilson.high, 30))


def test_kappa_is_cohens() -> None:
    assert cohens_kappa(np.array([[20, 5], [10, 15]])) == pytest.approx(0.4)
    assert cohens_kappa(np.array([[45, 15], [25, 15]])) == pytest.approx(0.1304, abs=1e-4)
    assert np.isnan(cohens_kappa(np.array([[9, 0], [0, 0]])))


def test_agreement_with_people(stub: Stub, tmp_path: Path) -> None:
    stub.plan = lambda question, attempt: "talk" if question == "g5 on 5" else "answer"
    questions = questions_on_grays()
    judged = judge_at(stub, tmp_path / "a.jsonl").ask(questions, progress=False)
    people = questions.to_dataframe().assign(category=lambda table: np.where(table["control"], "none", "concrete"))
    people.loc[0, "category"] = "global"
    people.loc[2, "category"] = "none"
    people.loc[4, "category"] = "cannot tell"
    found = judged.agreement(people.sample(frac=1, random_state=0)).set_index("labels")
    assert found["n"].tolist() == [98, 98]  # less one that the judge did not judge and one that people did not
    assert found["agreement"].tolist() == pytest.approx([96 / 98, 97 / 98])
    counts = np.zeros((4, 4))
    counts[[0, 0, 0, 3], [0, 2, 3, 3]] = [46, 1, 1, 50]
    assert found.loc["relation", "kappa"] == pytest.approx(cohens_kappa(counts))
    assert found.loc["interpretable", "kappa"] == pytest.approx(cohens_kappa(np.array([[47, 1], [0, 50]])))
    assert (found["low"] < found["kappa"]).all()
    assert (found["high"] <= 1).all()
    assert judged.agreement(judged)["kappa"].tolist() == [1, 1]
    with pytest.raises(tll.InvalidInputError, match="no question was judged by both"):
        judged.agreement(people.assign(image=lambda table: table["image"] + 900))


# Questions from readings

NAMES = ["blocks.1.hook_resid_post", "blocks.4.hook_resid_post"]
GRID = tll.PatchGrid.regular(4, 5, range(2, 22), height=40, width=50)


@pytest.fixture(scope="module")
def result(any_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tll.LensResult:
    """A text whose positions 2 to 21 stand for 4 × 5 patches."""
    path = tmp_path_factory.mktemp("judge") / "j.h5"
    bank = tll.build_bank(any_model, TEXTS, path, hook_names=NAMES, progress=False)
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank, device="cpu"), embedding_lens=True)
    any_model.run_with_hooks(" ".join(TEXTS[:4]), fwd_hooks=hooks)
    return hooks.result


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, size, np.uint8) for size in ((80, 100, 3), (40, 50, 3), (160, 200, 3), (80, 100, 3))]


def test_questions_are_the_same_patches_for_all_lenses_and_layers(result: tll.LensResult, pictures: list[np.ndarray]) -> None:
    images = [(result, GRID, picture) for picture in pictures]
    questions = tll.judge_questions(images, per_image=2)
    table = questions.to_dataframe()
    assert len(table) == 4 * 2 * 2 * 3 * 2  # images, patches, hook names, lenses, the control
    assert repr(questions) == "JudgeQuestions(96 questions on 4 images, 48 of them controls)"
    patches = table.groupby(["lens", "hook_name", "control"])["position"].agg(list)
    assert len(patches) == 12
    assert len({tuple(one) for one in patches}) == 1
    interior = {int(GRID.positions[t]) for t in range(len(GRID)) if GRID.rows[t] in (1, 2) and GRID.columns[t] in (1, 2, 3)}
    assert set(table["position"]) <= interior
    shown = table[table["control"]].groupby("image")["shown"].unique()
    assert all(len(one) == 1 for one in shown)
    assert sorted(one[0] for one in shown) == [0, 1, 2, 3]
    for question in questions.questions:
        width = questions.pictures[question.shown].shape[1]
        token = GRID.token(question.position)
        scale = width / GRID.width
        x0, y0, x1, y1 = scale * GRID.boxes[token]
        assert question.box == pytest.approx((x0 - 10 * scale, y0 - 10 * scale, x1 + 10 * scale, y1 + 10 * scale))
        cell = result.cell(question.hook_name, question.position)
        if question.lens == "latentlens":
            for word, found in zip(question.words, cell.neighbors, strict=True):
                text = re.sub("[«»]", "", found.context)
                assert word in text if not word.isalnum() else re.search(rf"(?<!\w){word}(?!\w)", text)
                assert found.token.strip() in word
        else:
            tokens = [token.strip() for token, _ in getattr(cell, question.lens)]
            assert [
                word
                for word, token in zip(question.words, tokens, strict=True)
                if token and token.isprintable() and word != token
            ] == []
    assert tll.judge_questions(images, per_image=2).questions == questions.questions
    assert tll.judge_questions(images, per_image=2, seed=1).questions != questions.questions
    more = tll.judge_questions([*images, (result, GRID, pictures[0] // 2)], per_image=3, control=False)
    assert {(q.image, q.position) for q in questions.questions} <= {(q.image, q.position) for q in more.questions}
    assert not any(q.control for q in more.questions)


def test_the_judge_sees_the_frame_and_what_is_in_it(result: tll.LensResult, pictures: list[np.ndarray]) -> None:
    blank = [np.zeros_like(pictures[0]), np.full_like(pictures[1], 9)]
    questions = tll.judge_questions([(result, GRID, picture) for picture in blank])
    left, top, right, bottom = questions.questions[0].box
    blank[0][top:bottom, left:right] = (0, 200, 0)
    framed, crop = tll.JudgeQuestions(tuple(blank), questions.questions).look(0)
    assert framed.size == (512, 410)
    assert max(crop.size) == 256
    assert (np.asarray(crop) == (0, 200, 0)).all()
    seen, scale = np.asarray(framed), 512 / 100
    red = np.argwhere((seen == (255, 0, 0)).all(-1))
    assert [*red.min(0)[::-1], *(red.max(0)[::-1] + 1)] == pytest.approx(
        [left * scale, top * scale, right * scale, bottom * scale], abs=1
    )
    assert tuple(seen[round((top + bottom) / 2 * scale), round((left + right) / 2 * scale)]) == (0, 200, 0)


def test_what_makes_no_questions_is_refused(result: tll.LensResult, pictures: list[np.ndarray]) -> None:
    one = (result, GRID, pictures[0])
    with pytest.raises(tll.InvalidInputError, match=r"got 1 images; .* two at least for the control"):
        tll.judge_questions([one])
    assert len(tll.judge_questions([one], control=False)) == 6
    with pytest.raises(tll.InvalidInputError, match="the same picture twice"):
        tll.judge_questions([one, one])
    with pytest.raises(tll.InvalidInputError, match=r"got 0 decoded patches with 2 more on every side; expected 1"):
        tll.judge_questions([one], around=2, control=False)
    with pytest.raises(tll.InvalidInputError, match=r"got 5 words of latentlens at blocks\.1.*; expected 6"):
        tll.judge_questions([one], top_k=6, control=False)


def test_answers_are_kept_as_lines_that_others_can_read(stub: Stub, tmp_path: Path) -> None:
    judge_at(stub, tmp_path / "a.jsonl").ask(questions_on_grays(2), progress=False)
    [record, *_] = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    assert set(record) == {"key", "answer", "finish_reason", "model", "input_tokens", "output_tokens"}
    assert (record["model"], record["finish_reason"], record["input_tokens"]) == ("m-1", "stop", 1000)
    answers, end = _load(tmp_path / "a.jsonl")
    assert (len(answers), end) == (4, (tmp_path / "a.jsonl").stat().st_size)


def test_judge_page_runs(stub: Stub, any_model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From a bridge of a vision-language model to kappa, against the stub in place of OpenAI."""
    import torch
    from support.vlms import llava
    from test_docs import snippets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", stub.url)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    torch.manual_seed(0)
    vlm = llava()
    bank = tll.build_bank(vlm.bridge, TEXTS, "bank.h5", hook_names=NAMES[:1], progress=False)
    rng = np.random.default_rng(0)

    def processor(images: Any, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        return vlm.prompt(torch.tensor(np.asarray(images)).permute(2, 0, 1) / 255)

    names: dict[str, Any] = {
        "tll": tll,
        "bridge": vlm.bridge,
        "index": tll.ContextualIndex(bank, device="cpu"),
        "processor": processor,
        "prompt": "",
        "pictures": [Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)) for _ in range(3)],
    }
    for part in snippets("judge.md"):
        exec(part, names)
    questions = names["questions"]
    assert set(questions.to_dataframe()["lens"]) == {"latentlens", "logit_lens", "embedding_lens"}
    assert len(questions) == 3 * 3 * 2
    assert {question.position for question in questions.questions} == {2 + 4}  # the middle of 3 × 3
    assert names["framed"].size == (512, 512)
    assert {body["model"] for body in stub.bodies} == {"gpt-5", "gpt-5-mini"}
    assert set(names["judged"].table["category"]) == {"none"}
    pieces = names["judge"].estimate(tll.JudgeQuestions(questions.pictures, questions.questions), input_price=1, output_price=1)
    assert (pieces.requests, pieces.image_tokens) == (0, 0)
    fresh = tll.Judge("m", "fresh.jsonl").estimate(questions, input_price=1, output_price=1)
    assert fresh.image_tokens == fresh.requests * 320
    assert 250 <= fresh.text_tokens / fresh.requests <= 270
