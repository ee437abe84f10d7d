"""Lens readings as tables for the terminal: one for each token, a line a hook name."""

import textwrap
from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tl_latentlens.views.chance import is_chance, nearness_sentence
from tl_latentlens.views.data import DirectionLine, LensCell, NeighborLine, TokenHeading
from tl_latentlens.views.known import format_share, is_unknown
from tl_latentlens.views.lens_names import LENSES
from tl_latentlens.views.terminal.layout import longest_width, marked_text, terminal_width
from tl_latentlens.views.text import short_hook_name, visible

_NUMBERS = ("cos", "known", "use")


def lens_tables(tokens: Sequence[tuple[TokenHeading, list[LensCell]]], width: int | None = None) -> Group:
    """One table for each token: a line a hook name with its nearest contexts, and what the other lenses read beside them.

    Args:
        tokens: The tokens, each with its cells.
        width: Width of a table in characters; None: the terminal's.
    """
    return Group(*(_token_table(heading, cells, terminal_width(width)) for heading, cells in tokens))


def _token_table(heading: TokenHeading, cells: list[LensCell], width: int) -> Table:
    columns = {
        "hook": [Text(short_hook_name(cell.hook_name), style="bold") for cell in cells],
        "cos": [Text("\n".join(f"{near.similarity:.2f}" for near in cell.neighbors), style="cyan") for cell in cells],
    }
    if any(cell.known is not None for cell in cells):
        columns["known"] = [Text(format_share(cell.known), "dim" if is_unknown(cell.known) else "") for cell in cells]
    if any(cell.use_chance is not None for cell in cells):
        columns["use"] = [Text(format_share(cell.use_chance)) for cell in cells]
    if any(cell.words is not None for cell in cells):
        columns["other words"] = [Text(_wrapped(cell.words or [], max(12, width // 5))) for cell in cells]
    lens_columns = _lens_columns(cells)
    n_columns = len(columns) + len(lens_columns)
    taken = sum(longest_width(name, *texts) + 2 for name, texts in {**columns, **lens_columns}.items())
    free = max(16, width - taken - n_columns - 4)  # Two spaces a column are counted already; the rest are separators.
    columns["neighbors"] = [
        Text("\n").join(neighbor_text(near, cell.hook_name, free, is_dim=is_unknown(cell.known)) for near in cell.neighbors)
        for cell in cells
    ]
    table = Table(
        box=box.SIMPLE_HEAD,
        title=token_title(heading, width - 24),
        title_justify="left",
        title_style="",
        header_style="dim",
    )
    columns |= lens_columns
    for name, texts in columns.items():
        # Only the contexts may give way where the terminal is narrow.
        min_width = 8 if name == "neighbors" else longest_width(name, *texts)
        table.add_column(name, no_wrap=True, min_width=min_width, justify="right" if name in _NUMBERS else "left")
    for line in zip(*columns.values(), strict=True):
        table.add_row(*line)
    return table


def _wrapped(words: list[str], width: int) -> str:
    """Words in lines of so many characters; – for none."""
    return "\n".join(textwrap.wrap(", ".join(words), width, break_long_words=False, break_on_hyphens=False)) or "–"


def _lens_columns(cells: list[LensCell]) -> dict[str, list[Text]]:
    """A column of tokens and scores for each lens that read one of the cells."""
    columns = {}
    for lens, info in LENSES.items():
        readings = [cell.lenses.get(lens, []) for cell in cells]
        if any(readings):
            columns[info.label] = [
                Text("\n".join(f"{score:4.0%} {visible(token)}" for token, score in tokens)) for tokens in readings
            ]
    return columns


def token_title(heading: TokenHeading, width: int) -> Text:
    """The position and the token that is read, marked in what stands around it."""
    title = Text(f"{heading.label}  ", style="bold")
    if heading.context is None:
        return title
    context = heading.context.clipped(width)
    return title + Text.assemble(
        (context.before, "not bold"), (f"«{context.token}»", "bold reverse"), (context.after, "not bold")
    )


def neighbor_text(neighbor: NeighborLine, hook_name: str, width: int, *, is_dim: bool = False) -> Text:
    """The neighbor in its context; the hook name it was found at is added where it is another than the query's."""
    place = short_hook_name(neighbor.hook_name)
    found_at = "" if neighbor.hook_name == hook_name else f"  at {place if width >= 34 else place.split()[0]}"
    mark_style = "dim" if is_dim else "bold yellow"
    return marked_text(neighbor.context.clipped(width - len(found_at) - 2), mark_style).append(found_at, "magenta")


def direction_tables(direction: DirectionLine, width: int | None = None) -> Group:
    """The nearest rows to both ends of a direction, one table each, and below it whether they are near at all."""
    tables = []
    for sign, end in (("+", direction.positive), ("−", direction.negative)):
        names = [short_hook_name(neighbor.hook_name) for neighbor in end.neighbors]
        free = max(16, terminal_width(width) - longest_width("hook", *names) - 14)
        mark_style = "dim" if end.nearness is not None and is_chance(end.nearness.p) else "bold yellow"
        table = Table(box=box.SIMPLE_HEAD, header_style="dim")
        table.add_column("cos", style="cyan", justify="right", no_wrap=True)
        table.add_column(f"nearest to {sign}v", no_wrap=True, max_width=free)
        table.add_column("hook", style="magenta", no_wrap=True)
        for neighbor, name in zip(end.neighbors, names, strict=True):
            table.add_row(f"{neighbor.similarity:.2f}", marked_text(neighbor.context.clipped(free - 2), mark_style), name)
        tables.append(table)
        if end.nearness is not None:
            tables.append(Text(f" {nearness_sentence(end.nearness)}"))
    return Group(*tables)
