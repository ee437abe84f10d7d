"""Directions as one self-contained HTML file: the rows nearest to both ends of each, and whether they are near."""

from collections.abc import Sequence
from html import escape

from tl_latentlens.views.chance import is_chance, nearness_sentence
from tl_latentlens.views.data import DirectionEnd, DirectionLine, NeighborLine
from tl_latentlens.views.page_head import PageHead
from tl_latentlens.views.template import render_template
from tl_latentlens.views.text import also_at, printable, short_hook_name


def direction_page(lines: Sequence[DirectionLine], random: DirectionLine | None, head: PageHead) -> str:
    """The page.

    Args:
        lines: The directions.
        random: A random direction, for comparison; None: there is none.
        head: What the page opens with.
    """
    titles = [f"direction {line.name}" if len(lines) > 1 else "" for line in lines]
    sections = [_section(title, line) for title, line in zip(titles, lines, strict=True)]
    sections += [] if random is None else [_section("a random direction, for comparison", random)]
    return render_template("directions.html", {}, head, title="tl-latentlens: directions", body="\n".join(sections))


def _section(title: str, line: DirectionLine) -> str:
    ends = "".join(_end(name, end) for name, end in (("+v", line.positive), ("−v", line.negative)))
    heading = f"<h2>{_text(title)}</h2>" if title else ""
    return f'<section>{heading}<div class="ends">{ends}</div></section>'


def _end(name: str, end: DirectionEnd) -> str:
    is_faint = end.nearness is not None and is_chance(end.nearness.p)
    note = "" if end.nearness is None else f"<small>{_text(nearness_sentence(end.nearness))}</small>"
    items = "".join(map(_neighbor, end.neighbors))
    return f'<div><h3>rows nearest to {name}</h3>{note}<ol class="contexts{" faint" if is_faint else ""}">{items}</ol></div>'


def _neighbor(near: NeighborLine) -> str:
    context = near.context.clipped(None)
    place = " ".join(filter(None, [short_hook_name(near.hook_name), also_at(near.hook_names)]))
    text = f"{_text(context.before)}<mark>{_text(context.token)}</mark>{_text(context.after)}"
    return f'<li><span class="figure">{near.similarity:.3f}</span>{text} <small>{_text(place)}</small></li>'


def _text(text: str) -> str:
    return escape(printable(text))
