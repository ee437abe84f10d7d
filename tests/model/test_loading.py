"""Models loaded in other dtypes, on several devices, and from where a bank says; settings that a kind does not take."""

import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import TEXTS, available_kinds

import tl_latentlens as tll
from tl_latentlens.index.banks import different_models
from tl_latentlens.model import loading
from tl_latentlens.model.describe import describe_model, model_device, model_dtype
from tl_latentlens.model.source import DEMO_MODEL, source_of

needs_bridge = pytest.mark.skipif("bridge" not in available_kinds(), reason="no bridge in this TransformerLens")


@pytest.mark.parametrize("kind", available_kinds())
@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), (torch.float16, torch.float16)])
def test_weights_are_in_the_dtype_that_is_asked_for(kind: str, dtype: Any, expected: torch.dtype) -> None:
    model = tll.load_model("demo", kind=kind, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model_dtype(model) == expected
    info = describe_model(model)
    assert (info.dtype, info.kind, info.source) == (str(expected).removeprefix("torch."), kind, "demo")
    assert torch.isfinite(model("The bank").float()).all()


@needs_bridge
def test_a_device_map_needs_a_bridge() -> None:
    model = tll.load_model("demo", device_map={"": "cpu"})
    assert type(model).__name__ == "TransformerBridge"
    expected = tll.load_model("demo", kind="bridge")("The river bank")
    torch.testing.assert_close(model("The river bank"), expected)
    assert describe_model(model).source == "demo"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, r"got dtype='int8' for the weights of a model; expected one of \['float32', 'float16'"),
        ({"dtype": torch.int64}, r"got dtype=torch.int64 for the weights"),
        ({"device": "cpu", "device_map": "auto"}, "got device='cpu' and device_map='auto'; expected one of the two"),
        ({"n_devices": 0}, "got n_devices=0; expected 1 up to the number of CUDA devices"),
        ({"n_devices": 2}, "got n_devices=2; expected 1 up to the number of CUDA devices, of which torch .* sees 0"),
        ({"max_memory": {0: "1GiB"}}, "alone; it needs device_map='auto', or n_devices"),
        ({"device": "gpu"}, "got device='gpu'"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_load", lambda *_: pytest.fail("nothing is to be loaded"))
    with pytest.raises(tll.InvalidInputError, match=message):
        tll.load_model("demo", **settings)


def test_a_hooked_transformer_takes_no_device_map(monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"got device_map='auto' for a HookedTransformer, which takes device, dtype and n_devices; .*kind='bridge'"
    monkeypatch.setattr(loading, "installed_kinds", lambda: ["hooked"])
    for kind in (None, "hooked"):
        with pytest.raises(tll.InvalidInputError, match=message):
            tll.load_model("demo", kind=kind, device_map="auto")
    asked: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(loading, "installed_kinds", lambda: ["hooked", "bridge"])
    monkeypatch.setattr(loading, "_load", lambda name, folder, kind, given: asked.append((kind, given.given())) or Loaded())
    tll.load_model("gpt2", device_map="auto", max_memory={0: "1GiB"})
    tll.load_model("gpt2", n_devices=1)
    assert asked == [("bridge", {"device_map": "auto", "max_memory": {0: "1GiB"}}), ("hooked", {"n_devices": 1})]


class Loaded:
    """Stands for a model that was loaded."""


def test_settings_that_an_older_transformer_lens_lacks() -> None:
    def boot(name: str, device: Any = None, dtype: Any = None) -> None: ...

    settings = loading.load_settings(device_map="auto")
    with pytest.raises(tll.InvalidInputError, match=r"got \['device_map'\], which the installed TransformerLens does not take"):
        loading._accepted(boot, settings)


def test_sources() -> None:
    def named(name: str, tokenizer: str | None = None) -> str:
        return source_of(Named(SimpleNamespace(model_name=name, tokenizer_name=tokenizer)))

    assert named("gpt2") == "gpt2"
    assert named("Qwen2-0.5B", "Qwen/Qwen2-0.5B") == "Qwen/Qwen2-0.5B"
    assert named("small", "gpt2") == "small", "the tokenizer of another model"
    assert named("custom", "gpt2") == ""
    assert named(str(DEMO_MODEL)) == "demo"
    assert named("a\nb") == ""
    assert source_of(Named(SimpleNamespace())) == ""


class Named:
    """A model with a `cfg` alone."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg


def test_a_bank_remembers_its_model(any_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(DEMO_MODEL, tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    model = tll.load_model("models/mine", dtype="bfloat16", kind=available_kinds()[0])
    bank = tll.build_bank(model, TEXTS, "bank.h5", hook_names=1, progress=False)
    path = bank.path.absolute()
    assert bank.model_info.source == str(tmp_path / "models" / "mine")
    monkeypatch.chdir("/")
    again = tll.load_model_of(path)
    assert (type(again), model_dtype(again)) == (type(model), torch.bfloat16)
    tll.ContextualIndex(path).check_model(again)
    assert model_dtype(tll.load_model_of(str(path), dtype="float32", device="cpu")) == torch.float32
    (tmp_path / "models").rename(tmp_path / "moved")
    with pytest.raises(
        tll.InvalidInputError, match=r"was loaded from .*mine, where there is no model any more; say where it is"
    ):
        tll.load_model_of(path)


def test_banks_without_a_source(bank: tll.Bank) -> None:
    info = bank.model_info
    assert info.source == "demo"
    first_banks = replace(info, source="")
    assert type(loading.load_recorded_model(first_banks)).__name__ == info.class_name
    with pytest.raises(
        tll.InvalidInputError, match="the bank does not say where its model, gpt2, was loaded from; name the model"
    ):
        loading.load_recorded_model(replace(first_banks, name="gpt2"))


def test_a_class_that_is_not_installed_is_loaded_as_another(bank: tll.Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    for class_name in ("HookedTransformer", "TransformerBridge", "HookedEncoder", "SAETransformerBridge"):
        assert loading.load_recorded_model(replace(bank.model_info, class_name=class_name)).cfg.n_layers == 6
    kinds = [replace(bank.model_info, class_name=name).kind for name in ("HookedSAETransformer", "HookedEncoder", "XBridge")]
    assert kinds == ["hooked", None, "bridge"]


def test_the_source_is_no_part_of_what_the_model_is(any_model: Any, tmp_path: Path, bank: tll.Bank) -> None:
    """One model from two places: banks go into one index, and a build goes on."""
    elsewhere = replace(bank.model_info, source="/elsewhere")
    assert elsewhere == bank.model_info
    assert not different_models(bank.model_info, elsewhere, ignores_centering=False)
    shutil.copytree(DEMO_MODEL, tmp_path / "demo_model")
    copied = tll.load_model(str(tmp_path / "demo_model"))
    path = tmp_path / "bank.h5"
    tll.build_bank(any_model, TEXTS, path, hook_names=1, progress=False)
    assert tll.build_bank(copied, TEXTS, path, hook_names=1, progress=False).model_info.source == "demo"
    other = tll.build_bank(copied, TEXTS[:3], tmp_path / "other.h5", hook_names=1, progress=False)
    assert other.model_info.source == str(tmp_path / "demo_model")
    assert tll.ContextualIndex([path, other]).n_rows > other.n_rows


@needs_bridge  # the forward pass of a HookedTransformer reads it itself
def test_devices_are_never_taken_from_the_config(tmp_path: Path) -> None:
    """`cfg.device` of a model on several devices is that of its first part, and of a remote one it is None."""
    model = tll.load_model("demo", kind="bridge")
    model.cfg.device = None
    bank = tll.build_bank(model, TEXTS, tmp_path / "bank.h5", hook_names=[1, "blocks.1.attn.hook_z"], progress=False)
    index = tll.ContextualIndex(bank, "1")
    names = [1, "blocks.1.attn.hook_result[0]"]
    hooks = tll.latentlens_hooks(index, names, embedding_lens=True, model=model)
    model.run_with_hooks(model.to_tokens(TEXTS[0], move_to_device=False), fwd_hooks=hooks)
    assert len(hooks.result.cell(1, -1).neighbors) == 5
    vector = tll.difference_of_means(model, "A boat", "Some money", 1)
    assert len(tll.SteeringLens(vector, index, 1).run(model, TEXTS[0]).to_dataframe())
    assert tll.repeated(model, TEXTS[0]).tokens.device.type == "cpu"


def test_the_device_of_weights_that_are_kept_elsewhere() -> None:
    class Offloaded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = torch.nn.Linear(2, 2, device="meta", dtype=torch.float16)
            self.embed = torch.nn.Embedding(2, 2, dtype=torch.bfloat16)

    model = Offloaded()
    assert (model_device(model), model_dtype(model)) == (torch.device("cpu"), torch.bfloat16)
    model.embed = torch.nn.Embedding(2, 2, device="meta")
    assert model_device(model) == torch.device("cpu")
    remote = Named(SimpleNamespace(device=None, dtype=torch.bfloat16))
    assert (model_device(remote), model_dtype(remote)) == (torch.device("cpu"), torch.bfloat16)


def test_a_copy_of_a_model_is_described_alike(any_model: Any) -> None:
    assert describe_model(copy.deepcopy(any_model)) == describe_model(any_model)


def test_loading_installs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX", raising=False)
    settings = []
    monkeypatch.setattr(loading, "_load", lambda *_: settings.append(os.environ["PIP_NO_INDEX"]) or Loaded())
    tll.load_model("gpt2")
    assert settings == ["1"]
    assert "PIP_NO_INDEX" not in os.environ
