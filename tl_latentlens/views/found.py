"""Components that write a meaning, as tables for the terminal."""

import math
from typing import Any

import numpy as np
from rich import box, get_console
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tl_latentlens.directions.find_result import FindResult, Meaning
from tl_latentlens.views.terminal import add_evidence, as_plain, label_text, neighbor_text
from tl_latentlens.views.text import clip, short_hook_name, visible


def meaning_lines(meaning: Meaning, *, width: int | None = None, neighbors: int = 3) -> Text:
    """The word in its text, and the uses of its token that show what is meant."""
    width = width or get_console().width
    tokens = [token for token in meaning.tokens if not (token.startswith("<") and token.endswith(">"))]
    before, word = "".join(tokens[:-1]).replace("\n", "↵").lstrip(), tokens[-1].replace("\n", "↵")
    lead, word = (" " if word.startswith(" ") and before else ""), word.strip() or word
    before, word, _ = clip(f"{before}{lead}«{word}»", word, width - 2)
    lines = Text.assemble(before, (f"«{word}»", "bold reverse"), "\n")
    if meaning.by_token:
        alike, others = meaning.alike(), f"{meaning.n_uses} others"
        lines.append(f"read at {short_hook_name(meaning.hook_name)}: what these uses share, and {others} lack\n", "dim")
    else:
        few = f"only {meaning.n_uses} other uses of the token: compared with the mean of all tokens"
        alike = meaning.neighbors()
        lines.append(f"read at {short_hook_name(meaning.hook_name)}; {few}\n", "dim")
    for near in alike[:neighbors]:
        lines.append(f"  {near.similarity:.2f}  ", "cyan")
        lines.append_text(neighbor_text(near, meaning.hook_name, width - 8)).append("\n")
    return lines


def find_table(result: FindResult, *, width: int | None = None) -> Table:
    """A line a component: its share, its p-values, what it is about or attends to, and the row nearest to what it writes.

    Args:
        result: What `find_features`, `find_heads` or `find_neurons` found.
        width: Width of the table in characters; None: the terminal's. In a narrow one some columns are left out.
    """
    table, width = result.table, width or get_console().width
    columns = {name: name for name in ("feature", "layer", "head", "neuron") if name in table}
    columns |= {"act": "activation"} if "activation" in table else {}
    columns |= {"added": "contribution", "usual": "usual"} if width >= 110 else {}
    columns |= {"share": "share", "p token": "p_same_token", "p any": "p_random"}
    shown = Table(box=box.SIMPLE_HEAD, header_style="dim")
    for heading in columns:
        shown.add_column(heading, justify="right", no_wrap=True, min_width=max(len(heading), 5))
    records = table.to_dict("records")
    heading = "attends to" if result.kind == "head" else "label, or why not"
    nearest = [result.neighbors(i)[0] for i in range(len(records))]
    evidence = add_evidence(shown, heading, [_told(line) for line in records], nearest, width)
    for line, cells in zip(records, evidence, strict=True):
        figures = [_figure(name, line[name]) for name in columns.values()]
        shown.add_row(*figures, *cells, style="" if line["beats_null"] else "dim")
    beating = f"{np.count_nonzero(table['beats_null'])} of these {len(table)} beat their null"
    shown.caption = f"{beating}. All in all: {', '.join(f'{name} {share:.0%}' for name, share in result.parts.items())}"
    shown.caption_justify = "left"
    return shown


def _figure(name: str, value: Any) -> str:
    if isinstance(value, int):
        return str(value)
    if math.isnan(value):
        return ""
    return f"{value:.1%}" if name == "share" else f"{value:.3f}" if name.startswith("p_") else f"{value:.1f}"


def _told(line: dict[str, Any]) -> Text:
    if "attends_to" in line:
        return Text.assemble(f"{line['attention']:4.0%} ", (visible(line["attends_to"]), "bold yellow"))
    return label_text(line, "label_why_not")


def find_text(result: FindResult, *, width: int = 120) -> str:
    """The word and the table as plain text."""
    return as_plain(Group(meaning_lines(result.meaning, width=width), find_table(result, width=width)), width)
