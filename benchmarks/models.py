"""Models that benchmarks run, the weights that a token meets in them, and the peak of known devices."""

from typing import Any

import torch

from benchmarks.measure import Settings
from benchmarks.shapes import SHAPES, random_llama
from tl_latentlens.model.loading import DEMO_MODEL, load_model

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}  # bfloat16, dense, SXM


def load_benchmark_model(settings: Settings) -> Any:
    """The embedded model, one by name, or a Llama of random weights in bfloat16 with the embedded model's tokenizer."""
    if settings.model not in SHAPES:
        return load_model(settings.model, device=settings.device)
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    hf_model = random_llama(settings.model, settings.device)
    bridge = TransformerBridge.boot_transformers(
        settings.model, hf_model=hf_model, tokenizer=tokenizer, device=settings.device, dtype=torch.bfloat16
    )
    return bridge.eval()


def n_parameters_met(model: Any, names: list[str]) -> int:
    """Number of parameters of the blocks up to the last banked one, without embedding: those that a token meets."""
    n_layers = max(int(name.split(".")[1]) for name in names) + 1
    return sum(p.numel() for block in list(model.blocks)[:n_layers] for p in block.parameters())


def known_peak_flops(device: str) -> float | None:
    """The peak of a GPU in operations a second; None where it is not known."""
    name = torch.cuda.get_device_name() if device != "cpu" else ""
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)
