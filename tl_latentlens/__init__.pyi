from tl_latentlens.api import *  # noqa: F403
from tl_latentlens.api import __all__ as __all__

__version__: str
