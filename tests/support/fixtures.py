"""Fixtures of every room: models made in the tests, a small bank, and the embedded model, each built once."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tl_latentlens as tll
from support.banks import blocks_of
from support.controls import few_controls
from support.models import ARCHITECTURES, TEXTS, available_kinds, copied_demo_models, make_tokenizer
from support.pages import find_browser

torch.set_num_threads(1)  # the models here are small: more threads only cost, above all on a busy machine

cuda_is_available = torch.cuda.is_available
torch.cuda.is_available = lambda: False  # models and indices go to the CPU; a test that wants the GPU names it


@pytest.fixture(scope="session", autouse=True)
def _imported_for_good() -> None:
    """What was imported and collected before the first test is never garbage: no need to look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_demo_model() -> Iterator[None]:
    with copied_demo_models():
        yield


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


@pytest.fixture(scope="session")
def browser() -> str:
    """The path of a Chromium."""
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium")
    return path


@pytest.fixture(scope="session")
def demo_models() -> dict[str, Any]:
    """The embedded model as each available class; tests do not change it."""
    return {kind: tll.load_demo_model(kind) for kind in available_kinds()}


@pytest.fixture(scope="session", params=available_kinds())
def demo_model(request: pytest.FixtureRequest, demo_models: dict[str, Any]) -> Any:
    """The embedded model, once as each available class."""
    return demo_models[request.param]


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


@pytest.fixture
def few_random_directions() -> Iterator[None]:
    """Directions are compared with a few random ones, for tests that do not ask how seldom these come as near."""
    with few_controls():
        yield


@pytest.fixture
def small_blocks() -> Iterator[None]:
    """Two or three batches of 16 tokens fill a block: it closes with the prompt that brings it to 16."""
    with blocks_of(1):
        yield


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
