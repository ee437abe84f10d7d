"""Tokens and hook names as text, written the same in every view."""

import re
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

_BLOCK_HOOK = re.compile(r"blocks\.(\d+)\.(?:hook_)?(.+)")
_BIDI_CONTROLS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # They show text in another order than it is stored in.
_VISIBLE_SIGNS = {
    **{code: 0x2400 + code for code in range(32)},
    127: 0x2421,
    **dict.fromkeys((*range(0x80, 0xA0), *_BIDI_CONTROLS), "\N{REPLACEMENT CHARACTER}"),
    **dict.fromkeys((10, 0x2028, 0x2029), "↵"),
}


def short_hook_name(hook_name: str) -> str:
    """`blocks.3.hook_resid_post` as `3`, `blocks.3.attn.hook_z[1]` as `3 attn.z[1]`; other names as they are."""
    match = _BLOCK_HOOK.fullmatch(hook_name)
    if match is None:
        return hook_name
    return match[1] if match[2] == "resid_post" else f"{match[1]} {match[2].replace('.hook_', '.')}"


def place_name(hook_name: str) -> str:
    """A hook name in a sentence: "layer 3", "layer 3 attn.z[1]"; other names as they are."""
    return f"layer {short_hook_name(hook_name)}" if _BLOCK_HOOK.fullmatch(hook_name) else hook_name


def also_at(hook_names: Sequence[str]) -> str:
    """The hook names after the first, as a note: "also at layers 3, 7"; empty where there are none."""
    if len(hook_names) < 2:
        return ""
    labels, kind = hook_headings(hook_names[1:])
    layers = "" if not kind else "layer " if len(labels) == 1 else "layers "
    return f"also at {layers}{', '.join(labels)}"


def hook_headings(hook_names: Sequence[str]) -> tuple[list[str], str]:
    """A short heading for each hook name, and what they have in common.

    Where all are one activation of several layers: the layer numbers, and `blocks.*.hook_resid_post`. Else the short names,
    and an empty text.
    """
    matches = [_BLOCK_HOOK.fullmatch(name) for name in hook_names]
    kinds = {match and match[2] for match in matches}
    if len(kinds) == 1 and None not in kinds:
        return [match[1] for match in matches if match], f"blocks.*.{hook_names[0].split('.', 2)[2]}"
    return [short_hook_name(name) for name in hook_names], ""


def layer_headings(hook_names: Sequence[str]) -> tuple[list[str], str]:
    """A heading for each hook name, and what the headings are: layer numbers ("layer") where all are `hook_resid_post`.

    Else the short names ("hook").
    """
    headings, kind = hook_headings(hook_names)
    is_layer = kind.endswith(".hook_resid_post")
    return (headings, "layer") if is_layer else (list(map(short_hook_name, hook_names)), "hook")


def printable(text: str) -> str:
    """Text that a terminal or a page only shows: each control character as one visible sign (ESC as ␛, a newline as ↵)."""
    return text.translate(_VISIBLE_SIGNS)


def visible(token: str | None) -> str:
    """A token with its control characters, and the spaces at its ends, made visible, so that " a" and "a" differ."""
    if token is None:
        return "?"
    inner = printable(token)
    stripped = inner.strip(" ")
    if not stripped:
        return "␣" * len(inner)
    start = len(inner) - len(inner.lstrip(" "))
    return "␣" * (start - 1) + (" " if start else "") + stripped + "␣" * (len(inner) - start - len(stripped))


def display_width(text: str) -> int:
    """Columns of a terminal that the longest line of a text takes; a wide character takes two."""
    return len(text) if text.isascii() and "\n" not in text else max(map(cell_len, text.split("\n")))


def take_columns(text: str, n_columns: int) -> str:
    """The beginning of a text that fills so many columns of a terminal; half a wide character becomes a space."""
    return text[:n_columns] if text.isascii() else set_cell_size(text, n_columns)
