"""Options that commands share: the model, which the bank remembers; layers; JSON or CSV; the version; how threads wait."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import available_kinds

import tl_latentlens as tll
from tl_latentlens.cli.options import ModelOptions
from tl_latentlens.model.source import DEMO_MODEL


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> str:
    (tmp_path / "corpus.txt").write_text("\n".join(texts))
    return str(tmp_path / "corpus.txt")


def test_a_build_asks_for_a_model(run, corpus: str, tmp_path: Path) -> None:
    code, _, error = run("build", corpus, str(tmp_path / "a.h5"))
    assert (code, list(tmp_path.glob("a.h5*"))) == (1, [])
    assert "got no --model; expected the embedded one, --model demo, a folder in Hugging Face format" in error


def test_the_model_of_a_bank_is_used_where_none_is_named(run, corpus: str, tmp_path: Path) -> None:
    folder, bank = tmp_path / "mine", str(tmp_path / "a.h5")
    shutil.copytree(DEMO_MODEL, folder)
    kind = available_kinds()[-1]
    built = ("--model", str(folder), "--model-dtype", "bfloat16", "--kind", kind, "-n", "1-2,-1", "--store-dtype", "float32")
    assert run("build", corpus, bank, *built)[0] == 0
    read = json.loads(run("info", bank, "--json")[1])
    assert list(read["hook_names"]) == [f"blocks.{layer}.hook_resid_post" for layer in (1, 2, 5)]
    assert (read["dtype"], read["model"]["dtype"], read["model"]["source"]) == ("float32", "bfloat16", str(folder))
    assert str(folder) in run("info", bank)[1]
    code, out, _ = run("decode", bank, "He rowed the boat to the bank", "--word", "bank", "-n", "-1", "--csv")
    assert (code, out.count("blocks.5.hook_resid_post,0")) == (0, 3)
    shutil.copytree(folder, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file(
        {name: 1.5 * weight for name, weight in weights.items()}, tmp_path / "other" / "model.safetensors", {"format": "pt"}
    )
    code, _, error = run("decode", bank, "the bank", "--model", str(tmp_path / "other"))
    assert code == 1
    assert f"The bank's model was loaded from {folder}: pass --model {folder}, or leave --model out." in error
    shutil.rmtree(folder)
    (tmp_path / "other").rename(folder)
    for named in ((), ("--model", str(folder))):
        code, _, error = run("decode", bank, "the bank", *named)
        assert code == 1
        assert f"The bank names {folder} as its model; pass --model with the one that built it." in error
    folder.rename(tmp_path / "moved")
    code, _, error = run("decode", bank, "the bank")
    assert code == 1
    assert f"was loaded from {folder}, where there is no model any more; say where it is now: --model" in error


def test_other_commands_take_the_model_of_the_bank(run, bank: tll.Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def load_for(options: ModelOptions, opened: tll.Bank) -> None:
        asked.append((opened.model_info.source, options.model))
        raise tll.InvalidInputError("loaded")

    monkeypatch.setattr(ModelOptions, "load_for", load_for)
    vector = ("decode-vector", str(bank.path), "--sae", "demo", "-f", "7", "-n", "3", "--text", "a")
    label = ("label-sae", "demo", str(bank.path), "-f", "3", "-n", "3")
    find = ("find-features", "demo", str(bank.path), "the bank", "--word", "bank", "-n", "3")
    for command in (vector, (*label, "--logit-lens"), (*label, "-m", "gpt2"), find, ("evaluate", str(bank.path))):
        assert run(*command)[0] == 1
    assert asked == [("demo", None), ("demo", None), ("demo", "gpt2"), ("demo", None), ("demo", None)]


def test_settings_of_the_model_reach_the_loader(run, bank: tll.Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def load_model(name: str, **settings: object) -> None:
        asked.append({"name": name, **{key: value for key, value in settings.items() if value is not None}})
        raise tll.InvalidInputError("loaded")

    monkeypatch.setattr(tll, "load_model", load_model)
    start = ("decode", str(bank.path), "a", "--model", "gpt2")
    for options in (
        ("--device-map", "auto", "--max-memory", "0=20GiB", "--max-memory", "cpu=64GiB", "--device", "cpu"),
        ("--device-map", '{"": 0}', "--model-dtype", "bfloat16"),
        ("--n-devices", "2", "--kind", "bridge"),
    ):
        assert run(*start, *options)[0] == 1
    assert asked == [
        {"name": "gpt2", "device_map": "auto", "max_memory": {0: "20GiB", "cpu": "64GiB"}},
        {"name": "gpt2", "device_map": {"": 0}, "dtype": "bfloat16"},
        {"name": "gpt2", "n_devices": 2, "kind": "bridge"},
    ]
    code, _, error = run(*start, "--max-memory", "20GiB")
    assert (code, "got --max-memory '20GiB'; expected a device and an amount" in error) == (1, True)
    code, _, error = run(*start, "--device-map", "{0: 1}")
    assert (code, "got --device-map '{0: 1}', which is no JSON" in error) == (1, True)


def test_the_old_name_of_store_dtype(run, corpus: str, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    assert run("build", corpus, str(path), "-m", "demo", "-n", "1", "--dtype", "bfloat16")[0] == 0
    assert tll.Bank.open(path).dtype == "bfloat16"
    shown = run("build", "--help")[1]
    assert "--store-dtype" in shown
    assert "--dtype " not in shown


def test_json_and_csv_are_two_options(run, bank: tll.Bank) -> None:
    shown = run("info", "--help")[1]
    for option in ("--json", "--csv"):
        assert any(line.replace("│", " ").split()[:1] == [option] for line in shown.splitlines()), option
    code, out, error = run("info", str(bank.path), "--json", "--csv")
    assert (code, out, "got --json and --csv; expected one of the two" in error) == (1, "", True)


def test_version(run) -> None:
    code, out, _ = run("--version")
    assert (code, out.split()[:2]) == (0, ["tl-latentlens", tll.__version__])
    assert f"torch {torch.__version__}" in out
    assert "transformers " in out


SETTINGS = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "1000"}, {"KMP_BLOCKTIME": "200"}])
def test_threads_sleep_while_they_wait_unless_the_user_has_chosen(own: dict[str, str]) -> None:
    """They are set before torch, whose OpenMP reads them when it is loaded; torch is not loaded by importing the package."""
    code = """
