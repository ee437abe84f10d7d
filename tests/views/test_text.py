"""Tokens and hook names are written the same everywhere."""

import pytest

from tl_latentlens.views.text import short_hook_name, visible


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("blocks.3.hook_resid_post", "3"),
        ("blocks.3.hook_resid_pre", "3 resid_pre"),
        ("blocks.3.attn.hook_z[1]", "3 attn.z[1]"),
        ("blocks.11.attn.hook_z", "11 attn.z"),
        ("hook_embed", "hook_embed"),
    ],
)
def test_short_hook_name(name: str, short: str) -> None:
    assert short_hook_name(name) == short


@pytest.mark.parametrize(
    ("token", "shown"),
    [(" a", " a"), ("a", "a"), ("  a", "␣ a"), (" ", "␣"), ("\n", "↵"), ("\x1b[0m\x9b\u202e", "␛[0m��"), (None, "?")],
)
def test_visible(token: str | None, shown: str) -> None:
    assert visible(token) == shown
