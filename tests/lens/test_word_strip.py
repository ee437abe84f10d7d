"""The other words of one token over all layers."""

from typing import Any

import pytest

import tl_latentlens as tll
from tl_latentlens.views.text import display_width

TEXTS = ["The bank was closed, so we sat on the grassy bank", "She deposited money"]


@pytest.fixture(scope="module")
def result(any_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tll.LensResult:
    texts = list(tll.load_corpus("demo", limit=120))
    bank = tll.build_bank(any_model, texts, tmp_path_factory.mktemp("strip") / "b.h5", hook_names="all", progress=False)
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank, device="cpu"), logit_lens=False)
    any_model.run_with_hooks(TEXTS, fwd_hooks=hooks)
    return hooks.result


def positions_of(result: tll.LensResult, token: str, batch: int = 0) -> list[int]:
    assert result.tokens is not None
    return [i for i, one in enumerate(result.tokens[batch]) if one == token]


def test_a_word_is_its_last_occurrence_at_the_token_that_ends_it(result: tll.LensResult) -> None:
    first, last = positions_of(result, " bank")
    assert result.word_strip("BANK").pos == result.word_strip(last).pos == last
    assert result.word_strip(first).pos == first
    assert result.word_strip("bank").word == "bank"
    ending = result.word_strip("deposited", batch=1)
    assert (ending.batch, ending.word) == (1, "deposited")
    assert "".join(result.tokens[1][: ending.pos + 1]).endswith("deposited")
    assert result.word_strip(ending.pos, batch=1).word == "deposited", "a token's word is the whole word"


def test_it_holds_the_words_of_each_layer(result: tll.LensResult) -> None:
    strip = result.word_strip("bank", n_words=3)
    for name in result.hook_names:
        cell = result.cell(name, strip.pos)
        assert strip.words[name] == [near.word for near in cell.words]
        assert strip.known[name] == cell.known
    covered = [i for line in strip.strip.lines for i in range(line.first, line.last + 1)]
    assert covered == list(range(len(result.hook_names)))
    assert strip.strip.lines[0].words == [], "the first layers have none"
    assert all(0 < len(line.words) <= 3 for line in strip.strip.lines[1:])


def test_tables_and_data(result: tll.LensResult) -> None:
    strip = result.word_strip("bank")
    shown, html, frame = str(strip), strip._repr_html_(), strip.to_dataframe()
    assert strip.strip.summary() in shown
    assert strip.strip.summary() in html
    for line in strip.strip.lines:
        assert strip.strip.label(line) in shown
        assert (", ".join(line.words) or "·") in html
    assert "grassy «bank»" in shown
    assert max(map(display_width, shown.splitlines())) <= 80
    assert list(frame.columns) == ["batch", "pos", "word", "hook_name", "line", "words", "known"]
    assert frame["hook_name"].tolist() == list(result.hook_names)
    assert frame["line"].is_monotonic_increasing
    assert frame["line"].nunique() == len(strip.strip.lines)


def test_refusals(result: tll.LensResult, any_model: Any) -> None:
    with pytest.raises(tll.InvalidInputError, match="no token of the text ends the word 'zebra'"):
        result.word_strip("zebra")
    with pytest.raises(tll.InvalidInputError, match="batch 0, position 0 was not decoded"):
        result.word_strip(0)
    with pytest.raises(tll.InvalidInputError, match="batch 7, position 3 was not decoded: the run had 2 texts"):
        result.word_strip(3, batch=7)
    with pytest.raises(tll.InvalidInputError, match="got batch 7; the run had 2 texts, from 0 on"):
        result.word_strip("bank", batch=7)
    with pytest.raises(tll.InvalidInputError, match="got n_words=0; expected 1 or more"):
        result.word_strip("bank", n_words=0)
    index = next(iter(result.found.values())).index
    hooks = tll.latentlens_hooks(index, words=0)
    any_model.run_with_hooks("The bank", fwd_hooks=hooks)
    with pytest.raises(tll.InvalidInputError, match=r"no other words; read them: latentlens_hooks\(index, words=8\)"):
        hooks.result.word_strip("bank")


def test_a_run_on_embeddings_is_asked_by_position(any_model: Any, result: tll.LensResult) -> None:
    index = next(iter(result.found.values())).index
    embeddings = any_model.W_E[any_model.to_tokens("The bank")]
    hook = tll.LatentLensHook(index, positions=[-1], logit_lens=False)
    hook(embeddings, hook=type("Point", (), {"name": index.hook_names[2]})())
    with pytest.raises(tll.InvalidInputError, match="got the word 'bank' of a run whose tokens are not known"):
        hook.result.word_strip("bank")
    assert hook.result.word_strip(-1).words[index.hook_names[2]]
