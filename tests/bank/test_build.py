"""The corpus run: what is banked is what the model gives, from any kind of corpus, and a stopped build goes on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from support.models import TEXTS

import tl_latentlens as tll
from tl_latentlens.bank import build as build_module
from tl_latentlens.bank.format import partial_path
from tl_latentlens.corpus import texts as corpus_module

FIRST, LAST = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
TOLERANCE = {"float16": 2e-3, "bfloat16": 1e-2, "float32": 1e-5}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The model is so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_alone(model: Any, tokens: list[int], hook_names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The activations of one prompt, run by itself: the oracle. [pos, d]"""
    seen: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook_fn(activation: torch.Tensor, hook: Any) -> None:
            seen[name] = activation[0].detach().float().flatten(1).cpu().numpy()

        return hook_fn

    with torch.no_grad():
        model.run_with_hooks(torch.tensor([tokens]), return_type=None, fwd_hooks=[(name, keep(name)) for name in hook_names])
    return seen


def check_bank(model: Any, bank: tll.Bank) -> None:
    """Every row against the model run on its prompt alone."""
    alone: dict[int, dict[str, np.ndarray]] = {}
    bank.verify()
    for i in range(bank.n_rows):
        row = bank.row(i)
        if row.prompt_index not in alone:
            alone[row.prompt_index] = run_alone(model, bank.prompt(row.prompt_index), bank.hook_names)
        for name, activation in alone[row.prompt_index].items():
            norm = np.linalg.norm(activation[row.position])
            np.testing.assert_allclose(bank.norms(name)[i], norm, rtol=1e-3)
            stored = bank.vectors(name)[i].astype(np.float32)
            np.testing.assert_allclose(stored, activation[row.position] / norm, atol=TOLERANCE[bank.dtype])


def build(model: Any, texts: Any, path: Path, **kwargs: Any) -> tll.Bank:
    return tll.build_bank(model, texts, path, **{"hook_names": [FIRST, LAST], "progress": False, **kwargs})


@contextmanager
def counted_runs(fail_after: int | None = None) -> Iterator[list[int]]:
    """Count the batches of a build, and interrupt it after so many."""
    run_hooked, runs = build_module.run_hooked, []

    def counting(*arguments: Any) -> None:
        if len(runs) == fail_after:
            raise KeyboardInterrupt
        runs.append(arguments[1].shape[0])
        run_hooked(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "run_hooked", counting)
        yield runs


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_bank_holds_what_the_model_gives(any_model: Any, texts: list[str], tmp_path: Path, dtype: str) -> None:
    names = [LAST, "blocks.0.attn.hook_z", "blocks.0.mlp.hook_post", "hook_embed"]
    bank = build(any_model, texts, tmp_path / "a.h5", hook_names=names, dtype=dtype)
    assert bank.hook_names == tuple(names)
    assert bank.dtype == dtype
    check_bank(any_model, bank)


def test_rows_are_the_distinct_prefixes(any_model: Any, texts: list[str], tmp_path: Path) -> None:
    bank = build(any_model, [*texts, texts[0]], tmp_path / "a.h5", max_rows_per_token=None)
    prompts = [any_model.to_tokens(text)[0].tolist() for text in [*texts, texts[0]]]
    prefixes = {tuple(prompt[: i + 1]) for prompt in prompts for i in range(1, len(prompt))}
    found = [tuple(bank.prompt(row.prompt_index)[: row.position + 1]) for row in map(bank.row, range(bank.n_rows))]
    assert sorted(found) == sorted(prefixes)
    assert [bank.prompt(i) for i in range(len(prompts))] == prompts
    assert [bank.row(0).prompt_text, bank.row(bank.n_rows - 1).prompt_text] == [texts[0], texts[-1]]


@pytest.mark.parametrize("cap", [1, 2, None])
def test_max_rows_per_token(any_model: Any, texts: list[str], tmp_path: Path, cap: int | None) -> None:
    def counts(**kwargs: Any) -> dict[int, int]:
        bank = build(any_model, texts, tmp_path / f"{kwargs}.h5".replace(" ", ""), **kwargs)
        ids = [bank.row(i).token_id for i in range(bank.n_rows)]
        return {i: ids.count(i) for i in ids}

    every = counts(max_rows_per_token=10**9)
    assert max(every.values()) > 2
    assert counts(max_rows_per_token=cap) == {i: n if cap is None else min(n, cap) for i, n in every.items()}


def test_seed_decides_the_sample(any_model: Any, texts: list[str], tmp_path: Path) -> None:
    rows = [
        build(any_model, texts, tmp_path / f"{n}.h5", max_rows_per_token=1, seed=seed).plan.row_tokens
        for n, seed in enumerate([0, 0, 1, 2])
    ]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert any(rows[0].tolist() != other.tolist() for other in rows[2:])


