"""A run read by every lens, and one whose texts hold markup and escape codes."""

from typing import Any

import pytest
from support.pages import HOSTILE

import tl_latentlens as tll


@pytest.fixture(scope="package")
def result(any_model: Any, index: tll.ContextualIndex) -> tll.LensResult:
    hooks = tll.latentlens_hooks(index, embedding_lens=True)
    any_model.run_with_hooks("She put the <i>money</i> in the bank before noon.", fwd_hooks=hooks)
    return hooks.result


@pytest.fixture(scope="package")
def hostile(any_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tll.LensResult:
    """A text with markup and escape codes, read from a bank of itself."""
    bank = tll.build_bank(any_model, [HOSTILE, "A boat."], tmp_path_factory.mktemp("hostile") / "h.h5", progress=False)
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank, device="cpu"), embedding_lens=True)
    any_model.run_with_hooks(HOSTILE, fwd_hooks=hooks)
    return hooks.result


@pytest.fixture(scope="package")
def calibrated(any_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tll.LensResult:
    """A text with tokens that its bank knows and tokens that it does not, and a second text."""
    texts = list(tll.load_corpus("demo", limit=150))
    path = tmp_path_factory.mktemp("calibrated") / "bank.h5"
    bank = tll.build_bank(any_model, texts, path, hook_names=[1, 3], progress=False)
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank, device="cpu"), top_k=3, embedding_lens=True, calibrate=True)
    any_model.run_with_hooks(["She put the money in the bank; zxqv bork", "A small red ball"], fwd_hooks=hooks)
    return hooks.result
