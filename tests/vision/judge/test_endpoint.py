"""A misbehaving endpoint costs nothing twice and loses nothing."""

import base64
import io
import json
import os
import re
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tl_latentlens.endpoint import retry
from tl_latentlens.endpoint.keyed_lines import LineWriter
from tl_latentlens.endpoint.requests import RequestRun
from tl_latentlens.vision.judge.judge import judge_messages

pytest.importorskip("openai")
pytest.importorskip("PIL")

from PIL import Image
from support.chat_endpoint import FAILURES, TIMEOUT
from support.fresh import start_fresh
from support.judge_endpoint import Stub, fails_often, judge_at, questions_on_grays

import tl_latentlens as tll


def test_with_30_percent_of_failures_nothing_is_lost_or_paid_twice(stub: Stub, tmp_path: Path) -> None:
    stub.plan = fails_often
    questions = questions_on_grays()
    judge = judge_at(stub.url, tmp_path / "answers.jsonl")
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


def ask_all(url: str, path: Path) -> None:
    """Ask every question, as fast as it goes."""
    retry._FIRST_BACKOFF = 0.01
    judge_at(url, path, attempts=6).ask(questions_on_grays(), progress=False)


def test_a_killed_run_goes_on_and_asks_only_what_has_no_answer(stub: Stub, tmp_path: Path) -> None:
    stub.plan, stub.delay = fails_often, 0.03
    path = tmp_path / "answers.jsonl"
    with start_fresh(ask_all, stub.url, path) as process:
        try:
            while len(stub.answered()) < 40:
                assert process.is_alive, "the run ended before it could be killed"
                time.sleep(0.01)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.end()
    time.sleep(TIMEOUT / 2)  # what was under way
    paid, n_asked, kept = stub.answered(), len(stub.asked), path.read_bytes()
    assert set(paid.values()) == {1}
    assert len(paid) - 4 <= kept.count(b"\n") <= len(paid) < 100

    path.write_bytes(kept + b'{"key": "0')  # as a power cut in the middle of a line leaves it
    questions, judge = questions_on_grays(), judge_at(stub.url, path)
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
    """All of the run waits, not only the question that was told to."""
    first = []

    def plan(question: str, attempt: int) -> str:
        if not first:
            first.append(question)
            return "429 after 1.2"
        return "answer"

    stub.plan, stub.delay = plan, 0.2
    judged = judge_at(stub.url, tmp_path / "a.jsonl", concurrency=2).ask(questions_on_grays(5), progress=False)
    assert "unanswered" not in set(judged.table["category"])
    assert stub.most == 2  # at once
    times = np.array([at for at, _, _ in stub.asked])
    told = times[0] + stub.delay
    assert not ((times > told + 0.1) & (times < told + 1.1)).any()


def test_what_cannot_be_judged_has_a_reason_and_is_asked_again(stub: Stub, tmp_path: Path) -> None:
    stub.plan = lambda question, attempt: {"g1 on 1": "400", "g2 on 2": "500", "g2 on 3": "malformed"}.get(question, "answer")
    questions = questions_on_grays(10)
    judge = judge_at(stub.url, tmp_path / "a.jsonl", attempts=3)
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
    questions = questions_on_grays(60)
    judge = judge_at(stub.url, tmp_path / "a.jsonl")
    with pytest.raises(tll.InvalidInputError, match=rf"refuses all; see to base_url, api_key, model: .*{refusal[:3]}"):
        judge.ask(questions, progress=False)
    # Each of four threads may have one question under way, and begin another before the refusal is read.
    assert len(stub.asked) <= 12 + 2 * 4
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
    judge_at(stub.url, tmp_path / "a.jsonl", options={"temperature": 0, "top_k": 3}).ask(questions, progress=False)
    body = stub.bodies[0]
    assert (body["model"], body["temperature"], body["top_k"]) == ("m", 0, 3)
    framed, crop, text = body["messages"][0]["content"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(one["image_url"]["url"].split(",")[1]))).size for one in (framed, crop)]
    assert sizes == [(512, 341), (256, 171)]
    assert re.search(r'^4\. "a \\"quoted\\""\n5\. "↵"$', text["text"], re.MULTILINE)


def test_a_full_disk_ends_the_run(stub: Stub, tmp_path: Path) -> None:
    """What cannot be kept is not paid for: /dev/full stands for the disk."""
    stub.delay = 0.05
    judge = judge_at(stub.url, tmp_path / "a.jsonl", concurrency=2)
    missing = judge._distinct_keys(questions := questions_on_grays())
    with Path("/dev/full").open("wb", buffering=0) as full:
        endpoint = judge._endpoint
        run = RequestRun(
            endpoint.client(),
            lambda number: endpoint.request(judge_messages(questions, number)),
            LineWriter(full),
            concurrency=2,
            attempts=10,
        )
        with pytest.raises(OSError, match="No space"):
            run.send_all(missing, "judging", False)
    assert len(stub.asked) <= 6