@pytest.mark.parametrize("batch_tokens", [1, 8, 64])
def test_small_batches_give_the_same_bank(any_model: Any, texts: list[str], tmp_path: Path, batch_tokens: int) -> None:
    with counted_runs() as runs:
        bank = build(any_model, texts, tmp_path / "a.h5", batch_tokens=batch_tokens)
    assert (set(runs) == {1}) == (batch_tokens <= 8)
    whole = build(any_model, texts, tmp_path / "whole.h5")
    for name in bank.hook_names:
        np.testing.assert_allclose(bank.vectors(name), whole.vectors(name), atol=2e-3)
        np.testing.assert_allclose(bank.norms(name), whole.norms(name), rtol=1e-4)


# Hook names


def test_default_hook_names_are_spread_over_the_layers(any_model: Any, texts: list[str], tmp_path: Path) -> None:
    names = build(any_model, texts, tmp_path / "a.h5", hook_names=None).hook_names
    n = any_model.cfg.n_layers
    assert names[0] == "blocks.0.hook_resid_post"
    assert names[-1] == f"blocks.{n - 1}.hook_resid_post"
    assert len(set(names)) == min(8, n)


def test_filter_of_hook_names(any_model: Any, texts: list[str], tmp_path: Path) -> None:
    bank = build(any_model, texts, tmp_path / "a.h5", hook_names=lambda name: name.endswith("hook_resid_mid"))
    assert sorted(bank.hook_names) == sorted(f"blocks.{layer}.hook_resid_mid" for layer in range(any_model.cfg.n_layers))
    check_bank(any_model, bank)


