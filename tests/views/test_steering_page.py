"""The pages of steered runs and of directions show what the results hold, as text, in the design of the other pages."""

import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pages import BROWSER_ARGUMENTS, HOSTILE, page_data, page_json

import tl_latentlens as tll
from tl_latentlens.views.steering import multiple_heading
from tl_latentlens.views.text import printable, visible

HOOK = "blocks.3.hook_resid_post"

pytestmark = pytest.mark.usefixtures("few_random_directions")
TEXTS = ["The boat crossed the bank", HOSTILE]
MULTIPLES = (-1.5, 0, 2)


@pytest.fixture(scope="module")
def vector() -> torch.Tensor:
    return torch.randn(256, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def steered(any_model: Any, index: tll.ContextualIndex, vector: torch.Tensor) -> tll.SteeringResult:
    steer = tll.SteeringLens(vector, index, HOOK, multiples=MULTIPLES, unit="activation", calibrate=True)
    return steer.run(any_model, TEXTS)


@pytest.mark.parametrize("pos", [None, 2])
def test_the_page_holds_what_was_read_under_each_multiple(steered: tll.SteeringResult, tmp_path: Path, pos: int | None) -> None:
    data = page_data(steered.to_html(tmp_path / "s.html", pos))
    hook_names = steered.readings[0.0].hook_names
    strings, contexts = data["strings"], data["contexts"]
    assert [text["tokens"] for text in data["texts"]] == [["−1.5 v", "unsteered", "+2 v"]] * 2
    for batch, text in enumerate(data["texts"]):
        for at, multiple in enumerate(MULTIPLES):
            reading = steered.readings[multiple]
            decoded = np.flatnonzero(reading.decoded[batch])
            place = int(decoded[-1]) if pos is None else pos
            cosines = steered.cosines_at(multiple)
            for i, name in enumerate(hook_names):
                cell = reading.cell(name, place, batch)
                found = text["latentlens"][i][at]
                np.testing.assert_allclose(found[2::3], [near.similarity for near in cell.neighbors], atol=1e-4)
                assert [contexts[k][1] for k in found[::3]] == [visible(near.token.strip()) for near in cell.neighbors]
                assert [strings[k] for k in text["words"][i][at]] == [visible(near.word) for near in cell.words or []]
                assert [strings[k] for k in text["logit_lens"][i][at][::2]] == [visible(t) for t, _ in cell.logit_lens or []]
                assert text["known"][i][at] == pytest.approx(cell.known, abs=1e-4)
                cosine = cosines.get((name, batch, place), np.nan) if multiple else np.nan
                note = "" if np.isnan(cosine) else f"cosine with the unsteered activation {cosine:.2f}"
                assert text["notes"][i][at] == note
    assert "«" in data["texts"][0]["label"]


def test_a_token_that_was_not_read_is_refused(steered: tll.SteeringResult, tmp_path: Path) -> None:
    with pytest.raises(tll.InvalidInputError, match="was not decoded"):
        steered.to_html(tmp_path / "s.html", 500)
    with pytest.raises(tll.InvalidInputError, match="cannot write"):
        steered.to_html(tmp_path)


def test_a_single_multiple_has_a_page(any_model: Any, index: tll.ContextualIndex, vector: torch.Tensor, tmp_path: Path) -> None:
    result = tll.SteeringLens(vector, index, HOOK, multiples=3.0, read=[5], calibrate=False).run(any_model, TEXTS[0])
    data = page_data(result.to_html(tmp_path / "s.html"))
    assert [text["tokens"] for text in data["texts"]] == [["+3 v"]]
    assert data["headings"] == ["5"]
    assert data["texts"][0]["notes"] == [[""]]


def test_headings_of_multiples() -> None:
    assert list(map(multiple_heading, (0, -0.0, 1, 0.25, -4))) == ["unsteered", "unsteered", "+1 v", "+0.25 v", "−4 v"]


def test_the_head_says_where_the_vector_was_added(steered: tll.SteeringResult, tmp_path: Path) -> None:
    page = unescape(steered.to_html(tmp_path / "s.html").read_text(encoding="utf-8"))
    for part in (
        "added to the stream at layer 3",
        "as long as a median row there",
        'SteeringLens(v, ContextualIndex("small.h5"), "blocks.3.hook_resid_post", multiples=(-1.5, 0, 2)).run(model, text)',
        "demo_model, 6 layers",
    ):
        assert part in page
    typed = steered.to_html(tmp_path / "s.html", call="tl-latentlens decode-vector x").read_text(encoding="utf-8")
    assert "<code>tl-latentlens decode-vector x</code>" in typed
    assert "<" not in page_json(tmp_path / "s.html")


def test_a_browser_shows_the_steered_runs(steered: tll.SteeringResult, browser: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = steered.to_html(tmp_path / "s.html")
    said: list[str] = []
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=BROWSER_ARGUMENTS)
        tab = chromium.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(path.as_uri())
        assert tab.locator("tfoot th").all_inner_texts() == ["layer", "−1.5 v", "unsteered", "+2 v"]
        playwright.expect(tab.locator("#label")).to_have_text("The boat crossed the «bank»")
        playwright.expect(tab.locator("#cell h2")).to_contain_text("+2 v layer 5, cosine with the unsteered activation ")
        tab.click("tbody tr:last-child td >> nth=1")
        playwright.expect(tab.locator("#cell h2")).to_have_text("unsteered layer 3")
        tab.select_option("#text", "1")
        assert "document.title = 'ran'" in tab.locator("#label").inner_text()
        assert tab.title() == "tl-latentlens: steering"
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        chromium.close()
    assert said == []


@pytest.mark.parametrize("calibrate", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_the_page_of_directions_holds_both_ends(any_model: Any, tmp_path: Path, n: int, calibrate: bool) -> None:
    bank = tll.build_bank(any_model, [HOSTILE, "A boat\nlay there.", "火山爆发了"], tmp_path / "h.h5", progress=False)
    index = tll.ContextualIndex(bank, device="cpu")
    vectors = torch.randn(n, 256, generator=torch.Generator().manual_seed(1))
    result = tll.decode_directions(vectors, index, top_k=4, calibrate=calibrate, progress=False)
    page = result.to_html(tmp_path / "d.html").read_text(encoding="utf-8")
    lists = re.findall(r'<ol class="contexts[^"]*">(.*?)</ol>', page)
    expected = [near for i in range(n) for near in result.neighbors(i)]
    expected += [] if result.random is None else list(result.random.neighbors(0))
    assert len(lists) == len(expected) == 2 * (n + calibrate)
    for shown, neighbors in zip(lists, expected, strict=True):
        items = re.findall(r'<li><span class="figure">(.*?)</span>(.*?)</li>', shown)
        assert [figure for figure, _ in items] == [f"{near.similarity:.3f}" for near in neighbors]
        marks = [unescape(re.findall("<mark>(.*?)</mark>", text)[0]) for _, text in items]
        assert marks == [visible(near.token.strip() or near.token) for near in neighbors]
        row = index.row(neighbors[0].row)
        text = printable(row.bank.text(row.bank.prompt(row.prompt_index)).replace("\n", " "))
        context = unescape(re.sub("<small>.*|<.*?>", "", items[0][1])).strip().strip("…")
        assert context.strip() in text
    assert page.count("<h2>") == (n if n > 1 else 0) + calibrate
    assert page.count("random directions come as near") == 2 * (n + calibrate) * calibrate
    assert "<script>document" not in page
    assert "\x1b" not in page
    assert "<details" in page
    with pytest.raises(tll.InvalidInputError, match="cannot write"):
        result.to_html(tmp_path / "none" / "d.html")
