"""Labelled SAE features as tables for the terminal."""

import math
from collections.abc import Sequence

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from tl_latentlens.views.chance import geometry_note
from tl_latentlens.views.data import FeatureLine
from tl_latentlens.views.label_kinds import MIXED, N_WRITES, counts_in_words
from tl_latentlens.views.terminal.layout import label_text, longest_width, marked_text, terminal_width

_SCORES = {"density": "density", "detection": "detection"}  # Heading → column of the feature table.
_SCORES_WITHOUT_ENCODER = {"cos": "similarity", "z": "z"}
_CHANCE_DETECTION = 0.5
_DETECTION_NOTE = "detection: does the label tell held-out contexts? chance 0.5 (dim); best first"
_LARGEST_PART_OF_WRITES = 0.42


def feature_table(
    features: Sequence[FeatureLine], score_names: Sequence[str], n_features: int, transform: str, width: int | None = None
) -> Table:
    """A line a feature: how often it is active, how well its label does, the label or what kept it back, what it writes.

    Args:
        features: The features that are shown; their nearest rows stand below the label.
        score_names: The scores that are known. Without an encoder, it is shown how near the nearest rows are.
        n_features: How many there are.
        transform: How they were compared with the rows.
        width: Width of the table in characters; None: the terminal's.
    """
    width = terminal_width(width)
    scores = _SCORES if "density" in score_names else _SCORES_WITHOUT_ENCODER
    table = Table(box=box.SIMPLE_HEAD, header_style="dim")
    for heading in ("feature", *scores):
        table.add_column(heading, justify="right", no_wrap=True, min_width=max(len(heading), 5))
    writes = [Text(", ".join(line.writes[:N_WRITES])) for line in features]
    taken = sum((column.min_width or 0) + 3 for column in table.columns)  # Three characters lie between two columns.
    free = max(20, width - taken - 7)
    width_of_writes = min(longest_width("writes", *writes), int(_LARGEST_PART_OF_WRITES * free))
    rows_width = free - width_of_writes
    labels = [
        Text("\n").join(
            [
                _label(line),
                *(marked_text(row.context.clipped(rows_width - 2), "bold") for row in line.neighbors),
            ]
        )
        for line in features
    ]
    table.add_column("label, or why not", width=min(longest_width("label, or why not", *labels), rows_width))
    table.add_column("writes", width=width_of_writes)
    for line, label, words in zip(features, labels, writes, strict=True):
        table.add_row(str(line.feature), *(_score(name, line.scores[name]) for name in scores.values()), label, words)
    shown = f"{len(features)} of {n_features:,} features, " if n_features > len(features) else ""
    notes = [_DETECTION_NOTE] if "detection" in score_names else []
    table.caption = "\n".join([*notes, f"writes: the words nearest to it. {shown}{geometry_note(transform)}"])
    table.caption_justify = "left"
    return table


def _label(line: FeatureLine) -> Text:
    """The label of a feature; dim where it tells held-out contexts apart no better than chance."""
    text = label_text(line.label, line.why_not, line.kind)
    if line.scores.get("detection", math.nan) <= _CHANCE_DETECTION:
        text.stylize("dim")
    return text


def _score(name: str, value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.1%}" if name == "density" else f"{value:.1f}" if name == "z" else f"{value:.2f}"


def label_counts(table: pd.DataFrame) -> str:
    """The number of features, of those named by each kind of label, of mixed ones, and of others by reason, in one line."""
    of_kind = {str(kind): int(n) for kind, n in table["label_kind"].value_counts().items()}
    n_mixed, n_none = of_kind.pop(MIXED, 0), of_kind.pop("", 0)
    kinds = counts_in_words(of_kind) if "density" in table else ""
    reasons = pd.Series(table["why_not"][table["label_kind"] == ""]).str.replace(r" \(p = .*\)", "", regex=True).value_counts()
    whys = "; ".join(f"{n:,}: {reason}" for reason, n in reasons.items())
    parts = [
        f"{len(table):,} features: {sum(of_kind.values()):,} named{f' ({kinds})' if kinds else ''}",
        *([f"{n_mixed:,} mixed"] if n_mixed else []),
        *([f"{n_none:,} without a label ({whys})"] if n_none else []),
    ]
    return ", ".join(parts)


def summary_table(summary: pd.DataFrame) -> Table:
    """The means over all features, with their intervals and nulls."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 0, 0, 1), show_edge=False)
    for heading in ("figure", "mean", "95 %", "null", "n"):
        table.add_column(heading, justify="left" if heading == "figure" else "right", no_wrap=heading != "figure")
    for line in summary.to_dict("records"):
        interval = "" if math.isnan(line["low"]) else f"{line['low']:.3f}–{line['high']:.3f}"
        null = "" if math.isnan(line["null"]) else f"{line['null']:.3f}"
        table.add_row(line["figure"], f"{line['mean']:.3f}", interval, null, f"{line['features']:,}")
    return table
