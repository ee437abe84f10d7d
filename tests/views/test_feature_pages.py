"""The page of labelled features shows what the labels hold, as text, to a browser that clicks through it."""

import base64
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.pages import BROWSER_ARGUMENTS, HOSTILE, page_data, page_json

import tl_latentlens as tll
from tl_latentlens.directions.features.page import N_BEFORE
from tl_latentlens.directions.features.sae import TensorSAE
from tl_latentlens.views.features import UNKNOWN_SHADE
from tl_latentlens.views.text import printable, short_hook_name, visible

HOOK = "blocks.3.hook_resid_post"
HOSTILE_TEXTS = [HOSTILE, "火山爆发了 🌋 near the bank.", "A boat\nlay there."]


@pytest.fixture(scope="module")
def hostile_index(any_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tll.ContextualIndex:
    path = tmp_path_factory.mktemp("hostile") / "h.h5"
    bank = tll.build_bank(any_model, HOSTILE_TEXTS, path, hook_names=[HOOK, "blocks.2.hook_resid_post"], progress=False)
    return tll.ContextualIndex(bank, HOOK, device="cpu", transform="center")


@pytest.fixture(scope="module")
def labels(hostile_index: tll.ContextualIndex, any_model: Any) -> tll.FeatureResult:
    """Features that are rows of the bank, one of zeros among them, and one that is never active."""
    vectors = np.asarray(hostile_index.banks[0].vectors(HOOK)).astype(np.float32)
    decoder = torch.from_numpy(vectors - vectors.mean(0))[::2].clone()
    decoder[2] = 0
    bias = torch.zeros(len(decoder))
    bias[4] = -1e6
    sae = TensorSAE(decoder, {"W_enc": decoder.T.contiguous(), "b_enc": bias}, hook_name=HOOK)
    return tll.label_features(sae, hostile_index, top_k=5, model=any_model, progress=False)


def array(data: dict[str, Any], name: str) -> np.ndarray:
    packed = data["arrays"][name]
    kind = packed["type"].removesuffix("Array").lower()
    return np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), kind).reshape(packed["shape"])


def around(data: dict[str, Any], place: int) -> str:
    """The text of a place in the page's stream, its token marked."""
    tokens, marked = array(data, "tokens").tolist(), place
    while tokens[marked] == 2:
        marked -= 1
    first = end = place
    while tokens[first - 1] > 1 and first > place - data["window"][0]:
        first -= 1
    while tokens[end] > 1 and end <= place + data["window"][1]:
        end += 1
    return "".join(f"«{data['strings'][tokens[i]]}»" if i == marked else data["strings"][tokens[i]] for i in range(first, end))


