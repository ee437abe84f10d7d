"""Results as tables for the terminal."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich import box, get_console
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tl_latentlens.directions.feature_result import FeatureResult
from tl_latentlens.evaluation.evaluate import Evaluation
from tl_latentlens.index.neighbor import Neighbor
from tl_latentlens.lens.result import Cell, LensResult
from tl_latentlens.statistics.intervals import Measure
from tl_latentlens.views.text import CHANCE, clip, columns_of, hook_headings, short_hook_name, visible

_FIGURE = 6  # characters of a mean
_LENSES = ("logit lens", "embedding lens")
_TWO_COLUMNS = 64  # characters left: fewer show a label and a row one under the other


def lens_table(
    result: LensResult, *, neighbors: int = 3, positions: Sequence[tuple[int, int]] | None = None, width: int | None = None
) -> Group:
    """One table for each decoded token: a line a hook name with its nearest contexts, and the logit lens beside them.

    Args:
        result: What a run's lens hooks read.
        neighbors: Most neighbors shown for each hook name.
        positions: Show only these (batch, pos); None: all that were decoded.
        width: Width of the whole table in characters; None: the terminal's.
    """
    shown = [tuple(place) for place in result.positions.tolist()] if positions is None else positions
    return Group(*(_token_table(result, batch, pos, neighbors, width or get_console().width) for batch, pos in shown))


def as_text(result: LensResult, *, width: int = 120) -> str:
    """The same tables as plain text."""
    return as_plain(lens_table(result, width=width), width)


def as_plain(shown: RenderableType, width: int) -> str:
    """Anything that rich prints, as plain text: in notebooks, where rich would display it, and under FORCE_COLOR too."""
    text = io.StringIO()
    Console(file=text, width=width, force_jupyter=False, color_system=None).print(shown)
    return text.getvalue()


def _token_table(result: LensResult, batch: int, pos: int, neighbors: int, width: int) -> Table:
    cells = [result.cell(name, pos, batch) for name in result.hook_names]
    columns: dict[str, list[Text]] = {
        "hook": [Text(short_hook_name(cell.hook_name), style="bold") for cell in cells],
        "cos": [Text("\n".join(f"{n.similarity:.2f}" for n in cell.neighbors[:neighbors]), style="cyan") for cell in cells],
    }
    if any(n.chance is not None for cell in cells for n in cell.neighbors):
        columns["p"] = [Text("\n".join(_chance(n) for n in cell.neighbors[:neighbors])) for cell in cells]
    for heading in _LENSES:
        readings = [_reading(cell, heading) for cell in cells]
        if any(readings):
            columns[heading] = [Text("\n".join(f"{score:4.0%} {visible(t)}" for t, score in r[:neighbors])) for r in readings]
    taken = sum(longest(heading, *texts) + 2 for heading, texts in columns.items())
    room = max(16, width - taken - len(columns) - 4)  # two spaces a column are counted; what is left are separators
    contexts = [Text("\n").join(neighbor_text(n, cell.hook_name, room) for n in cell.neighbors[:neighbors]) for cell in cells]
    table = Table(
        box=box.SIMPLE_HEAD,
        title=token_title(result, batch, pos, width - 24),
        title_justify="left",
        title_style="",
        header_style="dim",
    )
    order = ["hook", "cos", *(["p"] if "p" in columns else []), "neighbors", *(h for h in _LENSES if h in columns)]
    columns["neighbors"] = contexts
    for heading in order:
        # Only the contexts may give way where the terminal is narrow.
        at_least = 8 if heading == "neighbors" else longest(heading, *columns[heading])
        table.add_column(heading, no_wrap=True, min_width=at_least, justify="right" if heading in ("cos", "p") else "left")
    for line in zip(*(columns[heading] for heading in order), strict=True):
        table.add_row(*line)
    return table


def longest(*texts: Text | str) -> int:
    """Columns that the longest line of some texts takes."""
    return max(columns_of(str(text)) for text in texts)


def _reading(cell: Cell, heading: str) -> list[tuple[str, float]]:
    return (cell.logit_lens if heading == "logit lens" else cell.embedding_lens) or []


def token_title(result: LensResult, batch: int, pos: int, room: int) -> Text:
    """The position and the token that is read, marked in what stands around it."""
    title = Text(f"batch {batch}, pos {pos}  " if len(result.decoded) > 1 else f"pos {pos}  ", style="bold")
    if result.tokens is None:
        return title
    shown = result.decoded[batch]
    tokens = [token.replace("\n", "↵") for token in result.tokens[batch]]
    # BOS and padding, written like <s>, stand around the text and not in it.
    tokens = ["" if not shown[i] and i != pos and t.startswith("<") and t.endswith(">") else t for i, t in enumerate(tokens)]
    token = tokens[pos]
    before, after = "".join(tokens[:pos]), "".join(tokens[pos + 1 :])
    lead = " " if token.startswith(" ") and token.strip() else ""
    before, token, after = clip(f"{before}{lead}«{token.strip() or token}»{after}", token, room)
    return title + Text.assemble((before, "not bold"), (f"«{token}»", "bold reverse"), (after, "not bold"))


def neighbor_text(neighbor: Neighbor, hook_name: str, room: int) -> Text:
    """The neighbor in its context; the hook name it was found at is added where it is another than the query's."""
    place = short_hook_name(neighbor.hook_name)
    found_at = "" if neighbor.hook_name == hook_name else f"  at {place if room >= 34 else place.split()[0]}"
    before, token, after = clip(neighbor.context, neighbor.token, room - len(found_at) - 2)
    mark = "bold yellow" if neighbor.chance is None or neighbor.chance < CHANCE else "dim"
    return Text.assemble((before, "dim"), (f"«{token}»", mark), (after, "dim"), (found_at, "magenta"))


