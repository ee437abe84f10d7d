"""Another model than the bank's is refused, and read with a warning where that is allowed."""

import warnings
from typing import Any

import pytest
import torch
from support.fingerprints import RESIDUAL
from support.models import TEXTS
from typer.testing import CliRunner

import tl_latentlens as tll
from tl_latentlens import cli


@pytest.fixture(scope="module")
def other_bank(tmp_path_factory: pytest.TempPathFactory) -> tll.Bank:
    """A bank of the embedded model with another embedding."""
    model = tll.load_demo_model()
    with torch.no_grad():
        model.W_E.mul_(1.5)
    return tll.build_bank(model, TEXTS, tmp_path_factory.mktemp("other") / "a.h5", hook_names=RESIDUAL, progress=False)


def test_a_result_is_refused_and_read_when_allowed(demo_model: Any, other_bank: tll.Bank) -> None:
    text = "The river bank"
    strict = tll.latentlens_hooks(tll.ContextualIndex(other_bank, device="cpu"))
    demo_model.run_with_hooks(text, fwd_hooks=strict)
    for _ in range(2):  # every time, not only the first
        with pytest.raises(tll.ModelMismatchError, match=r"the bank is of demo_model .* its weights are others") as refused:
            _ = strict.result
    lax = tll.latentlens_hooks(tll.ContextualIndex(other_bank, device="cpu", allow_mismatch=True))
    demo_model.run_with_hooks(text, fwd_hooks=lax)
    with pytest.warns(UserWarning, match="the bank is of demo_model") as warned:
        result = lax.result
    assert [str(w.message) for w in warned] == [str(refused.value)]
    assert len(result.cell(RESIDUAL[0], -1).neighbors) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lax.result is result  # once is enough


def test_the_command_reads_when_allowed(other_bank: tll.Bank) -> None:
    command = ["decode", str(other_bank.path), "The river bank", "--word", "bank"]
    refused = CliRunner().invoke(cli.app, command)
    assert isinstance(refused.exception, tll.ModelMismatchError)
    with pytest.warns(UserWarning, match="the bank is of demo_model") as warned:
        allowed = CliRunner().invoke(cli.app, [*command, "--allow-mismatch"])
    assert [str(w.message) for w in warned] == [str(refused.exception)]
    assert allowed.exit_code == 0
    assert "The river «bank»" in allowed.output
