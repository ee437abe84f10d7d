"""Components that write a meaning, as tables for the terminal."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from tl_latentlens.views.chance import geometry_note
from tl_latentlens.views.data import NeighborLine, WordReading
from tl_latentlens.views.terminal.layout import add_nearest_rows, label_text, terminal_width
from tl_latentlens.views.terminal.lens import neighbor_text
from tl_latentlens.views.text import visible


def word_lines(word: WordReading, width: int | None = None) -> Text:
    """The word in its text, and the rows that show what is meant."""
    width = terminal_width(width)
    context = word.context.clipped(width - 2)
    lines = Text.assemble(context.before, (f"«{context.token}»", "bold reverse"), "\n", (f"{word.note}\n", "dim"))
    for neighbor in word.neighbors:
        lines.append(f"  {neighbor.similarity:.2f}  ", "cyan")
        lines.append_text(neighbor_text(neighbor, word.hook_name, width - 8)).append("\n")
    return lines


def component_table(
    components: pd.DataFrame,
    parts: dict[str, float],
    nearest: Sequence[NeighborLine],
    transform: str,
    width: int | None = None,
) -> Table:
    """A line a component: its share, its p-values, what it is about or attends to, and the row nearest to what it writes.

    Args:
        components: The table of a `FindResult`.
        parts: What all components of a kind add up to, as shares of the whole.
        nearest: The nearest row of each component.
        transform: How what it writes was compared with the rows.
        width: Width of the table in characters; None: the terminal's. In a narrow one some columns are left out.
    """
    width = terminal_width(width)
    columns = {name: name for name in ("feature", "layer", "head", "neuron") if name in components}
    columns |= {"act": "activation"} if "activation" in components else {}
    columns |= {"added": "contribution", "usual": "usual"} if width >= 110 else {}
    columns |= {"share": "share", "p": "p_family", "p token": "p_same_token"}
    columns |= {"p any": "p_random"} if width >= 90 else {}
    table = Table(box=box.SIMPLE_HEAD, header_style="dim")
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True, min_width=max(len(heading), 5))
    records = components.to_dict("records")
    heading = "attends to" if "head" in components else "label, or why not"
    cells_of_lines = add_nearest_rows(table, heading, list(map(_description, records)), [[row] for row in nearest], width)
    for record, cells in zip(records, cells_of_lines, strict=True):
        figures = [_figure(name, record[name]) for name in columns.values()]
        table.add_row(*figures, *cells, style="" if record["beats_null"] else "dim")
    beating = f"{np.count_nonzero(components['beats_null'])} of these {len(components)} beat their null"
    whole = ", ".join(f"{name} {share:.0%}" for name, share in parts.items())
    table.caption = f"{beating}. All in all: {whole}. What each writes is {geometry_note(transform)}"
    table.caption_justify = "left"
    return table


def _figure(name: str, value: Any) -> str:
    if isinstance(value, int):
        return str(value)
    if math.isnan(value):
        return ""
    return f"{value:.1%}" if name == "share" else f"{value:.3f}" if name.startswith("p_") else f"{value:.1f}"


def _description(record: dict[str, Any]) -> Text:
    """The token that a head attends to, or a feature's label or what kept it back."""
    if "attends_to" in record:
        return Text.assemble(f"{record['attention']:4.0%} ", (visible(record["attends_to"]), "bold yellow"))
    return label_text(record.get("label", ""), record.get("label_why_not", ""), record.get("label_kind", ""))
