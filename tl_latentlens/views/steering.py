"""A steered stream, and the two ends of a direction, as tables for the terminal."""

import math
from typing import TYPE_CHECKING

import numpy as np
from rich import box, get_console
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tl_latentlens.directions.direction_result import DirectionResult
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.lens.result import Cell
from tl_latentlens.views.terminal import longest, neighbor_text, token_title
from tl_latentlens.views.text import clip, short_hook_name, visible

if TYPE_CHECKING:
    from tl_latentlens.directions.steering_result import SteeringResult

_NARROWEST = 16  # characters that a multiple needs, margin included
_LINES = 3  # of a neighbor's context in a cell
_MARGIN = 3  # characters between columns


def steering_table(result: "SteeringResult", pos: int | None, batch: int | None, width: int | None) -> Group:
    """For each text a table of a line a layer and a column a multiple, in parts where they do not fit side by side."""
    width, multiples = width or get_console().width, list(result.readings)
    names = list(dict.fromkeys(name for reading in result.readings.values() for name in reading.hook_names))
    texts = range(len(result.readings[multiples[0]].decoded)) if batch is None else [batch]
    room = max(_NARROWEST, width - _longest(names) - 4)  # two edges, two spaces
    n_parts = math.ceil(len(multiples) * _NARROWEST / room)
    parts = [part.tolist() for part in np.array_split(multiples, min(n_parts, len(multiples)))]
    tables = [_table(result, names, part, pos, text, room // len(part) - _MARGIN) for text in texts for part in parts]
    where = f"added at {short_hook_name(result.hook_name)}"
    if result.relative_length is not None:
        where += f"; the vector is {result.relative_length:.2f} as long as a median row there"
    figures = "cos with the nearest neighbor" + " · with the unsteered activation" * bool(result.cosines)
    reads = "; → logit lens" * any(reading.logit_lens for reading in result.readings.values())
    return Group(*tables, Text(where, "dim"), Text(figures + reads, "dim"))


def _longest(names: list[str]) -> int:
    return max(len(short_hook_name(name)) for name in names)


def _table(result: "SteeringResult", names: list[str], multiples: list[float], pos: int | None, batch: int, room: int) -> Table:
    first = multiples[0]
    title = token_title(result.readings[first], batch, _place(result, first, pos, batch), (room + _MARGIN) * len(multiples))
    table = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        title_style="",
        header_style="bold",
        padding=(0, 2, 0, 0),
        pad_edge=False,
        leading=1,
    )
    table.add_column("hook", no_wrap=True, style="bold", header_style="dim", min_width=_longest(names))
    columns = [[Text(short_hook_name(name)) for name in names]]
    for multiple in multiples:
        table.add_column("unsteered" if multiple == 0 else f"× {multiple:g}", width=room)
        columns.append(_column(result, names, multiple, _place(result, multiple, pos, batch), batch, room))
    for line in zip(*columns, strict=True):
        table.add_row(*line)
    return table


def _place(result: "SteeringResult", multiple: float, pos: int | None, batch: int) -> int:
    decoded = np.flatnonzero(result.readings[multiple].decoded[batch])
    if not len(decoded):
        raise InvalidInputError(f"nothing was decoded of text {batch} under multiple {multiple:g}")
    if pos is None:
        return int(decoded[-1])
    return pos if pos >= 0 else pos + result.readings[multiple].decoded.shape[1]


def _column(result: "SteeringResult", names: list[str], multiple: float, pos: int, batch: int, room: int) -> list[Text]:
    """For each layer the nearest neighbor with its cosine, and what the logit lens reads; empty where it did not run."""
    reading, cosines = result.readings[multiple], result.cosines_at(multiple) if multiple else {}
    cells = []
    for name in names:
        lines = []
        if name in reading.found:
            cell = reading.cell(name, pos, batch)
            nearest, cosine = cell.neighbors[0], cosines.get((name, batch, pos), math.nan)
            unsteered = "" if math.isnan(cosine) else f" · {cosine:.2f}"
            before, token, after = clip(nearest.context, nearest.token, _LINES * room - 8)
            lines.append(Text.assemble((f"{nearest.similarity:.2f}", "cyan"), (unsteered, "magenta")))
            lines.append(Text.assemble((before, "dim"), (f"«{token}»", "bold yellow"), (after, "dim")))
            lines += _next_token(cell)
        cells.append(Text("\n").join(lines))
    return cells


def _next_token(cell: Cell) -> list[Text]:
    if not cell.logit_lens:
        return []
    token, probability = cell.logit_lens[0]
    return [Text(f"→ {visible(token).strip()} {probability:.0%}", "green")]


def direction_table(result: DirectionResult, direction: int = 0, *, width: int | None = None) -> Group:
    """The neighbors of a direction's two ends, one table each."""
    width = width or get_console().width
    tables = []
    for sign, neighbors in zip("+−", result.neighbors(direction), strict=True):
        names = [short_hook_name(neighbor.hook_name) for neighbor in neighbors]
        room = max(16, width - longest("hook", *names) - 14)
        table = Table(box=box.SIMPLE_HEAD, header_style="dim")
        table.add_column("cos", style="cyan", justify="right", no_wrap=True)
        table.add_column(f"nearest to {sign}v", no_wrap=True, max_width=room)
        table.add_column("hook", style="magenta", no_wrap=True)
        for neighbor, name in zip(neighbors, names, strict=True):
            table.add_row(f"{neighbor.similarity:.2f}", neighbor_text(neighbor, neighbor.hook_name, room), name)
        tables.append(table)
    return Group(*tables)
