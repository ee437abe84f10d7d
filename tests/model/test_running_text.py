"""Texts of tokens are what the tokenizer's own `decode` writes, for decoders of many kinds."""

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from support.models import TEXTS
from support.tokenizers import KINDS, byte_level, metaspace, model_with, of_symbols, word_level, wrapped
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import tl_latentlens as tll
from tl_latentlens.model.running_text import running_text
from tl_latentlens.model.token_strings import token_bytes, token_strings

MORE_TEXTS = [*TEXTS, "the bank", "He, by the bank; he said.", "bank"]


def decoded(tokenizer: Any, text: str) -> str:
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], clean_up_tokenization_spaces=False)


def joined(tokenizer: Any, text: str) -> str:
    """The texts of the tokens one after the other, without the space that `decode` leaves out at one end."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    known = token_bytes(SimpleNamespace(tokenizer=tokenizer), ids)
    whole = b"".join(known[i] for i in ids).decode("utf-8", "replace")
    dropped_space = running_text(tokenizer).dropped_space
    whole = whole.removeprefix(" ") if dropped_space == "start" else whole
    return whole.removesuffix(" ") if dropped_space == "end" else whole


@pytest.mark.parametrize("name", KINDS)
def test_tokens_join_to_what_decode_gives(name: str) -> None:
    tokenizer = wrapped(KINDS[name]())
    for text in MORE_TEXTS:
        assert joined(tokenizer, text) == decoded(tokenizer, text)


@pytest.mark.parametrize("name", ["words", "end of word", "word pieces", "metaspace", "byte level"])
def test_bank_reads_as_decode_gives(name: str, tmp_path: Path) -> None:
    tokenizer = wrapped(KINDS[name]())
    model = model_with(tokenizer, tmp_path)
    bank = tll.build_bank(model, TEXTS, tmp_path / "bank.h5", hook_names="blocks.0.hook_resid_post", progress=False)
    rows = [bank.row(row) for row in range(bank.n_rows)]
    assert {row.prompt_text for row in rows} == {decoded(tokenizer, text) for text in TEXTS}
    for row in rows:
        before, token, after = row.context(200).partition("«")[0], row.token.strip(), row.context(200).partition("»")[2]
        assert before + token + after == row.prompt_text, "no space is lost or doubled at the marks"


@pytest.mark.parametrize("text", ["naïve café 😀", "漢字 and עברית", "a\tb\n\nc   d"])
@pytest.mark.parametrize("name", ["byte level", "metaspace without a prefix", "metaspace"])
def test_parts_of_characters_keep_their_bytes(name: str, text: str) -> None:
    tokenizer = wrapped(KINDS[name]())
    assert joined(tokenizer, text) == text


@pytest.mark.parametrize("added", ["Zürich", "façade", "日本", "<think>", " two words "])
def test_added_tokens(added: str) -> None:
    for core in (byte_level(added), word_level()):
        tokenizer = wrapped(core)
        tokenizer.add_tokens([AddedToken(added, normalized=False)])
        for text in (added, f"The {added}", f"The {added} bank"):
            assert joined(tokenizer, text) == decoded(tokenizer, text)


def test_added_tokens_of_a_metaspace_vocabulary() -> None:
    tokenizer = wrapped(metaspace())
    tokenizer.add_tokens([AddedToken("Zürich", normalized=False)])
    for text in ("the Zürich", "Zürich", "the bank by Zürich"):
        assert joined(tokenizer, text) == decoded(tokenizer, text)


def test_tokens_that_are_added_later_are_read_anew() -> None:
    tokenizer = wrapped(word_level())
    last = len(tokenizer)
    assert token_strings(SimpleNamespace(tokenizer=tokenizer), [last]) == {last: f"[{last}]"}
    tokenizer.add_tokens(["zebra"])
    assert token_strings(SimpleNamespace(tokenizer=tokenizer), [last]) == {last: " zebra"}


def test_texts_do_not_depend_on_what_is_asked_with_them() -> None:
    for make in KINDS.values():
        tokenizer = wrapped(make())
        model = SimpleNamespace(tokenizer=tokenizer)
        together = token_bytes(model, range(len(tokenizer)))
        assert all(token_bytes(SimpleNamespace(tokenizer=wrapped(make())), [i]) == {i: together[i]} for i in (4, 9, 20))


def test_texts_are_kept_no_longer_than_their_tokenizer() -> None:
    tokenizer = wrapped(word_level())
    token_strings(SimpleNamespace(tokenizer=tokenizer), range(10))
    kept = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert kept() is None


def test_symbols_have_no_spaces() -> None:
    tokenizer = wrapped(of_symbols("ACGT"), clean_up_tokenization_spaces=False)
    assert joined(tokenizer, "GATTACA") == decoded(tokenizer, "GATTACA")


def test_replace_and_strip_decoders() -> None:
    core = Tokenizer(models.WordLevel({"<s>": 0, "@the": 1, "@bank": 2, "s": 3, "<unk>": 4}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    core.decoder = decoders.Sequence([decoders.Replace("@", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")
    assert joined(tokenizer, "@the|@bank|s") == "the banks"
    assert token_strings(SimpleNamespace(tokenizer=tokenizer), [1, 2, 3]) == {1: " the", 2: " bank", 3: "s"}


class SlowTokenizer(transformers.PreTrainedTokenizer):
    """A tokenizer in Python that joins its tokens as it likes, here with underscores for spaces."""

    def __init__(self) -> None:
        self._pieces = ["<unk>", "<s>", "_the", "_boat", "s", "_é", "."]
        super().__init__(unk_token="<unk>", bos_token="<s>")

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self._pieces)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return text.split("|")

    def _convert_token_to_id(self, token: str) -> int:
        return self._pieces.index(token) if token in self._pieces else 0

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens).replace("_", " ").strip()


def test_slow_tokenizers() -> None:
    known = token_strings(SimpleNamespace(tokenizer=SlowTokenizer()), range(2, 7))
    assert known == {2: " the", 3: " boat", 4: "s", 5: " é", 6: "."}
