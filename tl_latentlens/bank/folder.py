"""A folder of bank files that are one bank together: shards by rows, files by hook name, or both.

It reads as one `BankFile` does, with the rows of the shards one after the other. Which file is which part stands in the files;
their names do not matter.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import xxhash

from tl_latentlens.bank.file import BankFile
from tl_latentlens.bank.format import BankMetadata, ShardRecord
from tl_latentlens.bank.moments import pooled_mean_and_std
from tl_latentlens.corpus.plan import Plan
from tl_latentlens.errors import BankCorruptError, BankError
from tl_latentlens.model.fingerprint import Fingerprint

_MOST_NAMED = 8  # parts that an error names


class BankFolder:
    """The files of one bank.

    Attributes:
        path: Of the folder.
        files: The files, by row and then by name.
        metadata: As one file with all rows and hook names would have it.
        widths: Hook name → width of its vectors.
    """

    path: Path
    files: list[BankFile]
    metadata: BankMetadata
    widths: Mapping[str, int]
    first_prompt = 0
    _parts: dict[str, list[BankFile]]
    _norms: dict[str, np.ndarray]

    def __init__(self, path: Path) -> None:
        """Open every .h5 file in the folder, and in the folders in it.

        Raises:
            BankError: No bank file, files that are not of one bank, or a bank of which parts lack; the message names them.
            BankCorruptError: A file is not what was written.
        """
        self.path = path
        self._norms = {}
        files = [BankFile(file) for file in sorted(path.rglob("*.h5"))]
        if not files:
            raise BankError(f"no bank file in the folder {path}: it holds no .h5 file{_begun_note(path)}")
        for file in files:
            if not file.head.complete:
                raise BankError(f"{file.path} is an unfinished bank; run the same build call again to resume it")
        for file in files[1:]:
            _require_one_bank(files[0], file)
        self.files = sorted(files, key=lambda file: (_place(file).first_row, _place(file).index))
        names = list(dict.fromkeys(name for file in files for name in file.widths))
        self._parts = {name: [file for file in self.files if name in file.widths] for name in names}
        self._require_all_parts()
        self.widths = MappingProxyType({name: parts[0].widths[name] for name, parts in self._parts.items()})
        n_heads = {name: n for file in self.files for name, n in file.metadata.n_heads.items()}
        plan_digest = _place(files[0]).plan_digest
        self.metadata = replace(
            self.files[0].metadata, hook_names=tuple(names), n_heads=n_heads, plan_digest=plan_digest, shard=None
        )

    def parts_of(self, hook_name: str) -> list[tuple[int, BankFile]]:
        """The files that hold rows of a hook name, and the row at which each begins."""
        parts = self._parts[hook_name]
        return [(_place(file).first_row, file) for file in parts if file.plan.n_rows]

    @property
    def digest(self) -> str:
        """Of all that the files hold but vectors and norms, which their checksums cover."""
        return xxhash.xxh3_128_hexdigest("".join(file.digest for file in self.files).encode())

    @property
    def is_in_place(self) -> bool:
        """True where the files are still those that were opened."""
        return all(file.is_in_place for file in self.files)

    def check(self) -> None:
        """Compare everything but vectors and norms with the digests, and the whole with the plan that it is of.

        Raises:
            BankCorruptError: They differ.
        """
        for file in self.files:
            file.check()
        if self.plan.digest != self.metadata.plan_digest:
            raise BankCorruptError(f"{self.path}: its parts together are not the plan they name; build them again")

    def blocks(self) -> list[tuple[int, int]]:
        """First row and end of each block, of the first hook name where they differ."""
        parts = self.parts_of(next(iter(self.widths)))
        return [(first + a, first + b) for first, file in parts for a, b in file.blocks()]

    @cached_property
    def plan(self) -> Plan:
        """The plan of the whole, in memory where several files hold it."""
        parts = self._parts[next(iter(self.widths))]
        if len(parts) == 1:
            return parts[0].plan
        plans = [file.plan for file in parts]
        first_tokens = np.cumsum([0, *(len(plan.tokens) for plan in plans)])
        return Plan(
            np.concatenate([plan.tokens for plan in plans]),
            np.concatenate([[0], *(plan.prompt_starts[1:] + first for plan, first in zip(plans, first_tokens, strict=False))]),
            np.concatenate([plan.row_tokens + first for plan, first in zip(plans, first_tokens, strict=False)]),
            self.metadata.plan,
            self.metadata.n_truncated,
        )

    @property
    def fingerprint(self) -> Fingerprint:
        """The stored prompts and activations by which the model is known again."""
        activations = {name: parts[0].fingerprint.activations[name] for name, parts in self._parts.items()}
        return Fingerprint(self.files[0].fingerprint.prompts, activations, self.metadata.n_heads)

    def map_vectors(self, hook_name: str) -> np.ndarray:
        """The vectors of a hook name: memory-mapped where one file holds them, else copied into memory."""
        return _joined([file.map_vectors(hook_name) for _, file in self.parts_of(hook_name)])

    def map_norms(self, hook_name: str) -> np.ndarray:
        """The norms of a hook name, as `map_vectors`."""
        if hook_name not in self._norms:
            self._norms[hook_name] = _joined([file.map_norms(hook_name) for _, file in self.parts_of(hook_name)])
        return self._norms[hook_name]

    def moments(self, hook_name: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the vectors of a hook name, per dimension, float64."""
        files = [file for _, file in self.parts_of(hook_name)]
        if len(files) == 1:
            return files[0].moments(hook_name)
        means, stds = (np.stack(moments) for moments in zip(*(file.moments(hook_name) for file in files), strict=True))
        return pooled_mean_and_std([file.plan.n_rows for file in files], means, stds)

    def map_token_bytes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The token ids of the corpus, where the bytes of each begin (and the end), and the bytes."""
        return self._token_bytes

    @cached_property
    def _token_bytes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        bytes_of: dict[int, bytes] = {}
        for file in self._parts[next(iter(self.widths))]:
            ids, starts, all_bytes = file.map_token_bytes()
            joined = all_bytes.tobytes()
            for token_id, (start, end) in zip(ids.tolist(), pairwise(starts.tolist()), strict=True):
                bytes_of.setdefault(token_id, joined[start:end])
        ids = sorted(bytes_of)
        starts = np.cumsum([0, *(len(bytes_of[token_id]) for token_id in ids)])
        return np.array(ids, np.int32), starts, np.frombuffer(b"".join(bytes_of[token_id] for token_id in ids), np.uint8)

    def close(self) -> None:
        """Drop the memory maps."""
        for file in self.files:
            file.close()
        self._norms.clear()
        self.__dict__.pop("plan", None)

    def _require_all_parts(self) -> None:
        lacking = list(self._lacking_parts())
        if lacking:
            more = f" and {len(lacking) - _MOST_NAMED} more" if len(lacking) > _MOST_NAMED else ""
            raise BankError(
                f"the bank {self.path} is not complete; it lacks {', '.join(lacking[:_MOST_NAMED])}{more}"
                f"{_begun_note(self.path)}. Run the same build call for each of these"
            )

    def _lacking_parts(self) -> Iterator[str]:
        """The parts that no file holds.

        Raises:
            BankError: Two files hold the same part, or parts do not follow each other.
        """
        by_shards: dict[frozenset[int], list[str]] = {}
        for name, parts in self._parts.items():
            places = [_place(file) for file in parts]
            n, indices = places[0].n, [place.index for place in places]
            for (file, place), (next_file, following) in pairwise(zip(parts, places, strict=True)):
                if place.n != following.n:
                    raise BankError(f"{file.path} is of {place.n} shards, {next_file.path} of {following.n}; keep one set")
                if place.index == following.index:
                    raise BankError(f"{file.path} and {next_file.path} hold the same part of the bank; keep one of them")
            missing = frozenset(range(n)) - set(indices)
            by_shards.setdefault(missing, []).append(name)
            if not missing:
                ends = [place.first_row + file.plan.n_rows for file, place in zip(parts, places, strict=True)]
                if [place.first_row for place in places] != [0, *ends[:-1]] or ends[-1] != places[0].n_rows:
                    raise BankError(
                        f"the shards of {self.path} do not follow each other: {[str(f.path) for f in parts[:_MOST_NAMED]]}"
                    )
        for missing, names in by_shards.items():
            of_names = "" if len(by_shards) == 1 else f" of {', '.join(names)}"
            n = _place(self._parts[names[0]][0]).n
            yield from (f"shard {index} of {n}{of_names}" for index in sorted(missing))


def _place(file: BankFile) -> ShardRecord:
    """The place of a file's rows in the whole bank."""
    plan = file.plan
    whole = ShardRecord(0, 1, 0, 0, plan.n_rows, plan.n_prompts, file.metadata.plan_digest)
    return file.metadata.shard or whole


