"""A plan as a file (.plan), so that many processes that build one bank need not read and tokenize the corpus each.

It is a safetensors file of the plan's three arrays. Its metadata says the settings, the tokenizer, and a digest over all of it.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tl_latentlens.corpus.paths import absolute_path
from tl_latentlens.corpus.plan import Plan, PlanSettings
from tl_latentlens.errors import CorpusError

SUFFIX = ".plan"
_FORMAT, _VERSION = "tl-latentlens plan", 1
_ARRAYS = {"tokens": np.int32, "prompt_starts": np.int64, "row_tokens": np.int64}


@dataclass(frozen=True)
class PlanOrigin:
    """The model for which a corpus was planned.

    Attributes:
        model: Its name.
        tokenizer: sha256 over the vocabulary, hex.
        n_ctx: At which texts were cut.
    """

    model: str
    tokenizer: str
    n_ctx: int


def is_plan_path(source: Any) -> bool:
    """True for the path of a plan file, by its suffix."""
    return isinstance(source, str | Path) and Path(source).suffix == SUFFIX


def require_plan_path(path: str | Path) -> Path:
    """Check where a plan is to be written; returns the absolute path.

    Raises:
        CorpusError: The name does not end in .plan, or there is no such folder.
    """
    path = absolute_path(path)
    if path.suffix != SUFFIX:
        raise CorpusError(f"got the path {path} for a plan; expected a name that ends in {SUFFIX}: {path.with_suffix(SUFFIX)}")
    if not path.parent.is_dir():
        raise CorpusError(f"the plan {path} cannot be written: no folder {path.parent}; create it first")
    return path


def save_plan(plan: Plan, path: str | Path, origin: PlanOrigin) -> Path:
    """Write a plan; returns the path. A file that stands there is replaced when the new one is whole.

    Raises:
        CorpusError: It cannot be written, or the name does not end in .plan.
    """
    path = require_plan_path(path)
    record = {
        "format": _FORMAT,
        "version": _VERSION,
        "settings": asdict(plan.settings),
        "n_truncated": plan.n_truncated,
        "n_own_bos": plan.n_own_bos,
        "digest": plan.digest,
        "origin": asdict(origin),
    }
    arrays = {name: np.ascontiguousarray(getattr(plan, name), kind) for name, kind in _ARRAYS.items()}
    fresh = path.with_name(path.name + ".new")
    try:
        save_file(arrays, fresh, metadata={key: json.dumps(value) for key, value in record.items()})
        fresh.replace(path)
    except (OSError, SafetensorError) as error:
        fresh.unlink(missing_ok=True)
        raise CorpusError(f"the plan {path} cannot be written: {error}") from error
    return path


def load_plan(path: str | Path) -> tuple[Plan, PlanOrigin]:
    """The plan in a file, and the model for which it was made.

    Raises:
        CorpusError: No such file, none of a plan, one of a newer version, or one that is not what was written.
    """
    path = absolute_path(path)
    if not path.is_file():
        raise CorpusError(f"no plan at {path}; `tl-latentlens plan corpus.txt --model … --save {path.name}` makes one")
    try:
        with safe_open(path, framework="np") as file:
            record = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            if record.get("format") != _FORMAT:
                raise CorpusError(f"{path} is a safetensors file, and no plan; `tl-latentlens plan … --save` makes plans")
            if record["version"] != _VERSION:
                raise CorpusError(
                    f"{path} is a plan of version {record['version']}; expected {_VERSION}: upgrade tl-latentlens"
                )
            tokens, prompt_starts, row_tokens = arrays = [file.get_tensor(name) for name in _ARRAYS]
        settings, origin = _fields(PlanSettings, record["settings"]), _fields(PlanOrigin, record["origin"])
        plan = Plan(tokens, prompt_starts, row_tokens, settings, record["n_truncated"], record["n_own_bos"])
        is_whole = [array.dtype for array in arrays] == list(_ARRAYS.values()) and plan.digest == record["digest"]
    except CorpusError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"{path} cannot be read as a plan: {error}; copy it again, or plan again") from error
    if not is_whole:
        raise CorpusError(f"{path} is not what was written: its digest differs; copy it again, or plan again")
    return plan, origin


def _fields(kind: Any, values: dict[str, Any]) -> Any:
    names = [field.name for field in fields(kind)]
    if set(values) != set(names):
        raise ValueError(f"it has the settings {sorted(values)}, expected {sorted(names)}")
    return kind(**values)
