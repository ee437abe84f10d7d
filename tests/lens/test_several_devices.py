"""A model whose later layers are on another device than its first: banks, readings and directions are those of one device."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.devices import SECOND, later_layers_on_second_device
from support.models import TEXTS, available_kinds

import tl_latentlens as tll
from tl_latentlens.directions.features import steering_scores

LAYERS = [1, 4, "blocks.4.attn.hook_z"]


@pytest.mark.parametrize("kind", available_kinds())
def test_layers_on_two_devices(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering_scores, "_N_NULLS", 2)
    monkeypatch.setattr(steering_scores, "_MAX_VECTORS", 4)
    whole, parted = tll.load_model("demo", kind=kind), tll.load_model("demo", kind=kind)
    expected = everything(whole, tmp_path / "whole.h5")
    with later_layers_on_second_device(parted, 3) as device:
        seen: list[torch.device] = []
        parted.run_with_hooks(TEXTS[0], fwd_hooks=[("blocks.4.hook_resid_post", lambda x, hook: seen.append(x.device))])
        assert seen == [SECOND]
        assert not device.holds(next(iter(parted.parameters())))
        found = everything(parted, tmp_path / "parted.h5")
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=2e-3, err_msg=name)


def everything(model: Any, path: Path) -> dict[str, Any]:
    """Figures of all that runs the model."""
    bank = tll.build_bank(model, TEXTS, path, hook_names=LAYERS, progress=False)
    index = tll.ContextualIndex(bank, [1, 4])
    index.check_model(model)
    hooks = tll.latentlens_hooks(
        index, [1, 4, "blocks.4.attn.hook_result[0]"], embedding_lens=True, calibrate=True, model=model
    )
    model.run_with_hooks(TEXTS[:2], fwd_hooks=hooks)
    table = hooks.result.to_dataframe()
    followed = hooks.follow_tokens([" bank"]).to_dataframe()
    vector = tll.difference_of_means(model, ["A boat", "The sea"], "Some money", 4, positions=None)
    steered = tll.SteeringLens(vector, index, 1, model=model, unit="activation").run(model, TEXTS[0]).to_dataframe()
    sae = tll.load_sae("demo")
    labels = tll.label_features(sae, index, [3, 70], hook_name=4, model=model, progress=False).table
    evaluation = tll.evaluate(model, bank, hook_names=[1, 4], transforms="raw", senses=None, n_tokens=4, progress=False)
    heads = tll.find_heads(TEXTS[0], "bank", index, model=model, hook_name=4).table
    return {
        "vectors": np.array(bank.vectors("blocks.4.hook_resid_post"), np.float32),
        "heads": np.array(bank.vectors("blocks.4.attn.hook_z"), np.float32),
        "similarity": table["similarity"],
        "logits": table["logit_probability"].astype(float),
        "embeddings": table["embedding_similarity"].astype(float),
        "followed": followed.select_dtypes("number").to_numpy(float)[:, -1],
        "difference": vector.cpu().numpy(),
        "steered": steered["similarity"],
        "labels": labels["similarity"],
        "steered labels": labels["steered"],
        "evaluation": evaluation.to_dataframe()["mean"].astype(float),
        "contributions": heads["contribution"],
    }
