"""A command run in the process of the tests."""

import sys

import pytest

from tl_latentlens import cli


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], few_random_directions: None):
    """Run a command in this process: (exit code, stdout, stderr)."""

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
