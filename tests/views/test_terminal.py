"""Tables for the terminal fit, and show what was read."""

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

import tl_latentlens as tll
from tl_latentlens.evaluation.evaluate import Evaluation
from tl_latentlens.index.transforms import TRANSFORMS
from tl_latentlens.statistics.measures import Measure, ReaderKey
from tl_latentlens.views.context import Context
from tl_latentlens.views.data import LensCell, NeighborLine, TokenHeading
from tl_latentlens.views.terminal.features import label_counts, summary_table
from tl_latentlens.views.terminal.layout import plain_text
from tl_latentlens.views.terminal.lens import lens_tables
from tl_latentlens.views.text import display_width


@pytest.mark.parametrize("width", [80, 100, 160])
def test_table_fits_and_marks_the_token(result: tll.LensResult, width: int) -> None:
    assert result.tokens is not None
    pos = result.tokens[0].index(" bank")
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(result.to_rich(2, [(0, pos)], width=width))
    lines = console.export_text().splitlines()
    assert all(len(line) <= width for line in lines)
    shown = "\n".join(lines)
    assert "in the «bank» before noon" in shown
    assert "logit lens" in shown
    assert "embedding lens" in shown
    layers = [line.split()[0] for line in lines if line[:4].strip().isdecimal()]
    assert layers == [name.split(".")[1] for name in result.hook_names]


@pytest.mark.parametrize("width", [80, 120])
def test_table_says_what_the_bank_knows(calibrated: tll.LensResult, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True)
    console.print(calibrated.to_rich(2, width=width))
    shown = console.export_text(clear=False)
    assert all(len(line) <= width for line in shown.splitlines())
    assert re.findall(r"^ +layer +p +other words +nearest uses", shown, re.MULTILINE)
    figures = re.findall(r"^ +[13] +(\d\.\d\d|<\.01) ", shown, re.MULTILINE)
    cells = [calibrated.cell(name, pos, batch) for batch, pos in calibrated.positions for name in calibrated.hook_names]
    assert figures == ["<.01" if cell.known < 0.01 else f"{cell.known:.2f}" for cell in cells]
    marks = re.findall(r"\x1b\[([\d;]+)m«", console.export_text(styles=True))
    titles = [mark for mark in marks if mark == "1;7"]
    assert len(titles) == len(calibrated.positions)
    dim = [mark == "2" for mark in marks if mark != "1;7"]
    assert dim == [cell.known <= 0.05 for cell in cells for _ in range(2)]


@pytest.mark.parametrize("width", [80, 120])
def test_columns_stand_in_order_and_are_explained(calibrated: tll.LensResult, width: int) -> None:
    lines = plain_text(calibrated.to_rich(2, width=width), width).splitlines()
    first_row = next(i for i, line in enumerate(lines) if line.split()[:1] == ["1"])
    heading = " ".join(" ".join(lines[first_row - 3 : first_row - 1]).split())
    assert re.fullmatch(r"(logit embedding )?layer p other words nearest uses (logit lens embedding lens|lens lens)", heading)
    legend = lines[-6:]
    assert [line[:15].strip() for line in legend] == [
        "layer", "p", "other words", "nearest uses", "logit lens", "embedding lens",
    ]  # fmt: skip
    assert "high: the bank knows such a token; ≤ .05 (dim): it does not" in legend[1]
    assert "1.5× as far" in legend[3]
    has_around = any(cell.around for cell in calibrated.cells())
    assert ("near: words around" in legend[2]) == has_around


def test_the_legend_explains_only_what_is_shown(any_model: Any, index: tll.ContextualIndex) -> None:
    hooks = tll.latentlens_hooks(
        index, [1, "blocks.1.hook_mlp_out"], words=0, calibrate=False, logit_lens=False, model=any_model
    )
    any_model.run_with_hooks("A bank", fwd_hooks=hooks)
    lines = str(hooks.result).rstrip().splitlines()
    assert [line[:12].strip() for line in lines[-2:]] == ["hook", "nearest uses"]
    assert not any("the bank knows" in line or "other words" in line for line in lines)


