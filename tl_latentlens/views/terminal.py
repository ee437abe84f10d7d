"""Results as tables for the terminal."""

import io
import math
from collections.abc import Sequence

import pandas as pd
from rich import box, get_console
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from tl_latentlens.results import Cell, FeatureResult, LensResult, Neighbor
from tl_latentlens.views.text import clip, short_hook_name, visible

_LENSES = ("logit lens", "embedding lens")


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
    text = io.StringIO()
    Console(file=text, width=width).print(lens_table(result, width=width))
    return text.getvalue()


def _token_table(result: LensResult, batch: int, pos: int, neighbors: int, width: int) -> Table:
    cells = [result.cell(name, pos, batch) for name in result.hook_names]
    columns: dict[str, list[Text]] = {
        "hook": [Text(short_hook_name(cell.hook_name), style="bold") for cell in cells],
        "cos": [Text("\n".join(f"{n.similarity:.2f}" for n in cell.neighbors[:neighbors]), style="cyan") for cell in cells],
    }
    for heading in _LENSES:
        readings = [_reading(cell, heading) for cell in cells]
        if any(readings):
            columns[heading] = [Text("\n".join(f"{score:4.0%} {visible(t)}" for t, score in r[:neighbors])) for r in readings]
    taken = sum(max(len(heading), *(_longest(text) for text in texts)) + 2 for heading, texts in columns.items())
    room = max(16, width - taken - len(columns) - 4)  # two spaces a column are counted; what is left are separators
    contexts = [Text("\n").join(_context(n, cell.hook_name, room) for n in cell.neighbors[:neighbors]) for cell in cells]
    table = Table(
        box=box.SIMPLE_HEAD,
        title=_title(result, batch, pos, width - 24),
        title_justify="left",
        title_style="",
        header_style="dim",
    )
    order = ["hook", "cos", "neighbors", *(h for h in _LENSES if h in columns)]
    columns["neighbors"] = contexts
    for heading in order:
        # Only the contexts may give way where the terminal is narrow.
        at_least = 8 if heading == "neighbors" else max(len(heading), *(_longest(text) for text in columns[heading]))
        table.add_column(heading, no_wrap=True, min_width=at_least, justify="right" if heading == "cos" else "left")
    for line in zip(*(columns[heading] for heading in order), strict=True):
        table.add_row(*line)
    return table


def _longest(text: Text) -> int:
    return max(map(len, text.plain.split("\n")))


def _reading(cell: Cell, heading: str) -> list[tuple[str, float]]:
    return (cell.logit_lens if heading == "logit lens" else cell.embedding_lens) or []


def _title(result: LensResult, batch: int, pos: int, room: int) -> Text:
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


def _context(neighbor: Neighbor, hook_name: str, room: int) -> Text:
    """The neighbor in its context; the hook name it was found at is added where it is another than the query's."""
    found_at = "" if neighbor.hook_name == hook_name or room < 34 else f"  at {short_hook_name(neighbor.hook_name)}"
    before, token, after = clip(neighbor.context, neighbor.token, room - len(found_at) - 2)
    return Text.assemble((before, "dim"), (f"«{token}»", "bold yellow"), (after, "dim"), (found_at, "magenta"))


def feature_table(result: FeatureResult, lines: int, *, width: int | None = None) -> Table:
    """Labelled features first, the surest of them first; then those without a label, with what kept it back.

    Args:
        result: What `label_features` found.
        lines: Most features shown.
        width: Width of the table in characters; None: the terminal's. In a narrow one some figures are left out.
    """
    table, width = result.table, width or get_console().width
    by = "auroc" if "auroc" in table else "similarity"
    surest = table.assign(refused=table["label"] == "").sort_values(["refused", by], ascending=[True, False], kind="stable")
    figures = {
        "density": "density",
        "auroc": "auroc",
        "same token": "auroc_same_token",
        "overlap": "overlap",
        "cos": "similarity",
    }
    figures = {heading: name for heading, name in figures.items() if name in table and (width >= 110 or name == by)}
    taken = 11 + sum(max(len(heading), 5) + 2 for heading in figures)
    label_width = min(36, (width - taken) // 2)
    room = width - taken - label_width - 6
    shown = Table(box=box.SIMPLE_HEAD, header_style="dim")
    for heading in ("feature", *figures):
        shown.add_column(heading, justify="right", no_wrap=True, min_width=max(len(heading), 5))
    shown.add_column("label, or why not", width=label_width)
    shown.add_column("nearest row", no_wrap=True, width=room)
    place = {feature: i for i, feature in enumerate(result.ids)}
    for line in surest.head(lines).to_dict("records"):
        nearest = result.positive.neighbors_of(place[line["feature"]])[0]
        before, token, after = clip(nearest.context, nearest.token, room - 2)
        label = Text(line["label"], style="bold yellow") if line["label"] else Text(line["why_not"], style="dim")
        values = [f"{line[name]:.1%}" if name in ("density", "overlap") else f"{line[name]:.2f}" for name in figures.values()]
        shown.add_row(
            str(line["feature"]), *values, label, Text.assemble((before, "dim"), (f"«{token}»", "bold"), (after, "dim"))
        )
    if len(table) > lines:
        shown.caption = f"{lines} of {len(table):,} features"
    return shown


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
