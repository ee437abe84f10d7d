"""Heads of a bank: columns of the vectors, with moments of their own."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from support.golden import (
    INFO,
    head_of,
)

from tl_latentlens.bank.bank import Bank
from tl_latentlens.bank.format import ModelRecord
from tl_latentlens.bank.writer import BankWriter
from tl_latentlens.corpus.plan import make_plan, prompts_from_lists
from tl_latentlens.errors import BankCorruptError, UnknownHookError
from tl_latentlens.model.fingerprint import Fingerprint

# Heads


HEADS = "blocks.0.attn.hook_z"


def bank_of_heads(path: Path, n_heads: dict[str, int]) -> None:
    plan = make_plan(prompts_from_lists([list(range(6))]))
    rows = np.random.default_rng(0).standard_normal((6, 6))
    known = Fingerprint(((0,),), {HEADS: rows[:1]}, n_heads)
    with BankWriter.create(path, plan, ModelRecord(INFO, {HEADS: 6}, known, dict.fromkeys(range(6), b"a"))) as writer:
        for batch in writer.batches():
            norms = np.linalg.norm(rows, axis=1)
            units = torch.from_numpy(rows / norms[:, None]).half()
            writer.write(HEADS, batch, units[batch.rows], torch.from_numpy(norms[batch.rows]).float())


def test_heads_are_columns(tmp_path: Path) -> None:
    bank_of_heads(tmp_path / "heads.h5", {HEADS: 3})
    with Bank.open(tmp_path / "heads.h5") as bank, h5py.File(tmp_path / "heads.h5") as file:
        assert json.loads(file.attrs["n_heads"]) == {HEADS: 3}
        assert (bank.n_heads(HEADS), bank.d(HEADS), bank.d(f"{HEADS}[2]")) == (3, 6, 2)
        assert bank.head_names(f"{HEADS}[:]") == [f"{HEADS}[{head}]" for head in range(3)]
        assert bank.head_names(HEADS) == [HEADS]
        np.testing.assert_array_equal(bank.vectors(f"{HEADS}[1]"), bank.vectors(HEADS)[:, 2:4])
        assert bank.vectors(f"{HEADS}[1]").base is not None  # no copy
        np.testing.assert_array_equal(bank.norms(f"{HEADS}[1]"), bank.norms(HEADS))
        some = np.arange(bank.n_rows)[::-2]
        np.testing.assert_array_equal(bank.activations(f"{HEADS}[1]", some), bank.activations(HEADS, some)[:, 2:4])
        units = bank.vectors(HEADS)[:].astype(np.float64).reshape(-1, 3, 2)
        units /= np.linalg.norm(units, axis=-1, keepdims=True)
        for head in range(3):
            np.testing.assert_allclose(bank.mean(f"{HEADS}[{head}]"), units[:, head].mean(0), atol=1e-12)
            np.testing.assert_allclose(bank.std(f"{HEADS}[{head}]"), units[:, head].std(0), atol=1e-7)
        with pytest.raises(UnknownHookError, match=r"has heads 0 to 2 in the bank"):
            bank.vectors(f"{HEADS}[3]")


def test_a_bank_without_head_counts(tmp_path: Path) -> None:
    bank_of_heads(tmp_path / "old.h5", {})
    with Bank.open(tmp_path / "old.h5") as bank, h5py.File(tmp_path / "old.h5") as file:
        assert "n_heads" not in file.attrs
        assert bank.n_heads(HEADS) == 1
        assert bank.vectors(HEADS).shape[1] == 6
        with pytest.raises(UnknownHookError, match=r"knows no heads of 'blocks.0.attn.hook_z'.*; use .*, or rebuild the bank"):
            bank.vectors(f"{HEADS}[0]")


@pytest.mark.parametrize("n_heads", [{HEADS: 4}, {HEADS: 0}, {"other": 1}])
def test_head_counts_that_cannot_be(tmp_path: Path, n_heads: dict[str, int]) -> None:
    bank_of_heads(tmp_path / "heads.h5", {HEADS: 3})
    head = head_of(tmp_path / "heads.h5")
    encoded = replace(head, metadata=replace(head.metadata, n_heads=n_heads)).encode()
    with (tmp_path / "heads.h5").open("r+b") as file:
        file.write(2 * encoded)
    with pytest.raises(BankCorruptError, match=r"heads of (blocks.0.attn.hook_z|other), which its vectors do not have"):
        Bank.open(tmp_path / "heads.h5")
