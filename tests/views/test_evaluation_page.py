"""The page of an evaluation has every figure, draws it where it is, and can be read on a phone and in the dark."""

import math
import re
from html import escape, unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.pages import BROWSER_ARGUMENTS, MARKUP

from tl_latentlens.evaluation.evaluate import Evaluation
from tl_latentlens.statistics.measures import Measure, ReaderKey
from tl_latentlens.views.chart import ChartLine, line_chart
from tl_latentlens.views.measures import figure_text, hook_names_of, measure_lines

LAYERS = [f"blocks.{layer}.hook_resid_post" for layer in range(4)]
NULLS = ["random", "same token", f"odd {MARKUP}"]


def evaluation(hook_names: list[str], transforms: tuple[str, ...] = ("raw", "center"), n_units: int = 20) -> Evaluation:
    """Two measures, of shares and of amounts; a lens that does not read everywhere, and readers that need no hook name."""
    rng = np.random.default_rng(0)
    keys = [ReaderKey(reader) for reader in NULLS]
    keys += [ReaderKey("logit lens", name) for name in hook_names[::2]]
    keys += [ReaderKey(transform, name) for transform in transforms for name in hook_names]
    shares = {key: rng.integers(0, 2, n_units).astype(float) for key in keys}
    amounts = {key: rng.lognormal(-3, 1, n_units) for key in keys}
    return Evaluation(
        [
            Measure("sense accuracy", shares, "senses", kind="share", about="What it is."),
            Measure("KL (nats)", amounts, "tokens", lower_is_better=True, kind="geometric mean"),
        ],
        transforms,
    )


def shown_tables(page: str) -> list[dict[str, list[str]]]:
    """Of each table: heading of a line → the means in it."""
    tables = []
    for table in re.findall(r'<table class="figures[^"]*">(.*?)</table>', page):
        rows = re.findall(r'<tr><th scope="row"[^>]*>(.*?)</th>(.*?)</tr>', table)
        cells = {unescape(head): re.findall(r"<td>(.*?)</td>", line) for head, line in rows}
        tables.append({head: [re.sub(r"<small>.*|</?b>", "", cell) for cell in line] for head, line in cells.items()})
    return tables


@pytest.mark.parametrize(
    "hook_names",
    [LAYERS, LAYERS[2:3], ["hook_embed", "blocks.1.attn.hook_z[0]"], [f"blocks.{i}.hook_resid_post" for i in range(48)]],
    ids=["layers", "one", "mixed", "many"],
)
def test_the_page_has_every_figure(hook_names: list[str], tmp_path: Path) -> None:
    found = evaluation(hook_names)
    path = found.to_html(tmp_path / "e.html")
    table: Any = found.to_dataframe()
    page = path.read_text(encoding="utf-8")
    shown = shown_tables(page)
    assert len(shown) == 3, "two measures, and the gains"
    for measure, lines in zip(found.measures, shown[:2], strict=True):
        own = table[table["measure"] == measure.name]
        assert list(lines) == [name.replace("\x1b", "␛") for name in dict.fromkeys(own["reader"])]
        for reader, cells in lines.items():
            means = own[own["reader"] == reader].set_index("hook_name")["mean"]
            expected = [means.get("", means.get(name, math.nan)) for name in hook_names]
            assert cells == [figure_text(value, measure.kind) for value in expected]
    assert "What it is." in page
    assert "<script>document" not in page
    assert not re.search(r"(?:src|href)=|@import|url\(|https?://", page.replace(escape(MARKUP), ""))
    assert path.stat().st_size < 500_000


def test_the_best_transform_is_bold_at_each_hook() -> None:
    for measure in evaluation(LAYERS).measures:
        panel = Evaluation([measure], ("raw", "center"))._panels()[0]
        lines = {line.reader: line for line in measure_lines(panel, ("raw", "center"))}
        for name in hook_names_of(panel):
            raw, center = (lines[reader].figures[name] for reader in ("raw", "center"))
            is_raw_best = raw.mean <= center.mean if measure.lower_is_better else raw.mean >= center.mean
            assert raw.is_best is is_raw_best
            assert not any(lines[reader].figures[name].is_best for reader in NULLS)


@pytest.mark.parametrize(("own", "other", "said"), [(0.8, 0.3, "Furthest ahead"), (0.3, 0.8, "Nowhere ahead; nearest")])
@pytest.mark.parametrize("kind", ["share", "geometric mean"])
def test_a_sentence_says_whether_a_transform_is_ahead(tmp_path: Path, own: float, other: float, said: str, kind: Any) -> None:
    lower = kind == "geometric mean"
    first, second = (np.full(9, 1 - value if lower else value) for value in (own, other))
    values = {
        ReaderKey("random"): second,
        ReaderKey("raw", LAYERS[0]): first,
        ReaderKey("raw", LAYERS[1]): (first + second) / 2,
    }
    measure = Measure("m", values, "tokens", lower_is_better=lower, kind=kind)
    page = Evaluation([measure], ("raw",)).to_html(tmp_path / "e.html").read_text(encoding="utf-8")
    sentence = re.findall('<p class="best">(.*?)</p>', page)[0]
    assert sentence.startswith(f"{said} at layer {0 if own > other else 1}: raw <b>")
    assert "the best of the others there, random, " in sentence


def test_hook_names_keep_their_order_where_a_lens_reads_some_of_them() -> None:
    panel = evaluation(LAYERS)._panels()[0]
    assert panel.table["hook_name"].tolist()[len(NULLS) : len(NULLS) + 2] == LAYERS[::2], "the lens comes first"
    assert hook_names_of(panel) == LAYERS
    pytest.importorskip("plotly")
    figure = evaluation(LAYERS).plot()
    assert list(figure.layout.xaxis.categoryarray) == list("0123")
    assert {trace.name: list(trace.x) for trace in figure.data}["logit lens"] == ["0", "2"]


