"""Models made in the tests, a small bank, and the embedded model, each built once."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the kernels and commands that tests start

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import tl_latentlens as tll

torch.set_num_threads(1)  # the models here are small: more threads only cost, above all on a busy machine

cuda_is_available = torch.cuda.is_available
torch.cuda.is_available = lambda: False  # models and indices go to the CPU; a test that wants the GPU names it

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


@pytest.fixture
def cuda() -> Iterator[str]:
    """The name of the GPU, which is there for this test; the precision of products is put back afterwards."""
    if not cuda_is_available():
        pytest.skip("needs a CUDA device")
    before = torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", cuda_is_available)
        yield "cuda"
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session", params=available_kinds())
def demo_model(request: pytest.FixtureRequest) -> Any:
    """The embedded model, once as each available class."""
    return tll.load_demo_model(request.param)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """A few sentences with shared prefixes and an ambiguous word."""
    return TEXTS


@pytest.fixture(scope="session")
def any_model() -> Any:
    """The embedded model as the default class."""
    return tll.load_demo_model()


@pytest.fixture(scope="session")
def bank(any_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tll.Bank:
    """A small bank of the embedded model."""
    return tll.build_bank(any_model, TEXTS, tmp_path_factory.mktemp("bank") / "small.h5", progress=False)


@pytest.fixture(scope="session")
def index(bank: tll.Bank) -> tll.ContextualIndex:
    """An index over the small bank, on the CPU."""
    return tll.ContextualIndex(bank, device="cpu")


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


@pytest.fixture(scope="session", params=list(ARCHITECTURES))
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small randomly initialised model of each architecture, saved in Hugging Face format."""
    name = request.param
    tokenizer = make_tokenizer()
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = transformers.AutoConfig.for_model(name, vocab_size=len(tokenizer), **ids, **ARCHITECTURES[name])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    # TransformerLens picks wrong loaders for folders whose path holds "llama".
    folder = tmp_path_factory.mktemp(f"arch{list(ARCHITECTURES).index(name)}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
