"""What notebooks show is escaped, and readable on light and dark."""

import re
from html import escape, unescape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from support.pages import page_json

import tl_latentlens as tll
from tl_latentlens.views.data import FeatureLine
from tl_latentlens.views.label_kinds import part_name, unbroken
from tl_latentlens.views.notebook import features_html
from tl_latentlens.views.text import short_hook_name


def test_notebooks_and_figures_show_markup_as_text(hostile: tll.LensResult, tmp_path: Path) -> None:
    found = next(iter(hostile.found.values()))
    bank = found.index.banks[0]
    directions = tll.decode_directions(bank.vectors(found.index.hook_names[0])[:20], found.index, top_k=3)
    for shown in (hostile, found, bank, found.index, directions):
        html = shown._repr_html_()
        assert not re.search(r"<(script|img|!--)|\x1b", html)
        assert shown is found.index or "&lt;" in html
        assert not re.search(r"background(-color)?: *(#|white|black)|color: *(#|white|black)", html), "light and dark"
    data = page_json(hostile.to_html(tmp_path / "page.html"))
    assert "<" not in data
    assert "\x1b" not in data
    if find_spec("plotly"):
        heat = hostile.plot().data[0]
        shown = " ".join(
            [*heat.x, *(word for line in heat.text for word in line), *(h for line in heat.customdata for h in line)]
        )
        assert set(re.findall(r"<[^>]*>", shown)) <= {
            "<b>",
            "</b>",
            "<i>",
            "</i>",
            "<br>",
            '<span style="fill-opacity:0.4">',
            "</span>",
        }
        assert "$" not in shown, "no TeX"


def test_what_the_bank_does_not_know_is_faint_in_notebooks(calibrated: tll.LensResult) -> None:
    html = calibrated._repr_html_()
    known = np.array([calibrated.found[name].known.numpy() for name in calibrated.hook_names])
    n_words = np.array([[len(words.texts_of(i)) for i in range(known.shape[1])] for words in calibrated.words.values()])
    assert "color: known 0.00 to 1.00" in html
    assert html.count("<span style='opacity: 0.45'>") == ((known <= 0.05) | (n_words == 0)).sum()
    first = calibrated.cell(calibrated.hook_names[0], int(calibrated.positions[0, 1]))
    assert f">{first.known:.2f}</td>" in html
    found = calibrated.found[calibrated.hook_names[0]]
    assert found._repr_html_().count("opacity: 0.45") == int((found.known <= 0.05).sum()) > 0


def test_notebooks_show_other_words(calibrated: tll.LensResult, any_model: Any, index: tll.ContextualIndex) -> None:
    html = calibrated._repr_html_()
    grid = html.partition("<details")[0]
    cells = [unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall(r"<td[^>]*>(.*?)</td>", grid)]
    expected = []
    for batch in range(2):
        positions = [pos for text, pos in calibrated.positions.tolist() if text == batch]
        for name in reversed(calibrated.hook_names):
            words = [calibrated.cell(name, pos, batch).words for pos in positions]
            expected += [of_cell[0].word if of_cell else "·" for of_cell in words]
    assert cells == expected
    assert "nearest other word at blocks.*.hook_resid_post" in grid
    headings = re.findall(r"<th[^>]*>([^<]*)</th>", html.partition("<details")[2])
    shown = [calibrated.cell(name, pos, batch) for batch, pos in calibrated.positions for name in calibrated.hook_names][:60]
    around = ["words around"] * any(cell.around for cell in shown)
    columns = ["pos", "token", "hook", "p", "other words", *around, "nearest uses", "logit lens", "embedding lens"]
    assert headings == columns
    assert "p: high: the bank knows such a token" in html
    hooks = tll.latentlens_hooks(index, words=0, calibrate=False)
    any_model.run_with_hooks("A bank", fwd_hooks=hooks)
    assert "other word" not in hooks.result._repr_html_()
    assert "nearest contextual token" in hooks.result._repr_html_()


def test_notebook_tables(result: tll.LensResult, index: tll.ContextualIndex, bank: tll.Bank) -> None:
    html = result._repr_html_()
    assert html.count("<details") == 1
    assert "logit lens" in html
    layers = re.findall(r"text-align: right'>(\d+)</th>", html)
    assert layers == [name.split(".")[1] for name in reversed(result.hook_names)]
    assert f"{bank.n_rows:,} contextual tokens" in bank._repr_html_()
    for name in index.hook_names:
        assert f"{short_hook_name(name)} [" in index._repr_html_()
        assert f"{short_hook_name(name)} [" in bank._repr_html_()
    vectors = np.tile(np.asarray(bank.vectors(index.hook_names[0])[:40], np.float32), (2, 1))
    assert "the first 60 of 80" in index.search(vectors)._repr_html_()
    assert index.search(vectors[0])._repr_html_().count("1 query") == 1
    sae = tll.load_sae("demo")
    centered = tll.ContextualIndex(bank, sae.hook_name, device="cpu", transform="center")
    features = tll.label_features(sae, centered, range(8), top_k=3, progress=False)
    assert "8 features" in features._repr_html_()
    assert all(escape(unbroken(label)) in features._repr_html_() for label in features.table["label"])


def test_labelled_features_show_as_a_table() -> None:
    """Named labels are strong, mixed ones faint, reasons slanted; all of it is text."""

    def line(label: str, kind: str, why: str, scores: dict[str, float]) -> FeatureLine:
        return FeatureLine(3, label, kind, why, ["<hot>", "water", "tea", "cup"], scores, [])

    scores = {"density": 0.25, "detection": 0.875, "similarity": 0.5}
    lines = [
        line("<team> 59 %", "token", "", scores),
        line("mixed: a 9 %", "mixed", "no three", scores),
        line("", "", "never", scores | {"detection": float("nan")}),
    ]
    shown = features_html(lines, 3, 1, "center")
    assert re.findall("<th [^>]*>([^<]*)</th>", shown) == [
        "feature", "density", "detection", "label, or why not", "writes", "nearest rows"
    ]  # fmt: skip
    cells = re.findall(r"<td [^>]*>(.*?)</td>", shown)
    assert cells[:5] == ["3", "0.25", "0.875", "<b>&lt;team&gt; 59\xa0%</b>", "&lt;hot&gt;, water, tea"]
    assert [re.sub("<[^>]*>", "", cell) for cell in cells[8:16:6]] == ["0.875", ""]
    faint = [re.findall("opacity: ([.0-9]+)(; font-style: italic)?", cells[i]) for i in (9, 15)]
    assert faint == [[("0.7", "")], [("0.55", "; font-style: italic")]]
    assert "no three" not in shown
    alone = features_html([line("", "", "too far", {"similarity": 0.5})], 1, 0, "center")
    assert re.findall("<th [^>]*>([^<]*)</th>", alone)[:2] == ["feature", "similarity"]


def test_texts_without_a_letter_stand_in_quotes() -> None:
    texts = {"team": "team", "…ing": "…ing", "-": "«-»", "%": "«%»", "7": "«7»", "\n": "«↵»", "火": "火"}
    assert {text: part_name(text) for text in texts} == texts
    assert unbroken("«%» 40 % · b 9 %") == "«%» 40\xa0% · b 9\xa0%"
