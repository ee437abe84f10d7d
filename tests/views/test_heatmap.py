"""Heatmaps show every lens at every cell."""

import re
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pages import lens_cells

import tl_latentlens as tll
from tl_latentlens.views import heatmap
from tl_latentlens.views.known import format_share
from tl_latentlens.views.text import visible


def test_heatmap_shows_every_lens_at_every_cell(result: tll.LensResult) -> None:
    pytest.importorskip("plotly")
    figure, cells = result.plot(), lens_cells(result)
    heat = figure.data[0]
    assert list(heat.y) == [name.split(".")[1] for name in result.hook_names], "layers go upwards"
    assert [int(label.partition(":")[0]) for label in heat.x] == result.positions[:, 1].tolist()
    known = np.array([[cell.known for cell in line] for line in cells])
    np.testing.assert_allclose(heat.z, known, atol=1e-4)
    buttons = figure.layout.updatemenus[0].buttons
    assert [button.label for button in buttons] == ["other words", "uses", "around", "logit lens", "embedding lens"]
    for button, lens in zip(buttons[3:], ("logit_lens", "embedding_lens"), strict=True):
        drawn = button.args[0]
        read = [[getattr(cell, lens)[0] for cell in line] for line in cells]
        np.testing.assert_allclose(drawn["z"][0], [[score for _, score in line] for line in read], atol=1e-4)
        assert drawn["text"][0] == [[escape(visible(token), quote=False) for token, _ in line] for line in read]
        alone = result.plot(lens=lens).data[0]
        assert [list(line) for line in alone.text] == drawn["text"][0]
    uses = result.plot(lens="latentlens").data[0]
    for words, hovers, line in zip(uses.text, uses.customdata, cells, strict=True):
        for word, hover, cell in zip(words, hovers, line, strict=True):
            assert escape(cell.neighbors[0].token.strip(), quote=False) in word
            for near in cell.neighbors:
                assert f"{near.similarity:.3f}" in hover
            assert f"other words: {', '.join(near.word for near in cell.words) or '·'}" in hover
            assert f"logit lens: {escape(visible(cell.logit_lens[0][0]), quote=False)} {cell.logit_lens[0][1]:.0%}" in hover


@pytest.mark.parametrize("lens", ["words", "around"])
def test_cells_show_the_first_word_and_never_the_token_itself(calibrated: tll.LensResult, lens: str) -> None:
    pytest.importorskip("plotly")
    cells = lens_cells(calibrated)
    heat = calibrated.plot(lens=lens).data[0]
    shown = [[re.sub("<[^>]*>", "", word) for word in line] for line in heat.text]
    lists = [[[getattr(near, "word", near) for near in getattr(cell, lens)] for cell in line] for line in cells]
    assert shown == [[words[0] if words else "·" for words in line] for line in lists]
    own = [visible(cell.token).strip().lower() for cell in cells[0]]
    assert not any(word == token for line in shown for word, token in zip(line, own, strict=True))
    faint = [["opacity" in word for word in line] for line in heat.text]
    assert faint == [
        [not words or cell.known <= 0.05 for words, cell in zip(*pair, strict=True)] for pair in zip(lists, cells, strict=True)
    ]
    first = calibrated.plot().data[0].text
    assert lens == "around" or [list(line) for line in heat.text] == [list(line) for line in first]


def test_lenses_stand_one_above_the_other(result: tll.LensResult) -> None:
    pytest.importorskip("plotly")
    figure = result.plot_lenses()
    assert [part.colorbar.title.text for part in figure.data] == ["known"] * 3 + ["probability", "cosine"]
    assert [part.xaxis for part in figure.data] == ["x", "x2", "x3", "x4", "x5"]
    assert {axis.matches for axis in (figure.layout.xaxis, figure.layout.xaxis2)} == {"x5"}
    tops = [getattr(figure.layout, f"yaxis{i}").domain[1] for i in ("", 2, 3, 4, 5)]
    assert tops == sorted(tops, reverse=True)