def test_the_page_holds_what_the_labels_hold(labels: tll.FeatureResult, tmp_path: Path) -> None:
    path = labels.to_html(tmp_path / "f.html", 6, progress=False)
    index: Any = labels.positive.index
    data = page_data(path)
    assert data["features"] == labels.table["feature"].tolist()
    assert data["labels"] == labels.table["label"].map(printable).tolist()
    assert data["kinds"] == labels.table["label_kind"].tolist()
    assert data["words"] == [printable(", ".join(words)) for words in labels.table["words"]]
    shares = [[share for _, share in parts] for parts in labels.table["label_parts"]]
    assert [[share for _, share in parts] for parts in data["parts"]] == [pytest.approx(of_one, abs=1e-4) for of_one in shares]
    assert data["found"][2] == -1
    for name in ("density", "auroc", "similarity", "p_auroc", "steered_next"):
        shown = np.array([np.nan if value is None else value for value in data["figures"][name]])
        np.testing.assert_allclose(shown, labels.table[name], rtol=1e-3)
    tops = labels.activity.top if labels.activity else None
    assert tops is not None
    for i, feature in enumerate(labels.ids):
        for sign, neighbors in zip(("positive", "negative"), labels.neighbors(i), strict=True):
            np.testing.assert_allclose(array(data, f"{sign}_cosines")[i] / 1e4, [n.similarity for n in neighbors], atol=1e-4)
            for near, place in zip(neighbors, array(data, sign)[i].tolist(), strict=True):
                row = index.row(near.row)
                text = printable(row.bank.text(row.bank.prompt(row.prompt_index)))
                shown = around(data, place)
                assert shown.replace("«", "").replace("»", "") in text
                marked = re.search("«(.*)»", shown)
                assert marked is not None
                assert row.token == "\ufffd" or printable(row.token).strip("\ufffd") in marked[1]
        largest = labels.max_activating(feature, 6)
        np.testing.assert_allclose(array(data, "top_values")[i][: len(largest)], [value for value, _ in largest], rtol=1e-5)
        assert (array(data, "top")[i] > 0).sum() == len(largest)
        assert (array(data, "histogram")[i] == labels.activity.histogram[i]).all() if labels.activity else False
        tokens = [data["strings"][k] for k in array(data, "logit_negative")[i]]
        assert tokens == [visible(t) for t in labels.table["logit_tokens_negative"][data["features"].index(feature)]]
        assert (np.diff(array(data, "logit_negative_values")[i]) <= 0).all()
        shades = array(data, "shades")[i]
        assert all(abs(shades[j, N_BEFORE] - 254 * v / largest[0][0]) <= 3 for j, (v, _) in enumerate(largest))
    scores = {score["name"]: score for score in data["scores"]}
    assert list(scores)[:5] == ["detection", "detection_top", "intruder", "embedding", "auroc_same_token"]
    assert [(scores[name]["nulls"], scores[name]["beside"]) for name in ("intruder", "embedding")] == [
        ([0.2], "chance"), ([0.5], "chance")
    ]  # fmt: skip
    counts = scores["auroc_same_token"]["counts"]
    assert len(counts) == len(scores["auroc_same_token"]["nulls"]) == max(data["bins"]) + 1
    assert np.sum(counts) == len(labels.nulls["auroc_same_token"])
    nearness = scores["z"]
    assert np.sum(nearness["counts"]) == len(labels.nulls["z"]) == 2000
    assert nearness["p"] == "p_similarity"
    assert path.stat().st_size < 200_000


def test_neighbors_of_takes_the_number_of_a_feature(labels: tll.FeatureResult) -> None:
    """Places and numbers differ from the feature of zeros on."""
    assert list(labels.places) == list(labels.ids)
    assert labels.neighbors_of(2) == ([], [])
    for place, feature in enumerate(labels.ids):
        assert labels.neighbors_of(feature) == labels.neighbors(place)
    with pytest.raises(tll.InvalidInputError, match=r"feature 999 is not among the \d+ that were labelled"):
        labels.neighbors_of(999)


def test_without_a_model_only_rows_of_the_bank_are_shaded(any_model: Any, texts: list[str], tmp_path: Path) -> None:
    bank = tll.build_bank(any_model, texts, tmp_path / "b.h5", hook_names=HOOK, max_rows_per_token=1, progress=False)
    index = tll.ContextualIndex(bank, device="cpu", transform="center")
    unknown = []
    for model in (None, any_model):
        result = tll.label_features(tll.load_sae("demo"), index, range(40), model=model, progress=False)
        shades = array(page_data(result.to_html(tmp_path / "f.html", progress=False)), "shades")
        unknown.append((shades == UNKNOWN_SHADE).sum())
    assert unknown[0] > unknown[1]


def test_a_decoder_alone_leaves_out_what_needs_an_encoder(index: tll.ContextualIndex, tmp_path: Path) -> None:
    result = tll.label_features(tll.load_sae("demo").W_dec, index, [5, 9], progress=False)
    data = page_data(result.to_html(tmp_path / "f.html", progress=False))
    assert set(data["arrays"]) == {
        "tokens", "positive", "negative", "positive_cosines", "negative_cosines", "positive_hooks", "negative_hooks"
    }  # fmt: skip
    assert [score["name"] for score in data["scores"]] == ["z"]
    assert [data["hooks"][i] for i in array(data, "positive_hooks")[0]] == [
        short_hook_name(near.hook_name) for near in result.neighbors(0)[0]
    ]
    assert set(data["says"].values()) == {"its nearest rows", "mixed of"}
    none = tll.label_features(tll.load_sae("demo"), index, [], hook_name=HOOK, progress=False)
    assert page_data(none.to_html(tmp_path / "none.html", progress=False))["features"] == []


