"""Layers that read alike stand in one line."""

import json
import re
from html import unescape
from pathlib import Path

import pytest
from support.pages import dumped_dom, page_data

import tl_latentlens as tll
from tl_latentlens.views.data import TokenHeading
from tl_latentlens.views.strip import Strip, StripLine, strip_lines

NAMES = [f"blocks.{i}.hook_resid_post" for i in (0, 3, 6, 9)]


@pytest.mark.parametrize(
    ("lists", "lines"),
    [
        ([], []),
        ([[], []], [StripLine(0, 1, [])]),
        ([[], ["a", "b"]], [StripLine(0, 0, []), StripLine(1, 1, ["a", "b"])]),
        ([["a", "b", "c", "d"], ["a", "b", "x", "y"]], [StripLine(0, 1, ["a", "b", "c", "x"])]),
        ([[*"abcd"], [*"axyz"]], [StripLine(0, 0, [*"abcd"]), StripLine(1, 1, [*"axyz"])]),
        ([["a"], ["a", "b", "c", "d"]], [StripLine(0, 0, ["a"]), StripLine(1, 1, ["a", "b", "c", "d"])]),
        ([["a", "b"], ["b", "a"], ["b", "c"]], [StripLine(0, 2, ["b", "a", "c"])]),
        ([[*"abcde"], [*"xyzwe"]], [StripLine(0, 0, [*"abcd"]), StripLine(1, 1, [*"xyzw"])]),
    ],
)  # fmt: skip
def test_a_line_goes_on_while_half_of_its_words_are_read(lists: list[list[str]], lines: list[StripLine]) -> None:
    assert strip_lines(lists) == lines


def test_a_line_that_drifts_is_held_against_its_first_layer() -> None:
    lists = [["a", "b", "c", "d"], ["c", "d", "e", "f"], ["e", "f", "g", "h"]]
    assert [(line.first, line.last) for line in strip_lines(lists)] == [(0, 1), (2, 2)]


def test_labels_summaries_and_what_is_not_known() -> None:
    lines = [StripLine(0, 1, []), StripLine(2, 2, ["shop", "store", "market"]), StripLine(3, 3, ["river"])]
    strip = Strip(TokenHeading("pos 3", None), "bank", NAMES, lines, [True, False, True, False])
    assert [strip.label(line) for line in lines] == ["0–3", "6", "9"]
    assert strip.summary() == "bank: shop, store → river"
    assert [strip.is_faint(line) for line in lines] == [False, True, False]
    mixed = Strip(TokenHeading("pos 3", None), "bank", ["blocks.0.hook_mlp_out", *NAMES[1:]], lines[:1], [False] * 4)
    assert (mixed.label(lines[0]), mixed.summary()) == ("0 mlp_out–3", "bank: ·")


CLICKED = """{
const rows = [...document.querySelectorAll(".strip li")];
const shown = rows.map(row => [row.querySelector("button").textContent, row.querySelector("span").textContent]);
document.body.dataset.seen = JSON.stringify(shown);
rows[rows.length - 1].querySelector("button").click();
}"""


def test_the_page_shows_the_strip_and_a_click_goes_to_its_layer(
    calibrated: tll.LensResult, browser: str, tmp_path: Path
) -> None:
    path = calibrated.to_html(tmp_path / "page.html")
    data = page_data(path)
    text, strings = data["texts"][0], data["strings"]
    for at, pos in enumerate(text["positions"]):
        lines = calibrated.word_strip(pos).strip.lines
        assert [[first, last, [strings[i] for i in words]] for first, last, words in text["strips"][at]] == [
            [line.first, line.last, line.words] for line in lines
        ]
    path.write_text(path.read_text().replace("</body>", f"<script>{CLICKED}</script></body>"))
    dom = dumped_dom(browser, path, tmp_path / "profile")
    seen = json.loads(unescape(re.findall(r'data-seen="([^"]*)"', dom)[0]))
    strip = calibrated.word_strip(-1 if calibrated.decoded[0, -1] else text["positions"][-1]).strip
    assert seen == [[strip.label(line), ", ".join(line.words) or "·"] for line in reversed(strip.lines)]
    chosen = re.findall(r'<td[^>]*aria-selected="true"[^>]*>', dom)
    assert len(chosen) == 1
    assert f'data-layer="{strip.lines[0].last}"' in chosen[0]


def test_a_page_without_other_words_has_no_strip(any_model, index: tll.ContextualIndex, browser: str, tmp_path: Path) -> None:
    hooks = tll.latentlens_hooks(index, words=0)
    any_model.run_with_hooks("A bank", fwd_hooks=hooks)
    path = hooks.result.to_html(tmp_path / "page.html")
    assert page_data(path)["texts"][0]["strips"] == []
    dom = dumped_dom(browser, path, tmp_path / "profile")
    assert 'class="strip"' not in dom
    assert "aria-selected" in dom
