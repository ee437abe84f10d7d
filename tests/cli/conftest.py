"""A command run in the process of the tests."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tl_latentlens import cli
from tl_latentlens.model import loading
from tl_latentlens.model.load_settings import LoadSettings
from tl_latentlens.model.source import DEMO_MODEL

load_from_disk = loading._load


@cache
def load_demo(kind: str) -> Any:
    return load_from_disk("demo", DEMO_MODEL, kind, LoadSettings())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], few_random_directions: None):
    """Run a command in this process: (exit code, stdout, stderr). The embedded model is loaded once for all."""

    def load(name: str, folder: Path, kind: str, settings: LoadSettings) -> Any:
        is_demo = folder == DEMO_MODEL and settings in (LoadSettings(), LoadSettings(dtype=torch.float32))
        return load_demo(kind) if is_demo else load_from_disk(name, folder, kind, settings)

    monkeypatch.setattr(loading, "_load", load)

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tl-latentlens", *arguments])
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr(cli.console, "width", 160)
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        code = exit_info.value.code
        captured = capsys.readouterr()
        return 0 if code is None else int(code), captured.out, captured.err

    return command
