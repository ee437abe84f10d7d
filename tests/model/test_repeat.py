"""Banks of texts that were run twice, BOS text text, against plain runs on those tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import available_kinds

import tl_latentlens as tll
from tl_latentlens.bank import build as build_module
from tl_latentlens.bank.format import partial_path

NAMES = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z"]


def n_before(model: Any) -> int:
    """Tokens before a text: BOS, or none (Qwen2)."""
    return int(model.to_tokens("a").shape[1] - model.to_tokens("a", prepend_bos=False).shape[1])


def check_second_copies(model: Any, bank: tll.Bank) -> None:
    """Every row against run_with_cache on BOS text text, its prompt alone."""
    caches, start = {}, n_before(model)
    for i in range(bank.n_rows):
        row = bank.row(i)
        prompt = bank.prompt(row.prompt_index)
        if row.prompt_index not in caches:
            with torch.no_grad():
                caches[row.prompt_index] = model.run_with_cache(torch.tensor([prompt + prompt[start:]]))[1]
        for name in bank.hook_names:
            vector = caches[row.prompt_index][name][0].flatten(1)[row.position + len(prompt) - start].float().numpy()
            np.testing.assert_allclose(bank.norms(name)[i], np.linalg.norm(vector), rtol=1e-3)
            np.testing.assert_allclose(bank.vectors(name)[i], vector / np.linalg.norm(vector), atol=2e-3)


def build(model: Any, texts: list[str], path: Path, **kwargs: Any) -> tll.Bank:
    return tll.build_bank(model, texts, path, **{"hook_names": NAMES, "repeat": True, "progress": False, **kwargs})


def test_rows_are_the_second_copies(demo_model: Any, texts: list[str], tmp_path: Path) -> None:
    bank = build(demo_model, [*texts, "", texts[0]], tmp_path / "a.h5", batch_tokens=64)
    check_second_copies(demo_model, bank)
    bank.verify()


@pytest.mark.parametrize("kind", available_kinds())
def test_rows_of_every_architecture(model_folder: Path, texts: list[str], tmp_path: Path, kind: str) -> None:
    """Rotary positions and grouped heads among them."""
    if kind == "hooked" and json.loads((model_folder / "config.json").read_text())["model_type"] == "gemma2":
        pytest.skip("HookedTransformer reads Gemma 2 from the hub only")
    model = tll.load_model(str(model_folder), kind=kind)
    check_second_copies(model, build(model, texts[:3], tmp_path / "a.h5"))


def test_prompts_contexts_and_positions_are_those_of_a_plain_bank(any_model: Any, texts: list[str], tmp_path: Path) -> None:
    twice = [*texts, texts[0]]
    bank = build(any_model, twice, tmp_path / "a.h5", max_rows_per_token=None)
    plain = build(any_model, twice, tmp_path / "b.h5", repeat=False)
    assert [bank.prompt(i) for i in range(len(twice))] == [plain.prompt(i) for i in range(len(twice))]
    places = [(p, i) for p, text in enumerate(texts) for i in range(1, len(any_model.to_tokens(text)[0]))]
    rows = [bank.row(i) for i in range(bank.n_rows)]
    assert [(row.prompt_index, row.position) for row in rows] == places, "all of each text, shared prefixes too, once"
    context = {(row.prompt_index, row.position): row.context() for row in map(plain.row, range(plain.n_rows))}
    assert all(row.context() == context.get((row.prompt_index, row.position), row.context()) for row in rows)
    assert bank.plan_digest != plain.plan_digest
    assert bank.plan_digest == bank.plan.digest


def test_texts_are_cut_so_that_both_copies_fit(any_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = " ".join(["river"] * any_model.cfg.n_ctx)
    bank = build(any_model, [long, "short"], tmp_path / "a.h5", progress=True, max_rows_per_token=None)
    assert len(bank.prompt(0)) == (any_model.cfg.n_ctx - 1) // 2 + 1
    assert (
        f"1 of 2 texts were longer than n_ctx = {any_model.cfg.n_ctx} tokens, read twice, and were cut"
        in capsys.readouterr().err
    )
    assert tll.repeated(any_model, long).tokens.shape == (1, any_model.cfg.n_ctx - 1)


def test_a_stopped_build_goes_on_and_a_plain_one_does_not_take_it_over(
    any_model: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(any_model, texts, tmp_path / "whole.h5", batch_tokens=16)
    path, runs, run_hooked = tmp_path / "a.h5", [], build_module.run_hooked

    def failing(*arguments: Any) -> None:
        if len(runs) == 3:
            raise KeyboardInterrupt
        runs.append(1)
        run_hooked(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "run_hooked", failing)
        with pytest.raises(KeyboardInterrupt):
            build(any_model, texts, path, batch_tokens=16)
    assert partial_path(path).exists()
    with pytest.raises(tll.BankError, match=r"plan settings: the file has {'repeat': True, 'text_start': 1}, this call"):
        build(any_model, texts, path, batch_tokens=16, repeat=False)
    resumed = build(any_model, texts, path, batch_tokens=16)
    assert resumed.path.read_bytes() == whole.path.read_bytes()
    assert build(any_model, texts, path).n_rows == whole.n_rows, "a finished bank is opened"
    with pytest.raises(tll.BankError, match="exists and differs in plan settings"):
        build(any_model, texts, path, repeat=False)


def test_tokens_to_run_and_an_own_loop(any_model: Any, texts: list[str], tmp_path: Path) -> None:
    plan = tll.plan_corpus(any_model, texts, repeat=True)
    record = tll.record_model(any_model, plan, NAMES)
    run = 0
    with tll.BankWriter.create(tmp_path / "own.h5", plan, record, batch_tokens=64) as writer:
        for batch in writer.batches():
            run += int(batch.attention_mask.sum())
            with torch.no_grad():
                any_model.run_with_hooks(
                    batch.tokens, attention_mask=batch.attention_mask.long(), fwd_hooks=tll.bank_hooks(writer, batch)
                )
        assert run == writer.tokens_to_run == sum(2 * len(any_model.to_tokens(text)[0]) - 1 for text in texts)
    check_second_copies(any_model, tll.Bank.open(tmp_path / "own.h5"))


@pytest.mark.parametrize("names", [1, 3])
def test_a_text_of_the_bank_finds_itself(demo_model: Any, texts: list[str], tmp_path: Path, names: int) -> None:
    bank = build(demo_model, texts, tmp_path / "a.h5", hook_names=NAMES[:1], max_rows_per_token=None)
    run = tll.repeated(demo_model, texts[:names] if names > 1 else texts[0])
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank, device="cpu"), top_k=1, positions=run.second_copy)
    demo_model.run_with_hooks(run.tokens, attention_mask=run.attention_mask, fwd_hooks=hooks)
    cells = hooks.result.cells()
    lengths = [len(bank.prompt(i)) for i in range(names)]
    assert [(cell.batch, cell.pos - lengths[cell.batch] + 1) for cell in cells] == [
        (i, pos) for i in range(names) for pos in range(1, lengths[i])
    ]
    for cell in cells:
        (found,) = cell.neighbors
        assert found.similarity == pytest.approx(1, abs=1e-3)
        assert (found.prompt_index, found.position) == (cell.batch, cell.pos - lengths[cell.batch] + 1)
        assert found.token == cell.token


def test_a_mask_of_another_shape_is_named(any_model: Any, index: tll.ContextualIndex) -> None:
    for mask in (torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 5)):
        hooks = tll.latentlens_hooks(index, positions=mask)
        any_model.run_with_hooks(torch.tensor([[1, 2, 3, 4, 5]]), fwd_hooks=hooks)
        with pytest.raises(tll.InvalidInputError, match=r"got positions of shape .* expected bool of .* \(1, 5\)"):
            _ = hooks.result


def test_a_model_that_ends_texts_is_refused(any_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_tokens = any_model.to_tokens
    monkeypatch.setattr(any_model, "to_tokens", lambda text: torch.cat([to_tokens(text), torch.tensor([[2]])], -1))
    with pytest.raises(tll.InvalidInputError, match=r"cannot read a text twice: to_tokens puts \[2\] after a text"):
        build(any_model, ["The river"], tmp_path / "a.h5")
    assert not list(tmp_path.iterdir())
