"""The text of single tokens in running text, as a tokenizer's own `decode` writes them; measured, for decoders of any kind."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np

from tl_latentlens.model.special_tokens import special_token_ids

_MAX_CANDIDATES = 4096  # ids among which a token to decode others beside is looked for
_N_PAIRS = 64  # pairs of tokens that tell to which side a token's space belongs
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class RunningText:
    """The texts of a tokenizer's tokens in running text, each measured beside one other token, the anchor.

    A decoder may write a space before a token (" boat"), after it ("boat "), or none, and may drop it at the start or end of a
    text. Where most pairs of tokens join better with spaces after tokens, so they are counted; else before them.

    Attributes:
        dropped_space: "start" where `decode` leaves out the space that the first token of a text has here, "end" where it
            leaves out that of the last token, else empty.
    """

    dropped_space: str

    def __init__(self, tokenizer: Any) -> None:
        """Measure how the tokenizer joins tokens.

        Args:
            tokenizer: Of transformers, fast or slow.
        """
        self._tokenizer_ref = ref(tokenizer)  # the texts are kept for as long as their tokenizer is
        self._known: dict[int, bytes] = {}
        self._is_before = True
        usual_ids = self._usual_ids()
        alone = zip(usual_ids, self._decode([[i] for i in usual_ids]), strict=True)
        self._anchor, self._anchor_text = next((pair for pair in alone if _is_plain(pair[1])), (None, ""))
        if self._anchor is not None:
            self._is_before = self._join_errors(usual_ids, True) <= self._join_errors(usual_ids, False)
        self.dropped_space = self._dropped_space(usual_ids[:: max(1, len(usual_ids) // _N_PAIRS)])

    @property
    def _tokenizer(self) -> Any:
        return self._tokenizer_ref()

    def token_bytes(self, ids: Sequence[int]) -> dict[int, bytes]:
        """Token id → the bytes of its text; special tokens as they are called, ids that the tokenizer lacks as "[id]"."""
        new = [i for i in dict.fromkeys(ids) if i not in self._known]
        special_ids, text_ids, pieces = special_token_ids(self._tokenizer), [], []
        for i, piece in zip(new, self._tokenizer.convert_ids_to_tokens(new), strict=True):
            if piece is None or i in special_ids:
                self._known[i] = (piece or f"[{i}]").encode()
            else:
                text_ids.append(i)
                pieces.append(piece)
        for i, piece, text in zip(text_ids, pieces, self._texts(text_ids), strict=True):
            self._known[i] = _exact_bytes(piece, text)
        return {i: self._known[i] for i in ids}

    def _usual_ids(self) -> list[int]:
        """Ids of tokens that are text, spread over the vocabulary where it is large."""
        n, special_ids = len(self._tokenizer), special_token_ids(self._tokenizer)
        ids = np.unique(np.linspace(0, n - 1, min(n, _MAX_CANDIDATES)).astype(int)).tolist()
        pieces = self._tokenizer.convert_ids_to_tokens(ids)
        return [i for i, piece in zip(ids, pieces, strict=True) if piece is not None and i not in special_ids]

    def _decode(self, sequences: list[list[int]]) -> list[str]:
        settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return self._tokenizer.batch_decode(sequences, **settings) if sequences else []

    def _texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each token, with the space that parts it from its neighbor."""
        return self._beside_anchor([[i] for i in ids])

    def _beside_anchor(self, sequences: list[list[int]]) -> list[str]:
        """The texts of token sequences beside the anchor, which stands before them, or after them."""
        anchor = [] if self._anchor is None else [self._anchor]
        decoded = self._decode([anchor + ids if self._is_before else ids + anchor for ids in sequences])
        start = self._anchor_text
        texts = [text.removeprefix(start) if self._is_before else text.removesuffix(start) for text in decoded]
        # A decoder that changes the anchor too leaves no way but to decode the tokens by themselves.
        failed = [k for k, text in enumerate(texts) if start and text == decoded[k]]
        for k, text in zip(failed, self._decode([sequences[k] for k in failed]), strict=True):
            texts[k] = text
        return texts

    def _dropped_space(self, ids: Sequence[int]) -> str:
        """Where some of these tokens lose a space when they stand alone."""
        for text, alone in zip(self._texts(ids), self._decode([[i] for i in ids]), strict=True):
            if text != alone and text.strip() == alone.strip() != "":
                return "start" if self._is_before else "end"
        return ""

    def _join_errors(self, usual_ids: Sequence[int], is_before: bool) -> int:
        """How many pairs of tokens have another text than their tokens joined, with spaces counted before or after tokens."""
        self._is_before = is_before
        pairs = np.random.default_rng(0).choice(usual_ids, (_N_PAIRS, 2)).tolist()
        singles = self._texts([i for pair in pairs for i in pair])
        joined = [first + second for first, second in zip(singles[::2], singles[1::2], strict=True)]
        return sum(text != whole for text, whole in zip(joined, self._beside_anchor(pairs), strict=True))


_running_texts: WeakKeyDictionary[Any, tuple[int, RunningText]] = WeakKeyDictionary()


def running_text(tokenizer: Any) -> RunningText:
    """The running text of a tokenizer, measured when it is first asked for, and anew where tokens were added."""
    n_tokens, known = _running_texts.get(tokenizer, (0, None))
    if known is None or n_tokens != len(tokenizer):
        known = RunningText(tokenizer)
        _running_texts[tokenizer] = (len(tokenizer), known)
    return known


def _is_plain(text: str) -> bool:
    return text.isascii() and text.strip().isalnum()


def _exact_bytes(piece: str | bytes, text: str) -> bytes:
    """The bytes of a token: of its text, or, where that has parts of characters, those that its piece is written for."""
    if _REPLACEMENT in text:
        for exact in _bytes_of_piece(piece):
            if exact.decode("utf-8", "replace") == text:
                return exact
    return text.encode()


def _bytes_of_piece(piece: str | bytes) -> list[bytes]:
    """The bytes that a piece of a vocabulary may be written for: <0xE2>, or a character for each byte as GPT-2 has it."""
    if isinstance(piece, bytes):
        return [piece]
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return [bytes([int(match[1], 16)])]
    alphabet = _byte_alphabet()
    return [bytes(alphabet[c] for c in piece)] if all(c in alphabet for c in piece) else []


@cache
def _byte_alphabet() -> dict[str, int]:
    """The printable character by which GPT-2's vocabulary writes each byte, and the byte.

    A printable byte is written as itself. The others are written as the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
