"""A bidirectional encoder (BERT on a bridge): whole prompts instead of prefixes, and no logit lens."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.models import available_kinds

import tl_latentlens as tll

pytestmark = pytest.mark.skipif("bridge" not in available_kinds(), reason="BERT is read on a bridge")

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the river ran over its bank she put money in a . boat".split()
TEXTS = [
    "the river ran over its bank.",
    "the river ran over the boat.",
    "the river ran over its bank.",
    "she put money in a bank.",
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)})
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.5, architectures=["BertForMaskedLM"], **sizes
    )
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tll.load_model(str(folder), kind="bridge")


def test_rows_are_whole_prompts_once(bert: Any, tmp_path: Path) -> None:
    bank = tll.build_bank(bert, TEXTS, tmp_path / "bert.h5", progress=False)
    rows = [bank.row(i) for i in range(bank.n_rows)]
    assert {row.prompt_index for row in rows} == {0, 1, 3}, "the repeated prompt shares the rows of the first"
    for prompt in (0, 1, 3):
        tokens = bert.to_tokens(TEXTS[prompt])[0].tolist()
        assert [row.token_id for row in rows if row.prompt_index == prompt] == tokens[1:-1], (
            "all between [CLS] and [SEP], shared prefixes too"
        )
    index = tll.ContextualIndex(bank, device="cpu")
    hooks = tll.latentlens_hooks(index, logit_lens=False)
    bert.run_with_hooks(TEXTS[3], fwd_hooks=hooks)
    for cell in hooks.result.cells():
        assert cell.neighbors[0].similarity == pytest.approx(1.0, abs=1e-3)
        assert (cell.neighbors[0].prompt_index, cell.neighbors[0].position) == (3, cell.pos)


def test_an_encoder_is_not_given_a_text_twice(bert: Any, tmp_path: Path) -> None:
    with pytest.raises(
        tll.InvalidInputError, match="got repeat=True for a model that cannot read a text twice: it sees the whole text"
    ):
        tll.build_bank(bert, TEXTS, tmp_path / "bert.h5", repeat=True, progress=False)
    with pytest.raises(tll.InvalidInputError, match="leave repeat out"):
        tll.repeated(bert, TEXTS)


def test_logit_lens_is_refused(bert: Any) -> None:
    with pytest.raises(tll.InvalidInputError, match="an encoder's MLM head would be skipped; pass logit_lens=False"):
        tll.logit_lens(bert, torch.randn(2, 32))
