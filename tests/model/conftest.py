"""What banks would keep of the embedded model."""

from typing import Any

import pytest
from support.fingerprints import HEADS, OTHERS, RESIDUAL, Known, know


@pytest.fixture(scope="session")
def demo_known(demo_models: dict[str, Any]) -> dict[str, Known]:
    """What banks of many hook names would keep of it."""
    return {kind: know(model, [*RESIDUAL, *HEADS, *OTHERS]) for kind, model in demo_models.items()}
