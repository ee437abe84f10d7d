"""Whether later tokens change earlier activations: measured at each hook name, whatever a model is called."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.models import TEXTS, available_kinds, make_tokenizer, random_bridge

import tl_latentlens as tll
from tl_latentlens.model import is_bidirectional
from tl_latentlens.model.direction import _later_tokens_change
from tl_latentlens.model.running import run_hooked

needs_hooked = pytest.mark.skipif("hooked" not in available_kinds(), reason="no HookedTransformer")
needs_bridge = pytest.mark.skipif("bridge" not in available_kinds(), reason="no bridge")
NAMES = [
    "hook_embed",
    "blocks.0.hook_resid_pre",
    "blocks.0.hook_resid_post",
    "blocks.2.hook_resid_post",
    "blocks.1.attn.hook_z",
]
ENCODER_NAMES = ["encoder_blocks.0.hook_resid_post", "encoder_blocks.1.hook_resid_post"]


@pytest.fixture
def causal(model_folder: Path) -> Any:
    """Each architecture as the default class."""
    return tll.load_model(str(model_folder))


def test_decoders_are_causal_everywhere(causal: Any) -> None:
    assert not is_bidirectional(causal)
    assert not is_bidirectional(causal, NAMES)
    assert not is_bidirectional(causal, ["blocks.1.attn.hook_z[1]"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_later_token(dtype: torch.dtype) -> None:
    assert not is_bidirectional(tll.load_demo_model().to(dtype), NAMES)


@needs_bridge
def test_a_renamed_encoder_is_measured(tmp_path: Path) -> None:
    """The architecture's name says nothing here."""
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = tll.load_model(str(tmp_path / "model"), kind="bridge")
    model.cfg.architecture = model.cfg.original_architecture = "Renamed"
    assert is_bidirectional(model)
    assert is_bidirectional(model, ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"])


@needs_hooked
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_a_causal_model_whose_name_holds_bert(direction: str) -> None:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 1, "d_model": 16, "n_ctx": 16, "d_head": 8, "d_vocab": 20, "act_fn": "relu", "device": "cpu"}
    model = HookedTransformer(
        HookedTransformerConfig(**sizes, attention_dir=direction, original_architecture="RobertGPTForCausalLM", seed=0)
    )
    assert is_bidirectional(model) == (direction == "bidirectional")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if "bridge" not in available_kinds():
        pytest.skip("T5 is read on a bridge")
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = random_bridge(transformers.T5Config(**sizes), tmp_path_factory.mktemp("seq2seq"))
    try:
        model(TEXTS[0])
    except ValueError as error:
        pytest.skip(f"this TransformerLens cannot run T5 of this transformers: {error}")
    return model


def test_the_rows_of_a_t5_encoder_are_whole_prompts(t5: Any, tmp_path: Path) -> None:
    texts = ["The river ran over its bank.", "The river ran over the old stone bridge."]
    bank = tll.build_bank(t5, texts, tmp_path / "bank.h5", hook_names=ENCODER_NAMES, progress=False)
    assert bank.plan.settings.bidirectional
    for prompt in (0, 1):
        tokens = torch.tensor([bank.prompt(prompt)])
        with torch.no_grad():
            own = torch.nn.functional.normalize(t5.run_with_cache(tokens)[1][ENCODER_NAMES[1]][0], dim=-1)
        rows = [row for row in range(bank.n_rows) if bank.row(row).prompt_index == prompt]
        assert len(rows) == tokens.shape[1] - 1, "all but the first token, the shared beginning too"
        for row in rows:
            stored = torch.from_numpy(bank.vectors(ENCODER_NAMES[1])[[row]]).float()[0]
            torch.testing.assert_close(stored, own[bank.row(row).position], atol=2e-3, rtol=0)


def test_the_plan_is_made_for_the_hook_names(t5: Any) -> None:
    assert is_bidirectional(t5)
    assert is_bidirectional(t5, ENCODER_NAMES[:1])
    assert tll.plan_corpus(t5, TEXTS, hook_names=ENCODER_NAMES[0]).settings.bidirectional
    assert tll.plan_corpus(t5, TEXTS).settings.bidirectional
    with pytest.raises(tll.InvalidInputError, match="leave repeat out"):
        tll.plan_corpus(t5, TEXTS, repeat=True)


def test_it_is_measured_once(demo_model: Any) -> None:
    model = tll.load_demo_model("bridge" if hasattr(demo_model, "adapter") else "hooked")
    runs, fired = [], []
    model.embed.register_forward_hook(lambda *_: runs.append(1))
    model.add_hook("blocks.0.hook_resid_post", lambda activation, hook: fired.append(1))
    for _ in range(3):
        assert not is_bidirectional(model, NAMES[:3])
        assert not is_bidirectional(model)
    assert len(runs) == 2, "once for these names, once for the end of the stack"
    assert not fired, "hooks of the user see no run of ours"
    tokens = model.to_tokens(TEXTS[0])
    for _ in range(2):
        run_hooked(model, tokens, None, [(NAMES[2], lambda activation, hook: None)])
    assert len(runs) == 4


def test_nan_and_noise_are_no_change() -> None:
    tokens = torch.arange(8).expand(3, 8)
    activation = torch.randn(1, 8, 5).repeat(3, 1, 1)
    assert not _later_tokens_change(activation, tokens, 4)
    noisy = activation + 1e-6 * torch.randn(3, 8, 5)
    assert not _later_tokens_change(noisy, tokens, 4)
    overflown = activation.clone()
    overflown[:, 0] = float("nan")
    assert not _later_tokens_change(overflown, tokens, 4)
    overflown[1, 2] += 0.1
    assert _later_tokens_change(overflown, tokens, 4)
    assert not _later_tokens_change(activation[:, :3], tokens, 4), "another number of positions"
