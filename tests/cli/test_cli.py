"""The commands as a user types them."""

import io
import json
import os
import re
import signal
import sys
import time
from functools import partialmethod
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import transformers
import typer
from support.fresh import start_fresh
from support.models import available_kinds
from support.neuronpedia import KEY, NeuronpediaStub, read_bulk

import tl_latentlens as tll
from tl_latentlens import cli
from tl_latentlens.bank.format import partial_path


def json_of(run, *command: str):
    """What a command prints with --json; nothing but JSON."""
    code, out, _ = run(*command, "--json")
    assert code == 0
    return json.loads(out, parse_constant=pytest.fail)


def csv_of(run, *command: str) -> pd.DataFrame:
    """What a command prints with --csv."""
    code, out, _ = run(*command, "--csv")
    assert code == 0
    return pd.read_csv(io.StringIO(out), keep_default_na=False, na_values=[""])


def test_build_info_verify_decode(run, tmp_path: Path, texts: list[str]) -> None:
    corpus, bank = tmp_path / "corpus.txt", tmp_path / "own.h5"
    corpus.write_text("\n".join(texts))
    hook = "blocks.2.hook_resid_post"
    code, out, _ = run("build", str(corpus), str(bank), "--model", "demo", "-n", hook, "-n", "blocks.4.hook_resid_post")
    assert code == 0
    assert re.search(r"hook names +│ 2  \[", out), "hook names print as layers do"
    assert list(json_of(run, "info", str(bank))["hook_names"]) == [hook, "blocks.4.hook_resid_post"]
    assert tll.Bank.open(bank).hook_names == (hook, "blocks.4.hook_resid_post")
    code, out, _ = run("info", str(bank))
    assert code == 0
    assert "demo_model" in out
    assert "d_model 256" in out
    code, out, _ = run("verify", str(bank))
    assert code == 0
    assert "every checksum matches" in out
    html = tmp_path / "out.html"
    text = "He rowed the boat to the bank"
    code, out, _ = run("decode", str(bank), text, "--word", "bank")
    assert code == 0
    assert "He rowed the boat to the «bank»" in out
    assert run("decode", str(bank), text, "--word", "bank", "--html", str(html)) == (0, "", f"wrote {html}\n")
    assert len(json_of(run, "decode", str(bank), text, "--word", "bank", "--html", str(html))) == 2 * 3
    assert "plotly" not in html.read_text()
    table = csv_of(run, "decode", str(bank), text)
    own = table.query("token == ' bank' and rank == 1")
    assert own["similarity"].tolist() == pytest.approx([1, 1], abs=1e-3), "the text's own bank is a row of the bank"
    assert set(table.hook_name) == {hook, "blocks.4.hook_resid_post"}
    data = json.loads(html.read_text().partition('id="data">')[2].partition("</script>")[0])
    assert [one["tokens"] for one in data["texts"]] == [list(table.query("rank == 1 and hook_name == @hook").token)]
    code, _, error = run("decode", str(bank), text, "--html", "nowhere/out.html")
    assert (code, "no folder for nowhere/out.html" in error) == (1, True)


def type_command(*arguments: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    sys.argv = ["tl-latentlens", *arguments]
    cli.main()


def test_ctrl_c_says_in_one_line_how_to_resume(tmp_path: Path) -> None:
    path = tmp_path / "own.h5"
    command = ("build", "demo", str(path), "--model", "demo", "-n", "5", "--batch-tokens", "64")
    with start_fresh(type_command, *command) as process:
        deadline = time.monotonic() + 120
        while not partial_path(path).exists() and process.is_alive and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        code, out, err = process.end()
    assert code == 130
    assert out == ""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "own.h5:" not in line]
    assert len(lines) == 1
    kept = r"(what is done|[\d,]+ of [\d,]+ tokens)"
    assert re.fullmatch(rf"stopped; {re.escape(str(partial_path(path)))} keeps {kept}, and the same call resumes it", lines[0])
    assert {p.name for p in tmp_path.iterdir()} <= {"own.h5.partial", "own.h5.partial.rows"}


