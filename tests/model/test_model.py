"""tokenize and token_bytes against TransformerLens itself, and one text on every available model class."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.models import TEXTS, available_kinds, load_any
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import tl_latentlens as tll
from tl_latentlens.lens.run_context import skipped_positions
from tl_latentlens.model.flatten import flat_activation
from tl_latentlens.model.head_outputs import head_outputs
from tl_latentlens.model.loading import DEMO_MODEL, load_model
from tl_latentlens.model.token_strings import token_bytes
from tl_latentlens.model.tokenize import tokenize

ODD_TEXTS = [
    *TEXTS,
    "",
    "a",
    "   three spaces  inside",
    "two\n\nlines\tand a tab",
    "naïve café, straße, Ångström",
    "emoji 😀👩‍👩‍👧 and 🇫🇷",
    "漢字かな交じり文, 한국어, العربية",
    "zero​width and \x00 nul",
]


@pytest.fixture(scope="module")
def models_of(model_folder: Path) -> dict[str, Any]:
    """One small random model, as each available class."""
    return {kind: load_any(model_folder, kind) for kind in available_kinds()}


def bos_tokens(model: Any) -> int:
    """How many BOS tokens the model puts before a text: TransformerLens gives Qwen 2 none."""
    return int(model.cfg.default_prepend_bos)


def prompts_of(model: Any, texts: list[str]) -> list[list[int]]:
    """What tokenize gives, as one list a text."""
    prompts = tokenize(model, texts)
    return [prompts.tokens[a:b].tolist() for a, b in zip(prompts.starts[:-1], prompts.starts[1:], strict=True)]


def check_tokenize(model: Any) -> None:
    """Compare tokenize with to_tokens, text by text."""
    for text, ours in zip(ODD_TEXTS, prompts_of(model, ODD_TEXTS), strict=True):
        assert ours == model.to_tokens(text)[0].tolist(), repr(text)


def test_tokenize_is_to_tokens_demo(demo_models: dict[str, Any]) -> None:
    for model in demo_models.values():
        check_tokenize(model)


def test_tokenize_is_to_tokens(models_of: dict[str, Any]) -> None:
    for model in models_of.values():
        check_tokenize(model)


def test_tokenize_text_that_spells_bos(models_of: dict[str, Any], demo_models: dict[str, Any]) -> None:
    for model in [*models_of.values(), *demo_models.values()]:
        text = "A red ball." + model.tokenizer.eos_token
        assert prompts_of(model, [text]) == model.to_tokens(text).tolist()
        text = model.tokenizer.bos_token + "A red ball."
        assert prompts_of(model, [text]) == model.to_tokens(text, prepend_bos=False).tolist(), "BOS is not doubled"


def test_tokenize_marks_bos_and_nothing_else(models_of: dict[str, Any]) -> None:
    for model in models_of.values():
        prompts = tokenize(model, TEXTS)
        is_bos = prompts.tokens == model.tokenizer.bos_token_id
        assert prompts.special.tolist() == is_bos.tolist()
        assert np.flatnonzero(is_bos).tolist() == (prompts.starts[:-1].tolist() if bos_tokens(model) else [])


def test_tokenize_without_bos_where_the_model_wants_none(any_model: Any) -> None:
    before = any_model.cfg.default_prepend_bos
    any_model.cfg.default_prepend_bos = False
    try:
        prompts = tokenize(any_model, TEXTS)
        expected = [any_model.to_tokens(text)[0].tolist() for text in TEXTS]
    finally:
        any_model.cfg.default_prepend_bos = before
    assert prompts.tokens.tolist() == [token for ids in expected for token in ids]
    assert not prompts.special.any()


def test_tokenize_counts_truncation_at_n_ctx(demo_models: dict[str, Any]) -> None:
    for model in demo_models.values():
        n_ctx = model.cfg.n_ctx
        bare = len(model.tokenizer("a", add_special_tokens=False)["input_ids"])
        assert bare == 1
        unit = len(model.to_tokens("a" + " a" * 10)[0]) - len(model.to_tokens("a" + " a" * 9)[0])
        assert unit == 1
        exact, over = "a" + " a" * (n_ctx - 2), "a" + " a" * (n_ctx - 1)
        prompts = tokenize(model, [exact, over, "short", over + " a a a"])
        assert prompts.n_truncated == 2
        assert np.diff(prompts.starts)[[0, 1, 3]].tolist() == [n_ctx, n_ctx, n_ctx]
        assert prompts_of(model, [over])[0] == model.to_tokens(over)[0].tolist()


def test_tokenize_many_texts_in_order(any_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_latentlens.model.tokenize._TOKENIZER_BATCH_CHARACTERS", 100)  # two or three texts
    assert prompts_of(any_model, ODD_TEXTS) == [any_model.to_tokens(text)[0].tolist() for text in ODD_TEXTS]
    stream: Iterator[str] = iter(TEXTS)
    assert len(tokenize(any_model, stream).starts) == len(TEXTS) + 1


def test_tokenize_needs_a_tokenizer() -> None:
    with pytest.raises(tll.InvalidInputError, match="no tokenizer; give it one"):
        tokenize(SimpleNamespace(tokenizer=None, cfg=None), ["a"])


def test_token_bytes_join_to_the_text(models_of: dict[str, Any], demo_models: dict[str, Any]) -> None:
    for model in [*models_of.values(), *demo_models.values()]:
        for text in ODD_TEXTS:
            ids = tokenize(model, [text]).tokens.tolist()[bos_tokens(model) :]
            known = token_bytes(model, ids)
            assert b"".join(known[i] for i in ids) == text.encode()


def test_token_bytes_of_specials_and_without_tokenizer(any_model: Any) -> None:
    bos = any_model.tokenizer.bos_token_id
    assert token_bytes(any_model, [bos]) == {bos: any_model.tokenizer.bos_token.encode()}
    assert token_bytes(SimpleNamespace(tokenizer=None), [7]) == {7: b"[7]"}


def test_token_bytes_of_byte_fallback_and_metaspace() -> None:
    pieces = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "▁a", "b", "▁b"]
    vocabulary = [(piece, 0.0 if piece in ("<unk>", "<s>") else -10.0) for piece in pieces]
    core = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")
    text = " a b 😀é"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert any(tokenizer.convert_ids_to_tokens(i).startswith("<0x") for i in ids)
    known = token_bytes(SimpleNamespace(tokenizer=tokenizer), ids)
    assert b"".join(known[i] for i in ids) == text.encode()


def test_token_bytes_of_word_pieces() -> None:
    core = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    assert token_bytes(SimpleNamespace(tokenizer=tokenizer), [1, 2]) == {1: b" play", 2: b"ing"}


def read(model: Any, index: tll.ContextualIndex, text: str, top_k: int = 4) -> tll.LensResult:
    """Decode a text at the index's hook names."""
    hooks = tll.latentlens_hooks(index, top_k=top_k)
    model.run_with_hooks(text, fwd_hooks=hooks)
    return hooks.result


