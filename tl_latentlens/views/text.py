"""How tokens, hook names and contexts are written, the same in every view."""

import re
from collections.abc import Sequence

_SHORT = re.compile(r"blocks\.(\d+)\.(?:hook_)?(.+)")


def short_hook_name(hook_name: str) -> str:
    """`blocks.3.hook_resid_post` as `3 resid_post`; other names as they are."""
    match = _SHORT.fullmatch(hook_name)
    return f"{match[1]} {match[2].replace('.hook_', '.')}" if match else hook_name


def hook_headings(hook_names: Sequence[str]) -> tuple[list[str], str]:
    """Layer numbers, and `hook_resid_post` once, where all hook names are of one kind; else short names and nothing."""
    matches = [_SHORT.fullmatch(name) for name in hook_names]
    kinds = {match and match[2] for match in matches}
    if len(kinds) == 1 and None not in kinds:
        return [match[1] for match in matches if match], f"blocks.*.{hook_names[0].split('.', 2)[2]}"
    return [short_hook_name(name) for name in hook_names], ""


def visible(token: str | None) -> str:
    """A token with its spaces and newlines made visible at the ends, so that " a" and "a" differ."""
    if token is None:
        return "?"
    inner = token.replace("\n", "↵")
    stripped = inner.strip(" ")
    if not stripped:
        return "␣" * len(inner)
    start = len(inner) - len(inner.lstrip(" "))
    return "␣" * (start - 1) + (" " if start else "") + stripped + "␣" * (len(inner) - start - len(stripped))


def clip(context: str, token: str, width: int) -> tuple[str, str, str]:
    """A context «so» as (before, token, after) in at most `width` characters, most of them before the token.

    What stands before a token is what a causal model saw.
    """
    token = token.strip() or token  # the marked token is looked for, since a text may hold guillemets of its own
    before, _, after = context.partition(f"«{token}»")
    room_after = min(len(after), max(width // 4, width - len(before) - len(token)))
    room_before = max(8, width - len(token) - room_after)
    if len(before) > room_before:
        before = "…" + before[len(before) - room_before + 1 :].lstrip("…")
    if len(after) > room_after:
        after = after[: max(0, room_after - 1)].rstrip("…") + "…"
    return before, token, after
