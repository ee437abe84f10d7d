"""Chosen tokens and words as curves over the layers, a panel for each lens (plotly)."""

import math
from typing import Any

import numpy as np

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.views.colors import LINE_COLORS
from tl_latentlens.views.grids import FollowedGrid
from tl_latentlens.views.heatmap import plotly_text
from tl_latentlens.views.optional import plotly_graph_objects, plotly_subplots
from tl_latentlens.views.text import hook_headings, visible

_PANEL_PIXELS = 210


def token_curves(grid: FollowedGrid, by: str) -> Any:
    """A plotly figure with a panel for each lens, one above the other, and a line for each token.

    Args:
        grid: The chosen tokens.
        by: "score" or "rank".

    Raises:
        MissingExtraError: plotly is not installed.
        InvalidInputError: Another `by`.
    """
    graph_objects = plotly_graph_objects()
    if by not in ("score", "rank"):
        raise InvalidInputError(f'got by={by!r}; expected "score" or "rank"')
    figures = grid.ranks if by == "rank" else grid.scores
    figure = plotly_subplots(
        len(figures),
        1,
        shared_xaxes=True,
        vertical_spacing=0.12,
        subplot_titles=[_panel_title(lens, by, grid.top_k) for lens in figures],
    )
    headings, kind = hook_headings(grid.hook_names)
    for i, token in enumerate(grid.followed):
        name, color = plotly_text(repr(visible(token))), LINE_COLORS[i % len(LINE_COLORS)]
        line = {"name": name, "legendgroup": str(i), "mode": "lines+markers", "line_color": color}
        for row, values in enumerate(figures.values(), 1):
            figure.add_trace(graph_objects.Scatter(x=headings, y=values[:, i], showlegend=row == 1, **line), row=row, col=1)
    figure.update_xaxes(type="category", title_text=None)
    figure.update_xaxes(title_text=kind or "hook", row=len(figures))
    for row, (lens, values) in enumerate(figures.items(), 1):
        if by == "rank":
            last = max([10, *values[np.isfinite(values)].tolist()])
            figure.update_yaxes(type="log", range=[1.05 * math.log10(last), -0.15], dtick=1, row=row)
        elif lens != "embedding_lens":
            figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%", row=row)
    title = f"position {grid.pos}: {plotly_text(visible(grid.token))}"
    figure.update_annotations(x=0, xanchor="left", font_size=14)
    height = 130 + (_PANEL_PIXELS + 30) * len(figures)
    return figure.update_layout(
        title={"text": title, "x": 0, "xref": "paper", "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 14}},
        height=height,
        template="plotly_white",
        margin={"t": 110, "l": 60, "r": 20},
        legend={"orientation": "h", "x": 0, "y": 1 - 44 / height, "yref": "container", "yanchor": "top"},
        hovermode="x unified",
    )


def _panel_title(lens: str, by: str, top_k: int) -> str:
    nearest = f"in the {top_k} nearest rows"
    return {
        ("contexts", "score"): f"Contexts: share of the {top_k} nearest that hold the word",
        ("contexts", "rank"): f"Contexts: first of the {top_k} nearest that holds the word",
        ("latentlens", "score"): f"LatentLens: share {nearest}",
        ("latentlens", "rank"): f"LatentLens: first place {nearest}",
        ("logit_lens", "score"): "Logit lens: probability of coming next",
        ("logit_lens", "rank"): "Logit lens: rank of coming next",
        ("embedding_lens", "score"): "Embedding lens: cosine with the token",
        ("embedding_lens", "rank"): "Embedding lens: rank of the token",
    }[lens, by]
