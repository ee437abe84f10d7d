"""The golden file, to be forged."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.forge import read_all
from support.golden import GOLDEN


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A copy of the golden file."""
    return Path(shutil.copyfile(GOLDEN, tmp_path / "a.h5"))


@pytest.fixture(scope="module")
def original() -> dict[str, Any]:
    """Everything that can be read of the golden file."""
    return read_all(GOLDEN)
