"""Labelled SAE features as one self-contained HTML file: a table to search and sort, and a card for the feature chosen."""

import base64
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from tl_latentlens.directions.activity import HISTOGRAM_EDGES
from tl_latentlens.directions.contexts import Texts, activations_around, ranges, texts_of
from tl_latentlens.directions.feature_result import FeatureResult
from tl_latentlens.views.page import filled, target
from tl_latentlens.views.text import hook_headings, printable, short_hook_name, visible

_BEFORE, _AFTER = 24, 8  # tokens around a row
_CUT, _END, _JOINED = 0, 1, 2  # strings that stand for: the text goes on, it ends, the token's text is with the one before
_UNKNOWN = 255  # shade of a token whose activation is not known; 254 is the feature's largest
_NULL_BINS = 40
_SCORES = {
    "auroc_same_token": "AUROC, same token",
    "auroc": "AUROC",
    "similarity": "cosine",
    "overlap": "overlap",
    "steered": "steered",
    "steered_next": "steered, next token",
}


def write_features(result: FeatureResult, path: str | Path, contexts: int = 20, progress: bool = True) -> Path:
    """Write the file; see `FeatureResult.to_html`."""
    path = target(path)
    path.write_text(filled("features.html", _data(result, contexts, progress)), encoding="utf-8")
    return path


def _data(result: FeatureResult, contexts: int, progress: bool) -> dict[str, Any]:
    table, place = result.table, {feature: i for i, feature in enumerate(result.ids)}
    texts = texts_of(result.positive.index)
    near = {"positive": result.positive, "negative": result.negative}
    rows = {sign: found.rows.cpu().numpy() for sign, found in near.items()}
    arrays = {f"{sign}_cosines": _rounded(found.similarities.cpu().numpy(), 4) for sign, found in near.items()}
    if len(hook_names := result.positive.index.hook_names) > 1:
        arrays |= {f"{sign}_hooks": found.hook_ids.cpu().numpy() for sign, found in near.items()}
    if result.activity is not None:
        values = result.activity.top.similarities[:, :contexts].cpu().numpy()
        rows["top"] = np.where(np.isfinite(values), result.activity.top.rows[:, :contexts].cpu().numpy(), -1)
        arrays |= {"top_values": np.where(np.isfinite(values), values, 0), "histogram": result.activity.histogram}
        arrays["shades"] = _shades(result, texts, rows["top"], values, progress)
    tokens, strings, at = _stream(texts, np.concatenate([found.ravel() for found in rows.values()]))
    arrays["tokens"] = tokens
    ends = np.cumsum([found.size for found in rows.values()])[:-1]
    arrays |= {name: part.reshape(rows[name].shape) for name, part in zip(rows, np.split(at, ends), strict=True)}
    known = {string: i for i, string in enumerate(strings)}
    for name, sign in (("logit_tokens", "logit_positive"), ("logit_tokens_negative", "logit_negative")):
        if name in table:
            read = [[known.setdefault(visible(token), len(known)) for token in line] for line in table[name].dropna()]
            arrays[sign] = np.array(read, np.int64).reshape(len(read), -1)
    figures = [name for name in table.select_dtypes("number") if name != "feature" and not str(name).endswith("_null")]
    where = hook_names[0] if len(hook_names) == 1 else hook_headings(hook_names)[1] or f"{len(hook_names)} hook names"
    labelled = int(np.count_nonzero(table["label"] != ""))
    return {
        "about": f"{len(table):,} features, {labelled:,} labelled, by {result.positive.index.n_rows:,} rows of {where}",
        "features": table["feature"].tolist(),
        "labels": list(map(printable, table["label"])),
        "why": list(map(printable, table["why_not"])),
        "figures": {name: _short(table[name].to_numpy(float)) for name in figures},
        "scores": [_score(result, name, heading) for name, heading in _SCORES.items() if name in table],
        "found": [place.get(feature, -1) for feature in table["feature"].tolist()],
        "hooks": list(map(short_hook_name, hook_names)),
        "edges": HISTOGRAM_EDGES.tolist(),
        "window": [_BEFORE, _AFTER],
        "unknown": _UNKNOWN,
        "strings": list(known),
        "arrays": {name: _packed(array) for name, array in arrays.items()},
    }


def _score(result: FeatureResult, name: str, heading: str) -> dict[str, Any]:
    """A score's axis, the mean of its nulls, and how many of them stand in each bin of the axis."""
    null = result.nulls.get(name, np.zeros(0))
    mean = f"{name}_null"
    means = result.table[mean].dropna().to_numpy(float)[:1] if not len(null) and mean in result.table else null
    both = np.concatenate([result.table[name].dropna().to_numpy(float), null])
    low, high = (float(both.min()), float(both.max()) + 1e-6) if name == "similarity" and len(both) else (0.0, 1.0)
    return {
        "name": name,
        "heading": heading,
        "low": low,
        "high": high,
        "null": _short(means.mean(keepdims=True))[0] if len(means) else None,
        "counts": np.histogram(null, _NULL_BINS, (low, high))[0].tolist() if len(null) else [],
    }


