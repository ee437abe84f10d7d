"""Devices by name, and how much of their memory is free."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.search.settings import active_settings

_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
# For Linux' control groups, versions 2 and 1: the controller's name; the files that hold the limit and the memory in use;
# and the entries of memory.stat that count pages of files, which Linux gives up when memory is short.
_GROUP_FILES = (
    ("", "memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)


def as_device(device: torch.device | str | None) -> torch.device:
    """A device by its name; None: CUDA where there is one, else the CPU.

    Raises:
        InvalidInputError: There is no such device.
    """
    has_cuda = torch.cuda.is_available()
    try:
        named = torch.device(device or ("cuda" if has_cuda else "cpu"))
    except RuntimeError as error:
        raise InvalidInputError(f"got device={device!r}; expected 'cpu', 'cuda' or 'cuda:1', say") from error
    if named.type == "cuda" and (not has_cuda or (named.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count() if has_cuda else 0
        raise InvalidInputError(f"got device={device!r}; torch {torch.__version__} sees {count} CUDA devices; use device='cpu'")
    return named


def is_asynchronous(device: torch.device) -> bool:
    """True on a device that runs its operators while the program goes on."""
    return device.type not in active_settings().synchronous_devices


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on a CPU no more than the limits of a container or a cluster's job leave."""
    if device.type == "cuda":
        # torch keeps freed memory for its next tensors.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min([psutil.virtual_memory().available, *_free_in_control_groups()])


def working_memory(device: torch.device) -> int:
    """Bytes of working memory for a search: a sixteenth of a GPU's memory, 256 MiB on a CPU."""
    return torch.cuda.get_device_properties(device).total_memory // 16 if device.type == "cuda" else 2**28


def has_room_for(n_bytes: int, device: torch.device) -> bool:
    """True where that many bytes and working memory fit in 80 % of a GPU's free memory, or in half of a CPU's."""
    return n_bytes + working_memory(device) <= (0.8 if device.type == "cuda" else 0.5) * free_memory(device)


def _free_in_control_groups() -> Iterator[int]:
    """Bytes that are free in each of this process' control groups that has a limit."""
    lines = _OWN_GROUPS.read_text().splitlines() if _OWN_GROUPS.exists() else []
    own = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    for controllers, limit, used, page_counts in _GROUP_FILES:
        inner = _CONTROL_GROUPS / controllers / own.get(controllers, "").lstrip("/")
        for group in [inner, *inner.parents]:  # the limits of outer groups hold too
            try:
                pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                unused = int((group / limit).read_text()) - int((group / used).read_text())
                yield unused + sum(int(pages[name]) for name in page_counts)
            except (OSError, ValueError, KeyError):  # no such group here, or "max": it has no limit
                continue
