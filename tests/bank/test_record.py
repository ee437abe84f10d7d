"""bank_hooks from one's own loop, and what activations can be banked."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import TEXTS, available_kinds

import tl_latentlens as tll

NAMES = ["blocks.0.hook_resid_post", "blocks.4.hook_resid_mid"]


def own_loop(model: Any, path: Path, names: list[str], **settings: Any) -> tll.Bank:
    """Fill a bank as the documentation shows."""
    plan = tll.plan_corpus(model, TEXTS)
    with tll.BankWriter.create(path, plan, tll.record_model(model, plan, names), **settings) as writer:
        for batch in writer.batches():
            model.run_with_hooks(
                batch.tokens, attention_mask=batch.attention_mask, return_type=None, fwd_hooks=tll.bank_hooks(writer, batch)
            )
    return tll.Bank.open(path)


@pytest.mark.parametrize("batch_tokens", [16, 4096])
def test_own_loop_gives_the_same_bank(demo_model: Any, tmp_path: Path, batch_tokens: int) -> None:
    ours = own_loop(demo_model, tmp_path / "own.h5", NAMES, dtype="float32", batch_tokens=batch_tokens)
    built = tll.build_bank(
        demo_model, TEXTS, tmp_path / "built.h5", hook_names=NAMES, dtype="float32", batch_tokens=batch_tokens, progress=False
    )
    assert ours.plan_digest == built.plan_digest
    assert ours.hook_names == built.hook_names
    for name in NAMES:
        np.testing.assert_allclose(ours.vectors(name), built.vectors(name), atol=1e-5)
        np.testing.assert_allclose(ours.norms(name), built.norms(name), rtol=1e-4)
        np.testing.assert_allclose(ours.mean(name), built.mean(name), atol=1e-5)
    ours.verify()


def check_rows(bank: tll.Bank, model: Any, tolerance: float) -> None:
    """Each stored row against the cache of its prompt run alone."""
    seen = set()
    for prompt in range(len(TEXTS)):
        rows = [bank.row(r) for r in range(bank.n_rows) if bank.row(r).prompt_index == prompt]
        cache = model.run_with_cache(TEXTS[prompt])[1]
        for row in rows:
            seen.add(row.row)
            for name in bank.hook_names:
                expected = cache[name][0, row.position].detach().float().flatten()
                stored = torch.from_numpy(bank.vectors(name)[row.row].astype(np.float32))
                assert abs(float(bank.norms(name)[row.row]) / float(expected.norm()) - 1) < 1e-4
                assert torch.allclose(stored, expected / expected.norm(), atol=tolerance), (name, row.row)
    assert seen == set(range(bank.n_rows))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 6e-4), ("bfloat16", 5e-3), ("float32", 2e-5)])
def test_stored_rows_are_the_normalised_activations(demo_model: Any, tmp_path: Path, dtype: str, tolerance: float) -> None:
    bank = tll.build_bank(
        demo_model, TEXTS, tmp_path / "bank.h5", hook_names=NAMES, dtype=dtype, batch_tokens=40, progress=False
    )
    check_rows(bank, demo_model, tolerance)


def test_heads_and_other_widths(demo_model: Any, tmp_path: Path) -> None:
    names = ["blocks.1.attn.hook_z", "blocks.1.attn.hook_k", "blocks.2.mlp.hook_post", "blocks.2.hook_resid_post"]
    bank = tll.build_bank(demo_model, TEXTS, tmp_path / "bank.h5", hook_names=names, progress=False)
    cfg = demo_model.cfg
    assert [bank.d(name) for name in names] == [cfg.n_heads * cfg.d_head] * 2 + [cfg.d_mlp, cfg.d_model]
    check_rows(bank, demo_model, 6e-4)


def test_embedding_alone(demo_model: Any, tmp_path: Path) -> None:
    bank = tll.build_bank(demo_model, TEXTS, tmp_path / "bank.h5", hook_names="hook_embed", progress=False)
    for r in range(bank.n_rows):
        expected = demo_model.W_E[bank.row(r).token_id].detach()
        assert torch.allclose(torch.from_numpy(bank.vectors("hook_embed")[r]).float(), expected / expected.norm(), atol=6e-4)


def test_after_the_last_block(demo_model: Any, tmp_path: Path) -> None:
    names = ["ln_final.hook_normalized", "blocks.0.hook_resid_pre"]
    bank = tll.build_bank(demo_model, TEXTS, tmp_path / "bank.h5", hook_names=names, progress=False)
    check_rows(bank, demo_model, 6e-4)


@pytest.mark.parametrize("name", ["blocks.0.attn.hook_pattern", "blocks.0.attn.hook_attn_scores"])
def test_attention_patterns_are_refused(demo_model: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(tll.InvalidInputError, match=rf"{name} has shape \(1, 4, .*only activations with a vector for"):
        tll.build_bank(demo_model, TEXTS, tmp_path / "bank.h5", hook_names=name, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif("hooked" not in available_kinds(), reason="gated hooks are HookedTransformer's")
def test_a_hook_that_never_fires_is_refused(tmp_path: Path) -> None:
    model = tll.load_demo_model("hooked")
    names = ["blocks.0.hook_resid_post", "blocks.0.hook_mlp_in"]
    with pytest.raises(tll.InvalidInputError, match=r"'blocks.0.hook_mlp_in' never fires .*model.set_use_"):
        tll.build_bank(model, TEXTS, tmp_path / "bank.h5", hook_names=names, progress=False)
    model.set_use_hook_mlp_in(True)
    bank = tll.build_bank(model, TEXTS, tmp_path / "bank.h5", hook_names=names, progress=False)
    check_rows(bank, model, 6e-4)


def test_zero_and_nan_activations_are_refused(demo_model: Any, tmp_path: Path) -> None:
    name = "blocks.0.hook_resid_post"
    plan = tll.plan_corpus(demo_model, TEXTS)
    record = tll.record_model(demo_model, plan, [name])
    for kind, value in (("NaN", float("nan")), ("zero", 0.0)):

        def spoil(activation: torch.Tensor, hook: Any, value: float = value) -> torch.Tensor:
            changed = activation.clone()
            changed[:, 2] = value
            return changed

        def run(path: Path, spoil: Any = spoil) -> None:
            with tll.BankWriter.create(path, plan, record) as writer:
                for batch in writer.batches():
                    hooks = [(name, spoil), *tll.bank_hooks(writer, batch)]
                    demo_model.run_with_hooks(batch.tokens, attention_mask=batch.attention_mask, fwd_hooks=hooks)

        with pytest.raises(tll.InvalidInputError, match=rf"{name}: \d+ activations are NaN, inf or zero, .* position 2 "):
            run(tmp_path / f"{kind}.h5")
        assert not (tmp_path / f"{kind}.h5").exists()


def test_bank_hooks_change_nothing(demo_model: Any, tmp_path: Path) -> None:
    plan = tll.plan_corpus(demo_model, TEXTS)
    with tll.BankWriter.create(tmp_path / "bank.h5", plan, tll.record_model(demo_model, plan, NAMES)) as writer:
        for batch in writer.batches():
            hooks = tll.bank_hooks(writer, batch)
            assert [name for name, _ in hooks] == NAMES
            plain = demo_model(batch.tokens, attention_mask=batch.attention_mask)
            hooked = demo_model.run_with_hooks(batch.tokens, attention_mask=batch.attention_mask, fwd_hooks=hooks)
            assert torch.equal(plain, hooked)
