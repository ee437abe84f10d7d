"""The check that texts can be encoded: a lone surrogate, half of a cut emoji, is no character and has no bytes."""

from collections.abc import Iterable

from tl_latentlens.errors import InvalidInputError, LatentLensError


def require_unicode(
    texts: Iterable[str], first: int = 0, *, name: str = "text", error: type[LatentLensError] = InvalidInputError
) -> None:
    """Check that texts can be written in UTF-8.

    Args:
        texts: The texts.
        first: Number of the first of them.
        name: What they are called in an error.
        error: The class of error.

    Raises:
        LatentLensError: Of that class, naming the text and the character.
    """
    for number, text in enumerate(texts, start=first):
        if text.isascii():
            continue
        try:
            text.encode()
        except UnicodeEncodeError as failure:
            place = failure.start
            raise error(
                f"{name} {number} has a lone surrogate, {text[place]!r}, at character {place}, after "
                f"{text[max(0, place - 20) : place]!r}: it is half of a character, cut off when the text was made, and cannot "
                "be encoded; mend the text, or drop it with text.encode(errors='ignore').decode()"
            ) from None
