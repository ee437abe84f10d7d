"""The explore page opens with sentences of the bank to click; one ambiguous word means two things in them."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import tl_latentlens as tll

pytest.importorskip("dash")
from support.pages import BROWSER_ARGUMENTS
from werkzeug.serving import make_server

from tl_latentlens.explorer.app import Page, make_app
from tl_latentlens.explorer.examples import Example, find_examples
from tl_latentlens.explorer.layout import layout
from tl_latentlens.explorer.reader import Reader

MONEY = [
    "She deposited her money at the bank in the morning.",
    "The manager of the bank refused to lend him any money.",
    "He keeps all his savings in an account at the bank.",
    "The bank charged a fee for the account that she opened.",
]
RIVER = [
    "We sat on the grassy bank and watched the river.",
    "The boat ran ashore on the muddy bank of the river.",
    "Willows grow along the bank where the water is slow.",
    "Ducks nested in the reeds on the far bank of the stream.",
]
PLAIN = ["A red apple lay under the tree.", "The children ran home before dark."]


def index_of(model: Any, texts: Sequence[str], folder: Path, **settings: Any) -> tll.ContextualIndex:
    bank = tll.build_bank(model, list(texts), folder / "b.h5", hook_names=[1, 3], progress=False, **settings)
    return tll.ContextualIndex(bank, device="cpu")


def test_examples_are_two_uses_of_an_ambiguous_word(any_model: Any, tmp_path: Path) -> None:
    examples = find_examples(index_of(any_model, [*MONEY, *RIVER, *PLAIN], tmp_path))
    assert [example.word for example in examples] == ["bank", "bank"]
    assert sorted(example.text in MONEY for example in examples) == [False, True]
    assert sorted(example.text in RIVER for example in examples) == [False, True]


@pytest.mark.parametrize(
    ("texts", "n"),
    [
        (PLAIN, 1),
        (["火山爆发了,人们离开了村庄。"], 1),
        ([f"Long ago it rained. {' and '.join(PLAIN)} Then it stopped. " + "The wind blew on and on. " * 9], 1),
        (["river bank"] * 9, 0),
        (["bank"], 0),
        ([". . . ."], 0),
    ],
    ids=["plain", "unspaced", "long", "short", "word", "signs"],
)
def test_a_bank_without_ambiguous_words_gives_its_first_sentence(
    any_model: Any, tmp_path: Path, texts: list[str], n: int
) -> None:
    examples = find_examples(index_of(any_model, texts, tmp_path))
    assert len(examples) == n
    for example in examples:
        assert any(example.text in text for text in texts)
        assert len(example.text) < 230


def test_a_sentence_is_cut_out_of_a_long_text(any_model: Any, tmp_path: Path) -> None:
    texts = [f"Nothing happened here.\n{text} And so it went on, for years and years! What then?" for text in [*MONEY, *RIVER]]
    assert {example.text for example in find_examples(index_of(any_model, texts, tmp_path))} <= {*MONEY, *RIVER}


def test_a_part_of_a_word_is_no_word() -> None:
    assert Example("We sat on the ", "bank", ".").is_whole_word
    assert not Example("We saw a river", "bank", ".").is_whole_word
    assert not Example("She had a ", "bank", "note.").is_whole_word


@pytest.mark.parametrize("repeat", [False, True])
def test_a_click_reads_the_word(any_model: Any, tmp_path: Path, repeat: bool) -> None:
    texts = [*MONEY, *RIVER, "The bank by the river bank is a bank."]
    page = Page(Reader(any_model, index_of(any_model, texts, tmp_path, repeat=repeat), top_k=3))
    layers = list(page.reader.hook_names)
    for example in [*page.examples, Example("The bank by the river ", "bank", " is a bank.")]:
        reading, cell, typed, message = page.open_example(example, "raw", layers)
        assert (reading, typed, message) == ({"prompt": example.text}, example.text, "")
        result = page.reader.prompt(example.text, "raw").result
        tokens, first = (result.tokens or [[]])[0], int(result.positions[0, 1])
        assert tokens[cell["pos"]].strip() == example.word
        assert "".join(tokens[first : cell["pos"]]).strip() == example.before.strip()
    assert page.open_link("example", 1, [], "raw", layers)[0] == {"prompt": page.examples[1].text}


def test_the_page_opens_without_examples(any_model: Any, tmp_path: Path) -> None:
    page = Page(Reader(any_model, index_of(any_model, ["bank"], tmp_path)))
    assert "Type a prompt" in str(layout(page.reader, "raw", page.examples, "make_app()"))
    assert "example" not in str(layout(page.reader, "raw", page.examples, "make_app()"))


def test_a_browser_clicks_an_example(any_model: Any, browser: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    index = index_of(any_model, [*MONEY, *RIVER], tmp_path)
    app = make_app(any_model, index, call="tl-latentlens explore b.h5 --port <80>")
    server = make_server("127.0.0.1", 0, app.server, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    said: list[str] = []
    try:
        with playwright.sync_playwright() as play:
            chromium = play.chromium.launch(executable_path=browser, args=BROWSER_ARGUMENTS)
            tab = chromium.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
            tab.set_default_timeout(60_000)
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.goto(f"http://127.0.0.1:{server.server_port}")
            second = tab.locator(".example").nth(1)
            text = second.inner_text()
            assert text in [*MONEY, *RIVER]
            assert tab.locator(".head .facts").inner_text().count("b.h5") == 1
            assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 23, 26)", "the pages' stylesheet"
            second.click()
            playwright.expect(tab.locator(".panel h2")).to_have_text("bank at layer 3")
            playwright.expect(tab.locator("#prompt")).to_have_value(text)
            playwright.expect(tab.locator("#grid td.chosen")).to_be_in_viewport()
            playwright.expect(tab.locator("#grid .scroll")).to_have_class("scroll scrolls")
            tab.locator(".head summary").click()
            playwright.expect(tab.locator(".head code")).to_have_text("tl-latentlens explore b.h5 --port <80>")
            assert tab.evaluate("document.documentElement.scrollWidth") == 390
            chromium.close()
    finally:
        server.shutdown()
        thread.join()
    assert said == []