def check_same(one: tll.LensResult, other: tll.LensResult) -> None:
    """Equal similarities within 1e-4, and equal rows wherever the ranking is not within that of a tie."""
    assert one.tokens == other.tokens
    assert one.hook_names == other.hook_names
    clear = 0
    for a, b in zip(one.cells(), other.cells(), strict=True):
        ours, theirs = (np.array([n.similarity for n in cell.neighbors]) for cell in (a, b))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
        gaps = np.abs(np.diff(ours))
        for rank in range(len(ours) - 1):  # of the last one, the next similarity is not known
            if min(gaps[max(rank - 1, 0) : rank + 1]) > 3e-4:
                clear += 1
                x, y = a.neighbors[rank], b.neighbors[rank]
                assert (x.row, x.hook_name, x.context) == (y.row, y.hook_name, y.context)
        for (_, p), (_, q) in zip(a.logit_lens or [], b.logit_lens or [], strict=True):
            assert abs(p - q) < 1e-4
    assert clear > 0.3 * sum(len(cell.neighbors) for cell in one.cells())


def check_classes(models: dict[str, Any], tmp_path: Path, hook_names: list[str]) -> None:
    """Every class as builder and as reader gives the same result."""
    text = "The small boat lay over the river bank 😀."
    results = {}
    for builder, build_model in models.items():
        bank = tll.build_bank(build_model, TEXTS, tmp_path / f"{builder}.h5", hook_names=hook_names, progress=False)
        for reader, read_model in models.items():
            results[builder, reader] = read(read_model, tll.ContextualIndex(bank, device="cpu"), text)
    first, *others = results.values()
    assert len(results) == len(models) ** 2
    assert first.cells()[0].neighbors
    for other in others:
        check_same(first, other)


