"""Terminal table, HTML table and heatmap show what was read, and escape what they show."""

import io
import json
import re
import shutil
import subprocess
from html import escape, unescape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

import tl_latentlens as tll
from tl_latentlens.evaluation.evaluate import Evaluation
from tl_latentlens.index.transforms import TRANSFORMS
from tl_latentlens.statistics.intervals import Measure
from tl_latentlens.views.terminal import evaluation_text, feature_table, lens_table, refusals
from tl_latentlens.views.text import clip, columns_of, short_hook_name, visible, word_around


@pytest.fixture(scope="module")
def result(any_model: Any, index: tll.ContextualIndex) -> tll.LensResult:
    hooks = tll.latentlens_hooks(index, embedding_lens=True)
    any_model.run_with_hooks("She put the <i>money</i> in the bank before noon.", fwd_hooks=hooks)
    return hooks.result


@pytest.mark.parametrize("width", [80, 100, 160])
def test_table_fits_and_marks_the_token(result: tll.LensResult, width: int) -> None:
    assert result.tokens is not None
    pos = result.tokens[0].index(" bank")
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(lens_table(result, neighbors=2, positions=[(0, pos)], width=width))
    lines = console.export_text().splitlines()
    assert all(len(line) <= width for line in lines)
    shown = "\n".join(lines)
    assert "in the «bank» before noon" in shown
    assert "logit lens" in shown
    assert "embedding lens" in shown
    assert shown.count("resid_post") >= len(result.hook_names)


@pytest.mark.parametrize("width", [80, 160])
def test_feature_table_shows_what_tells_features_apart(bank: tll.Bank, width: int) -> None:
    sae = tll.load_sae("demo")
    index = tll.ContextualIndex(bank, sae.hook_name, device="cpu", transform="center")
    features = tll.label_features(sae, index, range(60), top_k=4, progress=False)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(feature_table(features, 60, width=width))
    lines = console.export_text().splitlines()
    assert all(len(line) <= width for line in lines)
    heading = next(line.split() for line in lines if "feature" in line)
    assert heading[:5] == (["feature", "density", "same", "token", "cos"] if width == 80 else heading[:5])
    assert ("auroc" in heading) == (width == 160)
    numbers = [int(line.split()[0]) for line in lines if line.split() and line.split()[0].isdigit()]
    table = features.table.set_index("feature").loc[numbers]
    assert sorted(numbers) == list(range(60))
    refused = (table["label"] == "").to_numpy()
    assert (np.diff(refused.astype(int)) >= 0).all()
    assert (np.diff(table["similarity"][~refused]) <= 0).all()


def test_refusals_are_counted_by_reason() -> None:
    why = ["", "too far (p = 0.5)", "too far (p = 0.012)", "never active", ""]
    table = pd.DataFrame({"label": ["a", "", "", "", "b"], "why_not": why})
    assert refusals(table) == "5 features, 2 labelled; 2: too far; 1: never active"


def cells_of(result: tll.LensResult, batch: int = 0) -> list[list[Any]]:
    """[layer][pos], found one by one."""
    positions = [pos for b, pos in result.positions.tolist() if b == batch]
    return [[result.cell(name, pos, batch) for pos in positions] for name in result.hook_names]


def test_heatmap_shows_every_lens_at_every_cell(result: tll.LensResult) -> None:
    pytest.importorskip("plotly")
    figure, cells = result.plot(), cells_of(result)
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


