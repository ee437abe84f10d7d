"""Chosen tokens as curves over the layers, a panel for each lens (plotly)."""

import math

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.lens.followed import COLUMNS, FollowedTokens
from tl_latentlens.views.heatmap import plain
from tl_latentlens.views.text import hook_headings, visible

_COLORS = ("#3366cc", "#dc3912", "#ff9900", "#109618", "#990099", "#0099c6")
_PANEL = 210  # pixels


def token_curves(followed: FollowedTokens, pos: int | None, batch: int, by: str) -> go.Figure:
    """A panel for each lens, one above the other, a line for each token; see `FollowedTokens.plot`."""
    if by not in ("score", "rank"):
        raise InvalidInputError(f'got by={by!r}; expected "score" or "rank"')
    frame = followed.at(pos, batch)
    nearest = f"in the {followed.top_k} nearest rows"
    titles = {
        "latentlens": (f"LatentLens: share {nearest}", f"LatentLens: first place {nearest}"),
        "logit_lens": ("Logit lens: probability of coming next", "Logit lens: rank of coming next"),
        "embedding_lens": ("Embedding lens: cosine with the token", "Embedding lens: rank of the token"),
    }
    at = by == "rank"
    figure = make_subplots(
        len(followed.lenses),
        1,
        shared_xaxes=True,
        vertical_spacing=0.12,
        subplot_titles=[titles[x][at] for x in followed.lenses],
    )
    headings, kind = hook_headings(followed.result.hook_names)
    for i, token in enumerate(followed.tokens):
        lines = frame.iloc[i :: len(followed.tokens)]
        for row, lens in enumerate(followed.lenses, 1):
            values = lines[COLUMNS[lens][at]].astype("float64")
            name, color = plain(repr(visible(token))), _COLORS[i % len(_COLORS)]
            trace = go.Scatter(x=headings, y=values, name=name, legendgroup=str(i), mode="lines+markers", line_color=color)
            figure.add_trace(trace.update(showlegend=row == 1), row=row, col=1)
    figure.update_xaxes(type="category", title_text=None)
    figure.update_xaxes(title_text=kind or "hook", row=len(followed.lenses))
    for row, lens in enumerate(followed.lenses, 1):
        if by == "rank":
            last = max([10, *frame[COLUMNS[lens][at]].dropna()])
            figure.update_yaxes(type="log", range=[1.05 * math.log10(last), -0.15], dtick=1, row=row)
        elif lens != "embedding_lens":
            figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%", row=row)
    place = frame.iloc[0]
    title = f"position {place['pos']}: {plain(visible(place['token']))}"
    figure.update_annotations(x=0, xanchor="left", font_size=14)
    height = 130 + (_PANEL + 30) * len(followed.lenses)
    return figure.update_layout(
        title={"text": title, "x": 0, "xref": "paper", "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 14}},
        height=height,
        template="plotly_white",
        margin={"t": 110, "l": 60, "r": 20},
        legend={"orientation": "h", "x": 0, "y": 1 - 44 / height, "yref": "container", "yanchor": "top"},
        hovermode="x unified",
    )
