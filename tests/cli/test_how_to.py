"""Every command of the pages "I want to …" and "Many machines" runs, with small files of the names they give."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from support.controls import few_controls, few_texts
from support.docs import DOCS, snippets
from support.models import available_kinds

import tl_latentlens as tll
from tl_latentlens.vision.scenes import draw_scenes

COMMANDS = [
    line
    for page in ("how_to.md", "scaling.md")
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines()
    if line.startswith("tl-latentlens ") and "--ray" not in line  # tests/index/test_ray.py runs that one
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the page names."""
    folder = tmp_path_factory.mktemp("how_to")
    with few_texts(20):
        tll.build_bank(tll.load_demo_model(), tll.load_corpus("demo"), folder / "demo.h5", progress=False)
    (folder / "happy.txt").write_text("I love this\nWhat a joy\n")
    (folder / "unhappy.txt").write_text("I hate this\nWhat a pity\n")
    model, texts = tll.load_demo_model(), ["The river ran over its bank.", "She put the money in the bank."]
    plan = tll.plan_bank(model, texts, hook_names=[1, 3], measure=False, progress=False)
    plan.save(folder / "corpus.plan")
    for shard in ("0/2", "1/2"):  # a command may be run without those before it
        tll.build_bank(model, texts, folder / "shards", hook_names=3, shard=shard, progress=False)
        tll.build_bank(model, texts, folder / "bank", hook_names=[1, 3], shard=shard, progress=False)
    (folder / "wanted.txt").write_text("river\nbank\n")
    (folder / "corpus.txt").write_text("".join(f"{text}\n" for text in texts))
    uses = [("They fished from the bank", "river"), ("The muddy bank of the river", "river"), ("The grassy bank", "river")]
    uses += [("Money in the bank", "money"), ("A loan from the bank", "money"), ("The bank was robbed", "money")]
    (folder / "uses.csv").write_text("text,word,sense\n" + "".join(f"{text},bank,{sense}\n" for text, sense in uses))
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[1])
def test_commands_run(command: str, run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    if "demo-vlm" in command:
        image = pytest.importorskip("PIL.Image")
        pixels = draw_scenes(1, np.random.default_rng(0)).images[0]
        image.fromarray((pixels * 255).round().astype(np.uint8)).save("scene.png")
    if "--device-map" in command and "bridge" not in available_kinds():
        pytest.skip("a device map needs a bridge")
    arguments = shlex.split(command)[1:]
    if "label-sae" in arguments:
        arguments += ["-f", "3", "-f", "700"]
    with few_controls():
        code, out, error = run(*arguments)
    assert code == 0, error
    assert out or error


def test_snippets_run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL")
    monkeypatch.chdir(folder)
    names: dict = {}
    for part in snippets("how_to.md"):
        exec(part, names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert all("«bank»" in line for line in printed)
