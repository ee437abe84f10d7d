"""The golden file, and the hand-made bank that it is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from support.banks import blocks_of
from tl_latentlens.bank import head as bank_head
from tl_latentlens.bank.format import ModelRecord
from tl_latentlens.bank.head import DatasetPlace, read_head
from tl_latentlens.bank.writer import BankWriter
from tl_latentlens.corpus.plan import Plan, PlanSettings, make_plan, prompts_from_lists
from tl_latentlens.model.fingerprint import Fingerprint
from tl_latentlens.model.info import ModelInfo

GOLDEN = Path(__file__).parents[1] / "data" / "golden_v1.h5"
POST, MID = "blocks.0.hook_resid_post", "blocks.1.hook_resid_mid"
INFO = ModelInfo("tiny", "TransformerBridge", 2, 4, 300, 16, "bfloat16", True, "ab" * 32)
BOS, EURO = 0, "€".encode()
# The euro sign is three bytes, here in two tokens; the line break is a token of its own.
TOKEN_BYTES = {
    BOS: b"<s>",
    1: b"The",
    2: b" bank",
    3: " Flüsse".encode(),
    4: EURO[:1],
    5: EURO[1:],
    6: b"\n",
    7: " 木".encode(),
    8: b" ",
}
TEXTS = [[BOS, 1, 2, 3], [BOS], [BOS, 4, 5, 6, 2], [BOS, 7, 8, 2]]


def hand_made_plan(texts: Sequence[Sequence[int]] = TEXTS) -> Plan:
    return make_plan(prompts_from_lists(texts, [[token == BOS for token in text] for text in texts]), PlanSettings(None, 3))


def hand_made_activations() -> dict[str, np.ndarray]:
    """[10, 4] and [10, 2]; each a multiple of a vector of halves or of an axis, so exact in any dtype when normalised."""
    halves = np.array([[1 if (row >> bit) & 1 else -1 for bit in range(4)] for row in range(10)], np.float32)
    axes = np.eye(2, dtype=np.float32)[np.arange(10) % 2]
    scale = np.arange(1, 11, dtype=np.float32)[:, None]
    return {POST: halves * scale, MID: -axes * scale * 100000}


def write_bank(
    path: Path, dtype: str = "bfloat16", texts: Sequence[Sequence[int]] = TEXTS, hook_names: Sequence[str] = (POST, MID)
) -> None:
    """A small bank of hand-made arrays; tests/data/golden_v1.h5 is `write_bank(path)` of the first release."""
    plan, acts = hand_made_plan(texts), {name: hand_made_activations()[name] for name in hook_names}
    known = Fingerprint(((BOS, 1, 2), (BOS,)), {name: array[:4] for name, array in acts.items()})
    record = ModelRecord(INFO, {name: array.shape[1] for name, array in acts.items()}, known, TOKEN_BYTES, (BOS,))
    kind = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    with blocks_of(8):
        writer = BankWriter.create(path, plan, record, dtype=dtype, batch_tokens=1)
    with writer:
        for batch in writer.batches():
            for name, array in acts.items():
                rows = torch.from_numpy(array[batch.rows])
                norms = torch.linalg.vector_norm(rows, dim=-1)
                writer.write(name, batch, (rows / norms[:, None]).to(kind), norms)


def head_of(path: Path) -> bank_head.Head:
    with path.open("rb") as file:
        return read_head(file)


def stored_in(file: h5py.File) -> dict[str, DatasetPlace]:
    """Where HDF5 says each dataset stands."""
    found: dict[str, DatasetPlace] = {}

    def add(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = DatasetPlace(item.id.get_offset(), item.dtype.name, item.shape)

    file.visititems(add)
    return found
