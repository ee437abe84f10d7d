"""Questions from readings show the right patch and the words of every lens."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.models import TEXTS

pytest.importorskip("openai")
pytest.importorskip("PIL")

from PIL import Image
from support.judge_endpoint import Stub

import tl_latentlens as tll

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


def test_judge_page_runs(stub: Stub, any_model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From a bridge of a vision-language model to kappa, against the stub in place of OpenAI."""
    import torch
    from support.docs import snippets
    from support.vlms import llava

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