def test_the_file_asks_for_nothing_and_its_data_are_no_markup(labels: tll.FeatureResult, tmp_path: Path) -> None:
    text = labels.to_html(tmp_path / "f.html", progress=False).read_text()
    assert not re.search(r"(?:src|href)=.|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", text.replace("link.href = `#", ""))
    data = page_json(tmp_path / "f.html")
    assert "<" not in data
    assert "\x1b" not in data
    assert "\\u001b" not in data
    assert text.isascii() or data.isascii()
    for where in (tmp_path, tmp_path / "none" / "f.html"):
        with pytest.raises(tll.InvalidInputError, match="cannot write"):
            labels.to_html(where)


def best_first(table: pd.DataFrame) -> list[int]:
    """Named features first, then mixed ones, those with the nearest rows first, as in the terminal."""
    place = table["label_kind"].map({"": 2, "mixed": 1}).fillna(0)
    ordered = table.assign(place=place).sort_values(["place", "similarity"], ascending=[True, False], kind="stable")
    return ordered["feature"].tolist()


def features_near(labels: tll.FeatureResult, data: dict[str, Any], word: str) -> set[int]:
    """The features whose card shows a word around one of the nearest or most active rows, found one by one."""
    begins = re.compile((r"(?<![^\W_])" if word[0].isascii() and word[0].isalnum() else "") + re.escape(word))
    return {
        feature
        for place, feature in enumerate(labels.ids)
        for name in ("positive", "top")
        for row in array(data, name)[place].tolist()
        if row and begins.search(re.sub("[«»]", "", around(data, row)).lower())
    }


@pytest.mark.parametrize(
    "word", ["boat", "BANK", "ank", "lay ther", "发了", "near the bank.", "never active", "zero", "zqxv", "3"]
)
def test_a_search_finds_labels_contexts_and_numbers(labels: tll.FeatureResult, browser: str, tmp_path: Path, word: str) -> None:
    """Words of the reasons why a label was kept back are found in no feature."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path, table = labels.to_html(tmp_path / "f.html", progress=False), labels.table
    named = {
        feature
        for feature, label in zip(table["feature"], table["label"], strict=True)
        if word.lower() in f"{feature} {printable(label)}".lower()
    }
    written = {
        feature
        for feature, words in zip(table["feature"], table["words"], strict=True)
        if word.lower() in printable(", ".join(words)).lower()
    }
    expected = named | written | features_near(labels, page_data(path), word.lower())
    order = [feature for feature in best_first(table) if feature in expected]
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=BROWSER_ARGUMENTS)
        tab = chromium.new_page(viewport={"width": 1280, "height": 900})
        tab.goto(path.as_uri())
        tab.fill("#search", word)
        rows = tab.locator("tbody tr")
        playwright.expect(rows).to_have_count(len(expected))
        found = [int(text) for text in tab.locator("tbody tr td:first-child").all_inner_texts()]
        assert found == sorted(order, key=lambda feature: feature not in named)
        for feature, row in zip(found, rows.all(), strict=True):
            assert word.lower() in (row.locator(".label").inner_text().lower() if feature not in named else word.lower())
        chromium.close()


def test_sentences_stand_below_labels(labels: tll.FeatureResult, browser: str, tmp_path: Path) -> None:
    """They are text, whatever is in them, and a search finds their words."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    sentences = ["" if feature % 2 else f"About {feature}: {HOSTILE}" for feature in labels.table["feature"]]
    path = replace(labels, table=labels.table.assign(sentence=sentences)).to_html(tmp_path / "f.html", progress=False)
    assert page_data(path)["sentences"] == list(map(printable, sentences))
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=BROWSER_ARGUMENTS)
        tab = chromium.new_page(viewport={"width": 1280, "height": 900})
        tab.goto(f"{path.as_uri()}#feature=6")
        playwright.expect(tab.locator("#content p").first).to_contain_text("About 6: ")
        tab.fill("#search", "about 4:")
        playwright.expect(tab.locator("tbody tr")).to_have_count(1)
        assert "About 4: " in tab.locator("tbody td.label small").first.inner_text()
        assert tab.title() == "tl-latentlens: features"
        chromium.close()


