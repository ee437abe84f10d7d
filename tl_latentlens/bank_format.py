"""The bank file's format: user block, checksums, and where each dataset lies. docs/bank_format.md describes it.

Every byte of a finished file is under a checksum: vectors and norms by block, all the rest (HDF5 structure, tokens, plan)
by one digest that stands in the user block before the HDF5 data and is checked before HDF5 parses anything.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import xxhash
from jaxtyping import Float

from tl_latentlens.errors import BankCorruptError, BankError
from tl_latentlens.plan import Plan, PlanSettings

FORMAT, VERSION = "tl-latentlens bank", 1
# Name in the file and in the interface → (dtype of the interface, dtype in the file): HDF5 has no bfloat16.
DTYPES: dict[str, tuple[Any, Any]] = {
    "float16": (np.float16, np.float16),
    "bfloat16": (ml_dtypes.bfloat16, np.uint16),
    "float32": (np.float32, np.float32),
}
_HASH_BYTES = 1 << 24


@dataclass(frozen=True)
class ModelInfo:
    """The model a bank was made with.

    Attributes:
        name: `cfg.model_name`.
        class_name: HookedTransformer, TransformerBridge, …
        n_layers, d_model, d_vocab, n_ctx: As in TransformerLens.
        dtype: Of the weights, for instance "float32".
        centered: True where center_writing_weights removed each residual vector's mean over d_model.
        tokenizer: sha256 over the vocabulary, hex.
    """

    name: str
    class_name: str
    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int
    dtype: str
    centered: bool
    tokenizer: str


@dataclass(frozen=True)
class Fingerprint:
    """What the model gave for a few prompts: enough to know it again.

    Attributes:
        prompts: Token ids of each prompt, BOS included.
        activations: Hook name → float32 [n_tokens, d], the prompts back to back.
    """

    prompts: tuple[tuple[int, ...], ...]
    activations: dict[str, Float[np.ndarray, "tokens d"]]


@dataclass(frozen=True)
class ModelRecord:
    """What a bank stores of its model.

    Attributes:
        info: The model's name, sizes and weight processing.
        widths: Hook name → width of its vectors, in the order of the bank.
        fingerprint: What the model gave for a few prompts.
        token_bytes: Token id → the bytes of its text, for every id of the plan.
        special_ids: Ids that are no text (BOS, padding).
    """

    info: ModelInfo
    widths: dict[str, int]
    fingerprint: Fingerprint
    token_bytes: Mapping[int, bytes] = field(repr=False)
    special_ids: tuple[int, ...] = ()


class Layout:
    """Where everything stands in a bank file: attributes, and each dataset's offset, shape and dtype."""

    def __init__(self, path: Path) -> None:
        """Check the metadata digest, then read the HDF5 structure; the file is closed again."""
        self.path = path
        check_metadata(path)
        self._maps: dict[str, np.ndarray] = {}
        self._datasets: dict[str, tuple[int, tuple[int, ...], np.dtype]] = {}
        try:
            with h5py.File(path, "r", locking=False) as file:  # a writer holds a lock of its own on a partial file
                attributes = {key: json.loads(value) for key, value in file.attrs.items()}
                file.visititems(self._note)
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise BankCorruptError(f"{path} cannot be read as HDF5: {error}") from error
        self.model = ModelInfo(**attributes["model"])
        self.settings = PlanSettings(**attributes["plan"])
        self.plan_digest: str = attributes["plan_digest"]
        self.dtype: str = attributes["dtype"]
        self.versions: dict[str, str] = attributes["versions"]
        self.batch_tokens: int = attributes["batch_tokens"]
        self.n_truncated: int = attributes["n_truncated"]
        self.special_ids = frozenset(attributes["special_ids"])
        names: list[str] = attributes["hook_names"]
        self.widths = MappingProxyType({name: self._datasets[f"hooks/{name}/vectors"][1][1] for name in names})

    def _note(self, name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            self._datasets[name] = (item.id.get_offset() or 0, item.shape, item.dtype)

    @cached_property
    def plan(self) -> Plan:
        """The plan, its arrays memory-mapped."""
        tokens, starts, rows = (self.map(name) for name in ("tokens", "prompt_starts", "row_tokens"))
        return Plan(tokens, starts, rows, self.settings, self.n_truncated)

    def region(self, name: str) -> tuple[int, int]:
        """Offset and size of a dataset, in bytes from the start of the file."""
        offset, shape, dtype = self._datasets[name]
        return offset, int(np.prod(shape)) * dtype.itemsize

    def map(self, name: str) -> np.ndarray:
        """Memory-map a dataset, copy on write, once."""
        if name not in self._maps:
            self._maps[name] = self.map_file(name)
        return self._maps[name]

    def map_file(self, name: str) -> np.ndarray:
        """Memory-map a dataset anew, as it stands in the file."""
        offset, shape, dtype = self._datasets[name]
        return np.memmap(self.path, dtype, mode="c", offset=offset, shape=shape) if np.prod(shape) else np.empty(shape, dtype)

    def close(self) -> None:
        """Drop the memory maps."""
        self._maps.clear()
        self.__dict__.pop("plan", None)


def partial_path(path: Path) -> Path:
    """Where a bank is built before it is complete."""
    return path.with_name(path.name + ".partial")


def block_checksum(vectors: np.ndarray, norms: np.ndarray) -> int:
    """xxh3-64 over a block's stored vectors, then its norms."""
    digest = xxhash.xxh3_64(np.ascontiguousarray(vectors).view(np.uint8))
    digest.update(np.ascontiguousarray(norms).view(np.uint8))
    return digest.intdigest()


def user_block_size(n_hooks: int) -> int:
    """Bytes before the HDF5 data: a power of two with room for one line of JSON."""
    return 1 << max(12, (1024 + 200 * n_hooks - 1).bit_length())  # five regions a hook name, each up to 40 characters


def encode_user_block(size: int, complete: bool, unhashed: Sequence[Sequence[int]], digest: str) -> bytes:
    """One line of JSON, its checksum on a second line, zeros to `size`."""
    record = {"format": FORMAT, "version": VERSION, "size": size, "complete": complete, "digest": digest, "unhashed": unhashed}
    line = json.dumps(record).encode()
    block = (line + b"\n" + xxhash.xxh3_64_hexdigest(line).encode() + b"\n").ljust(size, b"\0")
    if len(block) > size:
        raise BankError(f"the user block needs {len(block)} bytes and has {size}: bank fewer hook names in one file")
    return block


def read_user_block(path: Path) -> dict[str, Any]:
    """The JSON of the user block, its own checksum checked.

    Raises:
        BankError: Not a bank, or of a newer version.
        BankCorruptError: A bank whose user block is damaged.
    """
    with path.open("rb") as file:
        head = file.read(1 << 20)
    if FORMAT.encode() not in head[:64]:
        raise BankError(f"{path} is not a tl-latentlens bank; make one with build_bank or `tl-latentlens build`")
    line, _, rest = head.partition(b"\n")
    if rest[:17] != xxhash.xxh3_64_hexdigest(line).encode() + b"\n":
        raise BankCorruptError(f"{path}: the user block at the start of the file is damaged; copy the bank again or rebuild it")
    record = json.loads(line)
    if record["version"] > VERSION:
        raise BankError(
            f"{path} is of bank version {record['version']}; this package reads up to {VERSION}: upgrade tl-latentlens"
        )
    if head[: record["size"]].rstrip(b"\0") != head[: len(line) + 18]:
        raise BankCorruptError(f"{path}: the user block at the start of the file is damaged; copy the bank again or rebuild it")
    return record


def metadata_digest(path: Path, start: int, unhashed: Sequence[Sequence[int]]) -> str:
    """xxh3-128 over all bytes from `start` on, but for the given (offset, size) regions, and over the file's size."""
    digest = xxhash.xxh3_128()
    size = path.stat().st_size
    with path.open("rb") as file:
        for offset, length in [*sorted(map(tuple, unhashed)), (size, 0)]:
            while start < offset:
                file.seek(start)
                chunk = file.read(min(_HASH_BYTES, offset - start))
                if not chunk:
                    break
                digest.update(chunk)
                start += len(chunk)
            start = max(start, offset + length)
    digest.update(str(size).encode())
    return digest.hexdigest()


def check_metadata(path: Path) -> None:
    """Compare the file's metadata with the digest in its user block.

    Raises:
        BankCorruptError: They differ.
    """
    record = read_user_block(path)
    if metadata_digest(path, record["size"], record["unhashed"]) != record["digest"]:
        raise BankCorruptError(
            f"{path}: metadata does not match its checksum; the file was cut or changed: copy the bank again or rebuild it"
        )
