"""The lines of a measure: readers by hook names, as the terminal, the page and the curves of an evaluation show them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tl_latentlens.views.data import MeasurePanel

GEOMETRIC = "geometric mean"


@dataclass(frozen=True)
class Figure:
    """One mean with its 95 % interval, whose ends are NaN where there is none.

    Attributes:
        mean, low, high: The figures.
        is_best: Whether no compared transform is better at the hook name.
    """

    mean: float
    low: float
    high: float
    is_best: bool = False


@dataclass(frozen=True)
class MeasureLine:
    """One reader of a measure.

    Attributes:
        reader: Its name.
        is_compared: True for a transform; False for another lens, and for a null.
        figures: Hook name → its figure; a hook name at which it does not read is left out.
        needs_no_hook: Whether one figure stands for all hook names.
    """

    reader: str
    is_compared: bool
    figures: dict[str, Figure]
    needs_no_hook: bool


def hook_names_of(panel: MeasurePanel) -> list[str]:
    """The hook names of a measure, in the order of the reader that has most: a lens may read some of them alone."""
    lines = panel.table[panel.table["hook_name"] != ""]
    readers = sorted((names.tolist() for _, names in lines.groupby("reader", sort=False)["hook_name"]), key=len, reverse=True)
    return list(dict.fromkeys(name for names in readers for name in names))


def measure_lines(panel: MeasurePanel, transforms: Sequence[str]) -> list[MeasureLine]:
    """The readers of a measure, in their order."""
    hook_names, sign = hook_names_of(panel), -1 if panel.lower_is_better else 1
    columns = (panel.table[name] for name in ("reader", "hook_name", "mean", "low", "high"))
    figures: dict[str, dict[str, tuple[float, ...]]] = {}
    for reader, hook_name, *numbers in zip(*columns, strict=True):
        figures.setdefault(str(reader), {})[hook_name] = tuple(map(float, numbers))
    compared = [figures[transform] for transform in transforms if transform in figures]
    best = {name: max((sign * of[name][0] for of in compared if name in of), default=math.nan) for name in hook_names}
    return [
        MeasureLine(
            reader,
            reader in transforms,
            {
                name: Figure(*numbers, is_best=reader in transforms and sign * numbers[0] == best[name])
                for name in hook_names
                if (numbers := of.get("") or of.get(name)) is not None
            },
            "" in of,
        )
        for reader, of in figures.items()
    ]


def figure_text(value: float, kind: str) -> str:
    """A figure in few digits: three behind the point, two from ten on; small geometric means keep two digits."""
    if math.isnan(value):
        return ""
    if kind == GEOMETRIC and 0 < abs(value) < 0.00095:
        return f"{value:.0e}"
    if kind == GEOMETRIC and 0 < abs(value) < 0.00995:
        return f"{value:.4f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def gain_text(gain: float, kind: str) -> str:
    """A gain with its sign: of a geometric mean in percent."""
    return "" if math.isnan(gain) else f"{gain:+.1%}" if kind == GEOMETRIC else f"{gain:+.3f}"
