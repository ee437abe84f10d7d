"""The parts of a prompt: what `model.to_tokens` puts before a text, the text, and what it puts after it; measured, not guessed.

`to_tokens` takes one text at a time, or pads several. So texts are tokenized in batches by the tokenizer, and what stands
around them is found by comparing with `to_tokens` for some texts of each batch. Where these do not agree on one answer, each
text of the batch is given to `to_tokens`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tl_latentlens.model.special_tokens import special_token_ids

_N_SPREAD = 4  # texts of a batch, spread evenly, that are compared besides those of special kinds
_PROBE_CHARACTERS = 24  # of a text that is too long for the context


class PromptParts(NamedTuple):
    """A prompt in parts.

    Attributes:
        before: Token ids before the text: BOS, or the text's own BOS.
        text: Token ids of the text.
        after: Token ids after it.
        has_own_bos: True where the text brought what stands before it.
        is_cut: True where the text is not whole.
    """

    before: list[int]
    text: list[int]
    after: list[int]
    has_own_bos: bool = False
    is_cut: bool = False


class _Frame(NamedTuple):
    """The token ids around a text."""

    before: tuple[int, ...]
    after: tuple[int, ...]


class PromptSplitter:
    """Splits the prompts of texts into parts. What was found for one batch is checked again with texts of the next."""

    def __init__(self, model: Any) -> None:
        """Know nothing yet about what stands around a text.

        Args:
            model: Has a tokenizer.
        """
        self._model = model
        self._special_ids = special_token_ids(model.tokenizer)
        self._frame: _Frame | None = None

    def split(self, texts: Sequence[str]) -> list[PromptParts]:
        """The parts of the prompt of each text, uncut unless only `to_tokens` knows them."""
        bare_ids = self._bare(texts)
        measured = {i: self._whole(texts[i]) for i in _texts_to_compare(texts)}
        if self._frame is None:
            self._frame = self._common_frame([(bare_ids[i], whole) for i, whole in measured.items()], texts)
        frame = self._frame
        holds = frame is not None and all(self._is_framed(bare_ids[i], whole, frame) for i, whole in measured.items())
        parts = []
        for i, bare in enumerate(bare_ids):
            # A model may add or strip a special token where the text has one at that end.
            is_plain = holds and (not bare or not ({bare[0], bare[-1]} & self._special_ids))
            if is_plain and frame is not None:
                parts.append(PromptParts([*frame.before], bare, [*frame.after]))
            else:
                parts.append(self._measured_parts(bare, measured.get(i) or self._whole(texts[i])))
        return parts

    def _bare(self, texts: Sequence[str]) -> list[list[int]]:
        settings = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return self._model.tokenizer(list(texts), **settings)["input_ids"]

    def _whole(self, text: str) -> list[int]:
        return [int(i) for i in self._model.to_tokens(text)[0].tolist()]

    def _room(self, frame: _Frame) -> int:
        return self._model.cfg.n_ctx - len(frame.before) - len(frame.after)

    def _is_framed(self, bare: list[int], whole: list[int], frame: _Frame) -> bool:
        return whole == [*frame.before, *bare[: self._room(frame)], *frame.after]

    def _common_frame(self, pairs: Sequence[tuple[list[int], list[int]]], texts: Sequence[str]) -> _Frame | None:
        """The ids around a text on which all compared texts agree; None where there are none."""
        uncut = [(bare, whole) for bare, whole in pairs if len(whole) < self._model.cfg.n_ctx]
        if not any(bare for bare, _ in uncut):
            probes = [text[:_PROBE_CHARACTERS] for text in texts[:_N_SPREAD]]
            uncut += zip(self._bare(probes), map(self._whole, probes), strict=True)
        candidates = [_frames(bare, whole) for bare, whole in uncut if bare] or [_frames(*pair) for pair in uncut]
        common = set.intersection(*candidates)
        return max(common, key=lambda frame: len(frame.before), default=None)

    def _measured_parts(self, bare: list[int], whole: list[int]) -> PromptParts:
        """The parts of one prompt that `to_tokens` made."""
        frame = self._frame
        if frame is None or not self._is_framed(bare, whole, frame):
            frame = self._frame_of(bare, whole)
        text = bare if self._is_framed(bare, whole, frame) else whole[len(frame.before) : len(whole) - len(frame.after)]
        is_cut = len(whole) >= self._model.cfg.n_ctx and len(text) < len(bare)
        before = [*frame.before]
        n_own = next((n for n in range(len(before), 0, -1) if text[:n] == before[-n:]), 0)
        return PromptParts(before, text[n_own:], [*frame.after], n_own > 0, is_cut)

    def _frame_of(self, bare: list[int], whole: list[int]) -> _Frame:
        """The ids around a text, by its tokens or, where `to_tokens` splits it otherwise, by the special tokens at its ends."""
        if candidates := _frames(bare, whole):
            return max(candidates, key=lambda frame: len(frame.before))
        usual = [] if self._frame is None else [*self._frame.before]
        n_before = max(0, self._n_special(whole) - self._n_special(bare))
        n_before = len(usual) if whole[: len(usual)] == usual else n_before
        n_after = max(0, self._n_special(whole[::-1]) - self._n_special(bare[::-1]))
        n_after = min(n_after, len(whole) - n_before)
        return _Frame(tuple(whole[:n_before]), tuple(whole[len(whole) - n_after :]))

    def _n_special(self, ids: Sequence[int]) -> int:
        """How many special tokens come first."""
        return next((i for i, token_id in enumerate(ids) if token_id not in self._special_ids), len(ids))


def _frames(bare: list[int], whole: list[int]) -> set[_Frame]:
    """Every way in which a prompt holds the tokens of its text."""
    starts = range(len(whole) - len(bare) + 1)
    return {
        _Frame(tuple(whole[:start]), tuple(whole[start + len(bare) :]))
        for start in starts
        if whole[start : start + len(bare)] == bare
    }


def _texts_to_compare(texts: Sequence[str]) -> list[int]:
    """The first texts, some spread evenly, the longest and shortest, and those that begin or end with a space."""
    numbers = range(len(texts))
    spread = [0, 1, *(i * (len(texts) - 1) // _N_SPREAD for i in range(_N_SPREAD + 1))]
    by_length = sorted(numbers, key=lambda i: len(texts[i]))
    spaced = [next((i for i in numbers if texts[i][place].isspace()), None) for place in (slice(1), slice(-1, None))]
    return sorted({i for i in (*spread, by_length[0], by_length[-1], *spaced) if i is not None and i < len(texts)})
