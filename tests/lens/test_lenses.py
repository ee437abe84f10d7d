"""The logit lens against the model's real logits, the embedding lens against W_E."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.models import TEXTS, available_kinds

import tl_latentlens as tll
from tl_latentlens.model.loading import load_model


@pytest.fixture(scope="module", params=available_kinds())
def model(request: pytest.FixtureRequest, model_folder: Path) -> Any:
    """Each architecture as each class."""
    if request.param == "hooked" and transformers.AutoConfig.from_pretrained(model_folder).model_type == "gemma2":
        return hooked_with_softcap(model_folder)
    return load_model(str(model_folder), kind=request.param)


def hooked_with_softcap(folder: Path) -> Any:
    """A random HookedTransformer with Gemma 2's softcap and norm: TransformerLens loads Gemma 2 from no folder."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    cfg = HookedTransformerConfig(
        n_layers=2,
        d_model=32,
        d_head=8,
        n_ctx=64,
        d_vocab=len(tokenizer),
        act_fn="gelu_pytorch_tanh",
        normalization_type="RMS",
        gated_mlp=True,
        output_logits_soft_cap=30.0,
        device="cpu",
        seed=0,
    )
    return HookedTransformer(cfg, tokenizer).eval()


def last_residual(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits, and the residual they come from, in one run."""
    kept: list[torch.Tensor] = []
    name = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda activation, hook: kept.append(activation.clone()))])
    return logits, kept[0]


def check_logit_lens(model: Any) -> None:
    """At the last layer, the lens is the model's own prediction."""
    tokens = model.to_tokens(TEXTS[0])
    logits, residual = last_residual(model, tokens)
    reading = tll.logit_lens(model, residual, top_k=7)
    best = logits[0].float().softmax(-1).topk(7)
    assert reading.token_ids.shape == reading.scores.shape == (tokens.shape[1], 7)
    np.testing.assert_allclose(reading.scores, best.values, atol=1e-5)
    probabilities = logits[0].float().softmax(-1).numpy()
    np.testing.assert_allclose(np.take_along_axis(probabilities, reading.token_ids, -1), reading.scores, atol=1e-5)
    assert reading.tokens(1)[0] == model.tokenizer.decode([int(reading.token_ids[1, 0])])


def test_logit_lens_is_the_models_prediction(model: Any) -> None:
    # Larger residuals reach the softcap of Gemma 2, which a random model's logits would not.
    with torch.no_grad():
        weight = next(p for p in model.ln_final.parameters() if p.ndim == 1)
        before = weight.clone()
        weight.mul_(60).add_(60)
        try:
            check_logit_lens(model)
        finally:
            weight.copy_(before)
    check_logit_lens(model)


def test_softcap_is_applied(model: Any) -> None:
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    if cap is None or cap <= 0:
        pytest.skip("no softcap")
    with torch.no_grad():
        weight = next(p for p in model.ln_final.parameters() if p.ndim == 1)
        before = weight.clone()
        weight.mul_(0).add_(3000)
        try:
            logits, residual = last_residual(model, model.to_tokens(TEXTS[0]))
            reading = tll.logit_lens(model, residual, top_k=3)
        finally:
            weight.copy_(before)
    assert float(logits.abs().max()) > 0.9 * cap
    np.testing.assert_allclose(reading.scores, logits[0].softmax(-1).topk(3).values, atol=1e-5)


def test_logit_lens_of_the_demo_model(demo_model: Any) -> None:
    check_logit_lens(demo_model)


def test_logit_lens_fires_no_hooks(model: Any) -> None:
    fired: list[str] = []
    names = [name for name in model.hook_dict if name.startswith(("ln_final", "unembed"))]
    assert names
    _, residual = last_residual(model, model.to_tokens(TEXTS[0]))
    expected = tll.logit_lens(model, residual)
    for name in names:
        model.add_hook(name, lambda activation, hook: fired.append(hook.name))
    try:
        reading = tll.logit_lens(model, residual)
        assert fired == []
        model(TEXTS[0])
        assert fired  # the hooks are still there
    finally:
        model.reset_hooks()
    np.testing.assert_array_equal(reading.token_ids, expected.token_ids)
    np.testing.assert_array_equal(reading.scores, expected.scores)


def test_logit_lens_of_any_leading_shape(any_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    d, d_vocab = any_model.cfg.d_model, any_model.cfg.d_vocab
    vectors = torch.randn(2, 3, d, generator=torch.Generator().manual_seed(0))
    flat = tll.logit_lens(any_model, vectors.reshape(6, d), top_k=4)
    monkeypatch.setattr("tl_latentlens.lens.lenses._MAX_SCORE_BYTES", 2 * 4 * d_vocab)  # two vectors at a time
    nested = tll.logit_lens(any_model, vectors, top_k=4)
    np.testing.assert_array_equal(nested.token_ids, flat.token_ids)
    np.testing.assert_allclose(nested.scores, flat.scores, atol=1e-6)
    assert tll.logit_lens(any_model, vectors[0, 0], top_k=2).token_ids.shape == (1, 2)
    assert tll.logit_lens(any_model, vectors.half(), top_k=2).token_ids.shape == (6, 2)
    everything = tll.logit_lens(any_model, vectors[0], top_k=10**6)
    assert everything.token_ids.shape == (3, d_vocab)
    np.testing.assert_allclose(everything.scores.sum(-1), 1, atol=1e-4)


def test_logit_lens_of_no_vectors(demo_model: Any) -> None:
    reading = tll.logit_lens(demo_model, torch.zeros(0, demo_model.cfg.d_model), top_k=3)
    assert reading.token_ids.shape == (0, 3)


def test_logit_lens_keeps_training_mode(any_model: Any) -> None:
    any_model.train()
    try:
        reading = tll.logit_lens(any_model, torch.randn(2, any_model.cfg.d_model, requires_grad=True))
        assert any_model.training
    finally:
        any_model.eval()
    assert isinstance(reading.scores, np.ndarray)


def test_logit_lens_refusals(any_model: Any) -> None:
    d = any_model.cfg.d_model
    with pytest.raises(tll.InvalidInputError, match=rf"got vectors of width {d - 1}; the logit lens reads d_model = {d}"):
        tll.logit_lens(any_model, torch.randn(3, d - 1))
    encoder = SimpleNamespace(cfg=SimpleNamespace(attention_dir="bidirectional"))
    with pytest.raises(tll.InvalidInputError, match="an encoder's MLM head would be skipped; pass logit_lens=False"):
        tll.logit_lens(encoder, torch.randn(3, d))


def test_embedding_lens_finds_each_embedding(model: Any) -> None:
    weight = model.W_E.detach()
    ids = torch.tensor([5, 17, 99, len(weight) - 1])
    reading = tll.embedding_lens(model, weight[ids] * torch.tensor([[1.0], [0.1], [30.0], [2.0]]), top_k=4)
    assert reading.token_ids[:, 0].tolist() == ids.tolist()
    np.testing.assert_allclose(reading.scores[:, 0], 1, atol=1e-5)
    query = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1))
    brute = torch.nn.functional.normalize(query.double(), dim=-1) @ torch.nn.functional.normalize(weight.double(), dim=-1).T
    best = brute.topk(4)
    reading = tll.embedding_lens(model, query, top_k=4)
    assert reading.token_ids.tolist() == best.indices.tolist()
    np.testing.assert_allclose(reading.scores, best.values, atol=1e-5)


def test_embedding_lens_refuses_another_width(any_model: Any) -> None:
    d = any_model.cfg.d_model
    with pytest.raises(tll.InvalidInputError, match=rf"shape \(2, {d + 1}\); expected a last dimension of {d}"):
        tll.embedding_lens(any_model, torch.randn(2, d + 1))
