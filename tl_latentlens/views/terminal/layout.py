"""The parts that the tables for the terminal share: plain text, widths, and a column of nearest rows."""

import io
from collections.abc import Sequence

from rich import get_console
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tl_latentlens.views.context import Context
from tl_latentlens.views.data import NeighborLine
from tl_latentlens.views.label_kinds import MIXED
from tl_latentlens.views.text import display_width

_MIN_WIDTH_OF_TWO_COLUMNS = 64  # In less, a label and a row stand one under the other.


def terminal_width(width: int | None) -> int:
    """A width in characters; None: the terminal's."""
    return width or get_console().width


def plain_text(renderable: RenderableType, width: int | None = None) -> str:
    """Anything that rich prints, as plain text: in notebooks, where rich would display it, and under FORCE_COLOR too.

    Args:
        renderable: What is printed.
        width: In characters; None: the terminal's.
    """
    text = io.StringIO()
    Console(file=text, width=terminal_width(width), force_jupyter=False, color_system=None).print(renderable)
    return text.getvalue()


def longest_width(*texts: Text | str) -> int:
    """Columns that the longest line of some texts takes."""
    return max(display_width(str(text)) for text in texts)


def titled(title: str, table: RenderableType) -> Group:
    """A table below a title of its own: a table's title would be wrapped where the table is narrow."""
    return Group(Text(title, "bold"), table)


def marked_text(context: Context, mark_style: str) -> Text:
    """A clipped context with its token in guillemets."""
    return Text.assemble((context.before, "dim"), (f"«{context.token}»", mark_style), (context.after, "dim"))


def label_text(label: str, why_not: str, kind: str = "") -> Text:
    """A feature's label, faint where it is mixed, or what kept it back."""
    if not label:
        return Text(why_not, style="dim italic")
    return Text(label, style="dim" if kind == MIXED else "bold yellow")


def add_nearest_rows(
    table: Table, heading: str, texts: Sequence[Text], nearest: Sequence[Sequence[NeighborLine]], width: int
) -> list[list[Text]]:
    """Add a column of texts and one of nearest rows to a table; where it is narrow, one for both.

    Args:
        table: Has its other columns, whose `min_width` is what they take.
        heading: Of the texts.
        texts: A text for each line; where all are empty, only the nearest rows are shown.
        nearest: The rows of each line, one below the other in its cell.
        width: Width of the table in characters.

    Returns:
        The cells of each line.
    """
    free = width - sum((column.min_width or 0) + 3 for column in table.columns) - 4  # Three characters lie between columns.
    has_texts, is_narrow = any(texts), free < _MIN_WIDTH_OF_TWO_COLUMNS
    text_width = min(longest_width(heading, *texts), free // 2) if has_texts and not is_narrow else 0
    row_width = free - text_width - (3 if text_width else 0)
    contexts = [Text("\n").join(marked_text(row.context.clipped(row_width - 2), "bold") for row in rows) for rows in nearest]
    name = "nearest rows" if any(len(rows) > 1 for rows in nearest) else "nearest row"
    if not has_texts or is_narrow:
        table.add_column(f"{heading}; {name}" if has_texts else name, max_width=row_width)
        pairs = zip(texts, contexts, strict=True)
        return [[Text("\n").join([text, context] if text else [context])] for text, context in pairs]
    table.add_column(heading, width=text_width)
    table.add_column(name, no_wrap=True, max_width=row_width)
    return [list(cells) for cells in zip(texts, contexts, strict=True)]
