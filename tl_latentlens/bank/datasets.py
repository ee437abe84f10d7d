"""The datasets of a bank file: their names, dtypes and axes. `head` says where each of them stands in one file."""

import numpy as np

from tl_latentlens.bank.format import DTYPES, BankMetadata

TOKENS, PROMPT_STARTS, ROW_TOKENS, BLOCK_STARTS = "tokens", "prompt_starts", "row_tokens", "block_starts"
TOKEN_IDS, TOKEN_BYTES, TOKEN_BYTE_STARTS = "token_ids", "token_bytes", "token_byte_starts"
JOURNAL = "journal"  # 1 where a block is done
FINGERPRINT_TOKENS, FINGERPRINT_PROMPT_STARTS = "fingerprint/tokens", "fingerprint/prompt_starts"
# The datasets of each hook name.
VECTORS, NORMS, CHECKSUMS, MEAN, STD = "vectors", "norms", "checksums", "mean", "std"


def hook_dataset(hook_name: str, part: str) -> str:
    """The name of a hook name's dataset; `part` is VECTORS, NORMS, CHECKSUMS, MEAN or STD."""
    return f"hooks/{hook_name}/{part}"


def fingerprint_dataset(hook_name: str) -> str:
    """The name of the dataset that holds a hook name's activations at the fingerprint prompts."""
    return f"fingerprint/{hook_name}"


def n_datasets(n_hook_names: int) -> int:
    """The number of datasets in a bank of so many hook names."""
    return 10 + 6 * n_hook_names


def dataset_spec(metadata: BankMetadata) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The dtype and axes of every dataset, by its name.

    Axes of one name have one length; "rows+1" is one longer than "rows".
    """
    stored_dtype = np.dtype(DTYPES[metadata.dtype][1]).name
    spec: dict[str, tuple[str, tuple[str, ...]]] = {
        TOKENS: ("int32", ("tokens",)),
        PROMPT_STARTS: ("int64", ("prompts+1",)),
        ROW_TOKENS: ("int64", ("rows",)),
        BLOCK_STARTS: ("int64", ("blocks+1",)),
        TOKEN_IDS: ("int32", ("ids",)),
        TOKEN_BYTES: ("uint8", ("bytes",)),
        TOKEN_BYTE_STARTS: ("int64", ("ids+1",)),
        JOURNAL: ("uint8", ("blocks",)),
        FINGERPRINT_TOKENS: ("int32", ("fingerprint tokens",)),
        FINGERPRINT_PROMPT_STARTS: ("int64", ("fingerprint prompts+1",)),
    }
    for name in metadata.hook_names:
        width = f"d of {name}"
        spec[fingerprint_dataset(name)] = ("float32", ("fingerprint tokens", width))
        spec[hook_dataset(name, VECTORS)] = (stored_dtype, ("rows", width))
        spec[hook_dataset(name, NORMS)] = ("float32", ("rows",))
        spec[hook_dataset(name, CHECKSUMS)] = ("uint64", ("blocks",))
        spec[hook_dataset(name, MEAN)] = spec[hook_dataset(name, STD)] = ("float64", (width,))
    return spec