def test_what_the_bank_does_not_know_is_faint(calibrated: tll.LensResult) -> None:
    pytest.importorskip("plotly")
    heat, cells = calibrated.plot(lens="latentlens").data[0], lens_cells(calibrated)
    known = np.array([[cell.known for cell in line] for line in cells])
    np.testing.assert_allclose(heat.z, known, atol=1e-4)
    faint = np.array([["opacity" in word for word in line] for line in heat.text])
    np.testing.assert_array_equal(faint, known <= 0.05)
    assert 0 < faint.sum() < faint.size
    assert (heat.colorbar.title.text, heat.zmin, heat.zmax) == ("known", 0, 1)
    for hovers, line in zip(heat.customdata, cells, strict=True):
        for hover, cell in zip(hovers, line, strict=True):
            assert f"known {escape(format_share(cell.known))}" in hover
            assert ("the bank does not know this token" in hover) == (cell.known <= 0.05)
            assert ("of the token's other uses" in hover) == (cell.use_chance is not None)
    assert any(cell.use_chance is not None for line in cells for cell in line)


def test_colors_are_cosines_where_not_every_hook_name_is_in_the_bank(any_model: Any, index: tll.ContextualIndex) -> None:
    pytest.importorskip("plotly")
    hooks = tll.latentlens_hooks(index, [1, "blocks.1.hook_mlp_out"], calibrate=True, model=any_model)
    any_model.run_with_hooks("A bank by the river", fwd_hooks=hooks)
    heat = hooks.result.plot().data[0]
    assert heat.colorbar.title.text == "cosine"
    assert ["known" in line[0] for line in heat.customdata] == [False, True], "hook names in forward order"


def test_large_heatmaps_leave_words_to_the_hover_and_say_so(result: tll.LensResult, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly")
    monkeypatch.setattr(heatmap, "_MAX_CELLS_WITH_WORDS", 10)
    monkeypatch.setattr(heatmap, "_MAX_HOVER_NEIGHBORS", 10)
    figure = result.plot()
    assert figure.data[0].text is None
    assert "words are in the hover only" in figure.layout.title.text
    nearest = result.cell(result.hook_names[0], int(result.positions[0, 1])).neighbors
    hover = figure.data[0].customdata[0][0].replace("<br>┄", "")
    assert f"{nearest[0].similarity:.3f}" in hover
    assert hover.count("<br>") == 6, "known, two lines of words, the nearest neighbor alone, and a line a lens"
    hovers = [part.customdata[0][0] for part in result.plot_lenses().data]
    assert ["other words: " in hover for hover in hovers] == [True, *[False] * 4]
    assert ["logit lens: " in hover for hover in hovers] == [False, False, False, True, False]


def test_plot_refusals(result: tll.LensResult, any_model: Any, index: tll.ContextualIndex, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    with pytest.raises(tll.InvalidInputError, match=r"got lens='tuned_lens'; this result has \['words', 'latentlens', "):
        result.plot(lens="tuned_lens")
    with pytest.raises(tll.InvalidInputError, match=r"nothing was decoded of batch 3; decoded: \[0\]"):
        result.plot(3)
    with pytest.raises(tll.InvalidInputError, match=r"there is no folder .*nowhere; expected the name of a file"):
        result.to_html(tmp_path / "nowhere" / "page.html")
    with pytest.raises(tll.InvalidInputError, match="it is a folder"):
        result.to_html(tmp_path)
    hooks = tll.latentlens_hooks(index, logit_lens=False, words=0)
    any_model.run_with_hooks("A boat.", fwd_hooks=hooks)
    with pytest.raises(tll.InvalidInputError, match=r"got lens='words'; this result has \['latentlens'\]"):
        hooks.result.plot(lens="words")
    assert not hooks.result.plot().layout.updatemenus, "nothing to switch to"
    assert "logit lens" not in hooks.result._repr_html_()