def test_errors_are_one_line(run, tmp_path: Path) -> None:
    code, _, err = run("info", str(tmp_path / "none.h5"))
    assert code == 1
    assert "no bank file at" in err
    assert "Traceback" not in err
    not_a_bank = tmp_path / "text.h5"
    not_a_bank.write_text("hello")
    code, _, err = run("verify", str(not_a_bank))
    assert code == 1
    assert "is not a tl-latentlens bank" in err
    code, _, err = run("build", str(tmp_path / "missing.txt"), str(tmp_path / "x.h5"), "--model", "demo")
    assert code == 1
    assert "no corpus file" in err


def test_repeat(run, tmp_path: Path, texts: list[str]) -> None:
    corpus, bank = tmp_path / "corpus.txt", tmp_path / "own.h5"
    corpus.write_text("\n".join(texts))
    assert run("build", str(corpus), str(bank), "-m", "demo", "-n", "2", "--repeat")[0] == 0
    assert "run twice" in run("info", str(bank))[1]
    code, out, err = run("decode", str(bank), texts[1], "A small", "--repeat", "--word", "bank")
    assert code == 0
    assert "She put the money in the «bank» before noon." in out, "the text once, and all of it"
    assert out.count("batch 0") == 1
    assert [line for line in err.splitlines() if "note" in line] == ["note: text 1 does not have the word 'bank'"]
    read = csv_of(run, "decode", str(bank), texts[1], "A small", "--repeat").query("rank == 1 and batch == 0")
    assert (read.similarity > 0.999).all()
    assert "".join(read.token) == texts[1]
    assert "note: the bank was built with --repeat" in run("decode", str(bank), texts[1], "--word", "bank")[2]


def test_label_sae(run, bank: tll.Bank, tmp_path: Path) -> None:
    out, html = tmp_path / "features.parquet", tmp_path / "features.html"
    written = ("--out", str(out), "--html", str(html))
    code, shown, _ = run("label-sae", "demo", str(bank.path), "-f", "3", "-f", "700", "--top-k", "4", *written)
    assert code == 0
    assert json.loads(html.read_text().partition('id="data">')[2].partition("</script>")[0])["features"] == [3, 700]
    table = pd.read_parquet(out)
    assert table["feature"].tolist() == [3, 700]
    sae = tll.load_sae("demo")
    index = tll.ContextualIndex(bank, sae.hook_name, transform="center")
    expected = tll.label_features(sae, index, [3, 700], top_k=4, progress=False).with_evidence()
    lists = ["neighbors", "max_activating"]
    pd.testing.assert_frame_equal(table.drop(columns=lists), expected.drop(columns=lists))
    for name in lists:
        assert [list(contexts) for contexts in table[name]] == expected[name].tolist()
    for feature in ("3", "700", "auroc beats shuffled", "detection of labels", "2 features: "):
        assert feature in shown
    contexts = expected["neighbors"][0]
    for name, reader, written in (("f.csv", pd.read_csv, " | ".join(contexts)), ("f.json", pd.read_json, contexts)):
        assert run("label-sae", "demo", str(bank.path), "-f", "3", "--top-k", "4", "--out", str(tmp_path / name))[0] == 0
        assert reader(tmp_path / name)["feature"].tolist() == [3]
        assert reader(tmp_path / name)["neighbors"][0] == written
    code, _, error = run("label-sae", "demo", str(bank.path), "--html", "nowhere/f.html")
    assert (code, "no folder for nowhere/f.html" in error) == (1, True)
    code, _, error = run("label-sae", "demo", str(bank.path), "--out", str(tmp_path / "f.xlsx"))
    assert code == 1
    assert "expected a name that ends in .csv, .parquet, .json, in a folder that exists" in error.replace("\n", " ")