def line(name: str, means: list[float], *, is_level: bool = False) -> ChartLine:
    spread = [0.9 * mean for mean in means], [1.1 * mean for mean in means]
    return ChartLine(name, "red", False, means, *spread, [f"{name} {mean}" for mean in means], is_level)


def drawn_heights(svg: str) -> list[float]:
    return [float(y) for y in re.findall(r'<circle cx="[^"]+" cy="([^"]+)"', svg)]


def axis_of(svg: str) -> tuple[list[float], list[float]]:
    """The figures and heights of the ticks."""
    grid = re.search(r'<g class="grid">(.*?)</g>', svg)
    assert grid is not None
    ticks = re.findall(r"M\S+ (\S+)H.*?<text[^>]*>([^<]+)<", grid[1])
    return [float(text) for _, text in ticks], [float(y) for y, _ in ticks]


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize("scale", [1e-6, 0.003, 0.4, 1.0, 70.0, 3e5])
def test_points_stand_at_their_figures(scale: float, is_log: bool) -> None:
    means = [scale * share for share in (0.05, 0.31, 0.74, 1.0)]
    svg = line_chart([line("a", means)], list("0123"), title="t", axis="layer", is_log=is_log)
    ticks, heights = axis_of(svg)
    assert len(ticks) >= 2
    assert heights == sorted(heights, reverse=True)
    assert ticks[0] <= min(means) * 0.9 <= max(means) * 1.1 <= ticks[-1] * (1 + 1e-9)
    figures, ends = (np.log(means), np.log(ticks)) if is_log else (means, ticks)
    np.testing.assert_allclose(drawn_heights(svg), np.interp(figures, ends, heights), atol=0.11)


def test_a_line_goes_on_where_it_has_no_figure() -> None:
    gap = line_chart([line("a", [0.2, 0.3, math.nan, 0.4, math.nan, 0.1])], list("012345"), title="t", axis="layer")
    [points] = re.findall('<polyline points="([^"]+)"', gap)
    assert len(points.split()) == gap.count("<circle") == 4
    zero = line_chart([line("a", [0.2, 0.01, 0.0, 3.0])], list("0123"), title="t", axis="layer", is_log=True)
    assert zero.count("<circle") == 3
    for means in ([0.0, 0.0], [math.nan, math.nan], [-0.5, 0.25]):
        svg = line_chart([line("a", means)], list("01"), title="t", axis="layer", is_log=min(means) == 0)
        assert "nan" not in svg.replace("a nan", "")


@pytest.mark.parametrize("n", [1, 4, 12, 30])
def test_names_of_lines_do_not_cover_each_other(n: int) -> None:
    svg = line_chart([line(f"reader {i}", [0.5, 0.5 + i / 1e4]) for i in range(n)], ["0", "1"], title="t", axis="layer")
    ys = sorted(float(y) for y in re.findall(r'<text x="[^"]+" y="([^"]+)">reader', svg))
    assert len(ys) == n
    assert all(after - before > 12.9 for before, after in pairwise(ys))
    height = float(re.findall(r'viewBox="0 0 400 (\d+)"', svg)[0])
    assert 0 < ys[0] <= ys[-1] < height


def test_a_browser_shows_the_page_on_a_phone_and_in_the_dark(browser: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = evaluation(LAYERS, ("raw", "center", "standardize", "remove_top", "csls", "center_writing")).to_html(
        tmp_path / "e.html"
    )
    said: list[str] = []
    asked: set[str] = set()
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=BROWSER_ARGUMENTS)
        for scheme in ("light", "dark"):
            tab: Any = chromium.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.on("request", lambda request: asked.add(request.url.partition(":")[0]))
            tab.goto(path.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") == 390
            boxes = tab.evaluate(
                "[...document.querySelectorAll('.chart text')].map(t => { const b = t.getBBox(); return [b.x, b.width]; })"
            )
            assert all(x >= 0 and x + width <= 400 for x, width in boxes)
            letters = tab.evaluate("document.querySelector('.chart text').getBoundingClientRect().height")
            assert letters > 9, "letters that can be read"
            box = tab.locator(".scrolls").first
            assert box.get_attribute("data-more-right") is not None
            box.evaluate("box => { box.scrollLeft = box.scrollWidth; }")
            playwright.expect(box).not_to_have_attribute("data-more-right", "")
            playwright.expect(box).to_have_attribute("data-more-left", "")
            page, ink = (
                np.mean([int(part) for part in re.findall(r"\d+", tab.evaluate(f"getComputedStyle(document.body).{name}"))[:3]])
                for name in ("backgroundColor", "color")
            )
            assert bool(page > ink) is (scheme == "light")
        assert tab.title() == "tl-latentlens: evaluation"
        chromium.close()
    assert said == []
    assert asked == {"file"}


def test_labels_of_an_sae_are_a_table_for_each_transform(tmp_path: Path) -> None:
    columns = {"figure": ["labelled"], "mean": [0.75], "low": [0.7], "high": [0.8], "null": [math.nan], "features": [1523]}
    labels = pd.concat([pd.DataFrame(columns).assign(transform=name) for name in ("raw", "center")])
    found = evaluation(LAYERS)
    page = Evaluation(found.measures, found.transforms, labels).to_html(tmp_path / "e.html").read_text(encoding="utf-8")
    assert shown_tables(page)[3:] == [{"labelled": ["0.750", "0.700–0.800", "", "1,523"]}] * 2
