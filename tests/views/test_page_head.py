"""Every page opens with one head: what it shows, of which model and bank, by which call; all of it as text."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest

import tl_latentlens as tll
from tl_latentlens.views.page_head import PageHead, head_html, hook_names_phrase
from tl_latentlens.views.template import render_template

LAYERS = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
HOSTILE_NAME = "{{data}} <b>{{css}}</b> \x1b[31m"


@pytest.mark.parametrize(
    ("hook_names", "phrase"),
    [
        ([f"blocks.{layer}.hook_resid_post" for layer in (0, 1, 2, 5, 7, 8)], "blocks.*.hook_resid_post, layers 0–2, 5, 7–8"),
        (["blocks.11.attn.hook_z[3]"], "blocks.*.attn.hook_z[3], layer 11"),
        (["hook_embed", "blocks.3.hook_mlp_out"], "hook_embed; blocks.*.hook_mlp_out, layer 3"),
        (["blocks.0.hook_resid_pre", *LAYERS], "blocks.*.hook_resid_pre, layer 0; blocks.*.hook_resid_post, layers 0–2"),
        ([f"own.{i}" for i in range(9)], "own.0; own.1; own.2; own.3; own.4; own.5 and 3 more"),
        ([], ""),
    ],
)
def test_hook_names_are_said_in_a_few_words(hook_names: list[str], phrase: str) -> None:
    assert hook_names_phrase(hook_names) == phrase


def test_names_with_markup_and_places_of_the_template_are_text() -> None:
    head = PageHead(HOSTILE_NAME, HOSTILE_NAME, HOSTILE_NAME, HOSTILE_NAME, ["hook_embed"], HOSTILE_NAME, [HOSTILE_NAME])
    page = render_template("page.html", {"texts": HOSTILE_NAME}, head)
    shown = "{{data}} &lt;b&gt;{{css}}&lt;/b&gt; ␛[31m"
    assert page.count(shown) == 6
    assert "<b>" not in page
    assert date.today().isoformat() in page
    bare = head_html(PageHead("t", "l", "m", "b", []))
    assert "<details" not in bare
    assert "hooks" not in bare


def test_the_head_of_a_reading_names_what_was_read(calibrated: tll.LensResult, tmp_path: Path) -> None:
    head = calibrated.to_html(tmp_path / "r.html").read_text(encoding="utf-8").partition("<header")[2].partition("</header>")[0]
    index: Any = next(iter(calibrated.found.values())).index
    for part in (
        "demo_model, 6 layers, d_model 256",
        f"bank.h5, {index.n_rows:,} rows",
        "blocks.*.hook_resid_post, layers 1, 3",
        "latentlens_hooks(ContextualIndex(&quot;bank.h5&quot;), top_k=3, words=8, calibrate=True, embedding_lens=True)",
        "the bank does not know the token",
        "Embedding lens:",
    ):
        assert part in head
    typed = calibrated.to_html(tmp_path / "r.html", call="tl-latentlens decode b.h5 'a < b'").read_text(encoding="utf-8")
    assert "<code>tl-latentlens decode b.h5 &#x27;a &lt; b&#x27;</code>" in typed
