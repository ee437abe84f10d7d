"""Lens readings as tables for the terminal: one for each token, a line a hook name."""

import textwrap
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tl_latentlens.views.chance import NEARNESS_LEGEND, geometry_note, is_chance, nearness_sentence
from tl_latentlens.views.data import DirectionLine, LensCell, NeighborLine, TokenHeading
from tl_latentlens.views.jumps import is_jump
from tl_latentlens.views.known import format_share, is_unknown
from tl_latentlens.views.legend import legend_of
from tl_latentlens.views.lens_names import LENSES
from tl_latentlens.views.terminal.layout import longest_width, marked_text, terminal_width
from tl_latentlens.views.text import display_width, layer_headings, short_hook_name, take_columns, visible

_MIN_WORD_WIDTH = 16
_MAX_WORD_LINES = 4  # More where there are more uses.
_MIN_USE_WIDTH = 24  # In less, the headings of the lenses take two lines.
_LEAST_WIDTH = 24  # Of words and uses together.
_MAX_LENS_WIDTH = 18
_JUMP = "┄┄┄"


def lens_tables(tokens: Sequence[tuple[TokenHeading, list[LensCell]]], width: int | None = None) -> Group:
    """One table for each token, and below them what the columns show.

    A line a hook name: how well the bank knows the token, its nearest other words, its nearest uses in context, and what the
    other lenses read.

    Args:
        tokens: The tokens, each with its cells.
        width: Width of a table in characters; None: the terminal's.
    """
    total = terminal_width(width)
    tables = [
        _cell_table(token_title(heading, total - 24), *layer_headings([cell.hook_name for cell in cells]), cells, total)
        for heading, cells in tokens
    ]
    return _with_legend(tables, [cell for _, cells in tokens for cell in cells])


def patch_tables(layers: Sequence[tuple[str, list[str], list[LensCell]]], width: int | None = None) -> Group:
    """One table for each layer of an image, and below them what the columns show: a line a patch.

    Args:
        layers: Title of each layer, headings of the patches, and the cell of each.
        width: Width of a table in characters; None: the terminal's.
    """
    total = terminal_width(width)
    tables = [_cell_table(Text(title, "bold"), headings, "patch", cells, total) for title, headings, cells in layers]
    return _with_legend(tables, [cell for *_, cells in layers for cell in cells])


def _with_legend(tables: list[Table], cells: list[LensCell]) -> Group:
    columns = dict.fromkeys(str(column.header).replace("\n", " ") for table in tables for column in table.columns)
    legend = legend_of(columns)
    if any(cell.around for cell in cells):
        legend["other words"] += "; near: words around"
    return Group(*tables, _legend(legend))


def _legend(lines: dict[str, str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 0, 0, 1), style="dim")
    table.add_column(no_wrap=True)
    table.add_column()
    for name, text in lines.items():
        table.add_row(name, text)
    return table