@pytest.mark.parametrize("width", [66, 80])
def test_narrow_tables_are_not_cut_off(any_model: Any, index: tll.ContextualIndex, width: int) -> None:
    names = [1, "blocks.3.hook_mlp_out", 4]
    hooks = tll.latentlens_hooks(index, names, embedding_lens=True, model=any_model)
    any_model.run_with_hooks("He sat on the bank", fwd_hooks=hooks)
    shown = plain_text(hooks.result.to_rich(2, [(0, 5)], width=width), width)
    assert all(len(line) <= width for line in shown.splitlines())
    assert "3 mlp_out" in shown
    assert ("embedding lens" in shown) == (width == 80), "a lens gives way, and its line of the legend too"
    table = shown.partition("layer ")[0]
    tokens = [token for lens in ("logit_lens", "embedding_lens")[: 1 + (width == 80)] for name in hooks.result.hook_names
              if (read := getattr(hooks.result.cell(name, 5), lens)) for token, _ in read[:2]]  # fmt: skip
    assert all(token.strip()[:2] in table for token in tokens), "no column is cut off"
    assert re.search(r"logit +embedding *$" if width == 80 else r"logit *$", table, re.MULTILINE)


def test_hook_names_that_are_no_layers_keep_their_names(any_model: Any, index: tll.ContextualIndex) -> None:
    hooks = tll.latentlens_hooks(index, ["blocks.3.hook_mlp_out"], model=any_model)
    any_model.run_with_hooks("On the bank", fwd_hooks=hooks)
    assert re.search(r"^ +3 mlp_out ", str(hooks.result), re.MULTILINE)
    assert re.search(r"^ +3 mlp_out ", str(hooks.result.word_strip("bank")), re.MULTILINE)


def test_other_words_and_words_around_stand_in_one_column() -> None:
    near = NeighborLine(Context("at the", " bank", "."), 0.9, None, "blocks.3.hook_resid_post", 0, 0)
    words = ["store", "shop", "branch", "office", "restaurant", "market", "garden", "kitchen"]
    cells = [
        LensCell("blocks.3.hook_resid_post", 0, 1, " bank", [near], {}, 0.5, None, words, ["savings", "loan"]),
        LensCell("blocks.9.hook_resid_post", 0, 1, " bank", [near], {}, 0.5, None, [], []),
    ]
    shown = plain_text(lens_tables([(TokenHeading("pos 1", None), cells)], 80), 80)
    column = " ".join(line[17:38].strip() for line in shown.splitlines())
    assert "store, shop, branch, office, restaurant, market, garden, kitchen near: savings, loan –" in column
    assert re.search(r"^ +9 +0.50 +–", shown, re.MULTILINE)


def test_a_jump_stands_between_the_uses() -> None:
    def lines_of(cosines: list[float]) -> list[str]:
        nears = [
            NeighborLine(Context("at", f" word{i}", "."), cosine, None, "blocks.3.hook_resid_post", i, 0)
            for i, cosine in enumerate(cosines)
        ]
        cell = LensCell("blocks.3.hook_resid_post", 0, 1, " bank", nears, {}, 0.5, None, None)
        shown = plain_text(lens_tables([(TokenHeading("pos 1", None), [cell])], 80), 80)
        return re.findall("word\\d|┄┄┄", shown)

    assert lines_of([0.98, 0.96, 0.95]) == ["word0", "┄┄┄", "word1", "word2"]
    assert lines_of([0.95, 0.94, 0.93]) == ["word0", "word1", "word2"]
    assert lines_of([0.9999, 0.9994, 0.9985]) == ["word0", "word1", "word2"], "within what half precision loses"


def test_figures_of_the_nearest_use_are_in_the_data(calibrated: tll.LensResult) -> None:
    [pos] = [i for i, token in enumerate(calibrated.tokens[0]) if token == " the"][:1]
    cells = [calibrated.cell(name, pos) for name in calibrated.hook_names]
    assert any(cell.use_chance is not None for cell in cells)
    table = calibrated.to_dataframe().query("batch == 0 and pos == @pos")
    for cell in cells:
        lines = table[table["hook_name"] == cell.hook_name]
        assert lines["known"].tolist() == [pytest.approx(cell.known)] * 3
        assert lines["use_chance"].isna().tolist() == [cell.use_chance is None, True, True]
        assert not lines["chance"].isna().any()


