"""A lens result as one self-contained HTML file: layer × token tables with a lens switch; a click shows a cell's neighbors."""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.lens.result import LensResult, TokenReading
from tl_latentlens.views.sheet import LENSES, Sheet, contexts_of, sheet_of, span
from tl_latentlens.views.text import CHANCE, hook_headings, short_hook_name, visible

_CONTEXT = 160  # characters


def write_page(result: LensResult, path: str | Path) -> Path:
    """Write the file; see `LensResult.to_html`."""
    path = target(path)
    path.write_text(page(result), encoding="utf-8")
    return path


def target(path: str | Path) -> Path:
    """The path of a file to write.

    Raises:
        InvalidInputError: It is a folder, or in none.
    """
    path = Path(path).expanduser()
    if not path.parent.is_dir() or path.is_dir():
        problem = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise InvalidInputError(f"cannot write {path}: {problem}; expected the name of a file in a folder that exists")
    return path


def page(result: LensResult) -> str:
    """The whole page."""
    batches = np.unique(result.positions[:, 0]).tolist()
    if not batches:
        raise InvalidInputError("nothing was decoded: no position was selected")
    sheets = {batch: sheet_of(result, batch) for batch in batches}
    data = sheet_data(list(sheets.values()))
    texts = [{"batch": batch, **text} for batch, text in zip(batches, data["texts"], strict=True)]
    return filled("page.html", {**data, "texts": texts})


def filled(template: str, data: dict[str, Any]) -> str:
    """A page of this folder with its data: JSON of ASCII characters without any "<", which no HTML parser takes for markup."""
    folder = resources.files("tl_latentlens.views")
    page = folder.joinpath(template).read_text(encoding="utf-8")
    for place, shared in {"css": "page.css", "js": "page.js", "readings": "readings.js"}.items():
        page = page.replace(f"{{{{{place}}}}}", folder.joinpath(shared).read_text(encoding="utf-8").rstrip())
    written = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return page.replace("{{data}}", written)


def sheet_data(sheets: Sequence[Sheet]) -> dict[str, Any]:
    """What the scripts of a page show of the cells of some texts, each context and token once."""
    first = sheets[0]
    rows = np.unique(np.concatenate([sheet.rows.ravel() for sheet in sheets])).tolist()
    contexts = contexts_of(first.index, rows, _CONTEXT)
    place = {row: i for i, row in enumerate(contexts)}
    strings: dict[str, int] = {}
    texts = [
        {
            "tokens": sheet.tokens,
            "positions": sheet.positions,
            "latentlens": _neighbors(sheet, place),
            **{lens: [_scores(of.get(name), strings) for name in sheet.hook_names] for lens, of in sheet.readings.items()},
        }
        for sheet in sheets
    ]
    headings, kind = hook_headings(first.hook_names)
    return {
        "headings": headings,
        "kind": kind,
        "layers": list(map(short_hook_name, first.hook_names)),
        "hooks": list(map(short_hook_name, first.index.hook_names)),
        "calibrated": first.chances is not None,
        "chance": CHANCE,
        "lenses": [_lens(sheets, lens) for lens in first.lenses],
        "contexts": [[one.before, one.token, one.after, one.lead, one.tail] for one in contexts.values()],
        "strings": list(strings),
        "texts": texts,
    }


def _lens(sheets: Sequence[Sheet], lens: str) -> dict[str, Any]:
    scale = sheets[0].scale(lens)
    low, high = span([sheet.values(lens) for sheet in sheets], scale)
    return {"key": lens, "name": LENSES[lens], "scale": scale, "low": low, "high": high}


def _neighbors(sheet: Sheet, place: dict[int, int]) -> list[list[list[float]]]:
    """[hook name][pos] → context, hook name, cosine (and chance) of each neighbor, one after the other."""
    contexts = np.vectorize(place.__getitem__, otypes=[np.int64])(sheet.rows)
    cosines = sheet.similarities.astype(np.float64).round(4)
    parts = [contexts, sheet.hook_ids, cosines, *([] if sheet.chances is None else [sheet.chances.astype(np.float64).round(6)])]
    return _flat(parts)


def _scores(reading: TokenReading | None, strings: dict[str, int]) -> list[list[float]] | None:
    """[pos] → string and score of each token, one after the other; `strings` grows."""
    if reading is None:
        return None
    place = {i: strings.setdefault(visible(reading.strings[i]), len(strings)) for i in np.unique(reading.token_ids).tolist()}
    tokens = np.vectorize(place.__getitem__, otypes=[np.int64])(reading.token_ids)
    return _flat([tokens, reading.scores.astype(np.float64).round(4)])


def _flat(parts: list[np.ndarray]) -> Any:
    """[..., k] arrays of numbers, interleaved along their last axis, as nested lists; whole numbers stay whole."""
    mixed = np.stack([part.astype(object) for part in parts], -1)
    return mixed.reshape(*mixed.shape[:-2], -1).tolist()
