"""Labelled SAE features as tables for the terminal."""

import math
from collections.abc import Sequence

import pandas as pd
from rich import box
from rich.table import Table

from tl_latentlens.views.chance import geometry_note
from tl_latentlens.views.data import FeatureLine
from tl_latentlens.views.terminal.layout import add_nearest_rows, label_text, terminal_width

_SCORES = {
    "density": "density",
    "detection": "detection",
    "auroc": "auroc",
    "same token": "auroc_same_token",
    "cos": "similarity",
    "z": "z",
}  # Heading → column of the feature table.
_SCORES_OF_NARROW_TABLES = ("density", "detection", "similarity")


def feature_table(
    features: Sequence[FeatureLine], score_names: Sequence[str], n_features: int, transform: str, width: int | None = None
) -> Table:
    """A line a feature: scores, label or what kept it back, and the nearest row.

    Args:
        features: The features that are shown.
        score_names: The scores that are known.
        n_features: How many there are.
        transform: How they were compared with the rows.
        width: Width of the table in characters; None: the terminal's. In a narrow one some scores are left out.
    """
    width = terminal_width(width)
    scores = {heading: name for heading, name in _SCORES.items() if name in score_names}
    if width < 110:
        scores = {heading: name for heading, name in scores.items() if name in _SCORES_OF_NARROW_TABLES}
    table = Table(box=box.SIMPLE_HEAD, header_style="dim")
    for heading in ("feature", *scores):
        table.add_column(heading, justify="right", no_wrap=True, min_width=max(len(heading), 5))
    texts = [label_text(line.label, line.why_not, line.kind) for line in features]
    labels = add_nearest_rows(table, "label, or why not", texts, [line.neighbors for line in features], width)
    for line, cells in zip(features, labels, strict=True):
        table.add_row(str(line.feature), *(_score(name, line.scores[name]) for name in scores.values()), *cells)
    shown = f"{len(features)} of {n_features:,} features, " if n_features > len(features) else ""
    table.caption = shown + geometry_note(transform)
    return table


def _score(name: str, value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.1%}" if name in ("density", "overlap") else f"{value:.1f}" if name == "z" else f"{value:.2f}"


def label_counts(table: pd.DataFrame) -> str:
    """The number of features, of those with a label, and of those without one for each reason, in one line."""
    reasons = pd.Series([reason for reason in table["why_not"] if reason], dtype=str)
    counts = reasons.str.replace(r" \(p = .*\)", "", regex=True).value_counts()
    counted = "".join(f"; {n:,}: {reason}" for reason, n in counts.items())
    return f"{len(table):,} features, {len(table) - counts.sum():,} labelled{counted}"


def summary_table(summary: pd.DataFrame) -> Table:
    """The means over all features, with their intervals and nulls."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 0, 0, 1))
    for heading in ("figure", "mean", "95 %", "null", "n"):
        table.add_column(heading, justify="left" if heading == "figure" else "right", no_wrap=heading != "figure")
    for line in summary.to_dict("records"):
        interval = "" if math.isnan(line["low"]) else f"{line['low']:.3f}–{line['high']:.3f}"
        null = "" if math.isnan(line["null"]) else f"{line['null']:.3f}"
        table.add_row(line["figure"], f"{line['mean']:.3f}", interval, null, f"{line['features']:,}")
    return table
