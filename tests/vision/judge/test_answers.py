"""The file of answers: what is a question of its own, what is kept, what is refused."""

import json
from pathlib import Path

import pytest

from tl_latentlens.endpoint.chat import ANSWER
from tl_latentlens.endpoint.keyed_lines import append_lines, read_lines
from tl_latentlens.vision.judge.questions import Question
from tl_latentlens.vision.judge.replies import parse_relations

pytest.importorskip("openai")
pytest.importorskip("PIL")

from support.judge_endpoint import Stub, judge_at, questions_on_grays

import tl_latentlens as tll


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
    judge = judge_at(stub.url, tmp_path / "a.jsonl")
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
        with pytest.raises(tll.InvalidInputError, match=r"line 1 of .*a\.jsonl is not an answer of an endpoint"):
            judge_at(stub.url, path).ask(questions_on_grays(2), progress=False)
        assert path.read_bytes() == content
    path.unlink()
    with (
        append_lines(path, ANSWER),
        pytest.raises(tll.InvalidInputError, match="is being written by another process"),
    ):
        judge_at(stub.url, path).ask(questions_on_grays(2), progress=False)
    with pytest.raises(tll.InvalidInputError, match="there is no folder"):
        judge_at(stub.url, tmp_path / "none" / "a.jsonl").ask(questions_on_grays(2), progress=False)
    assert not stub.asked


def test_answers_are_kept_as_lines_that_others_can_read(stub: Stub, tmp_path: Path) -> None:
    judge_at(stub.url, tmp_path / "a.jsonl").ask(questions_on_grays(2), progress=False)
    [record, *_] = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    assert set(record) == {"key", "answer", "finish_reason", "model", "input_tokens", "output_tokens"}
    assert (record["model"], record["finish_reason"], record["input_tokens"]) == ("m-1", "stop", 1000)
    stored = read_lines(tmp_path / "a.jsonl", ANSWER)
    assert (len(stored.by_key), stored.n_bytes) == (4, (tmp_path / "a.jsonl").stat().st_size)


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
    assert parse_relations(answer, 2) == expected
