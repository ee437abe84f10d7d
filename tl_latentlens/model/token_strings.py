"""Texts of token ids, and the ids of single tokens given as text; prompts of whole texts are made in `tokenize`."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from tl_latentlens.errors import InvalidInputError


def token_bytes(model: Any, ids: Iterable[int]) -> dict[int, bytes]:
    """Token id → the bytes that the token stands for in running text, with its leading space.

    They are bytes and not strings, since a token of a byte-level vocabulary may be part of a character.
    """
    tokenizer, ids = model.tokenizer, [int(i) for i in ids]
    if tokenizer is None:
        return {i: f"[{i}]".encode() for i in ids}
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    decoder_json = b"" if decoder is None else decoder.__getstate__()
    is_byte_level, is_word_piece = b'"ByteLevel"' in decoder_json, b'"WordPiece"' in decoder_json
    special_ids = set(tokenizer.all_special_ids)
    alphabet = _byte_alphabet()
    texts: dict[int, bytes] = {}
    for i, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if piece is None or i in special_ids:
            texts[i] = (piece or f"[{i}]").encode()
        elif is_byte_level and all(c in alphabet for c in piece):
            texts[i] = bytes(alphabet[c] for c in piece)
        elif match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            texts[i] = bytes([int(match[1], 16)])
        elif is_word_piece:
            texts[i] = (piece[2:] if piece.startswith("##") else " " + piece).encode()
        else:
            texts[i] = piece.replace("▁", " ").encode()
    return texts


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


def _byte_alphabet() -> dict[str, int]:
    """The printable character by which GPT-2's vocabulary writes each byte, and the byte.

    A printable byte is written as itself. The others are written as the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
