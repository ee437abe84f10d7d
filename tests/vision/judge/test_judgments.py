"""Shares and agreement, by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tl_latentlens.statistics.intervals import share_of
from tl_latentlens.vision.judge.judgments import cohens_kappa
from tl_latentlens.vision.judge.questions import RELATIONS

pytest.importorskip("openai")
pytest.importorskip("PIL")

from support.judge_endpoint import Stub, judge_at, questions_on_grays

import tl_latentlens as tll


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


def judged_by_two(first: np.ndarray, second: np.ndarray) -> pd.Series:
    """Their agreement over the four categories; answers are numbers of categories, [images, questions]."""
    images, positions = np.indices(first.shape)
    place = {"image": images.ravel(), "position": positions.ravel(), "lens": "a", "hook_name": "b", "shown": images.ravel()}
    tables = [pd.DataFrame({**place, "category": np.array(RELATIONS)[answers.ravel()]}) for answers in (first, second)]
    return tll.Judgments("m", tables[0], 0, 0).agreement(tables[1]).iloc[0]


@pytest.mark.parametrize("n_questions", [1, 4])
def test_the_interval_of_kappa_holds_it(n_questions: int) -> None:
    """The second judge repeats the first's answer in 90 % of cases, and guesses in the rest, so that kappa is 0.9."""
    rng, held = np.random.default_rng(n_questions), []
    for _ in range(300):
        shape = (30, n_questions)
        first, guess = rng.integers(0, 4, (2, *shape))
        found = judged_by_two(first, np.where(rng.random(shape) < 0.9, first, guess))
        held.append(found["low"] <= 0.9 <= found["high"])
    assert np.mean(held) > 0.92


def test_judges_who_agree_on_few_images_may_disagree_on_others() -> None:
    same = np.tile(np.arange(4), 5)[:, None]
    found = judged_by_two(same, same)
    assert found["kappa"] == found["high"] == 1
    assert 0.7 < found["low"] < 0.85  # 20 of 20 is an agreement of 0.84 at least


def test_agreement_with_people(stub: Stub, tmp_path: Path) -> None:
    stub.plan = lambda question, attempt: "talk" if question == "g5 on 5" else "answer"
    questions = questions_on_grays()
    judged = judge_at(stub.url, tmp_path / "a.jsonl").ask(questions, progress=False)
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