def test_one_hook_name(any_model: Any, texts: list[str], tmp_path: Path) -> None:
    assert build(any_model, texts, tmp_path / "a.h5", hook_names=LAST).hook_names == (LAST,)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (
            ["blocks.0.hook_resid_pots"],
            tll.UnknownHookError,
            "no hook name 'blocks.0.hook_resid_pots'; did you mean 'blocks.0.hook_resid_post'",
        ),
        (["blocks.99.hook_resid_post"], tll.UnknownHookError, "no hook name 'blocks.99.hook_resid_post'"),
        ([], tll.InvalidInputError, "no hook name was chosen"),
        (lambda name: False, tll.InvalidInputError, "no hook name was chosen"),
        ([FIRST, FIRST], tll.InvalidInputError, "a hook name was given twice"),
        (["blocks.0.attn.hook_pattern"], tll.InvalidInputError, r"hook_pattern has shape .*expected \[batch, pos"),
    ],
)
def test_wrong_hook_names_leave_no_file(
    any_model: Any, texts: list[str], tmp_path: Path, names: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(any_model, texts, tmp_path / "a.h5", hook_names=names)
    assert list(tmp_path.iterdir()) == []


# Corpora


@pytest.fixture
def sources(texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The same texts in every shape that a corpus has."""
    dataset = datasets.Dataset.from_dict({"text": texts})
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    dataset.to_csv(folder / "a.csv")
    dataset.to_json(folder / "a.jsonl")
    dataset.to_parquet(folder / "a.parquet")
    monkeypatch.setattr(corpus_module, "DEMO_CORPUS", folder / "a.txt")
    files = {ending: folder / f"a.{ending}" for ending in ("txt", "csv", "jsonl", "parquet")}
    return {
        **files,
        "str": str(folder / "a.txt"),
        "demo": "demo",
        "dataset": dataset,
        "stream": dataset.to_iterable_dataset(),
        "generator": (t for t in texts),
    }


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "parquet", "str", "demo", "dataset", "stream", "generator"])
def test_every_kind_of_corpus(any_model: Any, texts: list[str], sources: dict[str, Any], tmp_path: Path, kind: str) -> None:
    bank = build(any_model, sources[kind], tmp_path / "a.h5")
    assert bank.plan_digest == tll.plan_corpus(any_model, texts).digest
    assert [bank.text(bank.prompt(i)) for i in range(bank.plan.n_prompts)] == texts


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "the corpus is empty"),
        (["", "", ""], "the corpus's 3 texts hold no token besides BOS and padding"),
        (datasets.Dataset.from_dict({"text": ["", ""]}).to_iterable_dataset(), "the corpus's 2 texts hold no token"),
        (datasets.Dataset.from_dict({"text": ["fine", None]}), "text 1 is NoneType"),
        (datasets.Dataset.from_dict({"body": ["x"]}), "no column 'text'"),
        ("nowhere.txt", "no corpus file at nowhere.txt"),
    ],
)
def test_nothing_to_bank(any_model: Any, tmp_path: Path, texts: Any, message: str) -> None:
    with pytest.raises(tll.CorpusError, match=message):
        build(any_model, texts, tmp_path / "a.h5")
    assert list(tmp_path.iterdir()) == []


def test_empty_texts_keep_their_number(any_model: Any, tmp_path: Path) -> None:
    bank = build(any_model, ["", "The river", "", "", "A bank", ""], tmp_path / "a.h5")
    assert {bank.row(i).prompt_index for i in range(bank.n_rows)} == {1, 4}
    assert bank.plan.n_prompts == 6
    check_bank(any_model, bank)


def test_text_that_is_not_ascii(any_model: Any, tmp_path: Path) -> None:
    texts = ["Übermäßig viele Flüsse — 木 🐟.", "naïve café"]
    bank = build(any_model, texts, tmp_path / "a.h5")
    assert bank.row(0).prompt_text == texts[0]
    assert bank.row(bank.n_rows - 1).prompt_text == texts[1]
    check_bank(any_model, bank)


def test_texts_past_the_context_are_cut_and_counted(any_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "The river ran over its bank. " * any_model.cfg.n_ctx
    bank = build(any_model, ["A bank", long], tmp_path / "a.h5", hook_names=FIRST, progress=True)
    assert bank.plan.n_truncated == 1
    assert len(bank.prompt(1)) == any_model.cfg.n_ctx
    shown = capsys.readouterr()
    assert f"1 of 2 texts were longer than n_ctx = {any_model.cfg.n_ctx} tokens and were cut" in shown.out + shown.err


# Progress


def test_progress_is_shown_when_asked_for(
    any_model: Any, texts: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build(any_model, texts, tmp_path / "quiet.h5", progress=False)
    assert capfd.readouterr() == ("", "")
    bank = build(any_model, texts, tmp_path / "shown.h5", progress=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "shown.h5: 100%" in shown.err
    total = len(bank.plan.tokens)
    assert f"{total}/{total}" in shown.err.replace(".0", "")


# Stopped, resumed, finished


@pytest.mark.usefixtures("small_blocks")
def test_interrupted_build_goes_on(any_model: Any, texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with counted_runs() as whole_runs:
        whole = build(any_model, texts, tmp_path / "whole.h5", batch_tokens=8)
    with counted_runs(3), pytest.raises(KeyboardInterrupt):
        build(any_model, texts, path, batch_tokens=8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5.partial", "whole.h5"]
    with counted_runs() as resumed:
        bank = build(any_model, texts, path, batch_tokens=8)
    assert len(resumed) == len(whole_runs) - 3
    assert not partial_path(path).exists()
    for name in bank.hook_names:
        np.testing.assert_array_equal(bank.vectors(name), whole.vectors(name))
        np.testing.assert_array_equal(bank.norms(name), whole.norms(name))


def test_interrupted_build_with_other_settings_is_refused(any_model: Any, texts: list[str], tmp_path: Path) -> None:
    with counted_runs(0), pytest.raises(KeyboardInterrupt):
        build(any_model, texts, tmp_path / "a.h5")
    with pytest.raises(tll.BankError, match="cannot be resumed, it differs in dtype: the file has float16, this call float32"):
        build(any_model, texts, tmp_path / "a.h5", dtype="float32")


def test_finished_bank_is_opened(any_model: Any, texts: list[str], tmp_path: Path) -> None:
    build(any_model, texts, tmp_path / "a.h5")
    before = (tmp_path / "a.h5").read_bytes()
    with counted_runs() as runs:
        bank = build(any_model, texts, tmp_path / "a.h5")
    assert runs == []
    assert bank.hook_names == (FIRST, LAST)
    assert (tmp_path / "a.h5").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"texts": ["Another river."]},
            r"differs in corpus: the file has 6 texts of 68 tokens, this call 1 texts of \d+ tokens",
        ),
        (
            {"texts": [TEXTS[0].replace("storm", "night"), *TEXTS[1:]]},
            r"differs in corpus or its tokens: the file has \w{64}, this call \w{64}",
        ),
        (
            {"max_rows_per_token": 1},
            r"differs in plan settings: the file has \{'max_rows_per_token': 50\}, this call \{'max_rows_per_token': 1\}",
        ),
        ({"seed": 5}, r"differs in plan settings: the file has \{'seed': 0\}, this call \{'seed': 5\}"),
        ({"hook_names": [LAST]}, rf"differs in hook names: the file has \['{FIRST}', '{LAST}'\], this call \['{LAST}'\]"),
        ({"dtype": "bfloat16"}, r"differs in dtype: the file has float16, this call bfloat16"),
        (
            {"dtype": "float32", "seed": 2},
            r"differs in plan settings.*; dtype: .*Repeat the old call, choose another path, or delete the file",
        ),
    ],
)
def test_finished_bank_of_something_else_is_refused(
    any_model: Any, texts: list[str], tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    path = tmp_path / "a.h5"
    build(any_model, texts, path)
    before = path.read_bytes()
    with pytest.raises(tll.BankError, match=rf"a\.h5 exists and {message}"):
        build(any_model, changed.pop("texts", texts), path, **changed)
    assert path.read_bytes() == before


@contextmanager
def other_weights(model: Any, change: Any) -> Iterator[None]:
    """The model with `change` done to its embedding matrix, in place."""
    embedding = next(p for p in model.parameters() if p.shape == (model.cfg.d_vocab, model.cfg.d_model))
    before = embedding.detach().clone()
    with torch.no_grad():
        change(embedding)
    try:
        yield
    finally:
        with torch.no_grad():
            embedding.copy_(before)


def test_bank_of_another_model_is_refused(any_model: Any, texts: list[str], tmp_path: Path) -> None:
    build(any_model, texts, tmp_path / "a.h5")
    with counted_runs(0), pytest.raises(KeyboardInterrupt):
        build(any_model, texts, tmp_path / "b.h5")
    with other_weights(any_model, lambda weight: weight.mul_(torch.linspace(0.2, 3, weight.shape[1]))):
        with pytest.raises(tll.ModelMismatchError, match=f"activations differ at {FIRST}, .*other.* under the same name"):
            build(any_model, texts, tmp_path / "a.h5")
        with pytest.raises(tll.BankError, match=r"cannot be resumed, .* activations: other weights under the same name"):
            build(any_model, texts, tmp_path / "b.h5")


def test_text_file_at_the_path_is_kept(any_model: Any, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_text("notes")
    with pytest.raises(tll.BankError, match="is not a tl-latentlens bank"):
        build(any_model, texts, tmp_path / "a.h5")
    assert (tmp_path / "a.h5").read_text() == "notes"


def test_path_with_a_tilde(any_model: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tll.build_bank(any_model, texts, "~/a.h5", hook_names=FIRST, progress=False).path == tmp_path / "a.h5"


# Models


@pytest.mark.parametrize("where", [0, -1])
def test_nan_activation_is_named(any_model: Any, texts: list[str], tmp_path: Path, where: int) -> None:
    """In the first text, which the model is known by, and in the last, which is only banked."""
    rare = "Zebra"
    corpus = [*texts, *texts[:3]]
    corpus[where] = f"The {rare} of the bank"
    ids = any_model.to_tokens(corpus[where])[0].tolist()
    others = {i for text in corpus if rare not in text for i in any_model.to_tokens(text)[0].tolist()}
    token = next(i for i in ids if i not in others and i in any_model.to_tokens(f"The {rare}")[0].tolist())
    prompt = where % len(corpus)
    plan = tll.plan_corpus(any_model, corpus)
    rows = plan.row_tokens[plan.row_prompts == prompt] - plan.prompt_starts[prompt]

    def spoil(weight: torch.Tensor) -> None:
        weight[token] = float("nan")

    with other_weights(any_model, spoil):
        # Attention multiplies what it masks by zero, and zero times NaN is NaN: tokens before the bad one are lost too.
        lost = ~np.isfinite(run_alone(any_model, ids, (FIRST,))[FIRST]).all(1)
        position = next(int(row) for row in rows if lost[row])
        message = (
            rf"{FIRST}: {lost[rows].sum()} activations are NaN, inf or zero, the first at prompt {prompt}, position {position} "
        )
        with pytest.raises(tll.InvalidInputError, match=message):
            build(any_model, corpus, tmp_path / "a.h5")
    assert not (tmp_path / "a.h5").exists()


def test_what_is_no_model_is_named(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(tll.InvalidInputError, match="got a Linear; expected a TransformerLens model"):
        build(torch.nn.Linear(2, 2), texts, tmp_path / "a.h5")


def test_the_model_is_left_as_it_was(any_model: Any, texts: list[str], tmp_path: Path) -> None:
    any_model.train()
    try:
        build(any_model, texts, tmp_path / "a.h5")
        assert any_model.training
    finally:
        any_model.eval()
    assert not any(point.fwd_hooks for point in any_model.hook_dict.values())


def test_own_loop_gives_the_same_bank(any_model: Any, texts: list[str], tmp_path: Path) -> None:
    plan = tll.plan_corpus(any_model, texts)
    with tll.BankWriter.create(tmp_path / "own.h5", plan, tll.record_model(any_model, plan, [FIRST, LAST])) as writer:
        for batch in writer.batches():
            any_model.run_with_hooks(
                batch.tokens,
                attention_mask=batch.attention_mask.long(),
                return_type=None,
                fwd_hooks=tll.bank_hooks(writer, batch),
            )
    own, built = tll.Bank.open(tmp_path / "own.h5"), build(any_model, texts, tmp_path / "built.h5")
    for name in built.hook_names:
        np.testing.assert_allclose(own.vectors(name), built.vectors(name), atol=2e-3)
