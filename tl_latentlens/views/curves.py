"""An evaluation as curves over the hook names (plotly)."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_latentlens.evaluation.evaluate import Evaluation
from tl_latentlens.views.text import hook_headings

_COLORS = ("#3366cc", "#dc3912", "#ff9900", "#109618", "#990099", "#0099c6")  # of transforms
_GRAYS = ("#222222", "#666666", "#999999")  # of everything else
_DASHES = ("dash", "dot", "dashdot")


def curves(evaluation: Evaluation) -> go.Figure:
    """A panel for each measure: means with 95 % intervals; transforms in color, other lenses and nulls gray and dashed."""
    measures = evaluation.measures
    rows = -(-len(measures) // 2)
    better = ["lower is better" if measure.lower_is_better else "higher is better" for measure in measures]
    titles = [f"{measure.name} ({end})" for measure, end in zip(measures, better, strict=True)]
    figure = make_subplots(rows, 2, subplot_titles=titles, horizontal_spacing=0.09, vertical_spacing=0.32 / (rows + 1))
    tables = [measure.table() for measure in measures]
    others = [reader for table in tables for reader in table["reader"] if reader not in evaluation.transforms]
    lines = {reader: (_GRAYS[i % 3], _DASHES[i // 3 % 3]) for i, reader in enumerate(dict.fromkeys(others))}
    lines |= {reader: (color, "solid") for reader, color in zip(evaluation.transforms, _COLORS, strict=False)}
    shown: set[str] = set()
    for panel, table in enumerate(tables):
        names = [name for name in dict.fromkeys(table["hook_name"]) if name]
        headings, kind = hook_headings(names)
        row, col = panel // 2 + 1, panel % 2 + 1
        for reader, part in table.groupby("reader", sort=False):
            if not any(part["hook_name"]):
                part = part.loc[part.index.repeat(len(names))]
            color, dash = lines[str(reader)]
            figure.add_trace(
                go.Scatter(
                    x=headings if len(part) == len(names) else part["hook_name"],
                    y=part["mean"],
                    error_y={
                        "array": part["high"] - part["mean"],
                        "arrayminus": part["mean"] - part["low"],
                        "thickness": 1,
                        "width": 3,
                    },
                    name=str(reader),
                    legendgroup=str(reader),
                    showlegend=reader not in shown,
                    mode="lines+markers" if dash == "solid" else "lines",
                    line={"color": color, "dash": dash},
                ),
                row=row,
                col=col,
            )
            shown.add(str(reader))
        figure.update_xaxes(title_text=kind or "hook", type="category", row=row, col=col)
        figure.update_yaxes(rangemode="tozero", row=row, col=col)
    return figure.update_layout(width=1100, height=120 + 330 * rows, template="plotly_white", legend={"tracegroupgap": 2})
