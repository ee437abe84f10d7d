"""Heatmaps show every lens at every cell."""

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
    np.testing.assert_allclose(heat.z, [[cell.neighbors[0].similarity for cell in line] for line in cells], atol=1e-4)
    buttons = figure.layout.updatemenus[0].buttons
    assert [button.label for button in buttons] == ["LatentLens", "logit lens", "embedding lens"]
    for button, lens in zip(buttons[1:], ("logit_lens", "embedding_lens"), strict=True):
        drawn = button.args[0]
        read = [[getattr(cell, lens)[0] for cell in line] for line in cells]
        np.testing.assert_allclose(drawn["z"][0], [[score for _, score in line] for line in read], atol=1e-4)
        assert drawn["text"][0] == [[escape(visible(token), quote=False) for token, _ in line] for line in read]
        alone = result.plot(lens=lens).data[0]
        assert [list(line) for line in alone.text] == drawn["text"][0]
    for words, hovers, line in zip(heat.text, heat.customdata, cells, strict=True):
        for word, hover, cell in zip(words, hovers, line, strict=True):
            assert escape(cell.neighbors[0].token.strip(), quote=False) in word
            for near in cell.neighbors:
                assert f"{near.similarity:.3f}" in hover
            assert f"logit lens: {escape(visible(cell.logit_lens[0][0]), quote=False)} {cell.logit_lens[0][1]:.0%}" in hover


def test_lenses_stand_one_above_the_other(result: tll.LensResult) -> None:
    pytest.importorskip("plotly")
    figure = result.plot_lenses()
    assert [part.colorbar.title.text for part in figure.data] == ["cosine", "probability", "cosine"]
    assert [part.xaxis for part in figure.data] == ["x", "x2", "x3"]
    assert {axis.matches for axis in (figure.layout.xaxis, figure.layout.xaxis2)} == {"x3"}
    tops = [axis.domain[1] for axis in (figure.layout.yaxis, figure.layout.yaxis2, figure.layout.yaxis3)]
    assert tops == sorted(tops, reverse=True)


def test_what_the_bank_does_not_know_is_faint(calibrated: tll.LensResult) -> None:
    pytest.importorskip("plotly")
    heat, cells = calibrated.plot().data[0], lens_cells(calibrated)
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
    hover = figure.data[0].customdata[0][0]
    assert f"{nearest[0].similarity:.3f}" in hover
    assert hover.count("<br>") == 3, "the nearest neighbor alone, and a line a lens"
    first, second, _ = (part.customdata[0][0] for part in result.plot_lenses().data)
    assert ("logit lens: " in first, "logit lens: " in second) == (False, True)


def test_plot_refusals(result: tll.LensResult, any_model: Any, index: tll.ContextualIndex, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    with pytest.raises(tll.InvalidInputError, match=r"got lens='tuned_lens'; this result has \['latentlens', 'logit_lens', "):
        result.plot(lens="tuned_lens")
    with pytest.raises(tll.InvalidInputError, match=r"nothing was decoded of batch 3; decoded: \[0\]"):
        result.plot(3)
    with pytest.raises(tll.InvalidInputError, match=r"there is no folder .*nowhere; expected the name of a file"):
        result.to_html(tmp_path / "nowhere" / "page.html")
    with pytest.raises(tll.InvalidInputError, match="it is a folder"):
        result.to_html(tmp_path)
    hooks = tll.latentlens_hooks(index, logit_lens=False)
    any_model.run_with_hooks("A boat.", fwd_hooks=hooks)
    assert not hooks.result.plot().layout.updatemenus, "nothing to switch to"
    assert "logit lens" not in hooks.result._repr_html_()
