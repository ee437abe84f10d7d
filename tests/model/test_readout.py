"""Models that lack a part of the way to the logits: read as the model itself does, or refused before anything is read."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.models import TEXTS, available_kinds, make_tokenizer, random_bridge

import tl_latentlens as tll
from tl_latentlens.model import DEMO_MODEL
from tl_latentlens.model.readout import readout_problem

needs_hooked = pytest.mark.skipif("hooked" not in available_kinds(), reason="no HookedTransformer")
needs_bridge = pytest.mark.skipif("bridge" not in available_kinds(), reason="no bridge")


def hooked(**settings: Any) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    sizes = {"n_layers": 2, "d_model": 32, "n_ctx": 32, "d_head": 8, "n_heads": 4, "d_vocab": len(tokenizer), "seed": 0}
    return HookedTransformer(HookedTransformerConfig(**sizes, **settings), tokenizer).eval()


def check_last_layer(model: Any, tmp_path: Path) -> None:
    """The lens hooks read the model's own predictions at the last layer."""
    bank = tll.build_bank(model, TEXTS, tmp_path / "bank.h5", progress=False)
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank, device="cpu"), top_k=3, embedding_lens=True)
    with torch.no_grad():
        logits = model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
    last = bank.hook_names[-1]
    assert last == f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    own = logits[0][hooks.result.decoded[0]].softmax(-1).topk(3).values
    np.testing.assert_allclose(hooks.result.logit_lens[last].scores, own, atol=1e-5)
    assert hooks.follow_tokens([5]).lenses == ["latentlens", "logit_lens", "embedding_lens"]


@needs_hooked
@pytest.mark.parametrize(
    "settings",
    [
        {"normalization_type": None, "attn_only": True},
        {"normalization_type": None, "act_fn": "relu"},
        {"normalization_type": None, "act_fn": "relu", "output_logits_soft_cap": 0.5},
    ],
)
def test_a_hooked_model_without_norms_is_read_without_one(settings: dict[str, Any], tmp_path: Path) -> None:
    model = hooked(**settings)
    assert not hasattr(model, "ln_final")
    check_last_layer(model, tmp_path)


@needs_bridge
def test_gpt_1_which_has_no_final_norm(tmp_path: Path) -> None:
    pytest.importorskip("transformer_lens.model_bridge.supported_architectures.openai_gpt")
    config = transformers.OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model, fired = random_bridge(config, tmp_path / "gpt1"), []
    model.run_with_hooks(TEXTS[0], fwd_hooks=[("blocks.0.hook_resid_post", lambda activation, hook: fired.append(1))])
    if not fired:
        pytest.skip("the hooks on the blocks of GPT-1 do not fire in this TransformerLens")
    check_last_layer(model, tmp_path)


def test_a_readout_that_gives_other_logits_is_left_out_with_a_reason(tmp_path: Path) -> None:
    """A model that scales its last activations in a way that no setting names."""
    model = tll.load_demo_model()
    bank = tll.build_bank(model, TEXTS[:2], tmp_path / "bank.h5", progress=False)
    handle = model.unembed.register_forward_pre_hook(lambda module, inputs: (inputs[0].flip(-1),))
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank, device="cpu"))
    try:
        model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
        with pytest.warns(
            UserWarning, match=r"without the logit lens: final norm and unembedding at blocks\.5\.hook_resid_post"
        ):
            result = hooks.result
        assert result.logit_lens == {}
        assert result.found.keys() == set(bank.hook_names)
        assert hooks.follow_tokens([5]).lenses == ["latentlens"]
        with pytest.raises(tll.InvalidInputError, match=r"give other logits .*; pass logit_lens=False"):
            tll.logit_lens(model, torch.randn(2, 256))
    finally:
        handle.remove()


def test_the_check_fires_no_hook_of_the_user(demo_model: Any) -> None:
    model, fired = tll.load_demo_model("bridge" if hasattr(demo_model, "adapter") else "hooked"), []
    model.add_hook("blocks.1.hook_resid_post", lambda activation, hook: fired.append(1))
    assert readout_problem(model) is None
    assert readout_problem(model) is None
    assert not fired


def test_a_model_without_unembedding_or_embeddings() -> None:
    class Headless(torch.nn.Module):
        cfg = SimpleNamespace(d_model=4, n_layers=1, n_ctx=0, d_vocab=9, attention_dir="causal")
        hook_dict: dict[str, Any] = {}  # noqa: RUF012

    model = Headless()
    with pytest.raises(tll.InvalidInputError, match=r"this Headless has no unembedding \(W_U\).*; pass logit_lens=False"):
        tll.logit_lens(model, torch.randn(2, 4))
    with pytest.raises(tll.InvalidInputError, match=r"this Headless has no input embeddings \(W_E\)"):
        tll.embedding_lens(model, torch.randn(2, 4))
    model = Headless()
    model.W_U = torch.nn.Parameter(torch.randn(3, 9))
    with pytest.raises(tll.InvalidInputError, match=r"reads width 3, and its residual stream has d_model = 4"):
        tll.logit_lens(model, torch.randn(2, 4))


@needs_bridge
def test_an_encoder_is_read_by_its_neighbors_with_a_warning(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    model = tll.load_model(str(tmp_path / "encoder"), kind="bridge")
    bank = tll.build_bank(model, TEXTS[:2], tmp_path / "bank.h5", progress=False)
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank, device="cpu"))
    model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
    with pytest.warns(UserWarning, match="the result is without the logit lens: the logit lens needs a decoder"):
        assert hooks.result.logit_lens == {}
    quiet = tll.latentlens_hooks(tll.ContextualIndex(bank, device="cpu"), logit_lens=False)
    model.run_with_hooks(TEXTS[0], fwd_hooks=quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert quiet.result.hook_names == bank.hook_names
