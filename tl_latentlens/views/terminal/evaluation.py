"""An evaluation as tables for the terminal."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tl_latentlens.views.data import MeasurePanel
from tl_latentlens.views.terminal.features import summary_table
from tl_latentlens.views.terminal.layout import longest_width, terminal_width, titled
from tl_latentlens.views.text import hook_headings

_PADDINGS = {3: (0, 1), 2: (0, 0, 0, 1), 1: (0, 0)}  # Characters between columns, and rich's padding for them.
_GEOMETRIC = "geometric mean"
_EDGES = 4  # Characters that the left and the right edge of a table take at most.


def evaluation_tables(
    panels: Sequence[MeasurePanel],
    transforms: Sequence[str],
    gains: pd.DataFrame | None,
    labels: pd.DataFrame | None,
    width: int | None = None,
) -> Group:
    """Tables for each measure, readers by hook names; then what each transform gains over the first; then label scores.

    Args:
        panels: The measures.
        transforms: The transforms that were compared.
        gains: What the other transforms gain: measure, reader, gain, low, high, kind; None where there is one transform.
        labels: Label scores of an SAE, a block of lines for each transform; None without an SAE.
        width: In characters; None: the terminal's.
    """
    parts = [_measure_tables(panel, transforms, terminal_width(width)) for panel in panels]
    if gains is not None:
        title = f"gain over {transforms[0]}, hook names together: above 0 better, * where sure at 95 %"
        parts.append(titled(title, _gains_table(gains)))
    if labels is not None:
        for transform, summary in labels.groupby("transform", sort=False):
            parts.append(titled(f"labels of SAE features, {transform}", summary_table(summary)))
    return Group(*parts)


def _measure_tables(panel: MeasurePanel, transforms: Sequence[str], width: int) -> Group:
    """Title and means, in parts only where the hook names do not fit side by side, however near the columns stand."""
    lines = panel.table
    hook_names = [name for name in dict.fromkeys(lines["hook_name"]) if name]
    headings, kind = hook_headings(hook_names)
    title = Text(f"{panel.name}{f', {kind}' if kind else ''}: ", "bold")
    note = f"{'lower' if panel.lower_is_better else 'higher'} is better, {lines['n'].max():,} {panel.unit}"
    note = f"{panel.kind}, {note}" if panel.kind == _GEOMETRIC else note
    title.append("" if title.cell_len + len(note) <= width else "\n").append(note)
    reader_width, mean_width = (
        longest_width("reader", *lines["reader"]),
        longest_width(*(_mean(mean, panel.kind) for mean in lines["mean"])),
    )
    column_width = max(mean_width, longest_width(*headings))

    def n_parts(margin: int) -> int:
        free = width - reader_width - mean_width - margin - _EDGES
        return math.ceil(len(hook_names) / max(1, free // (column_width + margin)))

    margin = min(_PADDINGS, key=lambda margin: (n_parts(margin), -margin))
    parts = np.array_split(hook_names, n_parts(margin))
    return Group(title, *(_measure_table(panel, names.tolist(), transforms, margin) for names in parts))


def _mean(value: float, kind: str) -> str:
    """A mean in five characters where it is below 100; geometric means have two digits from 0.001 on: 0.123, .0012, 1e-05."""
    if kind == _GEOMETRIC and 0 < value < 0.00095:
        return f"{value:.0e}"
    if kind == _GEOMETRIC and 0 < value < 0.00995:
        return f"{value:.4f}".removeprefix("0")
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def _half_interval(lines: pd.DataFrame, kind: str) -> str:
    """The larger half of the interval, averaged over the lines: what stands after ±, or the factor that stands after ×÷."""
    mean, low, high = (lines[name].to_numpy(float) for name in ("mean", "low", "high"))
    if kind == _GEOMETRIC:
        if not (is_above := low > 0).any():
            return ""
        mean, low, high = (np.log(ends[is_above]) for ends in (mean, low, high))
        return f"{np.exp(np.fmax(high - mean, mean - low).mean()):.2f}"
    half = float(np.fmax(high - mean, mean - low).mean())
    return "" if math.isnan(half) else f"{half:.3f}" if half < 10 else f"{half:.2f}"


def _measure_table(panel: MeasurePanel, hook_names: Sequence[str], transforms: Sequence[str], margin: int) -> Table:
    """Readers by hook names; the best transform at each hook name in bold."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=_PADDINGS[margin])
    table.add_column("reader", no_wrap=True)
    for heading in hook_headings(hook_names)[0]:
        table.add_column(heading, justify="right")
    table.add_column("×÷" if panel.kind == _GEOMETRIC else "±", justify="right")
    lines = panel.table
    means = {
        (reader, name): float(mean)
        for reader, name, mean in zip(lines["reader"], lines["hook_name"], lines["mean"], strict=True)
    }
    sign = -1 if panel.lower_is_better else 1
    best = {name: max(sign * means[transform, name] for transform in transforms) for name in hook_names}
    for reader, reader_lines in lines.groupby("reader", sort=False):
        needs_no_hook = (reader, "") in means
        values = {
            name: means[reader, "" if needs_no_hook else name]
            for name in hook_names
            if needs_no_hook or (reader, name) in means
        }
        styles = {name: "bold" if reader in transforms and sign * values[name] == best[name] else "" for name in values}
        cells = [Text(_mean(values[name], panel.kind), styles[name]) if name in values else Text() for name in hook_names]
        reader_text = Text(str(reader), "" if reader in transforms else "dim")
        table.add_row(reader_text, *cells, Text(_half_interval(reader_lines, panel.kind), "dim"))
    return table


def _gains_table(gains: pd.DataFrame) -> Table:
    """The gain of each transform, marked where its interval leaves 0 out."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=_PADDINGS[2])
    table.add_column("measure")
    for reader in dict.fromkeys(gains["reader"]):
        table.add_column(reader, justify="right", no_wrap=True)
    for measure, lines in gains.groupby("measure", sort=False):
        cells = []
        for gain, low, high, kind in zip(lines["gain"], lines["low"], lines["high"], lines["kind"], strict=True):
            is_sure = low > 0 or high < 0
            figure = f"{gain:+.1%}" if kind == _GEOMETRIC else f"{gain:+.3f}"
            cells.append(Text(f"{figure}{'*' if is_sure else ' '}", "bold" if is_sure else ""))
        table.add_row(str(measure), *cells)
    return table
