"""The fingerprint of a model: what it holds, and that the right model is never refused."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.fingerprints import RESIDUAL, Known, check, furthest, know, process
from support.models import TEXTS, available_kinds

import tl_latentlens as tll
from tl_latentlens.model.describe import describe_model
from tl_latentlens.model.fingerprint import TOLERANCES, Fingerprint, fingerprint
from tl_latentlens.model.fingerprint_check import check_fingerprint


def test_fingerprint_is_the_cache_of_each_prompt(demo_models: dict[str, Any]) -> None:
    names = ["blocks.2.hook_resid_post", "blocks.4.hook_resid_mid"]
    for model in demo_models.values():
        prompts = [model.to_tokens(text)[0].tolist() for text in TEXTS[:2]]
        known = fingerprint(model, prompts, names)
        for name in names:
            caches = [model.run_with_cache(torch.tensor([prompt]))[1][name][0] for prompt in prompts]
            np.testing.assert_allclose(known.activations[name], torch.cat(caches).detach().numpy(), atol=1e-4)
        check_fingerprint(model, known, describe_model(model))


def test_every_class_is_accepted_by_the_bank_of_every_class(
    demo_models: dict[str, Any], demo_known: dict[str, Known], index: tll.ContextualIndex
) -> None:
    for model in demo_models.values():
        index.check_model(model, force=True)
        for known in demo_known.values():
            check(model, known)
            assert furthest(known, model) < TOLERANCES["float32"] / 100


@pytest.mark.parametrize("batch_tokens", [16, 4096])
def test_the_batch_size_of_a_bank_does_not_matter(any_model: Any, tmp_path: Path, batch_tokens: int) -> None:
    bank = tll.build_bank(
        any_model, TEXTS, tmp_path / "a.h5", hook_names=RESIDUAL[0], batch_tokens=batch_tokens, progress=False
    )
    tll.ContextualIndex(bank, device="cpu").check_model(any_model)


def test_a_padded_batch_agrees_with_each_prompt_alone(demo_models: dict[str, Any]) -> None:
    """What a reader runs is a batch, the fingerprint is prompts alone: the tolerance must cover the difference."""
    for model in demo_models.values():
        alone = know(model).fingerprint
        shape = len(alone.prompts), max(map(len, alone.prompts))
        tokens, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for b, prompt in enumerate(alone.prompts):
            tokens[b, : len(prompt)], mask[b, : len(prompt)] = torch.tensor(prompt), 1
        seen: dict[str, np.ndarray] = {}

        def keep(activation: torch.Tensor, hook: Any, name: str, seen: dict = seen, mask: torch.Tensor = mask) -> None:
            seen[name] = activation[mask.bool()].detach().numpy()

        model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=[(name, partial(keep, name=name)) for name in RESIDUAL])
        assert all(alone.agrees(Fingerprint(alone.prompts, seen), name, "float32") for name in RESIDUAL)


@pytest.mark.parametrize("kind", available_kinds())
def test_processing_that_changes_no_activation_is_accepted(demo_known: dict[str, Known], kind: str) -> None:
    check(process(tll.load_demo_model(kind), fold_ln=True, center_unembed=True), demo_known[kind])


@pytest.mark.skipif("hooked" not in available_kinds(), reason="a bridge runs ln1 once")
def test_a_hook_that_fires_for_query_key_and_value(demo_models: dict[str, Any]) -> None:
    known = know(demo_models["hooked"], ["blocks.1.ln1.hook_normalized"])
    for model in demo_models.values():
        check(model, known)
