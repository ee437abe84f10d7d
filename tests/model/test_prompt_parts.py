"""What stands around a text is measured: prompts are those of `to_tokens`, for tokenizers of many kinds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.models import TEXTS, available_kinds
from support.tokenizers import KINDS, byte_level, metaspace, model_with, of_symbols, word_piece, wrapped
from tokenizers import AddedToken, processors

import tl_latentlens as tll
from tl_latentlens.corpus.plan import Prompts
from tl_latentlens.model.tokenize import tokenize

ODD_TEXTS = [*TEXTS, "", " the bank", "the bank ", "  two  spaces\n", "b", "zebra 😀 é", "the " * 200, TEXTS[0]]


def prompts_of(model: Any, texts: list[str]) -> list[list[int]]:
    return tokenize(model, texts).as_lists()


def text_tokens(prompts: Prompts) -> list[list[int]]:
    """The token ids of each prompt that are text."""
    tokens = np.split(np.where(prompts.special, -1, prompts.tokens), prompts.starts[1:-1])
    return [ids[ids >= 0].tolist() for ids in tokens]


@pytest.mark.parametrize("kind", available_kinds())
@pytest.mark.parametrize("name", KINDS)
def test_prompts_are_those_of_to_tokens(name: str, kind: str, tmp_path: Path) -> None:
    """BOS and EOS are special there, and nothing of the texts is."""
    model = model_with(wrapped(KINDS[name]()), tmp_path, kind)
    special = {model.tokenizer.bos_token_id, model.tokenizer.eos_token_id}
    for texts in (ODD_TEXTS, ODD_TEXTS[::-1], [""], ["the " * 200], [" b"], ["", "b"]):
        whole = [model.to_tokens(text)[0].tolist() for text in texts]
        prompts = tokenize(model, texts)
        assert prompts.as_lists() == whole
        assert text_tokens(prompts) == [[i for i in ids if i not in special] for ids in whole]


@pytest.mark.parametrize("kind", available_kinds())
@pytest.mark.parametrize("texts", [["1+2=3", "4+5=9", "7+1=8"], ["1"], ["=="]])
def test_vocabulary_without_letters(texts: list[str], kind: str, tmp_path: Path) -> None:
    """A vocabulary may lack any letter, so no probe text of our own tells what stands around a text."""
    model = model_with(wrapped(of_symbols("0123456789+=")), tmp_path, kind)
    prompts = tokenize(model, texts)
    assert prompts.as_lists() == [model.to_tokens(text)[0].tolist() for text in texts]
    assert text_tokens(prompts) == [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_banked_text_without_letters_is_found_again(tmp_path: Path) -> None:
    model = model_with(wrapped(of_symbols("ACGT")), tmp_path)
    bank = tll.build_bank(model, ["ACGT", "GATTACA"], tmp_path / "bank.h5", progress=False)
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank, device="cpu"), top_k=1)
    model.run_with_hooks("GATTACA", fwd_hooks=hooks)
    cells = hooks.result.cells()
    assert [str(cell.token).strip() for cell in cells[:7]] == list("GATTACA")
    assert all(cell.neighbors[0].similarity > 0.999 for cell in cells)


def test_later_texts_that_begin_otherwise_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a special token takes the space after it away, so a text that begins with a space is split otherwise."""
    tokenizer = wrapped(byte_level())
    tokenizer.add_special_tokens({"bos_token": AddedToken("<s>", rstrip=True, special=True)})
    model = model_with(tokenizer, tmp_path)
    monkeypatch.setattr("tl_latentlens.model.tokenize._TOKENIZER_BATCH_CHARACTERS", 60)
    texts = [*TEXTS, " the bank", *TEXTS, "   the bank"]
    assert prompts_of(model, texts) == [model.to_tokens(text)[0].tolist() for text in texts]


def test_many_tokens(any_model: Any) -> None:
    prompts = tokenize(any_model, ["the boat " * 30] * 1500)
    assert len(prompts.tokens) > 2**16
    assert (prompts.text_start, int(prompts.special.sum())) == (1, 1500)


def test_truncation_at_the_left_is_that_of_to_tokens(tmp_path: Path) -> None:
    tokenizer = wrapped(byte_level())
    tokenizer.truncation_side = "left"
    model = model_with(tokenizer, tmp_path)
    texts = ["the boat " * 100, "the bank"]
    prompts = tokenize(model, texts)
    assert prompts.as_lists() == [model.to_tokens(text)[0].tolist() for text in texts]
    assert prompts.n_truncated == 1


def test_tokens_after_a_text_are_no_rows(tmp_path: Path) -> None:
    tokenizer = wrapped(metaspace(template="<s> $A </s>"))
    model = model_with(tokenizer, tmp_path, available_kinds()[0])
    plan = tll.plan_corpus(model, TEXTS)
    ids = set(plan.tokens[plan.row_tokens].tolist())
    assert not ids & {tokenizer.bos_token_id, tokenizer.eos_token_id}


def test_repeated_texts_follow_the_measured_prompt(tmp_path: Path) -> None:
    model = model_with(wrapped(of_symbols("0123456789+=")), tmp_path)
    run = tll.repeated(model, ["1+2=3", "4"])
    whole = [model.to_tokens(text)[0].tolist() for text in ("1+2=3", "4")]
    n_before = len(whole[1]) - 1
    assert run.tokens[0].tolist() == whole[0] + whole[0][n_before:]
    assert run.tokens[1, run.second_copy[1]].tolist() == whole[1][n_before:]


@pytest.mark.parametrize("n_extra", [-1, -3])
def test_token_without_an_embedding_is_named(n_extra: int, tmp_path: Path) -> None:
    """It is found before the model runs, for texts and for token ids of the user's own."""
    tokenizer = wrapped(byte_level("Zuerich"))
    model = model_with(tokenizer, tmp_path, n_extra=n_extra)
    last = len(tokenizer) - 1
    message = rf"text 1 has token {last}, 'Zuerich', at position \d+; the model embeds ids 0 to {last + n_extra}"
    with pytest.raises(tll.InvalidInputError, match=message):
        tll.build_bank(model, ["in", "in Zuerich"], tmp_path / "never.h5", progress=False)
    plan = tll.make_plan(tll.prompts_from_lists([[0, 5], [0, last]]))
    with pytest.raises(tll.InvalidInputError, match=f"text 1 has token {last}, 'Zuerich', at position 1"):
        tll.record_model(model, plan)


def test_encoders_read_their_marks_as_no_text(tmp_path: Path) -> None:
    """A tokenizer that frames its texts, as BERT's does."""
    core = word_piece()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    model = model_with(wrapped(core), tmp_path)
    prompts = tokenize(model, ["the bank"])
    assert text_tokens(prompts) == [model.tokenizer("the bank", add_special_tokens=False)["input_ids"]]