def _shades(
    result: FeatureResult, texts: Texts, rows: Int[np.ndarray, "f n"], values: Float[np.ndarray, "f n"], progress: bool
) -> Int[np.ndarray, "f n window"]:
    """Activations around the max-activating rows as shares of the feature's largest, 0 to 254; `_UNKNOWN` where not known."""
    assert result.activity is not None
    around = activations_around(
        result.sae,
        texts,
        result.activity.hook_name,
        list(result.ids),
        rows,
        before=_BEFORE,
        after=_AFTER,
        model=result.model,
        progress=progress,
    )
    largest = np.maximum(values[:, :1, None], 1e-12) if values.size else np.ones((len(values), 1, 1))
    shares = np.ceil(254 * (around / largest).clip(0, 1))
    return np.where(np.isnan(around), _UNKNOWN, np.nan_to_num(shares)).astype(np.uint8)


def _stream(texts: Texts, rows: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " tokens"], list[str], Int[np.ndarray, " n"]]:
    """What stands around rows, each token once, as one stream of strings; the strings; and where in it each row stands.

    Windows that meet are one segment; between segments stands `_CUT` or `_END`. A row of -1 stands at 0.
    """
    asked = np.unique(rows[rows >= 0])
    begin, end = texts.spans(asked, _BEFORE, _AFTER)
    reach = np.maximum.accumulate(end)
    first = np.flatnonzero(np.concatenate([[True], begin[1:] >= reach[:-1]])[: len(begin)])
    begin, end = begin[first], np.maximum.reduceat(end, first) if len(first) else end
    sizes = end - begin + 2
    starts = sizes.cumsum() - sizes
    stream = np.empty(int(sizes.sum()), np.int64)
    strings = {"…": _CUT, "\0": _END, "": _JOINED}
    starts_of_prompts = texts.prompt_starts
    stream[starts] = np.where(np.isin(begin, starts_of_prompts), _END, _CUT)
    stream[starts + sizes - 1] = np.where(np.isin(end, starts_of_prompts), _END, _CUT)
    stream[ranges(starts + 1, starts + sizes - 1)] = _strings_at(texts, ranges(begin, end), strings)
    places = texts.row_places[rows]
    segment = np.searchsorted(begin, places, "right") - 1
    at = places - begin[segment] + starts[segment] + 1 if len(begin) else places
    return stream, list(strings), np.where(rows >= 0, at, 0)


def _strings_at(texts: Texts, places: Int[np.ndarray, " n"], strings: dict[str, int]) -> Int[np.ndarray, " n"]:
    """The string of the token at each ascending place; `strings` grows. Tokens that are parts of characters are joined."""
    parts = [np.zeros(0, np.int64)]
    for bank, start, here in texts.of_banks(places):
        ids, of = np.unique(bank.plan.tokens[here - start], return_inverse=True)
        pieces = [bank.token_bytes(i) for i in ids.tolist()]
        found = np.array([_string(piece, strings) for piece in pieces], np.int64)[of]
        broken = np.array([_is_broken(piece) for piece in pieces], bool)[of]
        for first, last in _runs(broken, here, texts.prompt_starts):
            joined = b"".join(pieces[i] for i in of[first:last].tolist())
            found[first], found[first + 1 : last] = _string(joined, strings), _JOINED
        parts.append(found)
    return np.concatenate(parts)


def _string(piece: bytes, strings: dict[str, int]) -> int:
    text = printable(piece.decode("utf-8", errors="replace"))
    return strings.setdefault(text, len(strings)) if piece else _END


def _is_broken(piece: bytes) -> bool:
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


def _runs(
    where: Bool[np.ndarray, " n"], places: Int[np.ndarray, " n"], starts: Int[np.ndarray, " prompts"]
) -> list[tuple[int, int]]:
    """First and end of each run of True at places that follow each other in one prompt."""
    if not where.any():
        return []
    at = np.flatnonzero(where)
    new = np.flatnonzero((np.diff(places[at], prepend=-2) > 1) | np.isin(places[at], starts))
    return list(zip(at[new].tolist(), (at[np.append(new[1:], len(at)) - 1] + 1).tolist(), strict=True))


def _rounded(values: Float[np.ndarray, "..."], digits: int) -> Int[np.ndarray, "..."]:
    return np.rint(values * 10.0**digits).astype(np.int64)


def _short(values: Float[np.ndarray, " n"]) -> list[float | None]:
    """Four significant digits; None for what is no number."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]


def _packed(array: np.ndarray) -> dict[str, Any]:
    """An array as deflated base64: whole numbers as the smallest type that holds them, others as float32."""
    if array.dtype.kind == "f":
        kind = np.dtype("<f4")
    else:
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        kind = np.result_type(np.min_scalar_type(low), np.min_scalar_type(high)).newbyteorder("<")
    content = base64.b64encode(zlib.compress(np.ascontiguousarray(array, kind).tobytes(), 6)).decode()
    return {"type": f"{kind.name.capitalize()}Array", "shape": list(array.shape), "data": content}