def test_same_neighbors_on_every_class(models_of: dict[str, Any], tmp_path: Path) -> None:
    check_classes(models_of, tmp_path, ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.2.hook_resid_post"])


def test_same_neighbors_on_every_class_demo(demo_models: dict[str, Any], tmp_path: Path) -> None:
    check_classes(demo_models, tmp_path, ["blocks.1.hook_resid_pre", "blocks.3.hook_resid_mid", "blocks.5.hook_resid_post"])


def alone(model: Any, index: tll.ContextualIndex, texts: list[str]) -> list[tll.LensResult]:
    """Each text by itself."""
    return [read(model, index, text) for text in texts]


def check_batched(batched: tll.LensResult, singles: list[tll.LensResult], n_bos: int) -> None:
    """A batch's cells are those of each prompt alone, shifted by its left padding; nothing else was decoded."""
    for b, single in enumerate(singles):
        decoded = np.flatnonzero(batched.decoded[b])
        expected = np.flatnonzero(single.decoded[0])
        assert len(decoded) == len(expected) == single.decoded.shape[1] - n_bos
        assert (np.diff(decoded) == 1).all()
        assert [batched.tokens[b][p] for p in decoded] == [single.tokens[0][p] for p in expected]
        for name in single.hook_names:
            for p, q in zip(decoded.tolist(), expected.tolist(), strict=True):
                here, there = batched.cell(name, p, b), single.cell(name, q)
                ours, theirs = ([n.similarity for n in cell.neighbors] for cell in (here, there))
                np.testing.assert_allclose(ours, theirs, atol=1e-4)
                assert ours[0] - ours[1] < 3e-4 or here.neighbors[0].row == there.neighbors[0].row


PAIR = ["A small red ball lay on the old stone bridge.", "The bank."]


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_batches_are_the_prompts_alone(models_of: dict[str, Any], padding_side: str, tmp_path: Path) -> None:
    for kind, model in models_of.items():
        index = tll.ContextualIndex(tll.build_bank(model, TEXTS, tmp_path / f"{kind}.h5", progress=False), device="cpu")
        check_padding(model, index, padding_side)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_batches_are_the_prompts_alone_demo(demo_model: Any, index: tll.ContextualIndex, padding_side: str) -> None:
    check_padding(demo_model, index, padding_side)


def check_padding(model: Any, index: tll.ContextualIndex, padding_side: str) -> None:
    """Strings padded by the model, and tokens with an explicit mask, against each text alone."""
    singles = alone(model, index, PAIR)
    hooks = tll.latentlens_hooks(index, top_k=4)
    rows = [model.to_tokens(text)[0] for text in PAIR]
    longest = max(map(len, rows))
    pad = model.tokenizer.pad_token_id
    tokens, mask = torch.full((2, longest), pad), torch.zeros((2, longest), dtype=torch.long)
    for b, ids in enumerate(rows):
        part = slice(0, len(ids)) if padding_side == "right" else slice(longest - len(ids), longest)
        tokens[b, part], mask[b, part] = ids, 1
    model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks)
    check_batched(hooks.result, singles, bos_tokens(model))
    if padding_side == "right":
        model.run_with_hooks(model.to_tokens(PAIR, padding_side="right"), fwd_hooks=hooks)
        check_batched(hooks.result, singles, bos_tokens(model))
    model.run_with_hooks(PAIR, padding_side=padding_side, fwd_hooks=hooks)
    check_batched(hooks.result, singles, bos_tokens(model))


@pytest.mark.parametrize(
    ("pad", "tokens", "mask", "expected"),
    [
        (9, [[1, 5, 6, 9, 9]], None, [[1, 0, 0, 1, 1]]),
        (9, [[9, 9, 1, 5, 6]], None, [[1, 1, 1, 0, 0]]),
        (9, [[5, 9, 6, 1, 7]], None, [[0, 0, 0, 0, 0]]),  # no BOS in front; a pad and a BOS inside a text are text
        (1, [[1, 5, 1, 6, 1]], None, [[1, 0, 0, 0, 1]]),  # BOS and padding share an id
        (1, [[1, 1, 1, 5, 6]], None, [[1, 1, 1, 0, 0]]),
        (9, [[1, 5, 9, 9, 9]], [[1, 1, 1, 0, 0]], [[1, 0, 0, 1, 1]]),  # the mask decides
        (9, [[7, 7, 1, 5, 6]], [[0, 0, 1, 1, 1]], [[1, 1, 1, 0, 0]]),
        (None, [[1, 5, 6]], None, [[1, 0, 0]]),
    ],
)
def test_skipped_positions(pad: int | None, tokens: list, mask: list | None, expected: list) -> None:
    model = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=pad, bos_token_id=1, cls_token_id=None))
    given = None if mask is None else torch.tensor(mask)
    assert skipped_positions(model, torch.tensor(tokens), given).long().tolist() == expected


