"""A lens result as a layer × position heatmap with hover (plotly)."""

import html

import numpy as np
import plotly.graph_objects as go

from tl_latentlens.results import Cell, LensResult
from tl_latentlens.views.text import clip, short_hook_name, visible


def heatmap(result: LensResult, batch: int = 0) -> go.Figure:
    """Color: similarity of the nearest neighbor, in [-1, 1]; text: its token; hover: neighbors and logit lens."""
    positions = [pos for b, pos in result.positions.tolist() if b == batch]
    cells = [[result.cell(name, pos, batch) for pos in positions] for name in result.hook_names]
    labels = [f"{pos}: {visible(None if result.tokens is None else result.tokens[batch][pos])}" for pos in positions]
    figure = go.Figure(
        go.Heatmap(
            z=[[cell.neighbors[0].similarity if cell.neighbors else np.nan for cell in row] for row in cells],
            x=labels,
            y=[short_hook_name(name) for name in result.hook_names],
            text=[[visible(cell.neighbors[0].token) if cell.neighbors else "" for cell in row] for row in cells],
            texttemplate="%{text}",
            customdata=[[_hover(cell) for cell in row] for row in cells],
            hovertemplate="%{customdata}<extra></extra>",
            colorscale="Viridis",
            colorbar={"title": "cosine"},
        )
    )
    figure.update_layout(
        title="Nearest contextual token at each layer and position",
        xaxis={"title": "position", "type": "category", "tickangle": -45},
        yaxis={"title": "hook", "type": "category"},
        width=max(520, 180 + 62 * len(positions)),
        height=max(320, 190 + 34 * len(result.hook_names)),
        hoverlabel={"align": "left"},
    )
    return figure


def _hover(cell: Cell) -> str:
    lines = [f"<b>{html.escape(visible(cell.token))}</b> at {html.escape(short_hook_name(cell.hook_name))}"]
    for n in cell.neighbors:
        before, token, after = (html.escape(part) for part in clip(n.context, n.token, 80))
        lines.append(f"{n.similarity:.3f} {before}<b>{token}</b>{after} <i>{html.escape(short_hook_name(n.hook_name))}</i>")
    if cell.logit_lens:
        lines.append("logit lens: " + ", ".join(f"{html.escape(visible(t))} {score:.0%}" for t, score in cell.logit_lens))
    return "<br>".join(lines)
