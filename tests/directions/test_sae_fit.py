"""An SAE of another model than the bank's is named as such, wherever the two meet."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tl_latentlens as tll
from tl_latentlens.directions.features.sae import TensorSAE
from tl_latentlens.explorer.reader import Reader

pytestmark = pytest.mark.usefixtures("few_random_directions")

HOOK = "blocks.3.hook_resid_post"


def sae_of(model_name: str | None, width: int = 256, hook_name: str | None = HOOK) -> TensorSAE:
    decoder = torch.randn(6, width, generator=torch.Generator().manual_seed(0))
    weights = {"W_enc": decoder.T.contiguous(), "b_enc": torch.zeros(6)}
    return TensorSAE(decoder, weights, hook_name=hook_name, model_name=model_name)


def ways(model: Any, index: tll.ContextualIndex) -> dict[str, Any]:
    """Where an SAE meets a bank or its model."""
    return {
        "label": lambda sae: tll.label_features(sae, index, [0], progress=False),
        "find": lambda sae: tll.find_features("The river bank", -1, sae, index, model=model, label=False),
        "explore": lambda sae: Reader(model, index, sae),
    }


@pytest.mark.parametrize("way", ["label", "find", "explore"])
def test_another_width_names_both_models(any_model: Any, index: tll.ContextualIndex, way: str) -> None:
    of_bank = rf"the bank is of '{index.model_info.name}' and {HOOK} has width 256"
    with pytest.raises(tll.InvalidInputError, match=rf"an SAE \(trained on 'gpt2-xl', W_dec of width 1600\); {of_bank}"):
        ways(any_model, index)[way](sae_of("gpt2-xl", 1600))
    with pytest.raises(tll.InvalidInputError, match=rf"an SAE \(W_dec of width 1600\); {of_bank}"):
        ways(any_model, index)[way](sae_of(None, 1600))


@pytest.mark.parametrize("way", ["label", "find", "explore"])
def test_another_model_of_one_width_is_a_warning(any_model: Any, index: tll.ContextualIndex, way: str) -> None:
    with pytest.warns(UserWarning, match="the SAE says that it was trained on 'org/pythia-14m', the bank is of"):
        ways(any_model, index)[way](sae_of("org/pythia-14m"))
    for name in (None, "demo", index.model_info.name, f"org/{index.model_info.name}-v2"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ways(any_model, index)[way](sae_of(name))


def test_a_width_that_no_hook_name_has(index: tll.ContextualIndex) -> None:
    with pytest.raises(tll.InvalidInputError, match=r"trained on .gpt2-small., W_dec of width 768.*its rows have width 256"):
        tll.label_features(sae_of("gpt2-small", 768, "blocks.8.hook_resid_pre"), index)


def test_what_saelens_says_of_its_model_counts(index: tll.ContextualIndex) -> None:
    metadata = SimpleNamespace(hook_name=HOOK, hook_name_out=None, model_name="gemma-2-2b")
    sae = SimpleNamespace(W_dec=torch.randn(3, 256), cfg=SimpleNamespace(metadata=metadata))
    with pytest.warns(UserWarning, match="trained on 'gemma-2-2b'"):
        tll.label_features(sae, index, progress=False)


@pytest.mark.filterwarnings("ignore")  # SAELens' own
@pytest.mark.parametrize("kind", ["BatchTopKTraining", "Temporal", "TopK", "JumpReLU", "Standard"])
def test_an_encoder_that_reads_rows_together_is_refused(any_model: Any, index: tll.ContextualIndex, kind: str) -> None:
    sae_lens = pytest.importorskip("sae_lens", exc_type=ImportError)
    from sae_lens.saes.sae import SAEMetadata

    settings = {"k": 5} if "TopK" in kind else {"n_heads": 1, "bottleneck_factor": 16} if kind == "Temporal" else {}
    config = getattr(sae_lens, f"{kind}SAEConfig")(
        d_in=256, d_sae=64, device="cpu", metadata=SAEMetadata(hook_name=HOOK), **settings
    )
    sae = getattr(sae_lens, f"{kind}SAE")(config)
    for way in (ways(any_model, index)["label"], ways(any_model, index)["find"]):
        if kind in ("BatchTopKTraining", "Temporal"):
            with pytest.raises(tll.InvalidInputError, match=rf"the encoder of {kind}SAE (gives|does not take)"):
                way(sae)
        else:
            way(sae)


def test_an_sae_of_one_head_reads_that_head(any_model: Any, texts: list[str], tmp_path: Path) -> None:
    hook = "blocks.1.attn.hook_z"
    bank = tll.build_bank(any_model, texts, tmp_path / "z.h5", hook_names=hook, progress=False)
    decoder = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    sae = TensorSAE(decoder, {"W_enc": decoder.T.contiguous(), "b_enc": torch.zeros(6)}, hook_name=f"{hook}[2]")
    result = tll.label_features(sae, tll.ContextualIndex(bank, sae.hook_name, device="cpu"), progress=False)
    heads = torch.from_numpy(bank.activations(hook, slice(None))).view(bank.n_rows, 4, 64)
    assert result.activity is not None
    assert result.activity.count.tolist() == (sae.encode(heads[:, 2]) > 0).sum(0).tolist()