import os, sys
import tl_latentlens.cli as cli
assert "torch" not in sys.modules
cli.let_threads_sleep()
print({name: os.environ[name] for name in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY") if name in os.environ})
"""
    environment = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | own, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == str(dict(sorted((own or SETTINGS).items())))


def test_the_names_of_the_package_are_loaded_when_they_are_asked_for() -> None:
    code = """
import sys
import tl_latentlens as tll
assert tll.__version__ and "torch" not in sys.modules
assert "load_model" in dir(tll) and tll.load_model.__module__ == "tl_latentlens.model.loading"
assert tll.bank.bank.Bank is tll.Bank
from tl_latentlens import *
assert load_model is tll.load_model and set(tll.__all__) <= set(dir(tll))
assert not hasattr(tll, "no_such_name") and not hasattr(tll, "__wrapped__")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["tl_latentlens", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("tl_latentlens", run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().out.startswith("tl-latentlens ")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nothere.gguf", "nothing is there; check the path (the current directory is "),
        ("./afolder", "the folder has no config.json"),
        ("empty.gguf", "the file is empty"),
        ("text.gguf", "the file does not begin as a GGUF file does"),
        ("smolm2", "Did you mean smollm2? Give a folder"),
    ],
)
def test_a_model_that_is_not_there(run, name: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afolder").mkdir()
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "text.gguf").write_text("no model")
    (tmp_path / "texts.txt").write_text("A text.")
    code, _, err = run("build", "texts.txt", "a.h5", "--model", name)
    assert code == 1
    assert problem in " ".join(err.split())