def _cell_table(title: Text, headings: Sequence[str], heading_name: str, cells: list[LensCell], width: int) -> Table:
    columns = {heading_name: [Text(name, style="bold") for name in headings]}
    if any(cell.known is not None for cell in cells):
        columns["p"] = [Text(format_share(cell.known), "dim" if is_unknown(cell.known) else "") for cell in cells]
    has_words = any(cell.words is not None for cell in cells)
    lens_columns, free = _fitted_lens_columns(cells, columns, width, has_words=has_words)
    if has_words:
        columns["other words"] = [_word_text(cell, max(11, min(width // 4, 2 * free // 5))) for cell in cells]
        free -= longest_width("other words", *columns["other words"])
    columns["nearest uses"] = [_use_text(cell, max(12, free)) for cell in cells]
    table = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        title_style="",
        header_style="dim",
    )
    columns |= lens_columns
    taken = _width_of({name: texts for name, texts in columns.items() if name != "nearest uses"}) + 5  # Margins and edges.
    for name, texts in columns.items():
        # Only the contexts may give way where the terminal is narrow.
        is_context = name == "nearest uses"
        min_width, max_width = (8, max(8, width - taken)) if is_context else (longest_width(name, *texts), None)
        justify = "right" if name == "p" else "left"
        table.add_column(name, no_wrap=True, min_width=min_width, max_width=max_width, justify=justify)
    for line in zip(*columns.values(), strict=True):
        table.add_row(*line)
    return table


def _fitted_lens_columns(
    cells: list[LensCell], columns: dict[str, list[Text]], width: int, *, has_words: bool
) -> tuple[dict[str, list[Text]], int]:
    """The columns of the lenses, and how much is left for words and uses.

    Where that is little, headings get two lines and tokens are cut; then the lenses after the first are left out.
    """
    wide = _lens_columns(cells, max(8, min(_MAX_LENS_WIDTH, width // 7)))
    free = width - _width_of(columns | wide) - 4 - 3 * has_words
    enough = _MIN_USE_WIDTH + _MIN_WORD_WIDTH * has_words
    for token_width in (8, 6, 4):
        if free >= enough:
            break
        wide = {name.replace(" ", "\n"): texts for name, texts in _lens_columns(cells, token_width).items()}
        free = width - _width_of(columns | wide) - 4 - 3 * has_words
    while len(wide) > 1 and free < _LEAST_WIDTH:
        wide.popitem()
        free = width - _width_of(columns | wide) - 4 - 3 * has_words
    return wide, free


def _width_of(columns: dict[str, list[Text]]) -> int:
    return sum(longest_width(name, *texts) + 3 for name, texts in columns.items())


def _word_text(cell: LensCell, width: int) -> Text:
    """The other words, as many as fit in a few lines, and those around the uses; "–" for none."""
    style = "dim" if is_unknown(cell.known) else ""
    words = _wrapped(cell.words or [], width)[: max(_MAX_WORD_LINES, len(cell.neighbors))]
    text = Text("\n".join(words).rstrip(",") or "–", style if words else "dim")
    if cell.around:
        text.append("\n" + "\n".join(_wrapped(["near:", *cell.around], width)), style or "italic")
    return text


def _wrapped(words: list[str], width: int) -> list[str]:
    """Words, with commas between them, in lines of so many characters."""
    text = ", ".join(words).replace("near:,", "near:")
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _use_text(cell: LensCell, width: int) -> Text:
    """The neighbors in context, a line each, and a line of ┄ where the next is much further."""
    jumps = is_jump(np.array([near.similarity for near in cell.neighbors]))
    lines = []
    for near, is_last in zip(cell.neighbors, jumps, strict=True):
        lines.append(neighbor_text(near, cell.hook_name, width, is_dim=is_unknown(cell.known)))
        if is_last:
            lines.append(Text(_JUMP, "dim"))
    return Text("\n").join(lines)


def _lens_columns(cells: list[LensCell], width: int) -> dict[str, list[Text]]:
    """A column of tokens and scores for each lens that read one of the cells; long tokens are cut."""
    columns = {}
    for lens, info in LENSES.items():
        readings = [cell.lenses.get(lens, []) for cell in cells]
        if any(readings):
            columns[info.label] = [
                Text("\n".join(f"{score:4.0%} {_cut(visible(token), width)}" for token, score in tokens)) for tokens in readings
            ]
    return columns


def _cut(text: str, width: int) -> str:
    return text if display_width(text) <= width else take_columns(text, width - 1).rstrip() + "…"


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


def direction_tables(direction: DirectionLine, random: DirectionLine | None = None, width: int | None = None) -> Group:
    """The nearest rows to both ends of a direction, one table each, and below it whether they are near at all.

    Args:
        direction: The direction.
        random: A random direction, whose nearest row stands below for comparison; None: none.
        width: In characters; None: the terminal's.
    """
    ends = [("nearest to +v", direction.positive), ("nearest to −v", direction.negative)]
    if random is not None:
        ends.append((random.name, replace(random.positive, neighbors=random.positive.neighbors[:1])))
    tables = []
    for heading, end in ends:
        names = [short_hook_name(neighbor.hook_name) for neighbor in end.neighbors]
        free = max(16, terminal_width(width) - longest_width("hook", *names) - 14)
        mark_style = "dim" if end.nearness is not None and is_chance(end.nearness.p) else "bold yellow"
        table = Table(box=box.SIMPLE_HEAD, header_style="dim")
        table.add_column("cos", style="cyan", justify="right", no_wrap=True)
        table.add_column(heading, no_wrap=True, max_width=free)
        table.add_column("hook", style="magenta", no_wrap=True)
        for neighbor, name in zip(end.neighbors, names, strict=True):
            table.add_row(f"{neighbor.similarity:.2f}", marked_text(neighbor.context.clipped(free - 2), mark_style), name)
        tables.append(table)
        if end.nearness is not None:
            tables.append(Text(f" {nearness_sentence(end.nearness)}"))
    notes = [f" v {geometry_note(direction.transform)}"]
    if any(end.nearness is not None for _, end in ends):
        notes.append(f" {NEARNESS_LEGEND}")
    return Group(*tables, Text("\n".join(notes), "dim"))