def test_decode_vector(run, bank: tll.Bank, tmp_path: Path, any_model) -> None:
    """Of prompts, of a file with the same vector, and of an SAE; what is written is what Python gives."""
    hook, text, sides = "blocks.3.hook_resid_post", "He rowed to the", (["A boat", "The sea"], ["Some money", "The coins"])
    for name, lines in zip(("a.txt", "b.txt"), sides, strict=True):
        (tmp_path / name).write_text("\n".join(lines))
    prompts = ("--positive", str(tmp_path / "a.txt"), "--negative", str(tmp_path / "b.txt"), "-n", hook)
    command = ("decode-vector", str(bank.path), *prompts, "--text", text)
    code, shown, _ = run(*command)
    assert code == 0
    csv, read = csv_of(run, *command), json_of(run, *command)
    vector, title = tll.difference_of_means(any_model, *sides, hook), f"{tmp_path / 'a.txt'} − {tmp_path / 'b.txt'} at {hook}"
    assert (read["vector"], read["length"]) == (title, pytest.approx(float(vector.norm())))
    index = tll.ContextualIndex(bank)
    expected = tll.decode_directions(vector, index, top_k=5).to_dataframe()
    for table in (csv[csv.table == "neighbors"], pd.DataFrame(read["neighbors"])):
        assert set(expected) <= set(table)
        assert table["row"].tolist() == expected["row"].tolist()
        np.testing.assert_allclose(table["similarity"], expected["similarity"], atol=1e-5)
    steered = tll.SteeringLens(vector, index, hook).run(any_model, text)
    for table in (csv[csv.table == "steered"], pd.DataFrame(read["steered"])):
        assert table["neighbor_row"].tolist() == steered.to_dataframe()["neighbor_row"].tolist()
    for part in ("nearest to +v", "nearest to −v", "He rowed to «the»", "unsteered", "× 4", f"{expected.similarity[0]:.2f}"):
        assert part in shown
    np.save(tmp_path / "v.npy", vector.numpy())
    code, again, _ = run("decode-vector", str(bank.path), str(tmp_path / "v.npy"))
    assert code == 0
    assert again[again.index("nearest to +v") :].strip() in shown
    code, of_sae, _ = run("decode-vector", str(bank.path), "--sae", "demo", "-f", "7", "--text", text, "-x", "0", "-x", "1.5")
    assert code == 0
    assert "× 1.5" in of_sae
    assert "the vector is 1.00 as long as a median row there" in of_sae
    for arguments, message in (
        ((), "a vector is needed: expected one of a vector file, --positive with --negative, --sae with --feature; got none"),
        ((), "For instance: tl-latentlens decode-vector demo.h5 vector.npy, or"),
        (prompts[:2], "got --positive without --negative"),
        ((*prompts, "--sae", "demo", "-f", "1"), "got --positive with --negative and --sae with --feature together"),
        (prompts[:4], "give the activation that the vector belongs to, for instance -n blocks.3.hook_resid_post"),
        (("--sae", "demo", "-f", "9999"), "got feature 9999; the SAE has features 0 to 1535"),
        ((str(tmp_path / "none.npy"),), "no vector at"),
    ):
        code, _, error = run("decode-vector", str(bank.path), *arguments)
        assert code == 1
        assert message in " ".join(error.split())


def test_find_features(run, bank: tll.Bank) -> None:
    text = "They rowed the boat across the river to the bank"
    command = ["find-features", "demo", str(bank.path), text, "--word", "bank", "--top-k", "2", "--heads", "--neurons"]
    code, shown, _ = run(*command)
    assert code == 0
    table = csv_of(run, *command)
    assert table["table"].tolist() == 2 * ["features"] + 2 * ["heads"] + 2 * ["neurons"]
    assert "They rowed the boat across the river to the «bank»" in shown
    assert all(str(int(number)) in shown for number in [*table["feature"][:2], *table["neuron"][4:]])
    read = json_of(run, *command)
    assert [line["feature"] for line in read["features"]] == table["feature"][:2].tolist()
    assert read["tokens"][-1] == " bank"
    assert run("find-features", "demo", str(bank.path), text, "--position", "-1", "--json")[0] == 0
    code, _, error = run("find-features", "demo", str(bank.path), text)
    assert (code, "expected one of --word and --position" in error) == (1, True)


