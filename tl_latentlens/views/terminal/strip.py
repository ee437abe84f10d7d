"""The other words of one token over all layers as a table for the terminal."""

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tl_latentlens.views.lens_names import LENSES
from tl_latentlens.views.strip import STRIP_NOTE, Strip
from tl_latentlens.views.terminal.layout import terminal_width
from tl_latentlens.views.terminal.lens import token_title
from tl_latentlens.views.text import layer_headings


def strip_table(strip: Strip, width: int | None = None) -> Group:
    """The token in its text, its meaning in one line, and a table: a line for each run of layers that read alike.

    Args:
        strip: What is drawn.
        width: In characters; None: the terminal's.
    """
    width = terminal_width(width)
    table = Table(box=box.SIMPLE_HEAD, header_style="dim")
    table.add_column(f"{layer_headings(strip.hook_names)[1]}s", style="bold", no_wrap=True)
    table.add_column(LENSES["words"].label)
    for line in strip.lines:
        style = "dim" if strip.is_faint(line) or not line.words else ""
        table.add_row(strip.label(line), Text(", ".join(line.words) or "–", style))
    return Group(token_title(strip.heading, width - 24), Text(strip.summary(), "bold yellow"), table, Text(STRIP_NOTE, "dim"))
