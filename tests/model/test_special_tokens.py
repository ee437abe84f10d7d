"""Special tokens in texts, as chat templates write them: BOS is not doubled; what is no text is no row and is not decoded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import TEXTS, available_kinds
from support.tokenizers import CHAT, byte_level, end_of_word, metaspace, model_with, word_level, wrapped
from tokenizers import AddedToken

import tl_latentlens as tll
from tl_latentlens.lens.run_context import skipped_positions
from tl_latentlens.model.special_tokens import skippable_token_ids, special_token_ids
from tl_latentlens.model.tokenize import run_input, tokenize

HOOK_NAME = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module", params=available_kinds())
def chat_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small model whose vocabulary has the special tokens of a chat template."""
    return model_with(wrapped(byte_level(chat=True)), tmp_path_factory.mktemp("chat"), request.param)


def tokens_of(model: Any, ids: Any) -> list[str]:
    return model.tokenizer.convert_ids_to_tokens(list(ids))


def row_tokens(plan: tll.Plan, model: Any) -> set[str]:
    return set(tokens_of(model, plan.tokens[plan.row_tokens].tolist()))


@pytest.mark.parametrize("text", ["<s>" + CHAT, "<s>", "<s><s>The boat", "<s>The boat</s>"])
def test_bos_of_a_text_is_not_doubled(chat_model: Any, text: str) -> None:
    prompts = tokenize(chat_model, ["The boat", text])
    assert prompts.as_lists()[1] == chat_model.to_tokens(text, prepend_bos=False)[0].tolist()
    assert (prompts.n_own_bos, prompts.text_start) == (1, 1)


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", None])
def test_bos_that_the_tokenizer_puts_is_not_doubled(template: str | None, tmp_path: Path) -> None:
    model = model_with(wrapped(metaspace(template=template)), tmp_path, available_kinds()[0])
    first, second = tokenize(model, ["<s>the boat", "the boat"]).as_lists()
    assert [ids.count(model.tokenizer.bos_token_id) for ids in (first, second)] == [1, 1]


def test_long_text_with_its_own_bos_fills_the_context(chat_model: Any) -> None:
    prompts = tokenize(chat_model, ["<s>" + "the boat " * 100])
    n_ctx = chat_model.cfg.n_ctx
    assert prompts.as_lists()[0] == chat_model.to_tokens("the boat " * 100)[0].tolist()[:n_ctx]
    assert prompts.n_truncated == 1


def test_special_tokens_are_no_rows(chat_model: Any) -> None:
    texts = ["<s>" + CHAT, CHAT, *TEXTS]
    special = {"<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"}
    assert not row_tokens(tll.plan_corpus(chat_model, texts), chat_model) & special
    kept = tll.plan_corpus(chat_model, texts, keep_special_tokens=True)
    assert row_tokens(kept, chat_model) & special == {"<|im_start|>", "<|im_end|>"}
    assert 0 not in kept.row_tokens - kept.prompt_starts[kept.row_prompts], "BOS before a text is never a row"


def test_plans_of_plain_texts_are_the_same_either_way(chat_model: Any) -> None:
    """Digests of plans stay as they were; where special tokens are kept, the plan says so."""
    plan, kept = (tll.plan_corpus(chat_model, TEXTS, keep_special_tokens=keep) for keep in (False, True))
    assert plan.row_tokens.tolist() == kept.row_tokens.tolist()
    assert plan.digest != kept.digest
    recorded = tll.make_plan(tokenize(chat_model, TEXTS), tll.PlanSettings())
    assert plan.digest == recorded.digest


def decoded_tokens(model: Any, index: tll.ContextualIndex, text: str) -> list[str]:
    hooks = tll.latentlens_hooks(index, HOOK_NAME, top_k=1)
    model.run_with_hooks(text, fwd_hooks=hooks)
    return [cell.token for cell in hooks.result.cells()]


def test_what_is_no_row_is_not_decoded(chat_model: Any, tmp_path: Path) -> None:
    texts = [CHAT, *TEXTS]
    for keep in (False, True):
        bank = tll.build_bank(
            chat_model, texts, tmp_path / f"{keep}.h5", hook_names=HOOK_NAME, keep_special_tokens=keep, progress=False
        )
        decoded = decoded_tokens(chat_model, tll.ContextualIndex(bank, device="cpu"), CHAT)
        rows = [bank.row(row).token for row in range(bank.n_rows) if bank.row(row).prompt_index == 0]
        assert decoded == rows
        assert ("<|im_start|>" in decoded) == keep


def test_texts_that_bring_bos_are_told_of(chat_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tll.build_bank(chat_model, ["<s>" + CHAT, *TEXTS], tmp_path / "bank.h5", hook_names=HOOK_NAME)
    noted = "".join(capsys.readouterr())
    assert f"1 of {len(TEXTS) + 1} texts begin with their own BOS, so none is put before them" in noted
    tll.build_bank(chat_model, TEXTS, tmp_path / "plain.h5", hook_names=HOOK_NAME)
    assert "BOS" not in "".join(capsys.readouterr())


def test_a_run_with_two_bos_is_told_of(chat_model: Any, tmp_path: Path) -> None:
    bank = tll.build_bank(chat_model, TEXTS, tmp_path / "bank.h5", hook_names=HOOK_NAME, progress=False)
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank, device="cpu"), top_k=1)
    chat_model.run_with_hooks("<s>" + CHAT, fwd_hooks=hooks)
    with pytest.warns(UserWarning, match="1 of 1 texts of the run begin with two BOS: .* prepend_bos=False"):
        hooks.result  # noqa: B018
    chat_model.run_with_hooks("<s>" + CHAT, prepend_bos=False, fwd_hooks=hooks)
    assert hooks.result.decoded.any()