def test_info_and_verify_as_data(run, bank: tll.Bank) -> None:
    read, line = json_of(run, "info", str(bank.path)), csv_of(run, "info", str(bank.path))
    assert read["hook_names"] == {name: bank.d(name) for name in bank.hook_names}
    assert (read["n_rows"], read["model"]["d_model"]) == (bank.n_rows, 256)
    assert (line["n_rows"].tolist(), line["model.d_model"].tolist()) == ([bank.n_rows], [256])
    assert json_of(run, "verify", str(bank.path)) == {"path": str(bank.path), "n_rows": bank.n_rows, "verified": True}
    assert csv_of(run, "verify", str(bank.path))["verified"].tolist() == [True]


def test_decode_as_data(run, bank: tll.Bank, any_model) -> None:
    """What `to_dataframe()` gives, at the word alone."""
    command = ("decode", str(bank.path), "The river bank", "A bank, a bank", "--word", "bank")
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank), top_k=3)
    any_model.run_with_hooks(["The river bank", "A bank, a bank"], fwd_hooks=hooks)
    expected = hooks.result.to_dataframe().query("token == ' bank'").reset_index(drop=True)
    assert expected[["batch", "pos"]].drop_duplicates().to_numpy().tolist() == [[0, 3], [1, 2], [1, 5]]
    empty = {"words": "", "around": ""}  # CSV has no difference between an empty text and none
    for table in (csv_of(run, *command), pd.DataFrame(json_of(run, *command))):
        read = table.astype({name: object for name in empty}).fillna(empty)
        pd.testing.assert_frame_equal(read, expected.fillna(empty), check_dtype=False, rtol=1e-4, atol=1e-6)


def test_decode_shows_a_strip(run, bank: tll.Bank, any_model) -> None:
    command = ("decode", str(bank.path), "The river bank", "A bank, a bank", "--strip", "bank")
    code, out, _ = run(*command)
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank))
    any_model.run_with_hooks(["The river bank", "A bank, a bank"], fwd_hooks=hooks)
    strips = [hooks.result.word_strip(pos, batch) for batch, pos in ((0, 3), (1, 2), (1, 5))]
    assert code == 0
    assert all(strip.strip.summary() in out for strip in strips)
    assert "nearest uses" not in out
    frame = csv_of(run, *command)
    assert list(zip(frame["batch"], frame["pos"], strict=True))[:: len(hooks.result.hook_names)] == [(0, 3), (1, 2), (1, 5)]
    assert frame["words"].fillna("").tolist() == [words for strip in strips for words in strip.to_dataframe()["words"]]
    code, _, error = run(*command, "--words", "0")
    assert code == 1
    assert "leave --words out" in error


def test_decode_says_of_which_hook_names_nothing_is_known(run, bank: tll.Bank) -> None:
    command = ("decode", str(bank.path), "The river bank", "-n", "blocks.2.hook_mlp_out", "-n", "2")
    code, out, error = run(*command)
    assert code == 0
    assert "blocks.2.hook_mlp_out is without p: the bank does not hold this hook name" in " ".join(error.split())
    assert "the bank knows such a token" in out
    assert "blocks.2.hook_resid_post is without" not in error
    assert "is without" not in run(*command, "--no-calibrate")[2]
    assert "other words" in out
    assert "other words" not in run(*command, "--words", "0")[1]


