"""Where tensors go, and what room there is."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from tl_latentlens.errors import InvalidInputError

_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
# Of Linux' control groups, versions 2 and 1: the controller's name, the files that hold the limit and what is used, and
# what of that are pages of files, which are given up when memory is short.
_GROUP_FILES = (
    ("", "memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)


def as_device(device: torch.device | str | None) -> torch.device:
    """A device by its name; None: CUDA where there is one, else the CPU.

    Raises:
        InvalidInputError: There is no such device.
    """
    cuda = torch.cuda.is_available()
    try:
        found = torch.device(device or ("cuda" if cuda else "cpu"))
    except RuntimeError as error:
        raise InvalidInputError(f"got device={device!r}; expected 'cpu', 'cuda' or 'cuda:1', say") from error
    if found.type == "cuda" and (not cuda or (found.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count() if cuda else 0
        raise InvalidInputError(f"got device={device!r}; torch {torch.__version__} sees {count} CUDA devices; use device='cpu'")
    return found


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on a CPU no more than the limits of a container or a cluster's job leave."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for its next tensors
        return torch.cuda.mem_get_info(device)[0] + kept
    return min([psutil.virtual_memory().available, *_left_by_control_groups()])


def _left_by_control_groups() -> Iterator[int]:
    """Bytes that each of this process' control groups with a limit has left."""
    lines = _OWN_GROUPS.read_text().splitlines() if _OWN_GROUPS.exists() else []
    own = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    for controllers, limit, used, files in _GROUP_FILES:
        inner = _CONTROL_GROUPS / controllers / own.get(controllers, "").lstrip("/")
        for group in [inner, *inner.parents]:  # the limits of outer groups hold too
            try:
                pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                left = int((group / limit).read_text()) - int((group / used).read_text())
                yield left + sum(int(pages[name]) for name in files)
            except (OSError, ValueError, KeyError):  # no such group here, or "max": it has no limit
                continue
