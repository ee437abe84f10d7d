"""A steered run as tables for the terminal."""

import math
from collections.abc import Sequence

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tl_latentlens.views.data import SteeringCell, SteeringColumn
from tl_latentlens.views.terminal.layout import marked_text, terminal_width
from tl_latentlens.views.terminal.lens import token_title
from tl_latentlens.views.text import short_hook_name, visible

_MIN_COLUMN_WIDTH = 16  # Of a multiple, margin included.
_CONTEXT_LINES = 3  # Of a neighbor that stands alone in a cell; several have one each.
_MARGIN = 3  # Characters between columns.


def steering_tables(
    texts: Sequence[Sequence[SteeringColumn]], hook_names: Sequence[str], notes: Sequence[str], width: int | None = None
) -> Group:
    """For each text a table of a line a layer and a column a multiple, in parts where they do not fit side by side.

    Args:
        texts: The columns of each text, the same multiples for all.
        hook_names: The lines.
        notes: Lines below the tables.
        width: In characters; None: the terminal's.
    """
    hook_width = max(len(short_hook_name(name)) for name in hook_names)
    free = max(_MIN_COLUMN_WIDTH, terminal_width(width) - hook_width - 4)  # Two edges, two spaces.
    tables = []
    for columns in texts:
        n_parts = min(math.ceil(len(columns) * _MIN_COLUMN_WIDTH / free), len(columns))
        for column_ids in np.array_split(np.arange(len(columns)), n_parts):
            shown = [columns[i] for i in column_ids.tolist()]
            tables.append(_table(shown, hook_names, hook_width, free // len(shown) - _MARGIN))
    return Group(*tables, *(Text(note, "dim") for note in notes))


def _table(columns: Sequence[SteeringColumn], hook_names: Sequence[str], hook_width: int, width: int) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title=token_title(columns[0].heading, (width + _MARGIN) * len(columns)),
        title_justify="left",
        title_style="",
        header_style="bold",
        padding=(0, 2, 0, 0),
        pad_edge=False,
        leading=1,
    )
    table.add_column("hook", no_wrap=True, style="bold", header_style="dim", min_width=hook_width)
    for column in columns:
        table.add_column("unsteered" if column.multiple == 0 else f"× {column.multiple:g}", width=width)
    for name in hook_names:
        table.add_row(Text(short_hook_name(name)), *(_cell_text(column.cells.get(name), width) for column in columns))
    return table


def _cell_text(steered: SteeringCell | None, width: int) -> Text:
    """The neighbors with their cosines, and what the logit lens reads; empty where the hook name did not run."""
    if steered is None:
        return Text()
    cosine, neighbors = steered.cosine_to_unsteered, steered.cell.neighbors
    n_columns = _CONTEXT_LINES * width - 8 if len(neighbors) == 1 else width - 2
    lines = []
    for rank, near in enumerate(neighbors):
        apart = "" if cosine is None or rank else f" · {cosine:.2f}"
        lines.append(Text.assemble((f"{near.similarity:.2f}", "cyan"), (apart, "magenta")))
        lines.append(marked_text(near.context.clipped(n_columns), "bold yellow"))
    for token, probability in steered.cell.lenses.get("logit_lens", [])[:1]:
        lines.append(Text(f"→ {visible(token).strip()} {probability:.0%}", "green"))
    return Text("\n").join(lines)