@pytest.mark.parametrize("width", [80, 160])
def test_feature_table_shows_what_tells_features_apart(bank: tll.Bank, width: int) -> None:
    sae = tll.load_sae("demo")
    index = tll.ContextualIndex(bank, sae.hook_name, device="cpu", transform="center")
    features = tll.label_features(sae, index, range(60), top_k=4, progress=False)
    is_mixed = (features.table["label"] != "") & (features.table["feature"] % 2 == 0)
    features = replace(features, table=features.table.assign(label_kind=features.table["label_kind"].mask(is_mixed, "mixed")))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(features.to_rich(60, width=width))
    lines = console.export_text().splitlines()
    assert all(len(line) <= width for line in lines)
    heading = next(line.split() for line in lines if "feature" in line)
    assert heading == ["feature", "density", "detection", "label,", "or", "why", "not", "writes"]
    numbers = [int(line.split()[0]) for line in lines if line.split() and line.split()[0].isdigit()]
    table = features.table.set_index("feature").loc[numbers]
    assert sorted(numbers) == list(range(60))
    places = table["label_kind"].map({"": 2, "mixed": 1}).fillna(0).to_numpy()
    assert set(places) == {0, 1, 2}, "named, mixed and none"
    assert (np.diff(places) >= 0).all()
    for place in (0, 1, 2):
        assert (np.diff(table["similarity"][places == place]) <= 0).all()
    shown = " ".join(" ".join(lines).split())
    if width == 160:
        for label, words in zip(table["label"], table["words"], strict=True):
            assert " ".join(f"{label} {', '.join(words[:3])}".split()) in shown


def test_refusals_are_counted_by_reason() -> None:
    why = ["", "too far (p = 0.5)", "too far (p = 0.012)", "never active", ""]
    table = pd.DataFrame({"label_kind": ["token", "", "", "", "token"], "why_not": why})
    assert label_counts(table) == "5 features: 2 named, 3 without a label (2: too far; 1: never active)"


def test_labels_are_counted_by_kind() -> None:
    kinds = ["position", "after", "token", "mixed", "token", "after", "mixed"]
    table = pd.DataFrame(
        {"label_kind": kinds, "why_not": [kind.replace("mixed", "no three") for kind in kinds], "density": 0.5}
    )
    assert label_counts(table) == ("7 features: 5 named (2 fire on a token, 2 before one, 1 at a position), 2 mixed")
    assert label_counts(table[:2]) == "2 features: 2 named (1 fire before one, 1 at a position)"
    assert label_counts(table[3:4]) == "1 features: 0 named, 1 mixed"
    assert label_counts(table[:0]) == "0 features: 0 named"


def test_terminal_shows_escape_codes_as_signs(hostile: tll.LensResult) -> None:
    found = next(iter(hostile.found.values()))
    directions = tll.decode_directions(found.index.banks[0].vectors(found.index.hook_names[0])[:20], found.index, top_k=3)
    for shown in (str(hostile), str(directions)):
        assert "\x1b" not in shown
        assert "␛[31m" in shown


@pytest.mark.parametrize("width", [80, 200])
def test_wide_characters_stand_in_their_columns(any_model, tmp_path: Path, width: int) -> None:
    texts = ["日本語の天気はとても良いです bank 日本語の天気", "The river bank", "東京 bank and the 東京 tower stand"]
    built = tll.build_bank(any_model, texts, tmp_path / "wide.h5", hook_names="blocks.2.hook_resid_post", progress=False)
    hooks = tll.latentlens_hooks(tll.ContextualIndex(built, device="cpu"), top_k=3)
    any_model.run_with_hooks(texts, fwd_hooks=hooks)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(hooks.result.to_rich(width=width))
    lines = console.export_text().splitlines()
    assert all(display_width(line) <= width for line in lines)
    ends = [display_width(line.partition("%")[0]) for line in lines if "%" in line]
    assert len(ends) == 3 * len(hooks.result.positions)
    for start in range(0, len(ends), 3):
        assert len(set(ends[start : start + 3])) == 1, "the logit lens begins in one column"


def test_measures_of_many_hook_names_stand_below_one_another() -> None:
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(48)]
    rng = np.random.default_rng(0)
    values = {ReaderKey("raw", name): rng.random(20) for name in names} | {ReaderKey("layer 0"): rng.random(20)}
    shown = plain_text(Evaluation([Measure("topic", values, "tokens")], ("raw",)).to_rich(width=80), 80).splitlines()
    assert all(len(line) <= 80 for line in shown)
    headings = [line.split()[1:-1] for line in shown if "reader" in line]
    assert [int(layer) for line in headings for layer in line] == list(range(48))
    means = [float(mean) for line in shown if line.split()[:1] == ["raw"] for mean in line.split()[1:-1]]
    np.testing.assert_allclose(means, [values["raw", name].mean() for name in names], atol=6e-4)


