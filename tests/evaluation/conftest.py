"""Labelled uses of four words, and a bank of their texts."""

from typing import Any

import pandas as pd
import pytest
from support.evaluation import NAMES

import tl_latentlens as tll


@pytest.fixture(scope="session")
def senses() -> pd.DataFrame:
    table = tll.load_senses("demo")
    return table[table.word.isin(["bank", "ring", "court", "bat"])].reset_index(drop=True)


@pytest.fixture(scope="session")
def bank(any_model: Any, senses: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> tll.Bank:
    texts = [*senses.text, *tll.load_corpus("demo", limit=120)]
    path = tmp_path_factory.mktemp("evaluate") / "bank.h5"
    return tll.build_bank(any_model, texts, path, hook_names=NAMES, max_rows_per_token=None, progress=False)
