"""A token in its text is clipped, marked and completed to a word."""

import pytest

from tl_latentlens.views.context import Context, end_of_text, start_of_text
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


@pytest.mark.parametrize(
    ("text", "n", "start", "end"),
    [
        ("the old stone bridge", 10, "the old", "bridge"),
        ("the old stone bridge", 7, "the old", "bridge"),
        ("the old stone bridge", 8, "the old", "bridge"),
        ("the old stone bridge", 12, "the old", "stone bridge"),
        ("the old stone bridge", 2, "th", "ge"),
        ("don't stop me now, please", 4, "don'", "ease"),
        ("we don't stop now,please", 7, "we", ",please"),
        ("to x" + "y" * 40 + " so", 40, "to x" + "y" * 36, "y" * 37 + " so"),
        ("日本語と東京の天気", 4, "日本語と", "京の天気"),
        ("日本語 and 東京", 6, "日本語", "and 東京"),
        ("क्या यह किताब है", 10, "क्या यह", "किताब है"),
    ],
)
def test_text_is_cut_between_words(text: str, n: int, start: str, end: str) -> None:
    """A word stays cut only where no whole one would stay, or where it is very long."""
    assert start_of_text(text, text[:n]) == start
    assert end_of_text(text, text[len(text) - n :]) == end


def test_clipped_contexts_end_at_words() -> None:
    words = "She put the wages from her savings account into the".split()
    context = Context.around(" ".join(words), " bank", " and walked along the river towards the harbour")
    for width in range(30, 90):
        before, token, after = parts(context.clipped(width))
        shown = [word for word in f"{before} {token} {after}".replace("…", " ").split()]
        assert set(shown) <= {*words, "bank", *"and walked along the river towards the harbour".split()}
        assert display_width(f"{before}{token}{after}") <= width


def test_spaces_of_a_token_stand_in_its_text() -> None:
    """A vocabulary may write the space of a word before its token, or after it."""
    assert parts(Context.around("the", " bank", " of")) == ("the ", " bank", " of")
    assert parts(Context.around("the ", "bank ", "of")) == ("the ", "bank ", " of")
    assert str(Context.around("the ", "bank ", "of")) == "the «bank» of"
    assert parts(Context.around("a", " ", "b")) == ("a", " ", "b")


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
