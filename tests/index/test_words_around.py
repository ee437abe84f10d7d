"""The words around the nearest uses of a word, against the whole order of its uses."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import snowballstemmer
import torch
from scipy.stats import mannwhitneyu

import tl_latentlens as tll

NAME = "blocks.4.hook_resid_post"
FILLERS = "old new red tall cold warm quiet small wide dark green young early heavy plain".split()
STEMMER = snowballstemmer.stemmer("english")


def texts_of(frame: str) -> list[str]:
    return [frame.format(FILLERS[i % 15], FILLERS[(7 * i + 3) % 15]) for i in range(15)]


TEXTS = [
    *texts_of("The {} boat lay by the river bank in the {} water."),
    *texts_of("A {} clerk at the bank counted the {} money for a loan."),
    *texts_of("The {} dog and the {} cat slept in the garden all day."),
]


@pytest.fixture(scope="module")
def index(any_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tll.ContextualIndex:
    path = tmp_path_factory.mktemp("around") / "bank.h5"
    bank = tll.build_bank(any_model, TEXTS, path, hook_names=[NAME], max_rows_per_token=None, progress=False)
    return tll.ContextualIndex(bank, device="cpu")


def activation(model: Any, text: str, word: str) -> torch.Tensor:
    tokens = model.to_str_tokens(text)
    position = max(i for i, token in enumerate(tokens) if token.strip() == word)
    return model.run_with_cache(text)[1][NAME][0, position][None].detach()


def by_hand(index: tll.ContextualIndex, vector: torch.Tensor, word: str) -> set[str]:
    """The stems that hold, each use of the word looked up and ranked by itself."""
    rows = [i for i in range(index.n_rows) if index.row(i).token.strip() == word]
    search = index._searches[NAME]
    cosines = (search.centered_activations(vector) * search.centered_rows(torch.tensor(rows))).sum(-1).numpy()
    near = []
    for i in rows:
        tokens, position = index.row(i).prompt_tokens, index.row(i).position
        window = "".join(tokens[max(1, position - 8) : position + 9])
        before = "".join(tokens[1 : max(1, position - 8)])
        after = "".join(tokens[position + 9 :])
        window = re.sub(r"^\w+", "", window) if re.search(r"\w$", before) else window
        window = re.sub(r"\w+$", "", window) if re.match(r"\w", after) else window
        words = re.findall(r"[a-z]{3,}", window.lower())
        near.append(set(STEMMER.stemWords(words)) - {STEMMER.stemWord(word)})
    counts = {stem: n for stem, n in Counter(stem for stems in near for stem in stems).items() if 2 <= n <= len(rows) / 2}
    p_of, least = {}, {}
    for stem in counts:
        has = np.array([stem in stems for stems in near])
        p_of[stem] = mannwhitneyu(cosines[has], cosines[~has], alternative="greater", method="exact").pvalue
        in_front = np.arange(len(rows))
        n = counts[stem]
        least[stem] = mannwhitneyu(-in_front[:n], -in_front[n:], alternative="greater", method="exact").pvalue
    n_tests = next(k for k in range(1, len(counts) + 2) if sum(p <= 0.05 / k for p in least.values()) <= k)
    return {stem for stem, p in p_of.items() if p <= 0.05 / n_tests}


@pytest.mark.parametrize(
    ("text", "expected", "other"),
    [
        ("They sat on the bank of the river.", {"river", "boat"}, "money"),
        ("The clerk at the bank had a loan.", {"money"}, "river"),
    ],
)
def test_words_of_the_sense_stand_around(
    any_model: Any, index: tll.ContextualIndex, text: str, expected: set[str], other: str
) -> None:
    vector = activation(any_model, text, "bank")
    [words] = index.words_around(vector, NAME, ["bank"], top_k=50)
    assert set(STEMMER.stemWords(words)) == by_hand(index, vector, "bank")
    assert expected <= set(words)
    assert other not in words
    assert index.words_around(vector, 4, ["Banks"], top_k=2) == [words[:2]]


def test_nothing_stands_around_without_enough_uses_or_a_word(any_model: Any, index: tll.ContextualIndex) -> None:
    vector = activation(any_model, "She asked the bank for a loan.", "bank")
    words = ["zebra", None, "", "!", "tall"]
    assert index.words_around(vector.expand(5, -1), NAME, words) == [[]] * 5
    assert index.words_around(vector[:0], NAME, []) == []


def test_what_cannot_be_is_refused(any_model: Any, index: tll.ContextualIndex) -> None:
    vectors = torch.ones(2, 256)
    with pytest.raises(tll.InvalidInputError, match="got 1 words; expected"):
        index.words_around(vectors, NAME, ["bank"])
    with pytest.raises(tll.UnknownHookError, match=r"blocks\.1\.hook_resid_post"):
        index.words_around(vectors, 1, ["bank", None])
    with pytest.raises(tll.InvalidInputError, match="width"):
        index.words_around(torch.ones(2, 5), NAME, ["bank", "bank"])
    with pytest.raises(tll.InvalidInputError, match="language='elvish'"):
        index.words_around(vectors, NAME, ["bank", None], language="elvish")


def test_cells_have_them(any_model: Any, index: tll.ContextualIndex, tmp_path: Path) -> None:
    hooks = tll.latentlens_hooks(index, [NAME, "blocks.0.hook_resid_post"], model=any_model)
    any_model.run_with_hooks("They sat on the bank of the river.", fwd_hooks=hooks)
    result = hooks.result
    cells = {cell.token.strip(): cell for cell in result.cells() if cell.hook_name == NAME}
    assert "boat" in cells["bank"].around
    assert cells["."].around == []
    assert result.cell(0, -1).around is None, "the index does not hold layer 0"
    grid = result.grid(0)
    assert grid.around[1] == [result.cell(NAME, pos).around for pos in grid.positions]
    table = result.to_dataframe()
    of_bank = table[(table["hook_name"] == NAME) & (table["token"] == " bank")]
    assert of_bank["around"].iloc[0] == ", ".join(cells["bank"].around)


def test_uses_without_any_word_near_them(any_model: Any, tmp_path: Path) -> None:
    texts = [f"{word} bank" for word in "I a to at of in on by up we he my no so us it".split()]
    bank = tll.build_bank(any_model, texts, tmp_path / "b.h5", hook_names=[NAME], max_rows_per_token=None, progress=False)
    index = tll.ContextualIndex(bank, device="cpu")
    assert index.words_around(torch.randn(2, 256), NAME, ["bank", "bank"]) == [[], []]