def with_labels(labels: tll.FeatureResult) -> tll.FeatureResult:
    """The first features with a label of each kind, whose texts are markup and signs."""
    given = [
        ("token", "<b>a</b> 60 % · «-» 20 % · near: <i>, hot", [("<b>a</b>", 0.6), ("-", 0.2)], ["<i>", "hot"]),
        ("before", "after the 81 %", [("the", 0.81)], []),
        ("", "", [], []),
        ("mixed", "mixed: e 20 % · f 10 %", [("e", 0.2), ("f", 0.1)], []),
        ("after", "before end of the text 55 %", [("end of the text", 0.55)], []),
        ("position", "2nd token 70 % of the text", [("2nd token", 0.7)], []),
    ]
    table = labels.table.copy()
    filled = [*given, *([("", "", [], [])] * (len(table) - len(given)))]
    for name, column in zip(("label_kind", "label", "label_parts", "label_near"), zip(*filled, strict=True), strict=True):
        table[name] = list(column)
    return replace(labels, table=table)


def test_labels_are_shown_by_kind_with_their_shares(labels: tll.FeatureResult, browser: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    labelled = with_labels(labels)
    path, table = labelled.to_html(tmp_path / "f.html", progress=False), labelled.table
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=BROWSER_ARGUMENTS)
        tab = chromium.new_page(viewport={"width": 1280, "height": 900})
        tab.goto(path.as_uri())
        n_of = {"all": len(table), "named": 4, "mixed": 1, "none": len(table) - 5}
        assert tab.locator("#kinds button").all_inner_texts() == [f"{name}{n}" for name, n in n_of.items()]
        for name, n in n_of.items():
            tab.click(f"#kinds button:has-text('{name}')")
            playwright.expect(tab.locator("tbody tr")).to_have_count(n)
            assert tab.locator("#kinds button[aria-pressed='true']").inner_text() == f"{name}{n}"
            assert tab.locator("td.label b").count() == {"all": 4, "named": 4}.get(name, 0)
        tab.click("#kinds button:has-text('all')")
        strong = {text.replace("\xa0", " ") for text in tab.locator("td.label b").all_inner_texts()}
        assert {"<b>a</b> 60 % · «-» 20 %", "after the 81 %"} <= strong
        for feature, says, parts in [
            (0, "fires on", ["<b>a</b>", "60 %", "«-»", "20 %"]),
            (1, "fires after", ["the", "81 %"]),
            (3, "mixed of", ["e", "20 %", "f", "10 %"]),
            (4, "fires before", ["end of the text", "55 %"]),
            (5, "fires at", ["2nd token", "70 %"]),
        ]:
            tab.goto(f"{path.as_uri()}#feature={feature}")
            playwright.expect(tab.locator("#content h2")).to_have_text(f"feature {feature}")
            assert tab.locator("#content h3").first.inner_text() == says
            assert tab.locator(".parts .text, .parts small").all_inner_texts() == parts
            widths = tab.locator(".parts i").evaluate_all("bars => bars.map(bar => bar.style.width)")
            assert [float(width.rstrip("%")) for width in widths] == [float(part.split()[0]) for part in parts[1::2]]
            headings = tab.locator("#content h3").all_inner_texts()
            places = [headings.index(name) for name in headings if name in (says, "writes", "opposite", "nearest rows to v")]
            assert places == sorted(places)
            assert len(places) == 4
            writes = tab.locator("h3:has-text('writes') + .chips .chip").all_inner_texts()
            assert writes == [printable(word) for word in table["words"][feature]]
        tab.goto(f"{path.as_uri()}#feature=0")
        playwright.expect(tab.locator("#content h2")).to_have_text("feature 0")
        assert tab.locator(".parts + .chips .chip").all_inner_texts() == ["<i>", "hot"]
        word = table["words"][1][-1]
        tab.fill("#search", word)
        playwright.expect(tab.locator("tbody tr", has_text="after the 81 %")).to_have_count(1)
        assert tab.title() == "tl-latentlens: features"
        chromium.close()