def _chance(neighbor: Neighbor) -> str:
    return "" if neighbor.chance is None else f"{neighbor.chance:.0e}" if neighbor.chance < CHANCE else f"{neighbor.chance:.2f}"


def feature_table(result: FeatureResult, lines: int, *, width: int | None = None) -> Table:
    """Labelled features first, those with the nearest rows first; then those without a label, with what kept it back.

    Args:
        result: What `label_features` found.
        lines: Most features shown.
        width: Width of the table in characters; None: the terminal's. In a narrow one some figures are left out.
    """
    table, width = result.table, width or get_console().width
    refused = table["label"] == ""  # among the others cosines decide: the AUROC of many is 1
    surest = table.assign(refused=refused).sort_values(["refused", "similarity"], ascending=[True, False], kind="stable")
    figures = {
        "density": "density",
        "auroc": "auroc",
        "same token": "auroc_same_token",
        "overlap": "overlap",
        "cos": "similarity",
    }
    narrow = ("density", "auroc_same_token", "similarity")
    figures = {heading: name for heading, name in figures.items() if name in table and (width >= 110 or name in narrow)}
    shown = Table(box=box.SIMPLE_HEAD, header_style="dim")
    for heading in ("feature", *figures):
        shown.add_column(heading, justify="right", no_wrap=True, min_width=max(len(heading), 5))
    place = {feature: i for i, feature in enumerate(result.ids)}
    records = surest.head(lines).to_dict("records")
    nearest = [result.positive.neighbors_of(place[f])[0] if (f := line["feature"]) in place else None for line in records]
    told = add_evidence(shown, "label, or why not", [label_text(line) for line in records], nearest, width)
    for line, cells in zip(records, told, strict=True):
        shown.add_row(str(line["feature"]), *(_figure(name, line[name]) for name in figures.values()), *cells)
    if len(table) > lines:
        shown.caption = f"{lines} of {len(table):,} features"
    return shown


def label_text(line: dict[str, Any], why_not: str = "why_not") -> Text:
    """A feature's label, or what kept it back."""
    return Text(line["label"], style="bold yellow") if line.get("label") else Text(line.get(why_not, ""), style="dim")


