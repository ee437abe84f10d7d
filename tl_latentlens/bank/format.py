"""The bank format: its version and dtypes, and the records of model and plan that a bank stores.

docs/bank_format.md describes the file. `datasets` names what is in it, `head` says where each dataset stands, `file` maps
it, `create` and `writer` make it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import xxhash

from tl_latentlens.corpus.plan import PlanSettings
from tl_latentlens.model.fingerprint import Fingerprint
from tl_latentlens.model.info import ModelInfo

FORMAT, VERSION = "tl-latentlens bank", 1
MAX_SHARDS = 10**5  # of one bank
# Name in the file and in the interface → (dtype of the interface, dtype in the file): HDF5 has no bfloat16.
DTYPES: dict[str, tuple[Any, Any]] = {
    "float16": (np.float16, np.float16),
    "bfloat16": (ml_dtypes.bfloat16, np.uint16),
    "float32": (np.float32, np.float32),
}


@dataclass(frozen=True)
class ModelRecord:
    """The record of its model that a bank stores.

    Attributes:
        info: The model's name, sizes and weight processing.
        widths: Hook name → width of its vectors, in the order of the bank.
        fingerprint: The model's activations for a few prompts.
        token_bytes: Token id → the bytes of its text, for every id of the plan.
        special_ids: Ids that are no text (BOS, padding and other special tokens).
        dropped_space: "start" or "end" where the tokenizer drops the first or last space of a text, see `RunningText`.
        hooked: Hook points, or modules, at which the model's user has hooks.
    """

    info: ModelInfo
    widths: dict[str, int]
    fingerprint: Fingerprint
    token_bytes: Mapping[int, bytes] = field(repr=False)
    special_ids: tuple[int, ...] = ()
    dropped_space: str = ""
    hooked: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShardRecord:
    """The place of a shard among the others of its bank.

    Attributes:
        index: Its number, from 0.
        n: How many shards there are.
        first_row: The row of the whole bank that is its row 0.
        first_prompt: The prompt of the whole corpus that is its prompt 0.
        n_rows: Rows of the whole bank.
        n_prompts: Prompts of the whole corpus.
        plan_digest: Of the plan of the whole bank.
    """

    index: int
    n: int
    first_row: int
    first_prompt: int
    n_rows: int
    n_prompts: int
    plan_digest: str


@dataclass(frozen=True)
class BankMetadata:
    """The metadata of a bank, stored in its head and as HDF5 attributes.

    Attributes:
        model: The model that filled it.
        plan: The settings that decided its rows.
        plan_digest: sha256 over plan settings, tokens, prompts and rows, hex.
        n_truncated: Prompts cut at n_ctx.
        dtype: The dtype of the stored vectors, a key of `DTYPES`.
        batch_tokens: Most tokens of one batch. The blocks follow from it.
        hook_names: In the order in which they were asked for.
        special_ids: Token ids that are no text.
        versions: Package → version that built the bank.
        n_heads: Hook name → number of heads that stand side by side in its vectors; not written where there are none.
        dropped_space: "start" or "end" where the tokens of a text begin or end with a space that the text has not.
        hooked: Where hooks of the user were attached to the model while it ran; not written where there were none.
        shard: The place of a file that holds some blocks of a bank; None, and not written, for a whole bank. `n_truncated`
            counts the whole corpus.
    """

    model: ModelInfo
    plan: PlanSettings
    plan_digest: str
    n_truncated: int
    dtype: str
    batch_tokens: int
    hook_names: tuple[str, ...]
    special_ids: tuple[int, ...]
    versions: dict[str, str]
    n_heads: dict[str, int] = field(default_factory=dict)
    dropped_space: str = ""
    hooked: tuple[str, ...] = ()
    shard: ShardRecord | None = None


def partial_path(path: Path) -> Path:
    """The path of a bank while it is built."""
    return path.with_name(path.name + ".partial")


def block_checksum(vectors: np.ndarray, norms: np.ndarray) -> int:
    """xxh3-64 over a block's stored vectors, then its norms."""
    digest = xxhash.xxh3_64(np.ascontiguousarray(vectors).view(np.uint8))
    digest.update(np.ascontiguousarray(norms).view(np.uint8))
    return digest.intdigest()