def test_a_browser_searches_sorts_and_opens_cards(labels: tll.FeatureResult, browser: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = labels.to_html(tmp_path / "f.html", progress=False)
    index: Any = labels.positive.index
    table = labels.table
    said: list[str] = []
    asked: set[str] = set()
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=BROWSER_ARGUMENTS)
        tab = chromium.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(60_000)
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.add(request.url.partition(":")[0]))

        def numbers() -> list[int]:
            return [int(text) for text in tab.locator("tbody tr td:first-child").all_inner_texts()]

        tab.goto(f"{path.as_uri()}#feature=1")
        playwright.expect(tab.locator("#content h2")).to_contain_text("feature 1 ")
        assert numbers() == best_first(table)
        shown = tab.locator("#content .contexts").all()
        assert len(shown) == 3
        at = list(labels.ids).index(1)
        lists = [[near for _, near in labels.max_activating(1, 20)], *labels.neighbors(at)]
        for listed, neighbors in zip(shown, lists, strict=True):
            items = listed.locator("li")
            assert items.count() == len(neighbors)
            for item, near in zip(items.all(), neighbors, strict=True):
                row = index.row(near.row)
                text = printable(row.bank.text(row.bank.prompt(row.prompt_index)))
                context = re.sub(r"^[-\d.]+", "", item.text_content() or "").strip("…").replace("␣", " ")
                assert context.strip() in text
                assert item.locator("mark").count() == 1
        assert tab.locator("img").count() == 0
        assert "document.title = 'ran'</script>" in tab.locator("#content").inner_text()
        assert tab.title() == "tl-latentlens: features"
        known = [score["name"] for score in page_data(path)["scores"] if not np.isnan(table[score["name"]][1])]
        assert tab.locator(".scores svg").count() == len(known) > 5
        shades = tab.locator("#content .contexts span[style]")
        assert shades.count() > 0

        tab.select_option("#by", "similarity")
        ordered = table.dropna(subset="similarity").sort_values("similarity", ascending=False, kind="stable")
        rounded = [float(f"{value:.4g}") for value in table.set_index("feature")["similarity"].loc[numbers()[: len(ordered)]]]
        assert rounded == sorted(rounded, reverse=True)
        assert numbers()[-1] == 2, "the decoder row of zeros comes last"
        tab.fill("#search", "")
        tab.click("thead button:has-text('feature')")
        assert numbers() == table["feature"].tolist()

        tab.focus("tbody a >> nth=0")
        tab.keyboard.press("ArrowDown")
        tab.keyboard.press("ArrowDown")
        tab.keyboard.press("Enter")
        playwright.expect(tab.locator("#content")).to_have_text("feature 2no label: its decoder row is zero")
        tab.click("#next")
        playwright.expect(tab.locator("#content h2")).to_contain_text("feature 3 ")
        tab.goto(f"{path.as_uri()}#feature=<b>7</b>")
        playwright.expect(tab.locator("#content")).to_contain_text("There is no feature")
        assert tab.locator("#content b").count() == 0
        tab.goto(f"{path.as_uri()}#feature=4")
        playwright.expect(tab.locator("#content")).to_contain_text("never active")

        tab.set_viewport_size({"width": 390, "height": 844})
        playwright.expect(tab.locator("#list")).to_be_hidden()
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        tab.click("#close")
        playwright.expect(tab.locator("#list")).to_be_visible()
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        assert tab.evaluate("document.querySelector('#rows').scrollWidth <= document.querySelector('#rows').clientWidth")
        chromium.close()
    assert said == []
    assert asked <= {"file"}