def test_label_sae_for_neuronpedia(run, bank: tll.Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("label-sae", "demo", str(bank.path), "-f", "3", "-f", "700", "--neuronpedia", str(tmp_path / "np"))
    code, _, error = run(*command, "--neuronpedia-model", "Demo", "--neuronpedia-source", "3-ours")
    assert (code, "got model_id='Demo'" in error, (tmp_path / "np").exists()) == (1, True, False)
    code, _, error = run(*command, "--neuronpedia-model", "demo", "--neuronpedia-source", "3-ours")
    assert (code, "np/demo/3-ours" in error) == (0, True)
    assert [line["index"] for line in read_bulk(tmp_path / "np" / "demo" / "3-ours")["features"]] == ["3", "700"]
    code, _, error = run(*command[:7], "--neuronpedia", str(bank.path))
    assert (code, "which is a file" in error) == (1, True)
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    up = (*command[:7], "--neuronpedia-model", "demo", "--neuronpedia-source", "3-ours", "--neuronpedia-upload")
    code, _, error = run(*up, str(tmp_path / "state.jsonl"))
    assert (code, "NEURONPEDIA_API_KEY" in error) == (1, True)
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "key")
    code, _, error = run(*up, str(tmp_path / "none" / "state.jsonl"))
    assert (code, "no folder" in error) == (1, True)
    stub = NeuronpediaStub()
    monkeypatch.setattr(
        tll.FeatureResult, "upload_to_neuronpedia", partialmethod(tll.FeatureResult.upload_to_neuronpedia, base_url=stub.url)
    )
    monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
    code, _, error = run(*up, str(tmp_path / "state.jsonl"))
    assert (code, stub.problems) == (0, [])
    assert f"{len(stub.times_stored)} features uploaded, 0 were there" in error
    stub.server.shutdown()
    stub.server.server_close()


def test_label_sae_as_data(run, bank: tll.Bank) -> None:
    command = ("label-sae", "demo", str(bank.path), "-f", "3", "-f", "700", "--rows", "1")
    index = tll.ContextualIndex(bank, tll.load_sae("demo").hook_name, transform="center")
    expected = tll.label_features(tll.load_sae("demo"), index, [3, 700], progress=False).with_evidence()
    read = json_of(run, *command)
    assert [line["neighbors"] for line in read] == expected["neighbors"].tolist()
    table = csv_of(run, *command)
    assert list(table) == list(expected) == list(read[0])
    np.testing.assert_allclose(table["auroc"], expected["auroc"])


