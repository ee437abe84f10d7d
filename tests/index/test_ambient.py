"""What a caller has set in torch changes nothing that is computed here: autocast, inference mode, defaults, precision."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import TEXTS

import tl_latentlens as tll
from tl_latentlens.search.ambient import own_arithmetic

HOOK = "blocks.3.hook_resid_post"


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def precision(name: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def strict_numpy() -> Iterator[None]:
    with np.errstate(all="raise", under="ignore"):
        yield


AMBIENT: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float16 by default": lambda: default_dtype(torch.float16),
    "meta by default": lambda: default_device("meta"),
    "a device block": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "high": lambda: precision("high"),
    "medium": lambda: precision("medium"),
    "numpy raises": strict_numpy,
}


@pytest.fixture(scope="module")
def queries() -> torch.Tensor:
    return torch.randn(7, 256, generator=torch.Generator().manual_seed(3))


def read_all(bank: tll.Bank, model: Any, queries: torch.Tensor) -> list[np.ndarray]:
    """Searches under transforms, chances, lenses and features; no run of the model."""
    numbers: list[Any] = []
    for transform in ("raw", "csls", "standardize", "remove_top"):
        index = tll.ContextualIndex(bank, HOOK, device="cpu", transform=transform)
        found = index.search(queries, 5, query_hook_name=HOOK, calibrate=True)
        numbers += [found.rows, found.similarities, found.chances, found.known, *index.transform_activations(HOOK, queries)]
    index = tll.ContextualIndex(bank, HOOK, device="cpu", dtype="int8")
    numbers += [index.search(queries, 5).rows]
    words = index.search_words(queries, 3, HOOK)
    numbers += [words.rows, words.similarities]
    for reading in (tll.logit_lens(model, queries, 4), tll.embedding_lens(model, queries, 4)):
        numbers += [reading.token_ids, reading.scores]
    features = tll.label_features(tll.load_sae("demo"), index, [1, 5], progress=False)
    numbers += [features.table.select_dtypes("number").to_numpy(), features.activity.top.rows, features.activity.total]
    return [np.array(value.tolist()) for value in numbers]


@pytest.fixture(scope="module")
def plain(bank: tll.Bank, any_model: Any, queries: torch.Tensor) -> list[np.ndarray]:
    return read_all(bank, any_model, queries)


@pytest.mark.parametrize("ambient", AMBIENT)
def test_readings_do_not_depend_on_the_callers_settings(
    ambient: str, bank: tll.Bank, any_model: Any, queries: torch.Tensor, plain: list[np.ndarray]
) -> None:
    with AMBIENT[ambient]():
        read = read_all(bank, any_model, queries)
    for expected, got in zip(plain, read, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_an_index_of_inference_mode_serves_afterwards(bank: tll.Bank, queries: torch.Tensor) -> None:
    with torch.inference_mode():
        index = tll.ContextualIndex(bank, HOOK, device="cpu", transform="csls")
        first = index.search(queries, 5, query_hook_name=HOOK, calibrate=True)
    found = index.search(queries, 5, query_hook_name=HOOK, calibrate=True)
    assert torch.equal(found.chances, first.chances)
    assert torch.equal(found.known, first.known)
    first.similarities.mul_(2)  # no tensor of inference mode
    index.search(queries.clone().requires_grad_(), 5, query_hook_name=HOOK)


def test_the_callers_settings_are_put_back() -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"), precision("medium"):
        with own_arithmetic(full_products=True):
            assert torch.ones(1).device.type == "cpu"
            assert not torch.is_autocast_enabled("cpu")
            assert not torch.is_inference_mode_enabled()
        assert torch.ones(1).device.type == "meta"
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled()
        assert torch.get_float32_matmul_precision() == "medium"


def test_contexts_of_two_threads_may_overlap() -> None:
    with precision("high"), torch.set_grad_enabled(torch.is_grad_enabled()):  # the order in which they end mixes those up
        first, second = own_arithmetic(full_products=True), own_arithmetic(full_products=True)
        settings = torch.backends.cuda.matmul
        before = settings.allow_tf32
        first.__enter__()
        second.__enter__()
        assert not settings.allow_tf32
        first.__exit__(None, None, None)
        assert not settings.allow_tf32
        second.__exit__(None, None, None)
        assert settings.allow_tf32 == before is True


@pytest.mark.parametrize("ambient", ["bfloat16 by default", "inference mode", "deterministic", "gradients"])
def test_a_bank_is_the_same(ambient: str, any_model: Any, bank: tll.Bank, tmp_path: Path) -> None:
    with AMBIENT[ambient]():
        built = tll.build_bank(any_model, TEXTS, tmp_path / "a.h5", progress=False)
        tll.ContextualIndex(built, device="cpu").check_model(any_model)
    assert built.file.digest == bank.file.digest


def test_hooks_of_inference_mode(any_model: Any, index: tll.ContextualIndex) -> None:
    hooks = tll.latentlens_hooks(index, calibrate=True, embedding_lens=True)
    any_model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
    expected = hooks.result
    with torch.inference_mode():
        any_model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
        assert str(hooks.result) == str(expected)
        any_model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
    assert str(hooks.result) == str(expected)
    assert hooks.follow_tokens(" bank").at().equals(hooks.follow_tokens(" bank").at())
