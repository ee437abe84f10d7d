"""Memory that is free: what the machine has, and what the control groups of a container or a job leave of it."""

from pathlib import Path

import psutil
import pytest
import torch

from tl_latentlens.search import device

GB = 2**30
VERSIONS = {
    2: ("", "0::", ("memory.max", "memory.current"), "{}_file"),
    1: ("memory", "9:memory:", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_{}_file"),
}


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(device, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 64 * GB}))


def write_group(tmp_path: Path, version: int, path: str, limit: int | str, used: int) -> None:
    """A group of which half of what is used are pages of files."""
    mount, _, names, stat = VERSIONS[version]
    folder = tmp_path / "groups" / mount / path.lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    pages = [f"{stat.format(name)} {used // 4}" for name in ("active", "inactive")]
    (folder / "memory.stat").write_text("\n".join(["anon 5", *pages]))


def free() -> int:
    return device.free_memory(torch.device("cpu"))


def test_without_control_groups_it_is_the_machine_s() -> None:
    assert free() == 64 * GB


@pytest.mark.parametrize("version", VERSIONS)
def test_a_job_has_what_its_groups_leave(tmp_path: Path, version: int) -> None:
    own = VERSIONS[version][1]
    (tmp_path / "own").write_text(f"3:cpu:/elsewhere\n{own}/job_7/step_0\n")
    write_group(tmp_path, version, "/", "max" if version == 2 else 2**63 - 4096, 60 * GB)
    write_group(tmp_path, version, "/job_7/step_0", "max" if version == 2 else 2**63 - 4096, 8 * GB)
    assert free() == 64 * GB
    write_group(tmp_path, version, "/job_7", 32 * GB, 8 * GB)
    assert free() == 28 * GB
    write_group(tmp_path, version, "/job_7/step_0", 8 * GB, 8 * GB)
    assert free() == 4 * GB
    write_group(tmp_path, version, "/job_8", GB, GB)  # another's
    assert free() == 4 * GB


@pytest.mark.parametrize("version", VERSIONS)
def test_a_container_sees_its_own_group_alone(tmp_path: Path, version: int) -> None:
    (tmp_path / "own").write_text(f"{VERSIONS[version][1]}/docker/0123\n")  # a path of the machine outside
    write_group(tmp_path, version, "/", 16 * GB, 8 * GB)
    assert free() == 12 * GB


def test_what_cannot_be_read_sets_no_limit(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/job\n")
    write_group(tmp_path, 2, "/job", 16 * GB, 8 * GB)
    (tmp_path / "groups" / "job" / "memory.stat").write_text("anon 5\n")
    assert free() == 64 * GB
    (tmp_path / "groups" / "job" / "memory.stat").unlink()
    assert free() == 64 * GB
