"""The bank file, read: open, look up rows, map vectors, verify. `writer` fills it; docs/bank_format.md describes it.

Every byte of a finished file is under a checksum: vectors and norms by block, all the rest (HDF5 structure, tokens, plan)
by one digest that stands in the user block before the HDF5 data and is checked before HDF5 parses anything.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import xxhash
from jaxtyping import Float

from tl_latentlens.errors import BankCorruptError, BankError, InvalidInputError, UnknownHookError
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
class Row:
    """One contextual token of a bank: a token in its prompt."""

    row: int
    token_id: int
    token: str
    position: int
    prompt_index: int
    bank: "Bank"

    @property
    def prompt_tokens(self) -> list[str]:
        """The strings of the prompt's tokens, BOS included."""
        return [self.bank.token_string(i) for i in self.bank.prompt(self.prompt_index)]

    @property
    def prompt_text(self) -> str:
        """The prompt's text, without special tokens."""
        return self.bank.text(self.bank.prompt(self.prompt_index))

    def context(self, width: int = 80, marks: tuple[str, str] = ("«", "»")) -> str:
        """The text around the token, at most `width` characters to each side, the token between `marks`."""
        ids = self.bank.prompt(self.prompt_index)
        before, after = self.bank.text(ids[: self.position]), self.bank.text(ids[self.position + 1 :])
        bare = self.token.lstrip()
        lead = self.token[: len(self.token) - len(bare)] if bare else ""
        before = before if len(before) <= width else "…" + before[len(before) - width :]
        after = after if len(after) <= width else after[:width] + "…"
        return f"{before}{lead}{marks[0]}{bare or self.token}{marks[1]}{after}".replace("\n", " ").strip()


