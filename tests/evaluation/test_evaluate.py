"""All measures together: evaluations from end to end, and what is refused."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from support.evaluation import NAMES
from support.models import available_kinds
from tqdm import tqdm

import tl_latentlens as tll
from tl_latentlens.evaluation.held_out import draw_held_out_rows
from tl_latentlens.evaluation.substitution import substitution
from tl_latentlens.index.transforms import TRANSFORMS


def test_evaluate_from_end_to_end(any_model: Any, bank: tll.Bank, senses: pd.DataFrame) -> None:
    sae = tll.load_sae(
        {"W_dec": torch.randn(6, 256), "W_enc": torch.randn(256, 6), "b_enc": torch.zeros(6)}, hook_name=NAMES[0]
    )
    settings: dict[str, Any] = {"transforms": ["raw", "csls"], "senses": senses, "n_tokens": 8, "device": "cpu"}
    found = tll.evaluate(any_model, bank, sae=sae, progress=False, **settings)
    frame = found.to_dataframe()
    assert len(frame.measure.unique()) == 6
    assert set(frame.hook_name) == {"", *NAMES}
    gains = found.gains()
    assert gains.reader.tolist() == ["csls"] * 6
    assert found.labels is not None
    assert set(found.labels["transform"]) == {"raw", "csls"}
    text = str(found)
    assert "sense accuracy" in text
    assert "gain over raw" in text
    again = tll.evaluate(any_model, bank, progress=False, **settings).to_dataframe()
    pd.testing.assert_frame_equal(frame, again)
    with pytest.raises(tll.InvalidInputError, match="got over='center'; expected one of the transforms compared"):
        found.gains("center")


def test_evaluate_refusals(any_model: Any, bank: tll.Bank) -> None:
    with pytest.raises(tll.InvalidInputError, match="n_tokens=0"):
        tll.evaluate(any_model, bank, n_tokens=0)
    for wrong, message in (
        ({"hook_names": []}, "got no hook names"),
        ({"sae": "demo"}, "got str 'demo' for an SAE; load it"),
        ({"transforms": "whiten"}, "got transform='whiten'"),
    ):
        with pytest.raises(tll.InvalidInputError, match=message):
            tll.evaluate(any_model, bank, **wrong)
    with pytest.raises(tll.InvalidInputError, match="got a dict; expected a bank, its path, or an index"):
        tll.evaluate(any_model, {})  # pyright: ignore[reportArgumentType]
    with pytest.raises(tll.InvalidInputError, match="got an index of 2 banks; expected one"):
        tll.evaluate(any_model, tll.ContextualIndex([bank, bank], device="cpu"))
    with pytest.raises(tll.InvalidInputError, match="got transform='whiten'"):
        tll.evaluate(any_model, bank, transforms=["whiten"])
    other = SimpleNamespace(hook_name="blocks.0.hook_resid_post", W_dec=torch.randn(3, 256))
    with pytest.warns(UserWarning, match=r"no label scores: the SAE reads blocks.0.hook_resid_post, the bank holds"):
        found = tll.evaluate(
            any_model, bank, transforms=["raw"], senses=None, n_tokens=5, sae=other, device="cpu", progress=False
        )
    assert found.labels is None
    assert "sense accuracy" not in set(found.to_dataframe().measure)


def test_the_transform_of_the_index_is_measured(any_model: Any, bank: tll.Bank) -> None:
    settings: dict[str, Any] = {"senses": None, "n_tokens": 8, "device": "cpu", "progress": False}
    assert tll.evaluate(any_model, bank, **settings).transforms == ("raw",)
    index = tll.ContextualIndex(bank, NAMES[0], device="cpu", transform="center")
    found = tll.evaluate(any_model, index, senses=None, n_tokens=8, progress=False)
    assert (found.transforms, set(found.to_dataframe().hook_name)) == (("center",), {"", NAMES[0]})
    expected = tll.evaluate(any_model, bank, hook_names=NAMES[0], transforms="center", **settings)
    pd.testing.assert_frame_equal(found.to_dataframe(), expected.to_dataframe())
    assert tll.evaluate(any_model, index, transforms="all", **settings).transforms == TRANSFORMS


def test_every_part_shows_the_time_that_is_left(
    any_model: Any, bank: tll.Bank, senses: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, int] = {}

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings, file=io.StringIO())
            shown[self.desc] = self.total

        def close(self) -> None:
            assert getattr(self, "n", 0) == self.total or self.disable, self.desc
            super().close()

    modules = (
        "evaluation.evaluate",
        "evaluation.agreement",
        "evaluation.senses",
        "evaluation.substitution",
        "model.activations",
    )
    for module in modules:
        monkeypatch.setattr(f"tl_latentlens.{module}.tqdm", Bar)
    tll.evaluate(any_model, bank, senses=senses, n_tokens=8, device="cpu")
    parts = {name: total for name, total in shown.items() if name}
    assert list(parts) == ["labelled uses", "other lenses", "neighbors, raw", "agreement", "substitution"]
    assert all(parts.values())
    assert parts["substitution"] == 8 * len(NAMES)


def test_few_tokens_are_said_and_heads_refused(any_model: Any, tmp_path: Path) -> None:
    name = "blocks.1.attn.hook_z"
    bank = tll.build_bank(any_model, ["The river ran."], tmp_path / "z.h5", hook_names=name, progress=False)
    with pytest.warns(UserWarning, match="only 3 tokens of .* can be read"):
        draw_held_out_rows(bank, 10, 0)
    with pytest.warns(UserWarning, match="only 3"), pytest.raises(tll.InvalidInputError, match="expected whole hook names"):
        tll.evaluate(any_model, bank, hook_names=f"{name}[:]", progress=False)


@pytest.mark.skipif("bridge" not in available_kinds(), reason="BERT is read on a bridge")
def test_encoders_have_no_substitution(tmp_path: Path) -> None:
    import transformers

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the river ran over its bank she put money in a . boat".split()
    tokenizer = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(tokenizer), architectures=["BertForMaskedLM"], **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    bert = tll.load_model(str(tmp_path / "m"), kind="bridge")
    texts = ["the river ran over its bank.", "she put money in a bank.", "the boat ran in the river."]
    bank = tll.build_bank(bert, texts, tmp_path / "b.h5", progress=False)
    table = pd.DataFrame({"text": texts[:2], "word": "bank", "sense": ["river", "money"]})
    found = tll.evaluate(bert, bank, senses=table, n_tokens=8, transforms=["raw"], device="cpu", progress=False)
    assert set(found.to_dataframe().measure) == {"sense accuracy", "next token", "topic"}
    with pytest.raises(tll.InvalidInputError, match="substitution asks for next-token distributions"):
        substitution(bert, draw_held_out_rows(bank, 3, 0), {})