def test_flat_activation_lays_heads_side_by_side() -> None:
    heads = torch.randn(2, 3, 4, 5)
    flat = flat_activation("z", heads, (2, 3))
    assert torch.equal(flat[1, 2], torch.cat([heads[1, 2, h] for h in range(4)]))
    with pytest.raises(tll.InvalidInputError, match=r"pattern has shape \(2, 4, 3, 3\); expected \[batch, pos, \.\.\.\]"):
        flat_activation("pattern", torch.randn(2, 4, 3, 3), (2, 3))


def test_require_model_names_what_it_got() -> None:
    with pytest.raises(tll.InvalidInputError, match="got a Linear; expected a TransformerLens model"):
        tll.build_bank(torch.nn.Linear(2, 2), TEXTS, "never.h5", progress=False)


def test_run_keeps_training_mode_and_hooks(tmp_path: Path) -> None:
    model = tll.load_demo_model(available_kinds()[0])
    model.train()
    fired: list[int] = []
    model.add_hook("blocks.0.hook_resid_post", lambda activation, hook: fired.append(1))
    tll.build_bank(model, TEXTS[:1], tmp_path / "bank.h5", progress=False)
    assert model.training
    before = len(fired)
    model.run_with_hooks("a", fwd_hooks=[])
    assert len(fired) == before + 1


def test_demo_model_folder_is_in_the_package() -> None:
    assert (DEMO_MODEL / "model.safetensors").is_file()


def test_load_model_names_available_kinds() -> None:
    with pytest.raises(tll.InvalidInputError, match=r"got kind='torch'; the installed TransformerLens has \["):
        load_model("demo", kind="torch")


@pytest.mark.skipif(len(available_kinds()) < 2, reason="needs both model classes")
def test_demo_model_has_equal_residuals_on_both_classes() -> None:
    models = [tll.load_demo_model(kind) for kind in available_kinds()]
    tokens = models[0].to_tokens("She carried the heavy crate to the bank and sat down on it.")
    names = [f"blocks.{layer}.hook_resid_{part}" for layer in range(6) for part in ("pre", "mid", "post")]
    first, second = (model.run_with_cache(tokens, names_filter=lambda name: name in names)[1] for model in models)
    for name in names:
        torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=0)


def test_head_outputs_add_up_to_the_output_of_the_layer(models_of: dict[str, Any]) -> None:
    for kind, model in models_of.items():
        cache = model.run_with_cache(TEXTS[0])[1]
        outputs = head_outputs(model, 1, cache["blocks.1.attn.hook_z"])
        assert outputs.shape == (*cache["blocks.1.attn.hook_z"].shape[:-1], model.cfg.d_model)
        if kind == "hooked" and "blocks.1.ln1_post.hook_normalized" in cache:
            continue  # hook_attn_out is behind another norm
        expected = cache["blocks.1.attn.hook_out" if kind == "bridge" else "blocks.1.hook_attn_out"]
        bias = model.blocks[1].attn.b_O
        torch.testing.assert_close(outputs.sum(-2) + (0 if bias is None else bias), expected, atol=1e-5, rtol=1e-4)
        with pytest.raises(tll.InvalidInputError, match=r"got z of shape \(1, 8\); expected \[\.\.\., 4 heads, d_head 8\]"):
            head_outputs(model, 1, torch.zeros(1, 8))


@pytest.mark.skipif("hooked" not in available_kinds(), reason="a gated hook of HookedTransformer")
def test_head_outputs_are_hook_result(models_of: dict[str, Any]) -> None:
    model = models_of["hooked"]
    model.set_use_attn_result(True)
    try:
        cache = model.run_with_cache(TEXTS[0])[1]
    finally:
        model.set_use_attn_result(False)
    torch.testing.assert_close(head_outputs(model, 1, cache["blocks.1.attn.hook_z"]), cache["blocks.1.attn.hook_result"])
