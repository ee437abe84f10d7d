"""What several tests need: models, banks, oracles, processes, pages."""

import pytest

# Their assertions show the values too.
pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in ("disk", "forge", "tape")))
