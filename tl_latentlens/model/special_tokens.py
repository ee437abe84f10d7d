"""Special tokens of a tokenizer: those that stand for no text, such as BOS, padding and the marks of a chat template."""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from tl_latentlens.model.image_tokens import placeholder_ids

_RARE_LETTERS = "ꙮ𐎀ᚠⰀ𒀀꡶"
_MARKS = ("bos_token", "eos_token", "pad_token", "cls_token", "sep_token")


@dataclass(frozen=True)
class _KnownIds:
    """The special ids of a tokenizer, and what it looked like when they were read."""

    looked_like: tuple[Any, ...]
    ids: frozenset[int]


_known_ids: WeakKeyDictionary[Any, _KnownIds] = WeakKeyDictionary()


def special_token_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of a tokenizer's special tokens; none without a tokenizer.

    These are the tokens that have a role (BOS, EOS, padding, mask, …) and all added tokens that are marked as special. The
    unknown token is none of them where it stands for text that the vocabulary lacks; it is one where the vocabulary can write
    any text, or where it has another role too. A role whose token the vocabulary lacks has no id.
    """
    names = getattr(tokenizer, "all_special_tokens", None)
    if names is None:
        return frozenset()
    looked_like = (len(tokenizer), tuple(map(str, names)), str(getattr(tokenizer, "unk_token", None)))
    known = _known_ids.get(tokenizer)
    if known is None or known.looked_like != looked_like:
        known = _known_ids[tokenizer] = _KnownIds(looked_like, _read_ids(tokenizer, names))
    return known.ids


def skippable_token_ids(model: Any) -> frozenset[int]:
    """The special ids of a model's tokenizer without the placeholders of images, at whose positions visual tokens stand."""
    return special_token_ids(model.tokenizer) - placeholder_ids(model)


def _read_ids(tokenizer: Any, names: list[Any]) -> frozenset[int]:
    marks = {str(getattr(tokenizer, mark, None)) for mark in _MARKS}
    added = {str(token): int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in map(str, names)}
    # For a token that it lacks, a tokenizer gives the id of the unknown token.
    ids = {name: i for name, i in ids.items() if i is not None and tokenizer.convert_ids_to_tokens(i) == name} | added
    unknown = str(getattr(tokenizer, "unk_token", None))
    stands_for_text = unknown in ids and unknown not in marks and ids[unknown] in _ids_of_rare_text(tokenizer)
    return frozenset(i for name, i in ids.items() if name != unknown or not stands_for_text)


def _ids_of_rare_text(tokenizer: Any) -> set[int]:
    """The ids of letters that hardly any vocabulary has as such: of bytes, or the unknown token's."""
    texts = list(_RARE_LETTERS)
    return {i for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] for i in ids}
