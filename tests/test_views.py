"""Terminal table, HTML table and heatmap show what was read, and escape what they show."""

import io
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

import tl_latentlens as tll
from tl_latentlens.views.terminal import feature_table, lens_table, refusals
from tl_latentlens.views.text import clip, short_hook_name, visible


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


def test_html_escapes_tokens(result: tll.LensResult) -> None:
    html = result._repr_html_()
    assert "<i>money" not in html
    assert "&lt;" in html
    assert "logit lens" in html


def test_heatmap_has_a_cell_for_each_token_and_hook(result: tll.LensResult) -> None:
    pytest.importorskip("plotly")
    heat = result.plot().data[0]
    assert len(heat.y) == len(result.hook_names)
    assert len(heat.x) == len(result.positions)
    best = result.cell(result.hook_names[0], int(result.positions[0][1])).neighbors[0]
    assert heat.z[0][0] == pytest.approx(best.similarity)
    assert best.token.strip() in heat.customdata[0][0]


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


@pytest.mark.parametrize(("token", "shown"), [(" a", " a"), ("a", "a"), ("  a", "␣ a"), (" ", "␣"), ("\n", "↵"), (None, "?")])
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


def test_printed_results_are_tables(result: tll.LensResult, index: tll.ContextualIndex) -> None:
    shown = str(result)
    assert "pos 1 " in shown
    assert "neighbors" in shown
    assert "similarity" in str(tll.decode_directions(index.banks[0].vectors(index.hook_names[0])[:2], index, top_k=2))
