"""Directions that mean something are told from random ones, whichever way the rows point and vary."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.banks import fill, make_record

import tl_latentlens as tll
from tl_latentlens.corpus.plan import Plan, PlanSettings, make_plan, prompts_from_lists
from tl_latentlens.index.transforms import TRANSFORMS

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
N_WORDS, D = 100, 64
SETTINGS: dict[str, Any] = {"device": "cpu"}


def plan_of(n_prompts: int, length: int = 12) -> Plan:
    rng = np.random.default_rng(3)
    lists = [[0, *rng.integers(1, N_WORDS + 1, length).tolist()] for _ in range(n_prompts)]
    return make_plan(prompts_from_lists(lists, [[i == 0 for i in range(len(one))] for one in lists]), PlanSettings(None))


def word_centers() -> np.ndarray:
    """A center for each word; some dimensions vary more than others."""
    scales = np.arange(1, D + 1) ** -0.25
    return np.random.default_rng(4).standard_normal((N_WORDS, D)) * scales


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tll.Bank:
    """Two hook names; the rows of each point its own way, those of the second nearly all the same."""
    plan, rng = plan_of(200), np.random.default_rng(5)
    tokens = plan.tokens[plan.row_tokens] - 1
    acts = {}
    for hook, common in zip(HOOKS, (1.0, 6.0), strict=True):
        rows = word_centers()[tokens] + 0.1 * rng.standard_normal((plan.n_rows, D))
        rows[:, 7 if hook == HOOKS[0] else 21] += common
        acts[hook] = (50 * rows).astype(np.float32)
    path = tmp_path_factory.mktemp("words") / "bank.h5"
    fill(path, plan, acts=acts, record=make_record(plan, dict.fromkeys(HOOKS, D)))
    return tll.Bank.open(path)


def scores_of(directions: Any, index: tll.ContextualIndex, hook_name: Any = None, **settings: Any) -> pd.DataFrame:
    found = tll.decode_directions(directions, index, hook_name=hook_name, calibrate=True, progress=False, **settings)
    assert found.scores is not None
    return found.scores


def stored(bank: tll.Bank, hook: str) -> np.ndarray:
    rows = np.asarray(bank.vectors(hook)).astype(np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("hook_names", [HOOKS[1:], HOOKS], ids=["one", "both"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_words_are_told_from_random_directions(words: tll.Bank, transform: str, hook_names: tuple[str, ...]) -> None:
    index, rng = tll.ContextualIndex(words, hook_names, transform=transform, **SETTINGS), np.random.default_rng(6)
    rows = np.concatenate([stored(words, hook) - stored(words, hook).mean(0) for hook in hook_names])
    of_words = scores_of(word_centers() - word_centers().mean(0), index, top_k=5)
    assert (of_words.p[of_words.sign == 1] < 0.01).mean() >= 0.99
    isotropic = scores_of(rng.standard_normal((200, D)), index, top_k=5)
    like_rows = scores_of(rng.multivariate_normal(np.zeros(D), np.cov(rows.T), 200), index, top_k=5)
    assert (isotropic.p >= 0.01).mean() >= 0.95
    assert (like_rows.p >= 0.01).mean() >= 0.95


@pytest.mark.usefixtures("few_random_directions")
def test_z_is_nearness_about_the_mean_above_random_rows_of_the_neighbors_hook_name(words: tll.Bank) -> None:
    index, direction = tll.ContextualIndex(words, **SETTINGS), word_centers()[3]
    found = tll.decode_directions(direction, index, top_k=3000, calibrate=True)
    assert found.scores is not None
    assert found.positive.hook_ids.unique().tolist() == [0, 1]
    about_mean = {}
    for hook in HOOKS:
        centered = stored(words, hook) - stored(words, hook).mean(0)
        about_mean[hook] = centered @ direction / np.linalg.norm(centered, axis=-1) / np.linalg.norm(direction)
    for sign, line, neighbors in zip((1, -1), found.scores.to_dict("records"), found.neighbors(0), strict=True):
        z = [
            sign * (about_mean[near.hook_name][near.row] - about_mean[near.hook_name].mean()) / about_mean[near.hook_name].std()
            for near in neighbors
        ]
        assert line["z"] == pytest.approx(np.mean(z), abs=0.02)  # all rows are few enough to be the sample
        assert line["similarity"] == pytest.approx(np.mean([near.similarity for near in neighbors]), abs=1e-6)


def test_a_few_rows_far_from_all_others_do_not_decide(tmp_path: Path) -> None:
    """As first tokens with massive activations are: they are near to every direction that has a little of theirs."""
    plan, rng = plan_of(200), np.random.default_rng(5)
    rows = word_centers()[plan.tokens[plan.row_tokens] - 1] + 0.1 * rng.standard_normal((plan.n_rows, D))
    rows[:, 7] += 10
    rows[rng.random(plan.n_rows) < 0.01, 11] += 10
    acts = {HOOKS[0]: rows.astype(np.float32)}
    fill(tmp_path / "b.h5", plan, acts=acts, record=make_record(plan, {HOOKS[0]: D}))
    index = tll.ContextualIndex(tmp_path / "b.h5", **SETTINGS)
    of_words = scores_of(word_centers() - word_centers().mean(0), index, top_k=5)
    assert (of_words.p[::2] < 0.01).mean() >= 0.95
    centered = stored(index.banks[0], HOOKS[0]) - stored(index.banks[0], HOOKS[0]).mean(0)
    like_rows = scores_of(rng.standard_normal((300, len(centered))) @ centered, index, top_k=5)
    isotropic = scores_of(rng.standard_normal((300, D)), index, top_k=5)
    assert (like_rows.p < 0.01).mean() <= 0.03
    assert (isotropic.p < 0.01).mean() <= 0.03


def test_p_is_the_share_of_random_directions_of_at_least_this_z(words: tll.Bank) -> None:
    """Of either kind, drawn here anew; the larger share counts."""
    index, rng = tll.ContextualIndex(words, HOOKS[0], transform="center", **SETTINGS), np.random.default_rng(8)
    rows = stored(words, HOOKS[0]) - stored(words, HOOKS[0]).mean(0)
    tried = scores_of(word_centers()[:3] + 0.4 * rng.standard_normal((3, D)), index)
    kinds = {
        "p_isotropic": rng.standard_normal((1500, D)),
        "p_covariance": rng.standard_normal((1500, len(rows))) @ (rows / np.linalg.norm(rows, axis=-1, keepdims=True)),
    }
    for name, directions in kinds.items():
        drawn = scores_of(directions, index)
        shares = [(drawn.z >= z).mean() for z in tried.z]
        np.testing.assert_allclose(tried[name], shares, atol=0.05)
    np.testing.assert_array_equal(tried.p, tried[["p_isotropic", "p_covariance"]].max(axis=1))


@pytest.mark.usefixtures("few_random_directions")
def test_random_directions_are_scored_once_for_an_index(words: tll.Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tll.ContextualIndex(words, **SETTINGS)
    searched: list[int] = []
    search = tll.ContextualIndex.search
    monkeypatch.setattr(
        tll.ContextualIndex, "search", lambda self, *args, **kwargs: searched.append(1) or search(self, *args, **kwargs)
    )

    def n_searches(index: tll.ContextualIndex, **settings: Any) -> int:
        before = len(searched)
        scores_of(word_centers()[:2], index, **settings)
        return len(searched) - before

    assert n_searches(index, top_k=3) > 4
    of_one = n_searches(index, top_k=3)
    assert of_one == 4, "both ends of the directions, and of the random one that is shown beside them"
    assert n_searches(copy.deepcopy(index), top_k=3) == of_one
    assert n_searches(pickle.loads(pickle.dumps(index)), top_k=3) == of_one
    for other in ({"top_k": 4}, {"top_k": 3, "hook_name": HOOKS[1]}, {"top_k": 3, "seed": 1}):
        assert n_searches(index, **other) > of_one
        assert n_searches(index, **other) == of_one
    assert n_searches(tll.ContextualIndex(words, transform="center", **SETTINGS), top_k=3) > of_one


@pytest.mark.usefixtures("few_random_directions")
def test_scores_do_not_hang_on_the_other_directions_or_on_the_index_object(words: tll.Bank) -> None:
    directions = np.random.default_rng(9).standard_normal((300, D))
    whole = scores_of(directions, tll.ContextualIndex(words, transform="standardize", **SETTINGS))
    for some in ([0], [17, 3], range(100, 260)):
        own = scores_of(directions[list(some)], tll.ContextualIndex(words, transform="standardize", **SETTINGS))
        expected = whole.iloc[[line for i in some for line in (2 * i, 2 * i + 1)]].reset_index(drop=True)
        pd.testing.assert_frame_equal(own.drop(columns="direction"), expected.drop(columns="direction"), check_exact=True)


@pytest.mark.usefixtures("few_random_directions")
def test_scores_do_not_hang_on_what_is_set_in_torch(words: tll.Bank) -> None:
    expected = scores_of(word_centers()[:4], tll.ContextualIndex(words, transform="center", **SETTINGS))
    with torch.autocast("cpu", torch.bfloat16):
        pd.testing.assert_frame_equal(
            scores_of(word_centers()[:4], tll.ContextualIndex(words, transform="center", **SETTINGS)), expected
        )
    with torch.inference_mode():
        index = tll.ContextualIndex(words, transform="center", **SETTINGS)
        pd.testing.assert_frame_equal(scores_of(word_centers()[:4], index), expected)
    pd.testing.assert_frame_equal(scores_of(word_centers()[:4], index), expected)
    try:
        torch.set_default_dtype(torch.float64)
        index = tll.ContextualIndex(words, transform="center", **SETTINGS)
        pd.testing.assert_frame_equal(scores_of(word_centers()[:4], index), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_several_banks_are_scored_as_one(words: tll.Bank, tmp_path: Path) -> None:
    plan = plan_of(3)
    fill(
        tmp_path / "b.h5", plan, record=make_record(plan, {HOOKS[0]: D}), acts={HOOKS[0]: np.ones((plan.n_rows, D), np.float32)}
    )
    index = tll.ContextualIndex([words, tmp_path / "b.h5"], HOOKS[0], allow_mismatch=True, **SETTINGS)
    centers = word_centers() - word_centers().mean(0)
    assert (scores_of(centers, index, top_k=5).p[::2] < 0.01).mean() >= 0.95


@pytest.mark.parametrize("transform", ["raw", "center"])
def test_rows_that_are_all_alike_tell_nothing(tmp_path: Path, transform: str) -> None:
    plan = plan_of(4)
    row = np.random.default_rng(1).standard_normal(D).astype(np.float32)
    acts = {HOOKS[0]: np.repeat(row[None], plan.n_rows, 0)}
    fill(tmp_path / "b.h5", plan, record=make_record(plan, {HOOKS[0]: D}), acts=acts)
    scores = scores_of(
        np.stack([row, -row, row[::-1]]), tll.ContextualIndex(tmp_path / "b.h5", transform=transform, **SETTINGS)
    )
    assert scores.p.tolist() == [1] * 6
    assert scores.p_covariance.isna().all()


def test_one_prompt_and_more_neighbors_than_rows(words: tll.Bank, tmp_path: Path) -> None:
    plan = plan_of(1, length=4)
    rows = np.random.default_rng(2).standard_normal((plan.n_rows, D)).astype(np.float32)
    fill(tmp_path / "b.h5", plan, record=make_record(plan, {HOOKS[0]: D}), acts={HOOKS[0]: rows})
    scores = scores_of(rows[0], tll.ContextualIndex(tmp_path / "b.h5", **SETTINGS), top_k=50)
    assert scores.p.between(0, 1).all()


@pytest.mark.usefixtures("few_random_directions")
def test_directions_of_one_head_among_several(bank: tll.Bank, any_model: Any, texts: list[str], tmp_path: Path) -> None:
    name = "blocks.1.attn.hook_z"
    heads = tll.build_bank(any_model, texts, tmp_path / "heads.h5", hook_names=name, progress=False)
    index = tll.ContextualIndex(heads, [f"{name}[:]"], **SETTINGS)
    one = f"{name}[1]"
    vectors = torch.from_numpy(np.asarray(heads.vectors(one)[:3]).astype(np.float32))
    scores = scores_of(vectors, index, one, top_k=1)
    alone = scores_of(vectors, tll.ContextualIndex(heads, one, **SETTINGS), top_k=1)
    pd.testing.assert_frame_equal(scores, alone)


@pytest.mark.usefixtures("few_random_directions")
def test_the_table_of_scores(words: tll.Bank) -> None:
    index = tll.ContextualIndex(words, **SETTINGS)
    found = tll.decode_directions(word_centers()[:2], index, ids=[17, 4], calibrate=True)
    assert found.scores is not None
    assert list(found.scores.columns) == ["direction", "sign", "similarity", "z", "p_isotropic", "p_covariance", "p"]
    assert found.scores[["direction", "sign"]].to_numpy().tolist() == [[17, 1], [17, -1], [4, 1], [4, -1]]
    assert found.scores.p.between(1 / 101, 1).all()
    flipped = scores_of(-word_centers()[:2], index, ids=[17, 4])
    pd.testing.assert_series_equal(flipped.p[::2], found.scores.p[1::2], check_index=False)
    pd.testing.assert_frame_equal(found.scores, scores_of(word_centers()[:2], index, ids=[17, 4]))
    assert tll.decode_directions(word_centers()[:2], index, calibrate=False).scores is None
    assert len(scores_of(np.zeros((0, D), np.float32), index)) == 0
    again = pickle.loads(pickle.dumps(found))
    pd.testing.assert_frame_equal(again.scores, found.scores)
