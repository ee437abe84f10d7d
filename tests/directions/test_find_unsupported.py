"""Models whose heads or neurons cannot be told apart are refused before they run, with what to use instead."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from support.models import TEXTS, available_kinds, random_bridge

import tl_latentlens as tll
from tl_latentlens.model.head_outputs import head_outputs

pytestmark = pytest.mark.skipif("bridge" not in available_kinds(), reason="these models are read on a bridge")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, **ATTENTION, intermediate_size=64, num_local_experts=4),
    "olmoe": lambda: transformers.OlmoeConfig(**SIZES, **ATTENTION, intermediate_size=64, num_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, **ATTENTION, head_dim=8, intermediate_size=64, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
    ),
    "mamba": lambda: transformers.MambaConfig(**SIZES, state_size=4, intermediate_size=64),
    "mamba2": lambda: transformers.Mamba2Config(**SIZES, state_size=4, num_heads=4, head_dim=16, n_groups=1, expand=2),
}


@pytest.fixture(params=list(CONFIGS))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    try:
        return random_bridge(CONFIGS[request.param](), tmp_path / "model")
    except tll.InvalidInputError as error:
        pytest.skip(str(error))


def test_it_is_refused_before_a_run(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tll.ContextualIndex(tll.build_bank(model, TEXTS, tmp_path / "bank.h5", progress=False), device="cpu")
    monkeypatch.setattr(type(model), "run_with_hooks", lambda *_, **__: pytest.fail("the model ran"))
    for find in (tll.find_heads, tll.find_neurons):
        with pytest.raises(
            tll.InvalidInputError, match=r"blocks\.0 of this \w+ has no (attn|mlp)\.\w+; expected .* find_features"
        ):
            find(TEXTS[1], "bank", index, model=model)


def test_outputs_of_heads_that_are_not_there(model: Any) -> None:
    if model.cfg.architecture.startswith("Mamba"):
        with pytest.raises(tll.InvalidInputError, match=r"blocks\.0 of this \w+ has no attn\.W_O; expected attention heads"):
            head_outputs(model, 0, torch.randn(1, 2, 4, 8))
    else:
        assert head_outputs(model, 0, torch.randn(1, 2, 4, 8)).shape == (1, 2, 4, 32)
    with pytest.raises(tll.UnknownHookError, match="has no layer 2; it has layers 0 to 1"):
        head_outputs(model, 2, torch.randn(1, 2, 4, 8))


def test_packed_weights_are_refused() -> None:
    layer = SimpleNamespace(attn=SimpleNamespace(W_O=torch.zeros(6, 3)))
    packed = SimpleNamespace(cfg=SimpleNamespace(n_layers=1, d_model=8), blocks=[layer])
    with pytest.raises(tll.InvalidInputError, match=r"attn\.W_O in blocks\.0 .* has shape \(6, 3\); expected attention heads"):
        head_outputs(packed, 0, torch.randn(1, 2, 4, 8))
