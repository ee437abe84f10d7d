"""Shards: the blocks of one plan, shared out among processes that each write a bank file of their own."""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from tl_latentlens.bank.format import MAX_SHARDS, ModelRecord, ShardRecord
from tl_latentlens.bank.head import Head, read_head
from tl_latentlens.corpus.plan import Plan, PlanSettings, part_of_plan, tokens_up_to
from tl_latentlens.errors import BankError, InvalidInputError

_SPEC = re.compile(r"(\d{1,6})/(\d{1,6})")
_FILE_NAME = re.compile(r"shard-\d{5,6}-of-\d{5,6}\.h5(\.partial)?$")
_TORCHRUN, _SLURM = ("RANK", "WORLD_SIZE"), ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")


@dataclass(frozen=True)
class Shard:
    """One shard of several.

    Attributes:
        index: Its number, from 0.
        n: How many there are.
    """

    index: int
    n: int

    def __str__(self) -> str:
        return f"{self.index}/{self.n}"

    @property
    def file_name(self) -> str:
        """The name of its file in the folder of the bank."""
        return f"shard-{self.index:05}-of-{self.n:05}.h5"


def as_shard(shard: tuple[int, int] | str) -> Shard:
    """The shard that a user names: a pair (i, n), or the text "i/n", counted from 0.

    Raises:
        InvalidInputError: Something else, or an `i` outside [0, n).
    """
    pair: object = shard
    if isinstance(shard, str) and (match := _SPEC.fullmatch(shard.strip())):
        pair = int(match[1]), int(match[2])
    if isinstance(pair, tuple | list) and len(pair) == 2 and all(type(number) is int for number in pair):
        index, n = pair
        if 0 <= index < n <= MAX_SHARDS:
            return Shard(index, n)
    raise InvalidInputError(f"got shard={shard!r}; expected (i, n) or 'i/n' with i from 0 to n - 1, as in (3, 64) or 3/64")


def shard_from_environment(path: Path) -> Shard | None:
    """The shard that torchrun (RANK, WORLD_SIZE) or a SLURM array says; None where neither does, or there is one process alone.

    The tasks of an array may be numbered from any number on, in any step.

    Args:
        path: Of the bank that is to be built.

    Raises:
        InvalidInputError: They do not say one shard, or `path` is a file, into which several processes would write.
    """
    shard = _shard_from_environment()
    if shard is not None and path.suffix == ".h5":
        raise InvalidInputError(
            f"got the file {path} in process {shard.index} of {shard.n} (as torchrun or SLURM says); expected a folder, in "
            f"which each process writes its shard: {path.with_suffix('')}. For the whole bank in this process: shard=(0, 1), "
            "or --shard 0/1"
        )
    return shard


def _shard_from_environment() -> Shard | None:
    rank, world_size = _numbers(*_TORCHRUN)
    task, n_tasks = _numbers(*_SLURM)
    if n_tasks > 1 and world_size > 1:
        raise InvalidInputError(
            f"torchrun says rank {rank} of {world_size}, and SLURM task {task} of {n_tasks}; name the shard: shard=(i, n), or "
            "--shard i/n"
        )
    if n_tasks > 1:
        first, step = (_number(f"SLURM_ARRAY_TASK_{part}", default) for part, default in (("MIN", 0), ("STEP", 1)))
        index, rest = divmod(task - first, max(1, step))
        if rest or not 0 <= index < n_tasks:
            raise InvalidInputError(
                f"SLURM task {task} of {n_tasks} tasks from {first} on has no place among the shards (an array with gaps, as "
                "--array=3,7, has none); name the shard: shard=(i, n), or --shard i/n"
            )
        return Shard(index, n_tasks)
    if world_size > 1:
        return as_shard((rank, world_size))
    return None


def _numbers(index: str, n: str) -> tuple[int, int]:
    return _number(index, 0), _number(n, 1)


def _number(variable: str, default: int) -> int:
    value = os.environ.get(variable, "").strip() or str(default)
    if not re.fullmatch(r"-?\d{1,9}", value):
        raise InvalidInputError(
            f"the environment has {variable}={value!r}; expected a whole number: name the shard, or unset it"
        )
    return int(value)


def shard_file(path: Path, shard: Shard) -> Path:
    """The file of a shard: in the folder `path`, which is made, or `path` itself where it ends in .h5.

    Raises:
        BankError: The folder cannot be made.
    """
    if path.suffix == ".h5":
        return path
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise BankError(f"the folder {path} for the shards of the bank cannot be made: {error}") from error
    return path / shard.file_name


