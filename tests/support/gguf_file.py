"""A tiny Llama as a GGUF file, with the embedded model's vocabulary."""

import json
from pathlib import Path

import numpy as np

from tl_latentlens.model.source import DEMO_MODEL

N_LAYERS, D_MODEL, N_HEADS, D_MLP = 2, 64, 2, 128


def write_gguf(path: Path, quantization: str = "Q8_0") -> dict[str, np.ndarray]:
    """Write the file, and return its weights as they are before they are quantized: GGUF name → array.

    Args:
        path: The file.
        quantization: The GGUF type of the matrices: "Q8_0", "Q4_0", "F32". Norms are F32.
    """
    import gguf

    vocabulary = json.loads((DEMO_MODEL / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(D_MODEL)
    writer.add_block_count(N_LAYERS)
    writer.add_feed_forward_length(D_MLP)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_HEADS)
    writer.add_rope_dimension_count(D_MODEL // N_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if i == 0 else gguf.TokenType.NORMAL for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    weights = _weights(len(tokens))
    for name, weight in weights.items():
        kind = gguf.GGMLQuantizationType["F32" if weight.ndim == 1 else quantization]
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def _weights(n_tokens: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (n_tokens, D_MODEL), "output.weight": (n_tokens, D_MODEL)}
    for layer in range(N_LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{layer}.{part}.weight"] = (D_MODEL, D_MODEL)
        shapes[f"blk.{layer}.ffn_gate.weight"] = shapes[f"blk.{layer}.ffn_up.weight"] = (D_MLP, D_MODEL)
        shapes[f"blk.{layer}.ffn_down.weight"] = (D_MODEL, D_MLP)
    norms = ["output_norm", *(f"blk.{layer}.{part}" for layer in range(N_LAYERS) for part in ("attn_norm", "ffn_norm"))]
    matrices = {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    return {**matrices, **{f"{name}.weight": np.ones(D_MODEL, np.float32) for name in norms}}
