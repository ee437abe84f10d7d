"""The plain table of labels."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import tl_latentlens as tll


@pytest.fixture(scope="module")
def labelled(index: tll.ContextualIndex) -> tll.FeatureResult:
    """Features with labels of our own, of every kind."""
    at_layer = tll.ContextualIndex(index.banks[0], 3, device="cpu")
    found = tll.label_features(tll.load_sae("demo"), at_layer, [3, 700, 9], progress=False)
    table = found.table.assign(
        label=["team 59 %", "", 'mixed: "the" 8 % · of 5 %'],
        label_kind=["token", "", "mixed"],
        label_parts=[[("team", 0.59), ("club", 0.2)], [], [("the", 0.08)]],
        label_near=[["hot", "water"], [], []],
    )
    return replace(found, table=table)


def test_a_line_is_texts_and_numbers(labelled: tll.FeatureResult, tmp_path: Path) -> None:
    table = labelled.label_table("gpt2-small", "5-name-res-16k")
    assert table["feature"].tolist() == [3, 700, 9]
    assert table["description"].tolist() == ["team 59 %", "", ""], "a mixed label names nothing"
    assert table["kind"].tolist() == ["token", "", "mixed"]
    assert table["shares"].tolist() == ["team 59 % · club 20 %", "", "the 8 %"]
    assert table["near"].tolist() == ["hot, water", "", ""]
    assert table["neuronpedia"][1] == "https://www.neuronpedia.org/gpt2-small/5-name-res-16k/700"
    assert table[["modelId", "layer", "index"]].iloc[2].tolist() == ["gpt2-small", "5-name-res-16k", "9"]
    assert {"density", "max_activation", "similarity", "auroc"} < set(table)
    assert not any(isinstance(value, list | tuple) for value in table.to_numpy().ravel().tolist())
    for suffix, write, read in ((".csv", "to_csv", pd.read_csv), (".parquet", "to_parquet", pd.read_parquet)):
        path = tmp_path / f"labels{suffix}"
        getattr(table, write)(path, index=False)
        assert read(path)["feature"].tolist() == [3, 700, 9]


@pytest.mark.parametrize("named", ["gpt2-small/5-res-jb", None, "", 5])
def test_ids_are_those_that_the_sae_names(labelled: tll.FeatureResult, named: Any) -> None:
    sae = SimpleNamespace(cfg=SimpleNamespace(metadata=SimpleNamespace(neuronpedia_id=named)))
    table = replace(labelled, sae=sae).label_table()
    if named == "gpt2-small/5-res-jb":
        assert table["neuronpedia"][0] == "https://www.neuronpedia.org/gpt2-small/5-res-jb/3"
    else:
        assert "neuronpedia" not in table
    with pytest.raises(tll.InvalidInputError, match="got source=''"):
        labelled.label_table("gpt2-small")
    assert "neuronpedia" not in labelled.label_table()