def batch_tokens_of_shards(path: Path) -> int | None:
    """The batch_tokens of the shards that stand beside `path`; None where there are none."""
    head = _head_of_another_shard(path)
    return None if head is None else head.metadata.batch_tokens


def require_fitting_shards(
    path: Path, record: ModelRecord, shard: ShardRecord | None, settings: PlanSettings, dtype: str, batch_tokens: int
) -> None:
    """Check that a shard will be of one bank with the shards that stand beside it.

    Args:
        path: Of its file.
        record: The model that is to fill it.
        shard: Its place; None: it is the whole, and nothing is checked.
        settings: Of the plan.
        dtype: How its vectors are to be stored.
        batch_tokens: Most tokens of one batch.

    Raises:
        BankError: It will not; the message says in what they differ.
    """
    head = _head_of_another_shard(path)
    if shard is None or head is None or head.metadata.shard is None or head.metadata.hook_names != tuple(record.widths):
        return
    metadata, place = head.metadata, head.metadata.shard
    pairs = {
        "number of shards": (place.n, shard.n),
        "plan settings": (metadata.plan, settings),
        "corpus or its tokens": (place.plan_digest, shard.plan_digest),
        "dtype": (metadata.dtype, dtype),
        "batch_tokens": (metadata.batch_tokens, batch_tokens),
        "model": (metadata.model, record.info),
    }
    differing = [f"{name}: there {there}, in this call {here}" for name, (there, here) in pairs.items() if there != here]
    if differing:
        raise BankError(
            f"{path.parent} has shards of another bank; they differ in {'; '.join(differing)}. Repeat the old call, or choose "
            "another folder"
        )


def _head_of_another_shard(path: Path) -> Head | None:
    """The head of one of the shards, finished or begun, in the folder of a shard that is named as they are."""
    if not _FILE_NAME.match(path.name):
        return None
    for file in sorted(path.parent.glob("shard-*.h5*")):
        if _FILE_NAME.match(file.name) and not file.name.startswith(path.name):
            with contextlib.suppress(BankError, OSError), file.open("rb") as opened:
                return read_head(opened)
    return None


def shard_of_plan(plan: Plan, starts: Int[np.ndarray, " blocks_and_end"], shard: Shard) -> tuple[Plan, ShardRecord | None]:
    """The part of a plan that a shard builds, and the record of its place; no record where it is the whole.

    Blocks are shared out in order, so that each shard has about as many tokens to run. All prompts are in one shard or another,
    those without rows too. With more shards than blocks some have no rows.

    Args:
        plan: Of the whole bank.
        starts: Its blocks, from `cut_blocks`.
        shard: Which part.
    """
    if shard.n == 1:
        return plan, None
    first_block, end_block = _block_span(tokens_up_to(plan, starts[1:]), shard)
    first_row, end_row = int(starts[first_block]), int(starts[end_block])
    first_prompt, end_prompt = _prompt_at(plan, first_row) if shard.index else 0, _prompt_at(plan, end_row)
    part = part_of_plan(plan, (first_prompt, end_prompt))
    place = {"index": shard.index, "n": shard.n, "first_row": first_row, "first_prompt": first_prompt}
    return part, ShardRecord(plan_digest=plan.digest, n_rows=plan.n_rows, n_prompts=plan.n_prompts, **place)


def _prompt_at(plan: Plan, row: int) -> int:
    """The prompt of a row, or the end of the prompts."""
    return int(plan.row_prompts[row]) if row < plan.n_rows else plan.n_prompts


def _block_span(tokens_at_ends: Int[np.ndarray, " blocks"], shard: Shard) -> tuple[int, int]:
    """First block of a shard, and the end: each shard ends at the block whose end is nearest to its share of the tokens.

    Every shard has a block where there are as many.
    """
    n_blocks = len(tokens_at_ends)
    shares = tokens_at_ends[-1] * np.arange(shard.n + 1) / shard.n
    edges = np.r_[0, tokens_at_ends]
    after = np.clip(np.searchsorted(edges, shares), 1, n_blocks)
    ends = np.where(shares - edges[after - 1] < edges[after] - shares, after - 1, after)
    ends[0], ends[-1] = 0, n_blocks
    places = np.arange(shard.n + 1)
    if shard.n <= n_blocks:
        ends = np.maximum.accumulate(ends - places) + places  # one block each at least
        ends = np.minimum(ends, n_blocks - (shard.n - places))
    return int(ends[shard.index]), int(ends[shard.index + 1])
