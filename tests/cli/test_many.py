"""Commands for banks of many processes: plan, build --shard, build --ray, merge, and folders where a bank is asked for."""

import json
from pathlib import Path

import pytest

import tl_latentlens as tll

TEXTS = ["The river ran over its bank.", "She put the money in the bank.", "Banks fail.", "A glacier moves."]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "corpus.txt"
    path.write_text("\n".join(TEXTS * 2))
    (path.parent / "wanted.txt").write_text("bank\nGlaciers\n\nzeppelin\n")
    return path


def test_plan(run, corpus: Path, tmp_path: Path) -> None:
    wanted = ["-n", "1,3", "--words", str(corpus.with_name("wanted.txt"))]
    code, out, err = run("plan", str(corpus), "--model", "demo", *wanted, "--save", str(tmp_path / "a.plan"))
    assert code == 0, err
    assert "8 texts" in out
    assert "tokens/s" in out
    assert "Wanted words: 2 of 3 would have rows" in out
    assert "Without a row (1): zeppelin" in out
    assert "a.plan" in err
    code, out, err = run("plan", str(tmp_path / "a.plan"), "--model", "demo", *wanted, "--json")
    assert code == 0, err
    planned = json.loads(out)
    assert [line["word"] for line in planned["words"]] == ["bank", "glaciers", "zeppelin"]
    assert [line["inflection_rows"] for line in planned["words"]] == [3, 1, 0]
    assert planned["n_prompts"] == 8
    code, out, err = run("build", str(tmp_path / "a.plan"), str(tmp_path / "a.h5"), "--model", "demo", "-n", "1,3", "--json")
    assert code == 0, err
    assert json.loads(out)["n_rows"] == planned["n_rows"]
    code, out, _ = run("plan", str(corpus), "--model", "demo", "-n", "1", "--csv")
    assert code == 0
    assert out.startswith("table,")


@pytest.mark.parametrize(
    ("words", "problem"), [("", "got no wanted word"), ("two words\n", "expected one word"), (None, "cannot be read")]
)
def test_plan_of_bad_words(run, corpus: Path, tmp_path: Path, words: str | None, problem: str) -> None:
    if words is not None:
        (tmp_path / "words.txt").write_text(words)
    code, _, err = run("plan", str(corpus), "--model", "demo", "--words", str(tmp_path / "words.txt"))
    assert code == 1
    assert problem in err


def test_shards(run, corpus: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "bank")
    for shard in ("0/2", "1/2"):
        code, out, err = run("build", str(corpus), folder, "--model", "demo", "-n", "1", "--shard", shard, "--json")
        assert code == 0, err
        assert (json.loads(out)["shard"], json.loads(out)["n_shards"]) == tuple(map(int, shard.split("/")))
        if shard == "0/2":
            code, _, err = run("info", folder)
            assert code == 1
            assert "it lacks shard 1 of 2" in err
    code, out, err = run("info", folder)
    assert code == 0, err
    assert "in 2 files" in out
    code, out, err = run("verify", folder)
    assert code == 0, err
    code, out, err = run("decode", folder, "They sat on the bank", "--word", "bank")
    assert code == 0, err
    code, out, err = run("merge", folder, str(tmp_path / "merged.h5"), "--json")
    assert code == 0, err
    one = tll.build_bank(tll.load_demo_model(), TEXTS * 2, tmp_path / "one.h5", hook_names=1, progress=False)
    assert (tmp_path / "merged.h5").read_bytes() == one.path.read_bytes()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--shard", "2/2"], "expected (i, n) or 'i/n'"),
        (["--ray", "local", "--shard", "0/2"], "Ray builds all shards: leave --shard out"),
        (["--n-workers", "2"], "without --ray"),
    ],
)
def test_options_that_do_not_go_together(run, corpus: Path, tmp_path: Path, options: list[str], problem: str) -> None:
    code, _, err = run("build", str(corpus), str(tmp_path / "bank"), "--model", "demo", *options)
    assert code == 1
    assert problem in err
    assert not list(tmp_path.iterdir())


def test_limit_of_a_plan(run, corpus: Path, tmp_path: Path) -> None:
    code, _, err = run("build", str(tmp_path / "a.plan"), str(tmp_path / "bank"), "--model", "demo", "--limit", "3")
    assert code == 1
    assert "got --limit with the plan" in err
