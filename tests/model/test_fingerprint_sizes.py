"""A model with another tokenizer, other sizes or other hook points is refused, both sides named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.fingerprints import OTHER_WEIGHTS, RESIDUAL, Known, check, know, load_small, refusal
from support.models import available_kinds

import tl_latentlens as tll
from tl_latentlens.model.describe import describe_model
from tl_latentlens.model.loading import DEMO_MODEL


@pytest.mark.parametrize("kind", available_kinds())
def test_another_tokenizer_with_the_same_weights(demo_known: dict[str, Known], tmp_path: Path, kind: str) -> None:
    """Two tokens have changed places: every size is the same, and texts would be read as other texts."""
    for file in DEMO_MODEL.glob("*token*"):
        shutil.copy(file, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["Ġriver"], vocabulary["Ġbank"] = vocabulary["Ġbank"], vocabulary["Ġriver"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    model = tll.load_demo_model(kind)
    model.tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    message = refusal(model, demo_known[kind])
    assert message.startswith("another tokenizer: the bank is of demo_model (")
    assert "the model is demo_model (" in message
    ours, theirs = describe_model(model).tokenizer[:8], demo_known[kind].info.tokenizer[:8]
    assert message.endswith(
        f"and their vocabularies differ (sha256 {theirs}… against {ours}…); load the model with its own tokenizer, or rebuild "
        "the bank"
    )


@pytest.mark.parametrize("kind", available_kinds())
def test_a_model_without_tokenizer_is_known_by_its_weights(demo_known: dict[str, Known], kind: str) -> None:
    model = tll.load_demo_model(kind)
    model.tokenizer = None
    check(model, demo_known[kind])
    with torch.no_grad():
        model.W_E.mul_(1.1)
    assert "its weights are others" in refusal(model, demo_known[kind])


def test_a_bank_made_without_tokenizer_is_known_by_its_weights() -> None:
    """From tokens of one's own: the tokenizer that the model has when it reads cannot be another one."""
    model = tll.load_demo_model()
    known, tokenizer = know(model), model.tokenizer
    model.tokenizer = None
    known = replace(known, info=describe_model(model))
    model.tokenizer = tokenizer
    check(model, known)
    with torch.no_grad():
        model.W_E.mul_(1.1)
    assert "its weights are others" in refusal(model, known)


@pytest.mark.parametrize("changes", [{"n_embd": 16}, {"n_layer": 2}], ids=["d_model", "n_layers"])
def test_a_model_of_another_size(tmp_path: Path, changes: dict[str, int]) -> None:
    whole, less = load_small(tmp_path / "whole"), load_small(tmp_path / "less", **changes)
    message = refusal(less, know(whole, ["blocks.1.hook_resid_post"]))
    assert message.startswith("another model: the bank is of whole (")
    for model in (whole, less):
        assert f", {model.cfg.n_layers} layers, d_model {model.cfg.d_model}, float32)" in message
    assert message.endswith(OTHER_WEIGHTS)


@pytest.mark.parametrize(
    ("name", "changes", "dtype"),
    [
        ("blocks.0.attn.hook_v", {"num_key_value_heads": 2}, torch.float32),
        ("blocks.0.mlp.hook_post", {"intermediate_size": 48}, torch.bfloat16),
    ],
)
def test_activations_of_another_width(tmp_path: Path, name: str, changes: dict[str, int], dtype: torch.dtype) -> None:
    """As many layers and as wide a residual stream, but fewer key-value heads or a narrower MLP."""
    settings = {"num_key_value_heads": 4}
    known = know(load_small(tmp_path / "one", "llama", **settings), [name])
    message = refusal(load_small(tmp_path / "two", "llama", **{**settings, **changes}).to(dtype), known)
    assert message.startswith("another model: the bank is of one (")
    assert name in message
    assert message.endswith(OTHER_WEIGHTS)


def test_a_vocabulary_too_small_for_the_bank(tmp_path: Path) -> None:
    """Without a tokenizer to compare, its ids would be looked up where there is no embedding."""
    full, few = load_small(tmp_path / "full"), load_small(tmp_path / "few", vocab_size=100)
    few.tokenizer = None
    message = refusal(few, know(full, ["blocks.1.hook_resid_post"]))
    assert "the bank is of full (" in message
    assert message.endswith(OTHER_WEIGHTS)


def test_a_model_that_lacks_a_hook(demo_models: dict[str, Any], demo_known: dict[str, Known]) -> None:
    for kind, model in demo_models.items():
        known = demo_known[kind].of(RESIDUAL)
        known.fingerprint.activations["blocks.0.hook_nowhere"] = known.fingerprint.activations[RESIDUAL[0]]
        message = refusal(model, known)
        assert message.startswith("the bank is of demo_model (")
        assert ", the model is demo_model (" in message
        assert ", and the model lacks an activation of the bank: " in message
        assert "blocks.0.hook_nowhere" in message


@pytest.mark.parametrize("kind", available_kinds())
def test_a_hook_that_is_switched_off(kind: str) -> None:
    name = "blocks.0.attn.hook_result"
    model = tll.load_demo_model(kind)
    model.set_use_attn_result(True)
    known = know(model, [name])
    check(model, known)
    model.set_use_attn_result(False)
    message = refusal(model, known)
    assert "the model lacks an activation of the bank: " in message
    assert name in message
    assert "set_use_" in message