@pytest.mark.parametrize("scale", [1, 20])
def test_measures_of_eight_layers_are_one_table_at_80_columns(scale: int) -> None:
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(0, 32, 4)]
    values = {ReaderKey("most frequent sense"): scale * np.linspace(0, 1, 20)}
    values |= {ReaderKey("raw", name): scale * np.linspace(0.1, 1, 20) for name in names}
    measure = Measure("KL of neighbor 1 on later tokens (nats)", values, "tokens", lower_is_better=True)
    lines = plain_text(Evaluation([measure], ("raw",)).to_rich(width=80), 80).splitlines()
    assert all(len(line) <= 80 for line in lines)
    (heading,) = (line for line in lines if "reader" in line)
    assert heading.split() == ["reader", *map(str, range(0, 32, 4)), "±"]
    assert lines[0].startswith("KL of neighbor 1 on later tokens (nats), blocks.*.hook_resid_post:")
    assert lines[1].rstrip() == "lower is better, 20 tokens"


@pytest.mark.parametrize("width", [80, 120])
def test_geometric_means_show_small_amounts_and_a_factor(width: int) -> None:
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(5)]
    means = [0.0012, 0.034, 1.2, 3e-5, 0.0]
    spread = np.exp(np.linspace(-1, 1, 21))
    values = {ReaderKey("raw", name): mean * spread for name, mean in zip(names, means, strict=True)}
    measure = Measure("KL of neighbor 1 (nats)", values, "tokens", lower_is_better=True, kind="geometric mean")
    lines = plain_text(Evaluation([measure], ("raw",)).to_rich(width=width), width).splitlines()
    assert all(len(line) <= width for line in lines)
    assert "geometric mean, lower is better, 21 tokens" in "".join(lines[:2])
    cells = {line.split()[0]: line.split()[1:] for line in lines if line.split()}
    assert cells["reader"] == ["0", "1", "2", "3", "4", "×÷"]
    assert cells["raw"][:-1] == [".0012", "0.034", "1.200", "3e-05", "0.000"]
    assert 1.2 < float(cells["raw"][-1]) < 1.5


def test_the_larger_half_of_an_interval_stands_after_plus_minus() -> None:
    shares = np.array([1.0] * 29 + [0.0])
    measure = Measure("next token", {ReaderKey("raw", "blocks.0.hook_resid_post"): shares}, "tokens", kind="share")
    shown = plain_text(Evaluation([measure], ("raw",)).to_rich(width=80), 80)
    line = measure.table().iloc[0]
    assert f"{line['mean'] - line['low']:.3f}" in shown
    assert f"{line['high'] - line['mean']:.3f}" not in shown


def test_gains_without_an_interval_are_not_sure_and_those_of_amounts_are_relative() -> None:
    name = "blocks.0.hook_resid_post"
    amounts = np.exp(np.random.default_rng(0).normal(size=40))
    columns = {"raw": amounts, "center": amounts, "csls": amounts * np.linspace(1.1, 1.3, 40)}
    values = {ReaderKey(transform, name): column for transform, column in columns.items()}
    measure = Measure("KL", values, "tokens", lower_is_better=True, kind="geometric mean")
    shown = plain_text(Evaluation([measure], tuple(columns)).to_rich(width=80), 80)
    gains = next(line for line in shown.splitlines()[::-1] if line.split()[:1] == ["KL"])
    assert gains.split() == ["KL", "+0.0%", "-19.9%*"]


def test_label_scores_stand_in_lines_of_their_own_at_80_columns() -> None:
    figures = ["labelled", "auroc_same_token beats shuffled, p < 0.01", "steered_next"]
    summary = pd.DataFrame({"figure": figures, "mean": 0.5, "low": 0.25, "high": 0.75, "null": 0.01, "features": 65536})
    lines = plain_text(summary_table(summary), 80).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert [line.split("0.500")[0].strip() for line in lines if "0.500" in line] == figures


