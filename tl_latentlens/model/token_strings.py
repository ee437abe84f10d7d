"""Texts of token ids, and the ids of single tokens given as text; prompts of whole texts are made in `tokenize`."""

from collections.abc import Iterable, Sequence
from typing import Any

from tl_latentlens.corpus.unicode import require_unicode
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.running_text import running_text


def token_bytes(model: Any, ids: Iterable[int]) -> dict[int, bytes]:
    """Token id → the bytes of its text in running text, as the tokenizer's `decode` writes it, with the space that parts words.

    They are bytes and not strings, since a token of a byte-level vocabulary may be part of a character.
    """
    ids = [int(i) for i in ids]
    if model.tokenizer is None:
        return {i: f"[{i}]".encode() for i in ids}
    return running_text(model.tokenizer).token_bytes(ids)


def token_strings(model: Any, ids: Iterable[int]) -> dict[int, str]:
    """Token id → its text, with its leading space; bytes that are no whole character become U+FFFD."""
    return {i: text.decode("utf-8", errors="replace") for i, text in token_bytes(model, ids).items()}


def single_tokens(model: Any, tokens: Sequence[str | int]) -> list[int]:
    """The ids of tokens given as texts, with their leading spaces, or as ids.

    Raises:
        InvalidInputError: A text that is not one token, an id outside the vocabulary, or no token at all.
    """
    if not tokens:
        raise InvalidInputError('got no tokens; expected at least one, for instance " the"')
    require_unicode([token for token in tokens if isinstance(token, str)], name="token")
    return [_single_token(model, token) for token in tokens]


def _single_token(model: Any, token: str | int) -> int:
    d_vocab = int(model.cfg.d_vocab)
    if not isinstance(token, str):
        if token != int(token) or not 0 <= token < d_vocab:
            raise InvalidInputError(f"got token id {token}; the vocabulary has ids 0 to {d_vocab - 1:,}")
        return int(token)
    if model.tokenizer is None:
        raise InvalidInputError(f"got {token!r}, but the model has no tokenizer; give token ids")
    # SentencePiece adds a space to a text that already begins with one, so the vocabulary is asked first.
    vocabulary_id = model.tokenizer.get_vocab().get(token.replace(" ", "▁"))
    ids = model.tokenizer(token, add_special_tokens=False)["input_ids"] if vocabulary_id is None else [vocabulary_id]
    if len(ids) != 1:
        strings = token_strings(model, ids)
        raise InvalidInputError(
            f"got {token!r}, which the model reads as {[strings[i] for i in ids]}; expected one token: one of these, or an id"
        )
    return int(ids[0])
