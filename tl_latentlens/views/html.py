"""A lens result as an HTML table, for notebooks."""

import html
from itertools import islice

import pandas as pd

from tl_latentlens.results import Cell, LensResult, Neighbor
from tl_latentlens.views.text import clip, short_hook_name, visible

_WIDTH, _NEIGHBORS, _ROWS = 90, 3, 400


def result_html(result: LensResult) -> str:
    """A table with a row for each decoded token and hook name; long results are cut, and say so."""
    n_cells = len(result.hook_names) * len(result.positions)
    frame = pd.DataFrame([_line(cell) for cell in islice(result.iter_cells(), _ROWS)])
    table = frame.to_html(escape=False, index=False, border=0, justify="left")
    cut = f"<p>{n_cells - _ROWS} more rows: use to_dataframe() or plot().</p>" if n_cells > _ROWS else ""
    return f"<div style='max-height: 40em; overflow: auto'>{table}</div>{cut}"


def _line(cell: Cell) -> dict[str, object]:
    line: dict[str, object] = {
        "batch": cell.batch,
        "pos": cell.pos,
        "token": f"<code>{html.escape(visible(cell.token))}</code>",
        "hook": html.escape(short_hook_name(cell.hook_name)),
        "nearest contextual tokens": "<br>".join(f"{n.similarity:.2f} {_context(n)}" for n in cell.neighbors[:_NEIGHBORS]),
    }
    for heading, reading in (("logit lens", cell.logit_lens), ("embedding lens", cell.embedding_lens)):
        if reading:
            line[heading] = "<br>".join(f"{score:.2f} {html.escape(visible(token))}" for token, score in reading[:_NEIGHBORS])
    return line


def _context(neighbor: Neighbor) -> str:
    before, token, after = (html.escape(part) for part in clip(neighbor.context, neighbor.token, _WIDTH))
    return f"<span style='opacity: 0.65'>{before}</span><b>{token}</b><span style='opacity: 0.65'>{after}</span>"
