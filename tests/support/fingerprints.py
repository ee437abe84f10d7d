"""What a bank keeps of its model, models with changed weights, and the refusals that users read."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import tl_latentlens as tll
from support.models import ARCHITECTURES, TEXTS, available_kinds, make_tokenizer
from tl_latentlens.model.describe import describe_model
from tl_latentlens.model.fingerprint import Fingerprint, fingerprint
from tl_latentlens.model.fingerprint_check import check_fingerprint
from tl_latentlens.model.info import ModelInfo
from tl_latentlens.model.loading import load_model
from tl_latentlens.model.tokenize import tokenize

RESIDUAL = ["blocks.0.hook_resid_post", "blocks.3.hook_resid_mid", "blocks.5.hook_resid_post"]
HEADS = ["blocks.1.attn.hook_q", "blocks.1.attn.hook_v", "blocks.1.attn.hook_z"]
OTHERS = ["blocks.1.ln2.hook_normalized", "blocks.2.mlp.hook_post", "hook_embed"]
PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices")
OTHER_WEIGHTS = "; load the model that built the bank, or rebuild the bank"
OTHER_SETTINGS = "; load the model as the bank's was loaded"


@dataclass(frozen=True)
class Known:
    """What a bank keeps of its model."""

    fingerprint: Fingerprint
    info: ModelInfo

    def of(self, hook_names: list[str]) -> "Known":
        """Of some activations alone."""
        kept = {name: self.fingerprint.activations[name] for name in hook_names}
        return replace(self, fingerprint=replace(self.fingerprint, activations=kept))


def know(model: Any, hook_names: list[str] = RESIDUAL) -> Known:
    """What a bank of the first two texts would keep."""
    prompts = tokenize(model, TEXTS[:2])
    ids = [prompts.tokens[a:b].tolist() for a, b in zip(prompts.starts[:-1], prompts.starts[1:], strict=True)]
    return Known(fingerprint(model, ids, hook_names), describe_model(model))


def check(model: Any, known: Known, **settings: bool) -> None:
    check_fingerprint(model, known.fingerprint, known.info, **settings)


def refusal(model: Any, known: Known, **settings: bool) -> str:
    """What a user reads when the model is refused."""
    with pytest.raises(tll.ModelMismatchError) as refused:
        check(model, known, **settings)
    return str(refused.value)


def furthest(known: Known, model: Any) -> float:
    """The largest change of an activation, as a share of its length."""
    before = known.fingerprint.activations
    after = fingerprint(model, known.fingerprint.prompts, list(before)).activations
    return max(
        float((np.linalg.norm(after[name] - rows, axis=-1) / np.linalg.norm(rows, axis=-1)).max())
        for name, rows in before.items()
    )


def process(model: Any, **changes: bool) -> Any:
    """TransformerLens' own processing of a model's weights, in place."""
    settings = {**dict.fromkeys(PROCESSING, False), **changes}
    if hasattr(model, "load_and_process_state_dict"):
        model.load_and_process_state_dict(model.state_dict(), **settings)
    else:
        model.process_weights(**settings)
    return model


def save_model(path: Path, architecture: str = "gpt2", *, seed: int = 1, **changes: Any) -> Path:
    """A small random model in Hugging Face format."""
    tokenizer = make_tokenizer()
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    settings = {"vocab_size": len(tokenizer), **ids, **ARCHITECTURES[architecture], **changes}
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(architecture, **settings))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def load_small(path: Path, *arguments: Any, **changes: Any) -> Any:
    """A small random model as the default class."""
    return load_model(str(save_model(path, *arguments, **changes)), kind=available_kinds()[0])


def fine_tune(model: Any, optimizer: torch.optim.Optimizer, texts: list[str]) -> None:
    """One step of language modeling."""
    optimizer.zero_grad()
    model(model.to_tokens(texts), return_type="loss").backward()
    optimizer.step()


def overflowing(model: Any) -> Any:
    """The model with inf at BOS of its last activation, as float16 models have."""

    def overflow(activation: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full_like(activation[:, :1], torch.inf), activation[:, 1:]], 1)

    model.hook_dict[RESIDUAL[-1]].forward = overflow  # a part of the model: hooks of a user are left out of the check
    return model