def test_contexts_hold_no_special_token(chat_model: Any, tmp_path: Path) -> None:
    bank = tll.build_bank(chat_model, ["<s>" + CHAT], tmp_path / "bank.h5", hook_names=HOOK_NAME, progress=False)
    contexts = [bank.row(row).context() for row in range(bank.n_rows)]
    assert not any("<" in context or "|" in context for context in contexts)
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank, device="cpu"), top_k=1)
    chat_model.run_with_hooks(CHAT, fwd_hooks=hooks)
    pos = int(hooks.result.positions[-2, 1])
    assert "<" not in str(hooks.result.token_heading(0, pos).context)


def test_repeated_reads_no_special_tokens(chat_model: Any) -> None:
    run = tll.repeated(chat_model, [CHAT])
    read = tokens_of(chat_model, run.tokens[0, run.second_copy[0]].tolist())
    assert not {"<s>", "<|im_start|>", "<|im_end|>"} & set(read)
    kept = tll.repeated(chat_model, [CHAT], keep_special_tokens=True)
    assert "<|im_start|>" in tokens_of(chat_model, kept.tokens[0, kept.second_copy[0]].tolist())
    assert run.tokens.tolist() == kept.tokens.tolist()


def test_texts_that_all_begin_with_a_mark_are_repeated_with_it(chat_model: Any) -> None:
    """Only BOS is not run again: the second copy of a chat begins with the chat's own mark."""
    plan = tll.plan_corpus(chat_model, [CHAT, CHAT + CHAT], repeat=True)
    assert plan.settings.text_start == 1


def test_run_input_leaves_plain_texts_to_the_model(chat_model: Any) -> None:
    assert run_input(chat_model, TEXTS).input == TEXTS
    run = run_input(chat_model, ["<s>" + CHAT, "The boat"])
    assert isinstance(run.input, torch.Tensor)
    assert run.attention_mask is not None
    rows = [ids[mask].tolist() for ids, mask in zip(run.input, run.attention_mask, strict=True)]
    assert rows == tokenize(chat_model, ["<s>" + CHAT, "The boat"]).as_lists()


def test_mean_over_a_prompt_leaves_its_special_tokens_out(chat_model: Any) -> None:
    text = "<|im_start|>The boat<|im_end|> lay"
    _, cache = chat_model.run_with_cache(text)
    ids = chat_model.to_tokens(text)[0].tolist()
    is_text = [token not in special_token_ids(chat_model.tokenizer) for token in ids]
    mean = cache[HOOK_NAME][0][torch.tensor(is_text)].mean(0)
    zero = tll.difference_of_means(chat_model, text, text, HOOK_NAME, positions=None)
    assert zero.abs().max() == 0
    _, other = chat_model.run_with_cache("The river")
    difference = tll.difference_of_means(chat_model, text, "The river", HOOK_NAME, positions=None)
    assert torch.allclose(difference, mean - other[HOOK_NAME][0, 1:].mean(0), atol=1e-5)


# ------------------------------------------------------------------------------------------------- which ids are special


def names_of(tokenizer: Any) -> set[str]:
    return set(tokenizer.convert_ids_to_tokens(sorted(special_token_ids(tokenizer))))


def test_unknown_token_stands_for_text() -> None:
    assert names_of(wrapped(word_level())) == {"<s>", "</s>", "<pad>"}
    assert names_of(wrapped(end_of_word(), unk_token="<s>")) >= {"<s>"}, "GPT-2 has one token in all roles"


def test_unknown_token_of_a_vocabulary_that_writes_any_text_is_special() -> None:
    """No text becomes it: it parts documents, as `<|endoftext|>` does."""
    tokenizer = wrapped(byte_level(chat=True), unk_token="<|im_end|>", eos_token=None)
    assert "<|im_end|>" in names_of(tokenizer)
    assert "<unk>" in names_of(wrapped(metaspace())), "its bytes write what it lacks"


def test_role_whose_token_the_vocabulary_lacks_has_no_id() -> None:
    """TransformerLens gives tokenizers without EOS one of GPT-2's, which reads as the unknown token."""
    tokenizer = wrapped(word_level())
    tokenizer.eos_token = tokenizer.bos_token = "<|endoftext|>"
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == tokenizer.unk_token_id
    assert tokenizer.unk_token_id not in special_token_ids(tokenizer)


def test_added_tokens_are_special_where_they_are_marked_so() -> None:
    tokenizer = wrapped(byte_level())
    assert "<call>" not in names_of(tokenizer)
    tokenizer.add_tokens([AddedToken("<call>", special=True), AddedToken("<think>", special=False)])
    assert "<call>" in names_of(tokenizer)
    assert "<think>" not in names_of(tokenizer)


def test_no_tokenizer_has_no_special_ids() -> None:
    assert special_token_ids(None) == frozenset()


def test_placeholders_of_images_are_decoded() -> None:
    tokenizer = wrapped(byte_level())
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = SimpleNamespace(image_token_id=image)
    model = SimpleNamespace(tokenizer=tokenizer, original_model=SimpleNamespace(config=config))
    assert image in special_token_ids(tokenizer)
    assert image not in skippable_token_ids(model)
    ids = torch.tensor([[0, image, 7, 1]])
    assert skipped_positions(model, ids, None).tolist() == [[True, False, False, True]]
    assert skipped_positions(model, ids, None, keep_special_tokens=True).tolist() == [[True, False, False, False]]
