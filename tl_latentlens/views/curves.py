"""An evaluation as curves over the hook names (plotly)."""

from collections.abc import Sequence
from typing import Any

from tl_latentlens.views.colors import BASELINE_GRAYS, LINE_COLORS, WORD_READER_COLORS
from tl_latentlens.views.data import MeasurePanel
from tl_latentlens.views.lens_names import LENSES
from tl_latentlens.views.measures import hook_names_of
from tl_latentlens.views.optional import plotly_graph_objects, plotly_subplots
from tl_latentlens.views.text import hook_headings

_DASHES = ("dash", "dot", "dashdot")


def measure_curves(panels: Sequence[MeasurePanel], transforms: Sequence[str]) -> Any:
    """A plotly figure with a panel for each measure: means with 95 % intervals.

    Transforms and other lenses are drawn in color. Nulls are gray and dashed.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    graph_objects = plotly_graph_objects()
    n_rows = -(-len(panels) // 2)
    titles = [f"{panel.name} ({'lower' if panel.lower_is_better else 'higher'} is better)" for panel in panels]
    figure = plotly_subplots(n_rows, 2, subplot_titles=titles, horizontal_spacing=0.09, vertical_spacing=0.32 / (n_rows + 1))
    styles = _line_styles(panels, transforms)
    readers_in_legend: set[str] = set()
    for i, panel in enumerate(panels):
        hook_names = hook_names_of(panel)
        headings, kind = hook_headings(hook_names)
        heading_of = dict(zip(hook_names, headings, strict=True))
        place = {"row": i // 2 + 1, "col": i % 2 + 1}
        for reader, lines in panel.table.groupby("reader", sort=False):
            is_level = not any(lines["hook_name"])
            lines = lines.loc[lines.index.repeat(len(hook_names))] if is_level else lines
            color, dash = styles[str(reader)]
            trace = graph_objects.Scatter(
                x=headings if is_level else [heading_of[name] for name in lines["hook_name"]],
                y=lines["mean"],
                error_y={
                    "array": lines["high"] - lines["mean"],
                    "arrayminus": lines["mean"] - lines["low"],
                    "thickness": 1,
                    "width": 3,
                },
                name=str(reader),
                legendgroup=str(reader),
                showlegend=reader not in readers_in_legend,
                mode="lines+markers" if dash == "solid" else "lines",
                line={"color": color, "dash": dash},
            )
            figure.add_trace(trace, **place)
            readers_in_legend.add(str(reader))
        figure.update_xaxes(title_text=kind or "hook", type="category", categoryorder="array", categoryarray=headings, **place)
        figure.update_yaxes(rangemode="tozero", **place)
    return figure.update_layout(width=1100, height=120 + 330 * n_rows, template="plotly_white", legend={"tracegroupgap": 2})


def _line_styles(panels: Sequence[MeasurePanel], transforms: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Color and dash of each reader."""
    others = [reader for panel in panels for reader in panel.table["reader"] if reader not in transforms]
    styles = {reader: (BASELINE_GRAYS[i % 3], _DASHES[i % 3]) for i, reader in enumerate(dict.fromkeys(others))}
    styles |= {info.label: (f"rgb{info.hue}", "solid") for info in LENSES.values()}
    styles |= {reader: (color, "solid") for reader, color in WORD_READER_COLORS.items()}
    return styles | {reader: (color, "solid") for reader, color in zip(transforms, LINE_COLORS, strict=False)}