@pytest.mark.parametrize("width", [80, 200])
def test_gains_show_every_transform_by_name(width: int) -> None:
    name = "blocks.3.hook_resid_post"
    values = {ReaderKey(transform, name): np.arange(9.0) for transform in TRANSFORMS}
    measure = Measure("KL of neighbor 1 on later tokens (nats)", values, "tokens")
    shown = plain_text(Evaluation([measure], tuple(TRANSFORMS)).to_rich(width=width), width)
    assert all(len(line) <= width for line in shown.splitlines())
    heading = next(line for line in shown.splitlines() if line.split()[:1] == ["measure"])
    assert heading.split()[1:] == [one for one in TRANSFORMS if one != "raw"]


def test_printed_results_are_tables(result: tll.LensResult, index: tll.ContextualIndex) -> None:
    shown = str(result)
    assert "pos 1 " in shown
    assert "nearest uses" in shown
    assert "nearest to −v" in str(tll.decode_directions(index.banks[0].vectors(index.hook_names[0])[:2], index, top_k=2))


@pytest.mark.parametrize("width", [60, 80])
def test_printed_results_show_what_was_asked_for_at_the_width_of_the_terminal(
    any_model: Any, index: tll.ContextualIndex, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr("rich._console", Console(width=width))
    vectors, name = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)), index.hook_names[-1]
    hooks = tll.latentlens_hooks(index, top_k=7)
    any_model.run_with_hooks("The river", fwd_hooks=hooks)
    steer = tll.SteeringLens(vectors[0], index, name, multiples=(0, 1), top_k=6)
    n_marks = [
        (hooks.result, 2 * (7 * len(index.hook_names) + 1)),
        (tll.decode_directions(vectors, index, top_k=9), 3 * 2 * 9 + 1),
        (tll.label_features(vectors, index, top_k=8, hook_name=name, progress=False), 3 * 8),
        (steer.run(any_model, "The river"), 2 * 6 + 1),
    ]
    for printed, expected in n_marks:
        lines = str(printed).splitlines()
        assert str(printed).count("«") == expected, type(printed).__name__
        assert width - 40 < max(map(display_width, lines)) <= width, type(printed).__name__
    found = tll.find_features("The river", -1, tll.load_sae("demo"), index, model=any_model, top_k=3, label=False)
    assert width - 30 < max(map(display_width, str(found).splitlines())) <= width
    followed = str(hooks.follow_tokens([" bank"]))
    assert max(map(display_width, followed.splitlines())) <= width


def test_a_sentence_below_the_rows_of_a_direction_says_whether_they_are_near(index: tll.ContextualIndex) -> None:
    name = index.hook_names[3]
    of_rows = torch.from_numpy(np.array(index.banks[0].vectors(name)[5:6]).astype(np.float32))
    random = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    found = tll.decode_directions(torch.cat([of_rows, random]), index, top_k=1, hook_name=name, calibrate=True)
    lines = str(found).splitlines()
    assert all(len(line) <= 80 for line in lines)
    verdicts = [line.strip() for line in lines if "random directions come" in line]
    assert found.scores is not None
    assert found.random is not None
    assert found.random.scores is not None
    shown = pd.concat([found.scores, found.random.scores[:1]])
    expected = [
        f"random directions come as near: p = {p:.2g} (z = {z:.1f}){'; may be chance' * (p >= 0.01)}"
        for z, p in zip(shown["z"], shown["p"], strict=True)
    ]
    assert verdicts == expected, "of both ends of each, and once of the random direction"
    assert sum("random direction (for comparison)" in line for line in lines) == 1
    assert "may be chance" not in verdicts[0]
    assert "may be chance" in verdicts[1], "nothing is near to the opposite of a row"
    assert found._repr_html_().count("random directions come as near") == 6
    assert found._repr_html_().count("random direction (for comparison)") == 1
    for place in range(2):
        printed = plain_text(found.neighbors_to_rich(place), 80)
        assert printed.count("random direction (for comparison)") == 1
        assert "compared with the rows less the mean of their hook name (center)" in printed
    assert found._repr_html_().count("explains it") == str(found).count("explains it")
    assert "random" not in str(tll.decode_directions(random, index, top_k=2, calibrate=False))
    raw = tll.ContextualIndex(index.banks[0], name, device="cpu", transform="raw")
    assert "compared with the rows as they are (raw)" in str(tll.decode_directions(random, raw, top_k=2))


def test_printed_results_are_plain_text_in_a_notebook(result: tll.LensResult, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = str(result)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert str(result) == expected
