"""Llama models of random weights, as large as real ones; needs torch and transformers alone."""

from typing import Any

import torch
import transformers

SHAPES: dict[str, dict[str, int]] = {
    "llama-8b-shape": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "llama-1b-shape": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "llama-tiny-shape": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "max_position_embeddings": 512,
    },
}


def random_llama(shape: str, device: str) -> Any:
    """A model of one of the shapes in bfloat16; its weights are the same each time on the same kind of device."""
    config = transformers.LlamaConfig(**SHAPES[shape], architectures=["LlamaForCausalLM"])  # pyright: ignore
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
