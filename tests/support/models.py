"""Small models of several architectures, a tokenizer and a few sentences."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tl_latentlens.model import loading
from tl_latentlens.model.load_settings import LoadSettings
from tl_latentlens.model.loading import load_model
from tl_latentlens.model.source import DEMO_MODEL

TEXTS = [
    "The river ran over its bank after the storm.",
    "She put the money in the bank before noon.",
    "The river ran over the old stone bridge.",
    "A small red circle above a blue square.",
    "A small red ball lay on the bank.",
    "He rowed the boat to the bank and tied it up.",
]


def available_kinds() -> list[str]:
    """The model classes that the installed TransformerLens has."""
    import transformer_lens

    kinds = []
    try:
        transformer_lens.HookedTransformer  # noqa: B018
        kinds.append("hooked")
    except (AttributeError, ImportError):
        pass
    if (Path(transformer_lens.__file__).parent / "model_bridge").is_dir():
        kinds.append("bridge")
    return kinds


@contextmanager
def copied_demo_models() -> Iterator[None]:
    """A context in which the embedded model is read from the disk once for each class; who loads it gets a copy."""
    load_from_disk = loading._load
    as_it_is = (LoadSettings(), LoadSettings(dtype=torch.float32))

    @cache
    def load_once(kind: str) -> Any:
        return load_from_disk("demo", DEMO_MODEL, kind, LoadSettings())

    def load(name: str, folder: Path, kind: str, settings: LoadSettings) -> Any:
        if folder != DEMO_MODEL or settings not in as_it_is:
            return load_from_disk(name, folder, kind, settings)
        return deepcopy(load_once(kind))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_load", load)
        yield


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_ctx": 64},
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    },
    "qwen2": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    },
    "gemma2": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "head_dim": 8,
    },
}


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A small byte-level tokenizer with BOS, EOS and padding of their own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet)
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def load_any(folder: Path, kind: str) -> Any:
    """load_model, also for Gemma 2 as a HookedTransformer, whose config TransformerLens knows by its published names only."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if kind != "hooked" or config.model_type != "gemma2":
        return load_model(str(folder), kind=kind)
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gemma_weights

    cfg = HookedTransformerConfig(
        d_model=config.hidden_size,
        d_head=config.head_dim,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        n_layers=config.num_hidden_layers,
        n_ctx=512,
        eps=config.rms_norm_eps,
        d_vocab=config.vocab_size,
        act_fn="gelu_pytorch_tanh",
        normalization_type="RMS",
        rotary_base=10000.0,
        positional_embedding_type="rotary",
        attn_scale=config.query_pre_attn_scalar**0.5,
        window_size=config.sliding_window,
        use_local_attn=True,
        attn_types=["local", "global"] * 2,
        attn_scores_soft_cap=config.attn_logit_softcapping,
        output_logits_soft_cap=config.final_logit_softcapping,
        gated_mlp=True,
        final_rms=True,
        use_normalization_before_and_after=True,
        original_architecture="Gemma2ForCausalLM",
        device="cpu",
    )
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = HookedTransformer(cfg, transformers.AutoTokenizer.from_pretrained(folder), move_to_device=False)
    state = convert_gemma_weights(hf_model, cfg)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return model.eval()


def random_bridge(config: transformers.PretrainedConfig, folder: Path) -> Any:
    """A randomly initialised model of a Hugging Face config, on a bridge, with the tokenizer of `make_tokenizer`."""
    tokenizer = make_tokenizer()
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(str(folder), kind="bridge")