def _require_one_bank(first: BankFile, other: BankFile) -> None:
    """Check that two files are of one bank.

    Raises:
        BankError: They are not; the message says in what they differ.
    """
    a, b = first.metadata, other.metadata
    pairs: dict[str, tuple[Any, Any]] = {
        "plans": (_place(first).plan_digest, _place(other).plan_digest),
        "plan settings": (a.plan, b.plan),
        "models": (a.model, b.model),
        "dtypes": (a.dtype, b.dtype),
        "special tokens": (a.special_ids, b.special_ids),
        "hooks of the user": (a.hooked, b.hooked),
    }
    shared = [name for name in first.widths if name in other.widths]
    if shared:
        pairs["batch_tokens"] = a.batch_tokens, b.batch_tokens
    differing = [f"{name}: {x} and {y}" for name, (x, y) in pairs.items() if x != y]
    if not differing and first.fingerprint.prompts != other.fingerprint.prompts:
        differing = ["fingerprint prompts"]
    if not differing and not all(first.fingerprint.agrees(other.fingerprint, name, a.model.dtype) for name in shared):
        differing = ["activations of the model: other weights under the same name"]
    if differing:
        raise BankError(
            f"{first.path} and {other.path} are not of one bank; they have different {'; '.join(differing)}. Keep the files of "
            "one bank in a folder of their own, or give several banks of one model as a list of paths"
        )


def _begun_note(path: Path) -> str:
    begun = sorted(file.name for file in path.rglob("*.h5.partial"))
    return f" (begun: {', '.join(begun[:_MOST_NAMED])}{'…' * (len(begun) > _MOST_NAMED)})" if begun else ""


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