def test_what_chance_explains_is_faint(any_model: Any, index: tll.ContextualIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly")
    monkeypatch.setattr("tl_latentlens.views.sheet.CHANCE", 0.03)  # the bank is too small for chances below 0.01
    hooks = tll.latentlens_hooks(index, calibrate=True)
    any_model.run_with_hooks("He rowed the boat to the bank; quantum jazz", fwd_hooks=hooks)
    heat = hooks.result.plot().data[0]
    chances = np.array([[cell.neighbors[0].chance for cell in line] for line in cells_of(hooks.result)])
    np.testing.assert_allclose(heat.z, -np.log10(chances), atol=1e-4)
    faint = np.array([["opacity" in word for word in line] for line in heat.text])
    np.testing.assert_array_equal(faint, chances >= 0.03)
    assert 0 < faint.sum() < faint.size
    assert heat.colorbar.title.text == "−log₁₀ p"


def test_large_heatmaps_leave_words_to_the_hover_and_say_so(result: tll.LensResult, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly")
    from tl_latentlens.views import heatmap

    monkeypatch.setattr(heatmap, "_WORDS", 10)
    monkeypatch.setattr(heatmap, "_LINES", 10)
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


def page_data(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8").partition('id="data">')[2].partition("</script>")[0])


def test_page_holds_every_reading(any_model: Any, index: tll.ContextualIndex, tmp_path: Path) -> None:
    hooks = tll.latentlens_hooks(index, top_k=3, embedding_lens=True, calibrate=True)
    any_model.run_with_hooks(["He rowed the boat to the bank", "A small red ball"], fwd_hooks=hooks)
    result, path = hooks.result, tmp_path / "page.html"
    assert result.to_html(str(path)) == path
    data = page_data(path)
    assert data["headings"] == [name.split(".")[1] for name in result.hook_names]
    for batch, text in enumerate(data["texts"]):
        for i, line in enumerate(cells_of(result, batch)):
            for j, cell in enumerate(line):
                found = np.array(text["latentlens"][i][j]).reshape(-1, 4)
                for (context, hook, cosine, chance), near in zip(found, cell.neighbors, strict=True):
                    before, token, after = data["contexts"][int(context)][:3]
                    assert (before, token, after) == clip(near.context, near.token, 160)
                    assert data["hooks"][int(hook)] == short_hook_name(near.hook_name)
                    assert (cosine, chance) == pytest.approx((near.similarity, near.chance), abs=1e-4)
                for lens in ("logit_lens", "embedding_lens"):
                    read = np.array(text[lens][i][j]).reshape(-1, 2)
                    assert [data["strings"][int(k)] for k in read[:, 0]] == [visible(t) for t, _ in getattr(cell, lens)]
                    assert read[:, 1] == pytest.approx([score for _, score in getattr(cell, lens)], abs=1e-4)
    assert not re.search(r"https?:|src=|@import|url\(", path.read_text()), "nothing is asked of a network"


MARKUP = "<script>document.title = 'ran'</script><img src=x onerror=\"document.title='ran'\">"
HOSTILE = f"The bank {MARKUP} \x1b[31m</script><!-- $x$ &amp; end"


@pytest.fixture(scope="module")
def hostile(any_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tll.LensResult:
    """A text with markup and escape codes, read from a bank of itself."""
    bank = tll.build_bank(any_model, [HOSTILE, "A boat."], tmp_path_factory.mktemp("hostile") / "h.h5", progress=False)
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank, device="cpu"), embedding_lens=True)
    any_model.run_with_hooks(HOSTILE, fwd_hooks=hooks)
    return hooks.result


def test_terminal_shows_escape_codes_as_signs(hostile: tll.LensResult) -> None:
    found = next(iter(hostile.found.values()))
    directions = tll.decode_directions(found.index.banks[0].vectors(found.index.hook_names[0])[:20], found.index, top_k=3)
    for shown in (str(hostile), str(directions)):
        assert "\x1b" not in shown
        assert "␛[31m" in shown


def test_notebooks_and_figures_show_markup_as_text(hostile: tll.LensResult, tmp_path: Path) -> None:
    found = next(iter(hostile.found.values()))
    bank = found.index.banks[0]
    directions = tll.decode_directions(bank.vectors(found.index.hook_names[0])[:20], found.index, top_k=3)
    for shown in (hostile, found, bank, found.index, directions):
        html = shown._repr_html_()
        assert not re.search(r"<(script|img|!--)|\x1b", html)
        assert shown is found.index or "&lt;" in html
        assert not re.search(r"background(-color)?: *(#|white|black)|color: *(#|white|black)", html), "light and dark"
    data = hostile.to_html(tmp_path / "page.html").read_text().partition('id="data">')[2].partition("</script>")[0]
    assert "<" not in data
    assert "\x1b" not in data
    if find_spec("plotly"):
        heat = hostile.plot().data[0]
        shown = " ".join(
            [*heat.x, *(word for line in heat.text for word in line), *(h for line in heat.customdata for h in line)]
        )
        assert set(re.findall(r"<[^>]*>", shown)) <= {"<b>", "</b>", "<i>", "</i>", "<br>"}
        assert "$" not in shown, "no TeX"


def test_the_page_works_in_a_browser(hostile: tll.LensResult, tmp_path: Path) -> None:
    """Nothing of a text runs; cells, lens switch and clicks do."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium")
    path = hostile.to_html(tmp_path / "page.html")
    clicks = "document.querySelectorAll('nav button')[1].click(); document.querySelectorAll('td')[2].click()"
    path.write_text(path.read_text().replace("</body>", f"<script>{clicks}</script></body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    dom = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    dom = re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
    assert "<title>tl-latentlens</title>" in dom
    assert "<img" not in dom
    cells = [unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", dom)]
    top = hostile.hook_names[-1]
    places = [pos for _, pos in hostile.positions.tolist()]
    assert len(cells) == len(hostile.hook_names) * len(places)
    assert cells[: len(places)] == [visible(hostile.cell(top, pos).logit_lens[0][0]) for pos in places]
    chosen = hostile.cell(top, places[2])
    panel = unescape(re.sub(r"<[^>]*>", "", re.sub(r"&nbsp;", " ", dom.partition('id="cell"')[2])))
    for near in chosen.neighbors:
        context = hostile.found[top].index.row(near.row).context(160)
        assert "".join(clip(context, near.token, 160)) in panel


def test_notebook_tables(result: tll.LensResult, index: tll.ContextualIndex, bank: tll.Bank) -> None:
    html = result._repr_html_()
    assert html.count("<details") == 1
    assert "logit lens" in html
    layers = re.findall(r"text-align: right'>(\d+)</th>", html)
    assert layers == [name.split(".")[1] for name in reversed(result.hook_names)]
    assert f"{bank.n_rows:,} contextual tokens" in bank._repr_html_()
    for name in index.hook_names:
        assert name in index._repr_html_()
        assert name in bank._repr_html_()
    vectors = np.tile(np.asarray(bank.vectors(index.hook_names[0])[:40], np.float32), (2, 1))
    assert "the first 60 of 80" in index.search(vectors)._repr_html_()
    assert index.search(vectors[0])._repr_html_().count("1 query") == 1
    sae = tll.load_sae("demo")
    centered = tll.ContextualIndex(bank, sae.hook_name, device="cpu", transform="center")
    features = tll.label_features(sae, centered, range(8), top_k=3, progress=False)
    assert "8 features" in features._repr_html_()
    assert all(escape(label) in features._repr_html_() for label in features.table["label"])


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("blocks.3.hook_resid_post", "3 resid_post"),
        ("blocks.11.attn.hook_z", "11 attn.z"),
        ("hook_embed", "hook_embed"),
    ],
)
def test_short_hook_name(name: str, short: str) -> None:
    assert short_hook_name(name) == short


@pytest.mark.parametrize(
    ("token", "shown"),
    [(" a", " a"), ("a", "a"), ("  a", "␣ a"), (" ", "␣"), ("\n", "↵"), ("\x1b[0m\x9b\u202e", "␛[0m��"), (None, "?")],
)
def test_visible(token: str | None, shown: str) -> None:
    assert visible(token) == shown


def test_clip_keeps_the_token_and_the_budget() -> None:
    context = "…" + "left " * 30 + "«token»" + " right" * 30
    for width in (30, 60, 120):
        before, token, after = clip(context, " token", width)
        assert token == "token"
        assert len(before) + len(token) + len(after) <= width + 1
        assert len(before) > len(after)
    quoted = "said «no» to the «token» there"
    assert clip(quoted, "token", 80) == ("said «no» to the ", "token", " there")
    assert clip("short «token» text", "token", 80) == ("short ", "token", " text")
    assert clip("end «. » next", ".\n", 80) == ("end ", ".", " next"), "a context shows newlines as spaces"
    assert clip("end « » next", "\n", 80) == ("end ", "↵", " next")
    assert clip("\x1b[2J «a» \r", "a", 80) == ("␛[2J ", "a", " ␍")
    for width in range(14, 60):
        wide = "".join(clip("日本語と" * 20 + "«東京»" + "の天気a" * 20, "東京", width))
        assert width - 4 <= columns_of(wide) <= width, "a wide character takes two columns, and none is halved"


@pytest.mark.parametrize("width", [80, 200])
def test_wide_characters_stand_in_their_columns(any_model, tmp_path: Path, width: int) -> None:
    texts = ["日本語の天気はとても良いです bank 日本語の天気", "The river bank", "東京 bank and the 東京 tower stand"]
    built = tll.build_bank(any_model, texts, tmp_path / "wide.h5", hook_names="blocks.2.hook_resid_post", progress=False)
    hooks = tll.latentlens_hooks(tll.ContextualIndex(built, device="cpu"), top_k=3)
    any_model.run_with_hooks(texts, fwd_hooks=hooks)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(lens_table(hooks.result, width=width))
    lines = console.export_text().splitlines()
    assert all(columns_of(line) <= width for line in lines)
    ends = [columns_of(line.partition("%")[0]) for line in lines if "%" in line]
    assert len(ends) == 3 * len(hooks.result.positions)
    for start in range(0, len(ends), 3):
        assert len(set(ends[start : start + 3])) == 1, "the logit lens begins in one column"


def test_measures_of_many_hook_names_stand_below_one_another() -> None:
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(48)]
    rng = np.random.default_rng(0)
    values = {("raw", name): rng.random(20) for name in names} | {("layer 0", ""): rng.random(20)}
    shown = evaluation_text(Evaluation([Measure("topic", values, "tokens")], ("raw",)), width=80).splitlines()
    assert all(len(line) <= 80 for line in shown)
    headings = [line.split()[1:-1] for line in shown if "reader" in line]
    assert [int(layer) for line in headings for layer in line] == list(range(48))
    means = [float(mean) for line in shown if line.split()[:1] == ["raw"] for mean in line.split()[1:-1]]
    np.testing.assert_allclose(means, [values["raw", name].mean() for name in names], atol=6e-4)


@pytest.mark.parametrize("width", [80, 200])
def test_gains_show_every_transform_by_name(width: int) -> None:
    name = "blocks.3.hook_resid_post"
    measure = Measure("KL of neighbor 1 on later tokens (nats)", {(one, name): np.arange(9.0) for one in TRANSFORMS}, "tokens")
    shown = evaluation_text(Evaluation([measure], tuple(TRANSFORMS)), width=width)
    assert all(len(line) <= width for line in shown.splitlines())
    heading = next(line for line in shown.splitlines() if line.split()[:1] == ["measure"])
    assert heading.split()[1:] == [one for one in TRANSFORMS if one != "raw"]


@pytest.mark.parametrize(
    ("before", "token", "after", "expected"),
    [
        ("they were go", "ing", " home", ("go", "")),
        ("a ", "dragon", "flies' wing", ("", "flies")),
        ("he don", "'t", " know", ("", "")),
        ("x" * 13, "ing", " home", ("", "")),
        ("中文", "字", "符", ("", "")),
        ("in 19", "84", " he", ("19", "")),
    ],
)
def test_a_part_of_a_word_is_completed(before: str, token: str, after: str, expected: tuple[str, str]) -> None:
    assert word_around(before, token, after) == expected


def test_printed_results_are_tables(result: tll.LensResult, index: tll.ContextualIndex) -> None:
    shown = str(result)
    assert "pos 1 " in shown
    assert "neighbors" in shown
    assert "similarity" in str(tll.decode_directions(index.banks[0].vectors(index.hook_names[0])[:2], index, top_k=2))


def test_printed_results_are_plain_text_in_a_notebook(result: tll.LensResult, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = str(result)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert str(result) == expected