def add_evidence(
    table: Table, heading: str, told: Sequence[Text], nearest: Sequence[Neighbor | None], width: int
) -> list[list[Text]]:
    """Add a column for what is told of each line and one for its nearest row; where it is narrow, one for both.

    Args:
        table: Has its other columns, whose `min_width` is what they take.
        heading: Of what is told.
        told: A text for each line; all empty: only the nearest rows are shown.
        nearest: A row for each line, or None.
        width: Width of the table in characters.

    Returns:
        The cells of each line.
    """
    left = width - sum((column.min_width or 0) + 3 for column in table.columns) - 4  # three characters lie between columns
    both, one_column = any(told), left < _TWO_COLUMNS
    told_width = min(longest(heading, *told), left // 2) if both and not one_column else 0
    room = left - told_width - (3 if told_width else 0)
    contexts = [_context(neighbor, room) for neighbor in nearest]
    if not both or one_column:
        table.add_column(f"{heading}; nearest row" if both else "nearest row", max_width=room)
        return [[Text("\n").join([text, context] if text else [context])] for text, context in zip(told, contexts, strict=True)]
    table.add_column(heading, width=told_width)
    table.add_column("nearest row", no_wrap=True, max_width=room)
    return [list(cells) for cells in zip(told, contexts, strict=True)]


def _context(neighbor: Neighbor | None, room: int) -> Text:
    if neighbor is None:
        return Text()
    before, token, after = clip(neighbor.context, neighbor.token, room - 2)
    return Text.assemble((before, "dim"), (f"«{token}»", "bold"), (after, "dim"))


def _figure(name: str, value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.1%}" if name in ("density", "overlap") else f"{value:.2f}"


def refusals(table: pd.DataFrame) -> str:
    """How many features have a label, and how often each reason kept one back, in one line."""
    reasons = pd.Series([why for why in table["why_not"] if why], dtype=str)
    refused = reasons.str.replace(r" \(p = .*\)", "", regex=True).value_counts()
    counted = "".join(f"; {n:,}: {reason}" for reason, n in refused.items())
    return f"{len(table):,} features, {len(table) - refused.sum():,} labelled{counted}"


def features_as_text(result: FeatureResult, *, lines: int = 30, width: int = 100) -> str:
    """The table of the first features, and how many have a label, as plain text."""
    return as_plain(Group(feature_table(result, lines, width=width), Text(refusals(result.table))), width)


def summary_table(summary: pd.DataFrame) -> Table:
    """The means over all features, with their intervals and nulls."""
    shown = Table(box=box.SIMPLE_HEAD, header_style="dim")
    for heading in ("figure", "mean", "95 % interval", "null", "features"):
        shown.add_column(heading, justify="left" if heading == "figure" else "right", no_wrap=heading != "figure")
    for line in summary.to_dict("records"):
        interval = "" if math.isnan(line["low"]) else f"{line['low']:.3f} to {line['high']:.3f}"
        null = "" if math.isnan(line["null"]) else f"{line['null']:.3f}"
        shown.add_row(line["figure"], f"{line['mean']:.3f}", interval, null, f"{line['features']:,}")
    return shown


def evaluation_text(evaluation: Evaluation, *, width: int = 100) -> str:
    """All tables of an evaluation as plain text."""
    return as_plain(evaluation_tables(evaluation, width=width), width)


def evaluation_tables(evaluation: Evaluation, *, width: int | None = None) -> Group:
    """Tables for each measure, readers by hook names, then what each transform gains over the first one."""
    width = width or get_console().width
    parts = [_measure_tables(measure, evaluation.transforms, width) for measure in evaluation.measures]
    over = evaluation.transforms[0]
    if len(evaluation.transforms) > 1:
        title = f"gain over {over}, hook names together: above 0 better, * where sure at 95 %"
        parts.append(_titled(title, _gains_table(evaluation.gains(over))))
    if evaluation.labels is not None:
        for transform, summary in evaluation.labels.groupby("transform", sort=False):
            parts.append(_titled(f"labels of SAE features, {transform}", summary_table(summary)))
    return Group(*parts)


def _titled(title: str, table: Table) -> Group:
    """A title of its own: a table's would be wrapped where the table is narrow."""
    return Group(Text(title, "bold"), table)


def _measure_tables(measure: Measure, transforms: Sequence[str], width: int) -> Group:
    """Title and means, in parts where the hook names do not fit side by side; the best transform of each in bold."""
    lines = measure.table()
    names = [name for name in dict.fromkeys(lines["hook_name"]) if name]
    headings, kind = hook_headings(names)
    ends = "lower is better" if measure.lower_is_better else "higher is better"
    title = f"{measure.name}{f', {kind}' if kind else ''}: {ends}, {lines['n'].max():,} {measure.unit}"
    column = max(_FIGURE, longest("", *headings)) + 3
    n_parts = math.ceil(len(names) * column / max(column, width - longest("", *lines["reader"]) - _FIGURE - 9))
    parts = [_measure_table(measure, lines, part.tolist(), transforms) for part in np.array_split(names, max(1, n_parts))]
    return Group(Text(title, "bold"), *parts)


def _measure_table(measure: Measure, lines: pd.DataFrame, names: Sequence[str], transforms: Sequence[str]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, header_style="dim")
    shown.add_column("reader", no_wrap=True)
    for heading in hook_headings(names)[0]:
        shown.add_column(heading, justify="right")
    shown.add_column("±", justify="right")
    mean = {
        (one, name): float(value) for one, name, value in zip(lines["reader"], lines["hook_name"], lines["mean"], strict=True)
    }
    sign = -1 if measure.lower_is_better else 1
    best = {name: max(sign * mean[one, name] for one in transforms) for name in names}
    for reader, part in lines.groupby("reader", sort=False):
        alone = (reader, "") in mean  # a reader that needs no hook name
        values = {name: mean[reader, "" if alone else name] for name in names if alone or (reader, name) in mean}
        style = {name: "bold" if reader in transforms and sign * values[name] == best[name] else "" for name in values}
        half = ((part["high"] - part["low"]) / 2).mean()
        means = [Text(f"{values[name]:.3f}", style[name]) if name in values else Text() for name in names]
        shown.add_row(Text(str(reader), "" if reader in transforms else "dim"), *means, Text(f"{half:.3f}", "dim"))
    return shown


def _gains_table(gains: pd.DataFrame) -> Table:
    """What each transform gains, marked where its interval leaves 0 out."""
    shown = Table(box=box.SIMPLE_HEAD, header_style="dim")
    readers = list(dict.fromkeys(gains["reader"]))
    shown.add_column("measure")
    for reader in readers:
        shown.add_column(reader, justify="right", no_wrap=True)
    for measure, part in gains.groupby("measure", sort=False):
        lines = zip(part["gain"], part["low"], part["high"], strict=True)
        cells = [
            Text(f"{gain:+.3f}{'*' if low > 0 or high < 0 else ' '}", "bold" if low > 0 or high < 0 else "")
            for gain, low, high in lines
        ]
        shown.add_row(str(measure), *cells)
    return shown
