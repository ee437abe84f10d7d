"""A token in its text is clipped, marked and completed to a word."""

import pytest

from tl_latentlens.views.context import Context
from tl_latentlens.views.text import display_width


def parts(context: Context) -> tuple[str, str, str]:
    return context.before, context.token, context.after


def test_clip_keeps_the_token_and_the_budget() -> None:
    context = Context("…" + "left " * 30, " token", " right" * 30)
    for width in (30, 60, 120):
        before, token, after = parts(context.clipped(width))
        assert token == "token"
        assert len(before) + len(token) + len(after) <= width + 1
        assert len(before) > len(after)
    quoted = Context("said «no» to the ", "token", " there")
    assert parts(quoted.clipped(80)) == ("said «no» to the ", "token", " there")
    assert parts(Context("short ", "token", " text").clipped(80)) == ("short ", "token", " text")
    assert parts(Context("end ", ".\n", " next").clipped(80)) == ("end ", ".", " next"), "spaces around a token are left out"
    assert parts(Context("end ", "\n", " next").clipped(80)) == ("end ", "↵", " next")
    assert parts(Context("\x1b[2J ", "a", " \r").clipped(80)) == ("␛[2J ", "a", " ␍")
    assert parts(Context("left " * 30, " a\n", " right").clipped(None)) == ("left " * 30, "a", " right")
    for width in range(14, 60):
        wide = "".join(parts(Context("日本語と" * 20, "東京", "の天気a" * 20).clipped(width)))
        assert width - 4 <= display_width(wide) <= width, "a wide character takes two columns, and none is halved"


def test_a_context_is_marked_at_its_own_token() -> None:
    """Guillemets of the text are no marks, and the token may stand in it more than once."""
    context = Context("said «no» to the ", " no", " there")
    assert str(context) == "said «no» to the «no» there"
    assert context.marked(("[", "]")) == "said «no» to the [no] there"
    assert parts(context.clipped(80)) == ("said «no» to the ", "no", " there")
    assert str(Context("a ", "\n", " b")) == "a « » b"


@pytest.mark.parametrize(
    ("before", "token", "after", "expected"),
    [
        ("they were go", "ing", " home", ("go", "")),
        ("a ", "dragon", "flies' wing", ("", "flies")),
        ("he don", "'t", " know", ("", "")),
        ("x" * 13, "ing", " home", ("", "")),
        ("中文", "字", "符", ("", "")),
        ("in 19", "84", " he", ("19", "")),
    ],
)
def test_a_part_of_a_word_is_completed(before: str, token: str, after: str, expected: tuple[str, str]) -> None:
    context = Context(before, token, after)
    assert (context.lead, context.tail) == expected
    assert context.word == expected[0] + token + expected[1]
