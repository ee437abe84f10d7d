"""The embedded model as each class, and what banks would keep of it; tests do not change either."""

from typing import Any

import pytest
from support.fingerprints import HEADS, OTHERS, RESIDUAL, Known, know
from support.models import available_kinds

import tl_latentlens as tll


@pytest.fixture(scope="session")
def demo_models() -> dict[str, Any]:
    """The embedded model as each available class."""
    return {kind: tll.load_demo_model(kind) for kind in available_kinds()}


@pytest.fixture(scope="session")
def demo_known(demo_models: dict[str, Any]) -> dict[str, Known]:
    """What banks of many hook names would keep of it."""
    return {kind: know(model, [*RESIDUAL, *HEADS, *OTHERS]) for kind, model in demo_models.items()}
