"""Words among the nearest contexts, against a count over the texts of the rows found."""

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest

import tl_latentlens as tll

TEXT = "We fished in the river and sat on the grassy bank"
CHOSEN = ["river", "Money", "sit", "the"]
FORMS = {"river": r"rivers?", "Money": r"mon(?:ey|eys|ies)", "sit": r"sit(?:s|ting)?", "the": "the"}


@pytest.fixture(scope="module")
def index(any_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tll.ContextualIndex:
    texts = [
        "The RIVERS rose; money-lenders left.",
        "He was sitting by the driver on the bank",
        *tll.load_corpus("demo", limit=150),
    ]
    path = tmp_path_factory.mktemp("follow") / "words.h5"
    return tll.ContextualIndex(tll.build_bank(any_model, texts, path, hook_names=[1, 3], progress=False), device="cpu")


@pytest.fixture(scope="module")
def hooks(any_model: Any, index: tll.ContextualIndex) -> Any:
    hooks = tll.latentlens_hooks(index)
    any_model.run_with_hooks([TEXT, "A bank"], fwd_hooks=hooks)
    return hooks


def holds(index: tll.ContextualIndex, row: int, pattern: str) -> bool:
    """Whether a whole word that ends within eight tokens of a row is of a pattern."""
    at = index.row(row)
    ends = np.cumsum([len(token) for token in at.prompt_tokens])
    words = re.finditer(r"[^\W\d_]+", "".join(at.prompt_tokens))
    last_tokens = [(word[0], int(np.searchsorted(ends, word.end()))) for word in words]
    return any(re.fullmatch(pattern, word, re.IGNORECASE) and abs(end - at.position) <= 8 for word, end in last_tokens)


def test_shares_are_counts_over_the_nearest_contexts(any_model: Any, index: tll.ContextualIndex, hooks: Any) -> None:
    followed = hooks.follow_words(CHOSEN, top_k=20)
    _, cache = any_model.run_with_cache(TEXT, names_filter=list(index.hook_names))
    assert followed.lenses == ["contexts"]
    n_held = 0
    for pos in (4, 7, 11):
        frame = followed.at(pos).set_index(["hook_name", "followed"])
        for name in index.hook_names:
            rows = index.search(cache[name][0, pos], 20, query_hook_name=name, distinct=True).rows.tolist()
            for word in CHOSEN:
                held = [holds(index, row, FORMS[word]) for row in rows]
                line = frame.loc[name, word]
                assert line["context_share"] == pytest.approx(np.mean(held)), (pos, name, word)
                first = held.index(True) + 1 if any(held) else None
                rank = line["context_rank"]
                assert (None if pd.isna(rank) else rank) == first
                n_held += any(held)
    assert n_held > 5


def test_a_word_is_whole_in_any_case_and_inflection(index: tll.ContextualIndex) -> None:
    texts = [index.row(row).prompt_text for row in range(index.n_rows)]
    rows = np.array([row for row, text in enumerate(texts) if text.startswith(("The RIVERS", "He was sitting"))])
    of_first = np.array([texts[row].startswith("The RIVERS") for row in rows])
    found = index.contexts_hold(rows, ["river", "drivers", "SIT", "lender", "river"])
    assert found.shape == (len(rows), 5)
    assert found[of_first, 0].all(), "in capitals and the plural"
    assert not found[~of_first, 0].any(), "a driver is no river"
    assert found[~of_first, 1].any()
    assert found[~of_first, 2].any()
    assert not found[of_first, 2].any()
    np.testing.assert_array_equal(found[:, 0], found[:, 4])
    alone = index.contexts_hold(rows, ["river", "rivers"], language=None)
    assert not alone[of_first, 0].any()
    assert alone[of_first, 1].all()


def test_any_shape_of_rows_and_parts(index: tll.ContextualIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).integers(0, index.n_rows, (5, 7))
    whole = index.contexts_hold(rows, CHOSEN)
    monkeypatch.setattr("tl_latentlens.index.context_words._ROWS_AT_ONCE", 3)
    np.testing.assert_array_equal(index.contexts_hold(rows, CHOSEN), whole)
    assert index.contexts_hold(rows[0, 0], CHOSEN).tolist() == whole[0, 0].tolist()
    assert index.contexts_hold(rows[:0], CHOSEN).shape == (0, 7, 4)


def test_several_banks_of_one_model(
    any_model: Any, index: tll.ContextualIndex, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("second") / "b.h5"
    second = tll.build_bank(any_model, ["Her money lay in the drawer"], path, hook_names=[1, 3], progress=False)
    both = tll.ContextualIndex([index.banks[0], second], device="cpu")
    rows = np.arange(both.n_rows)
    expected = np.concatenate([index.contexts_hold(np.arange(index.n_rows), CHOSEN), np.zeros((second.n_rows, 4), bool)])
    expected[index.n_rows :, [1, 3]] = True
    np.testing.assert_array_equal(both.contexts_hold(rows, CHOSEN), expected)


def test_views(hooks: Any) -> None:
    followed = hooks.follow_words("river", top_k=10)
    assert "context_share" in str(followed)
    assert "nearest contexts" in followed._repr_html_()
    assert list(followed.to_dataframe().columns) == [
        "hook_name", "batch", "pos", "token", "followed", "context_share", "context_rank",
    ]  # fmt: skip
    pytest.importorskip("plotly")
    figure = followed.plot(7)
    assert figure.layout.annotations[0].text == "Contexts: share of the 10 nearest that hold the word"
    np.testing.assert_allclose(figure.data[0].y, followed.at(7)["context_share"])
    assert "holds the word" in followed.plot(7, by="rank").layout.annotations[0].text


@pytest.mark.parametrize("word", ["at", "two words", "money!", "x2y", "", "well-known"])
def test_what_is_no_word_is_refused(hooks: Any, word: str) -> None:
    with pytest.raises(tll.InvalidInputError, match="expected one word of 3 letters or more, without other signs"):
        hooks.follow_words(["river", word])


def test_other_refusals(hooks: Any, index: tll.ContextualIndex) -> None:
    with pytest.raises(tll.InvalidInputError, match="got no words"):
        hooks.follow_words([])
    with pytest.raises(tll.InvalidInputError, match="got top_k=0"):
        hooks.follow_words("river", top_k=0)
    with pytest.raises(tll.InvalidInputError, match="got language='klingon'"):
        hooks.follow_words("river", language="klingon")
    with pytest.raises(tll.InvalidInputError, match=f"the index has rows 0 to {index.n_rows - 1}"):
        index.contexts_hold(np.array([index.n_rows]), ["river"])
    with pytest.raises(tll.InvalidInputError, match="nothing was captured"):
        tll.latentlens_hooks(index).follow_words("river")