class Bank:
    """A finished bank file. Opening reads metadata only; vectors are memory-mapped when asked for."""

    def __init__(self, path: Path, layout: "Layout") -> None:
        """Use `Bank.open`."""
        self.path = path
        self._layout = layout

    @classmethod
    def open(cls, path: str | Path) -> "Bank":
        """Open a finished bank.

        Raises:
            BankError: No such file, or not a bank, or a bank that is still being built.
            BankCorruptError: The file's metadata is not what was written.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            partial = partial_path(path)
            hint = f"; {partial.name} is there: the same build call resumes it" if partial.exists() else ""
            raise BankError(f"no bank file at {path}{hint}")
        if not read_user_block(path)["complete"]:
            raise BankError(f"{path} is an unfinished bank; run the same build call again to resume it")
        return cls(path, Layout(path))

    def __enter__(self) -> "Bank":
        """Return the bank itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Let go of the memory maps."""
        self.close()

    def __repr__(self) -> str:
        return f"Bank({str(self.path)!r}: {self.n_rows} rows, {len(self.hook_names)} hook names, {self.model_info.name})"

    def close(self) -> None:
        """Let go of the memory maps; the bank maps them again if it is used again."""
        self._layout.close()

    @property
    def n_rows(self) -> int:
        """Contextual tokens in the bank; the same rows for every hook name."""
        return self.plan.n_rows

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The banked hook names, in the order they were asked for."""
        return tuple(self._layout.widths)

    @property
    def model_info(self) -> ModelInfo:
        """The model that filled the bank."""
        return self._layout.model

    @property
    def dtype(self) -> str:
        """How the vectors are stored: "float16", "bfloat16" or "float32"."""
        return self._layout.dtype

    @property
    def versions(self) -> dict[str, str]:
        """Package versions that built the bank."""
        return self._layout.versions

    @property
    def plan(self) -> Plan:
        """Which rows were kept, and of which prompts; the tokens are memory-mapped."""
        return self._layout.plan

    @property
    def plan_digest(self) -> str:
        """sha256 of the plan: banks with the same digest have the same rows."""
        return self._layout.plan_digest

    def d(self, hook_name: str) -> int:
        """Width of a hook name's vectors."""
        self._require(hook_name)
        return self._layout.widths[hook_name]

    def vectors(self, hook_name: str) -> Float[np.ndarray, "rows d"]:
        """The unit-length vectors of a hook name, memory-mapped; writing to them does not reach the file."""
        self._require(hook_name)
        stored = self._layout.map(f"hooks/{hook_name}/vectors")
        return stored.view(DTYPES[self.dtype][0])

    def norms(self, hook_name: str) -> Float[np.ndarray, " rows"]:
        """Length of each activation before it was normalised, float32, memory-mapped."""
        self._require(hook_name)
        return self._layout.map(f"hooks/{hook_name}/norms")

    def mean(self, hook_name: str) -> Float[np.ndarray, " d"]:
        """Mean of the unit-length vectors, per dimension, float64."""
        self._require(hook_name)
        return np.array(self._layout.map(f"hooks/{hook_name}/mean"))

    def std(self, hook_name: str) -> Float[np.ndarray, " d"]:
        """Standard deviation of the unit-length vectors, per dimension, float64 (divided by n)."""
        self._require(hook_name)
        return np.array(self._layout.map(f"hooks/{hook_name}/std"))

    def row(self, row: int) -> Row:
        """Look up one row.

        Raises:
            InvalidInputError: `row` is outside [0, n_rows).
        """
        row = int(row)
        if not 0 <= row < self.n_rows:
            raise InvalidInputError(f"got row {row}; the bank has rows 0 to {self.n_rows - 1}")
        at = int(self.plan.row_tokens[row])
        prompt = int(np.searchsorted(self.plan.prompt_starts, at, side="right")) - 1
        token = int(self.plan.tokens[at])
        return Row(row, token, self.token_string(token), at - int(self.plan.prompt_starts[prompt]), prompt, self)

    def prompt(self, prompt_index: int) -> list[int]:
        """Token ids of a prompt, BOS included."""
        start, end = self.plan.prompt_starts[prompt_index : prompt_index + 2]
        return self.plan.tokens[start:end].tolist()

    def token_string(self, token_id: int) -> str:
        """The text of one token; bytes that are no whole character show as the replacement character."""
        return self._token_bytes[token_id].decode("utf-8", errors="replace")

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens in sequence, special tokens left out."""
        special = self._layout.special_ids
        return b"".join(self._token_bytes[i] for i in token_ids if i not in special).decode("utf-8", errors="replace")

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """The stored prompts and activations by which the model is known again."""
        starts = self._layout.map("fingerprint/prompt_starts").tolist()
        tokens = self._layout.map("fingerprint/tokens").tolist()
        prompts = tuple(tuple(tokens[a:b]) for a, b in itertools.pairwise(starts))
        return Fingerprint(prompts, {n: np.array(self._layout.map(f"fingerprint/{n}")) for n in self.hook_names})

    def verify(self, hook_names: Sequence[str] | None = None) -> None:
        """Check every checksum, metadata and vectors.

        Raises:
            BankCorruptError: Naming the hook name and the block that differ.
        """
        check_metadata(self.path)
        for name in self.hook_names if hook_names is None else hook_names:
            self._require(name)
            # Mapped anew: `vectors` hands out private copies that the user may have written to.
            parts = (self._layout.map_file(f"hooks/{name}/{part}") for part in ("vectors", "norms", "checksums"))
            vectors, norms, expected = parts
            for block, (first, last) in enumerate(self.blocks()):
                if block_checksum(vectors[first:last], norms[first:last]) != int(expected[block]):
                    raise BankCorruptError(
                        f"{self.path}: hook name {name!r}, block {block} (rows {first} to {last - 1}) does not match its "
                        "checksum; the file was changed or the disk is failing: copy the bank again or rebuild it"
                    )

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First row and end of each checksummed block."""
        starts = self._layout.map("block_starts").tolist()
        return itertools.pairwise(starts)

    @cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        ids, starts = self._layout.map("token_ids").tolist(), self._layout.map("token_byte_starts").tolist()
        blob = self._layout.map("token_bytes").tobytes()
        return {i: blob[a:b] for i, a, b in zip(ids, starts[:-1], starts[1:], strict=True)}

    def _require(self, hook_name: str) -> None:
        if hook_name not in self._layout.widths:
            raise UnknownHookError(f"the bank {self.path} has no hook name {hook_name!r}; it has {list(self.hook_names)}")


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


def as_json(record: Any) -> str:
    """A dataclass as JSON, for an attribute."""
    return json.dumps(asdict(record))
