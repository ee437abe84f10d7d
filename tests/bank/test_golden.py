"""The golden file reads as ever, and banks written today are laid out like it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import pytest
from support.golden import (
    GOLDEN,
    INFO,
    MID,
    POST,
    head_of,
    stored_in,
    write_bank,
)

from tl_latentlens.bank.bank import Bank
from tl_latentlens.corpus.plan import PlanSettings

# The format


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_bank(tmp_path / "a.h5")
    return tmp_path / "a.h5"


def test_golden_file_reads_as_ever() -> None:
    data = GOLDEN.read_bytes()
    assert len(data) < 60_000
    start = b'{"format": "tl-latentlens bank", "version": 1, "size": 8192, "complete": true, "digest": "'
    assert data.startswith(start + head_of(GOLDEN).digest.encode() + b'", "attributes": {"model": {"name": "tiny", ')
    assert data[:4096] == data[4096:8192]
    assert data[8192:].startswith(b"\x89HDF\r\n\x1a\n")
    with Bank.open(GOLDEN) as bank:
        bank.verify()
        assert (bank.n_rows, bank.hook_names, bank.dtype, bank.model_info) == (10, (POST, MID), "bfloat16", INFO)
        assert bank.plan.settings == PlanSettings(None, 3, False)
        assert bank.plan.row_tokens.tolist() == [1, 2, 3, 6, 7, 8, 9, 11, 12, 13]
        assert bank.plan_digest == "8217e0efbc79c2f5d374b539e9791e6f4971fb35707e56c49de07fb85ff4906d"
        assert list(bank.blocks()) == [(0, 7), (7, 10)]
        assert bank.vectors(POST)[5].tolist() == [0.5, -0.5, 0.5, -0.5]
        assert bank.vectors(MID)[:2].tolist() == [[-1, 0], [0, -1]]
        assert bank.norms(POST).tolist() == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
        assert bank.norms(MID)[-1] == 1e6
        assert bank.mean(MID).tolist() == [-0.5, -0.5]
        assert bank.std(MID).tolist() == [0.5, 0.5]
        assert bank.fingerprint.prompts == ((0, 1, 2), (0,))
        assert bank.fingerprint.activations[POST][1].tolist() == [2, -2, -2, -2]
        row = bank.row(1)
        assert (row.token_id, row.token, row.position, row.prompt_index, row.prompt_text) == (
            2,
            " bank",
            2,
            0,
            "The bank Flüsse",
        )
        assert bank.row(6).prompt_text == "€\n bank"


def test_banks_written_today_are_laid_out_as_the_golden_file(path: Path) -> None:
    def structure(file: h5py.File) -> dict[str, Any]:
        found: dict[str, Any] = {key: json.loads(value) for key, value in file.attrs.items() if key != "versions"}
        file.visititems(
            lambda name, item: (
                found.update({name: (str(item.dtype), item[:].tolist(), dict(item.attrs))})
                if isinstance(item, h5py.Dataset)
                else None
            )
        )
        return found

    with h5py.File(GOLDEN, "r") as golden, h5py.File(path, "r") as today:
        assert structure(today) == structure(golden)
        assert stored_in(golden) == head_of(GOLDEN).datasets
    assert b"repeat" not in path.read_bytes()[:8192], "what a plain plan does not use is not recorded"
    then, now = head_of(GOLDEN), head_of(path)
    assert replace(now.metadata, versions={}) == replace(then.metadata, versions={})
    assert list(now.datasets) == list(then.datasets)
