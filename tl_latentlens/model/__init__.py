"""All that the package asks of a TransformerLens model, both classes alike."""

from tl_latentlens.model.direction import is_bidirectional
from tl_latentlens.model.loading import DEMO_MODEL

__all__ = ["DEMO_MODEL", "is_bidirectional"]
