"""The environment of all tests. Their fixtures, which import torch and the package, are in `support/fixtures.py`."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the kernels and commands that tests start

# Processes that tests start import `support` too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])


def pytest_configure(config: pytest.Config) -> None:
    """Import the fixtures, but not where this process only hands the tests out to workers, which wait for it."""
    hands_out = bool(getattr(config.option, "tx", None)) and not hasattr(config, "workerinput")
    if not hands_out or config.option.collectonly:
        config.pluginmanager.import_plugin("support.fixtures")