def test_demo_as_data(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data on stdout, what is told beside it on stderr."""
    load = tll.load_corpus
    monkeypatch.setattr("tl_latentlens.bank.planning.load_corpus", lambda texts, **_: load(texts, limit=150))
    code, out, err = run("demo", "--bank", str(tmp_path / "demo.h5"), "--json")
    assert code == 0
    assert "2. run two sentences" in err
    read = json.loads(out, parse_constant=pytest.fail)
    assert {line["token"] for line in read["readings"]} == {" bank"}
    assert read["features"][0]["feature"] >= 0


def test_empty_texts(run, bank: tll.Bank) -> None:
    code, out, error = run("decode", str(bank.path), "")
    assert (code, out, "error: got no text with a token to read" in error) == (1, "", True)
    code, out, error = run("decode", str(bank.path), "", "the bank")
    assert (code, "note: text 0 has no token to read" in error) == (0, True)
    assert "batch 1, pos 2" in out


@pytest.mark.filterwarnings("always")
def test_a_warning_is_a_line_without_source(run, bank: tll.Bank) -> None:
    code, out, error = run("label-sae", "demo", str(bank.path), "-f", "3", "-n", "blocks.9.hook_resid_post", "--json")
    assert (code, json.loads(out)[0]["feature"]) == (0, 3)
    assert [line[:40] for line in error.splitlines() if "arn" in line] == ["warning: no activations to encode, so no"]
    assert ".py" not in error


CONTROL = "\x1b[31mred\x1b[0m \x07bell \u009b2J and 日本語 \x1b]8;;http://x.example\x07the bank"


def test_control_characters_of_a_corpus_are_signs(run, tmp_path: Path) -> None:
    corpus, bank = tmp_path / "corpus.txt", tmp_path / "own.h5"
    corpus.write_text(f"{CONTROL}\n{CONTROL} again\n")
    command = ("decode", str(bank), CONTROL, "-n", "blocks.2.hook_resid_post")
    assert run("build", str(corpus), str(bank), "-m", "demo", "-n", "2")[0] == 0
    for width in (80, 200):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli.console, "width", width)
            code, out, err = run(*command)
        assert code == 0
        assert not {c for c in out + err if not c.isprintable()} - {"\n", "\r"}
    assert "␛" in out
    assert {line["token"] for line in json_of(run, *command)} & {"\x1b"}


def test_a_word_that_is_no_token_is_named(run, bank: tll.Bank) -> None:
    code, _, err = run("decode", str(bank.path), "The river bank", "--word", "ocean")
    assert code == 1
    assert "no token of the text ends the word 'ocean'" in err


def test_a_word_is_found_in_any_case(run, bank: tll.Bank) -> None:
    command = ("decode", str(bank.path), "The river bank", "A boat", "By the Bank, he said", "--word", "BANK")
    read = csv_of(run, *command)
    assert set(zip(read.batch, read.token, strict=True)) == {(0, " bank"), (2, "ank")}
    assert "note: text 1 does not have the word 'BANK'" in run(*command)[2]
    code, out, _ = run("find-features", "demo", str(bank.path), "He sat on the Bank", "--word", "bank", "--top-k", "1")
    assert (code, "«" in out) == (0, True)


def test_arguments_that_cannot_be_encoded(run, bank: tll.Bank) -> None:
    """A shell gives bytes that are no UTF-8 as lone surrogates."""
    for arguments in (["caf\udce9 bank"], ["The bank", "--word", "b\udce9"]):
        code, _, err = run("decode", str(bank.path), *arguments)
        assert code == 1
        assert "has a lone surrogate" in err


def test_chat_texts(run, tmp_path: Path) -> None:
    """A text with its own BOS is read with one, and special tokens are neither rows nor decoded, unless they are kept."""
    corpus, bank, hook = tmp_path / "chat.json", tmp_path / "chat.h5", "blocks.2.hook_resid_post"
    bos = tll.load_demo_model().tokenizer.bos_token
    corpus.write_text(json.dumps({"data": [{"text": f"{bos}The river bank{bos} A boat"}]}))
    for option, tokens in (((), "The river bank A boat"), (("--keep-special-tokens",), f"The river bank{bos} A boat")):
        code, _, err = run("build", str(corpus), str(bank), "--model", "demo", "-n", hook, "--field", "data", *option)
        assert code == 0
        assert "1 of 1 texts begin with their own BOS" in err
        read = csv_of(run, "decode", str(bank), f"{bos}The river bank{bos} A boat").query("rank == 1")
        assert "".join(read.token) == tokens
        assert (read.similarity > 0.999).all()
        assert ("special tokens of the texts kept" in run("info", str(bank))[1]) == bool(option)
        bank.unlink()


def test_decode_vector_writes_a_page(run, bank: tll.Bank, tmp_path: Path) -> None:
    """Of both ends, or with a text of the steered runs."""
    html = tmp_path / "v.html"
    source = ("decode-vector", str(bank.path), "--sae", "demo", "--feature", "12", "--no-calibrate", "--html", str(html))
    assert run(*source)[0] == 0
    page = html.read_text(encoding="utf-8")
    for part in ("What a direction means", "rows nearest to −v", "tl-latentlens decode-vector", "--feature 12"):
        assert part in page
    assert run(*source, "--text", "They walked along the", "-x", "0", "-x", "2")[0] == 0
    page = html.read_text(encoding="utf-8")
    for part in ("What a steered run means", "+2 v", "--text &#x27;They walked along the&#x27;"):
        assert part in page
    code, _, error = run(*source[:-1], "nowhere/v.html")
    assert (code, "no folder for nowhere/v.html" in error) == (1, True)


@pytest.mark.parametrize(
    "command", ["demo", "build", "info", "verify", "decode", "decode-vector", "label-sae", "find-features", "evaluate"]
)
def test_help_shows_an_example(run, command: str) -> None:
    code, shown, _ = run(command, "--help")
    assert code == 0
    assert f"Example: tl-latentlens {command}" in " ".join(shown.replace("│", " ").split())


def test_evaluate(run, bank: tll.Bank, tmp_path: Path, texts: list[str]) -> None:
    """What is shown and written are the figures that Python gives."""
    uses = pd.DataFrame({"text": texts, "word": "bank"})[lambda table: table.text.str.contains("bank")]
    uses["sense"] = ["money" if "money" in text else "river" for text in uses.text]
    uses.to_csv(tmp_path / "uses.csv", index=False)
    out, html = tmp_path / "out.csv", tmp_path / "out.html"
    settings = ("-n", "blocks.3.hook_resid_post", "-t", "raw", "-t", "center", "--senses", str(tmp_path / "uses.csv"))
    written = ("--n-tokens", "12", "--out", str(out), "--html", str(html))
    code, shown, _ = run("evaluate", str(bank.path), *settings, *written)
    assert code == 0
    for part in ("sense accuracy, blocks.*.hook_resid_post", "most frequent sense", "KL of neighbor 1 (nats)", "gain over raw"):
        assert part in shown
    expected = tll.evaluate(
        tll.load_model("demo"),
        bank,
        hook_names="blocks.3.hook_resid_post",
        transforms=["raw", "center"],
        senses=uses,
        n_tokens=12,
        progress=False,
    ).to_dataframe()
    found = pd.read_csv(out, keep_default_na=False)
    data = json_of(run, "evaluate", str(bank.path), *settings, "--n-tokens", "12")
    assert data == {"measures": json.loads(expected.to_json(orient="records"))}
    assert found.reader.tolist() == expected.reader.tolist()
    np.testing.assert_allclose(found["mean"].astype(float), expected["mean"], rtol=1e-6)
    page = html.read_text(encoding="utf-8")
    assert "plotly" not in page
    for part in ("KL of neighbor 1", "Made by <code>tl-latentlens evaluate", "demo_model, 6 layers", bank.path.name):
        assert part in page
    code, _, error = run("evaluate", str(bank.path), "--html", "nowhere/e.html")
    assert (code, "no folder for nowhere/e.html" in error) == (1, True)
    code, _, error = run("evaluate", str(bank.path), "-t", "whiten")
    assert code == 1
    assert "got transform='whiten'" in " ".join(error.split())
    code, _, error = run("evaluate", str(bank.path), "--out", "nowhere/out.csv")
    assert code == 1
    assert "in a folder that exists" in " ".join(error.split())


def test_what_transformer_lens_prints_is_not_among_the_data(monkeypatch: pytest.MonkeyPatch, capsys, any_model) -> None:
    monkeypatch.setattr("tl_latentlens.model.loading._load", lambda *_: typer.echo("Loaded pretrained model gpt2") or any_model)
    assert tll.load_model("gpt2") is any_model
    assert capsys.readouterr().out == ""


def test_a_folder_that_only_a_bridge_can_load(tmp_path: Path, any_model) -> None:
    """transformers 5 writes no n_ctx, without which TransformerLens makes no HookedTransformer of a GPT-2."""
    if "bridge" not in available_kinds():
        pytest.skip("no bridge in this TransformerLens")
    config = transformers.GPT2Config(
        vocab_size=4096, n_positions=64, n_embd=32, n_layer=2, n_head=2, architectures=["GPT2LMHeadModel"]
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    any_model.tokenizer.save_pretrained(tmp_path)
    assert type(tll.load_model(str(tmp_path))).__name__ == "TransformerBridge"


def test_a_model_that_cannot_be_loaded_is_one_line(run, bank: tll.Bank, tmp_path: Path) -> None:
    code, _, err = run("decode", str(bank.path), "text", "--model", str(tmp_path / "nowhere"))
    assert code == 1
    assert "no model at" in err
    code, _, err = run("decode", str(bank.path), "text", "--model", "nobody/has-this-model")
    assert code == 1
    assert "cannot load 'nobody/has-this-model'" in err
