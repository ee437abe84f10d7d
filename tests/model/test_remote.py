"""A model that runs elsewhere, as a RemoteBridge: no weights and no device here, hooks on what comes back."""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import TEXTS, available_kinds

import tl_latentlens as tll
from tl_latentlens.model.describe import describe_model

if "bridge" not in available_kinds():
    pytest.skip("no bridge in this TransformerLens", allow_module_level=True)
remote_bridge = pytest.importorskip("transformer_lens.model_bridge.remote_bridge", reason="no RemoteBridge here")
driver_protocol = pytest.importorskip("transformer_lens.model_bridge.driver_protocol")

HOOK_NAMES = ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"]


class Driver:
    """A driver that runs a model of this process, as another process would."""

    architecture = "GPT2LMHeadModel"
    provides_sequence_logits = True
    supported_hook_points = frozenset(HOOK_NAMES)
    non_fireable_hook_points: frozenset[str] = frozenset()

    def __init__(self, local: Any) -> None:
        self.local, self.bridge_config, self.tokenizer = local, copy.deepcopy(local.cfg), local.tokenizer

    def forward(
        self,
        input_ids: Any = None,
        *,
        capture: tuple[str, ...] = (),
        intervene: Any = None,
        max_new_tokens: int = 1,
        return_logits: bool = True,
        **inputs: Any,
    ) -> Any:
        logits, cache = self.local.run_with_cache(input_ids, names_filter=lambda name: name in capture, **inputs)
        return driver_protocol.ForwardResult(logits=logits, captured={name: cache[name] for name in capture})

    def close(self) -> None: ...

    def supports(self, feature: str) -> bool:
        return False


@pytest.fixture
def local() -> Any:
    return tll.load_model("demo", kind="bridge")


@pytest.fixture
def remote(local: Any) -> Iterator[Any]:
    adapter = copy.copy(local.adapter)
    adapter.cfg = copy.deepcopy(local.cfg)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its hooks cannot change a run, which no hook here does
        yield remote_bridge.RemoteBridge(adapter, local.tokenizer, Driver(local))


def test_a_bank_and_readings_of_a_remote_model(remote: Any, local: Any, tmp_path: Path) -> None:
    assert not isinstance(remote, torch.nn.Module)
    assert remote.cfg.device is None
    info = describe_model(remote)
    assert (info.class_name, info.dtype, info.d_model) == ("RemoteBridge", "float32", 256)
    bank = tll.build_bank(remote, TEXTS, tmp_path / "remote.h5", hook_names=HOOK_NAMES, progress=False)
    expected = tll.build_bank(local, TEXTS, tmp_path / "local.h5", hook_names=HOOK_NAMES, progress=False)
    for name in HOOK_NAMES:
        np.testing.assert_allclose(bank.activations(name, slice(None)), expected.activations(name, slice(None)), atol=0.02)
    index = tll.ContextualIndex(bank)
    index.check_model(remote)
    index.check_model(local)
    hooks = tll.latentlens_hooks(index, logit_lens=False, model=remote)
    remote.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
    assert hooks.result.cell(3, -1).neighbors[0].similarity > 0.999
    vector = tll.difference_of_means(remote, "A boat", "Some money", 3)
    torch.testing.assert_close(vector, tll.difference_of_means(local, "A boat", "Some money", 3), atol=1e-4, rtol=1e-4)
