"""The connection to a Ray cluster (extra "ray")."""

import os
from typing import Any

from tl_latentlens.errors import InvalidInputError, MissingExtraError

MAX_RETRIES = 5  # of a task whose worker died; one that always dies, for want of memory, would be tried for ever


def connected_ray(address: str | None = None) -> Any:
    """The module `ray`, connected to a cluster.

    Args:
        address: Of the cluster; "auto": the one that runs on this machine; None: that of RAY_ADDRESS, or one that is started
            here.

    Raises:
        MissingExtraError: Ray is not installed.
        InvalidInputError: There is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("Ray is not installed; pip install 'tl-latentlens[ray]'") from error
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of our own reports to nobody
        joins = bool(address or os.environ.get("RAY_ADDRESS"))
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                configure_logging=False,
                include_dashboard=None if joins else False,
            )
        except (ConnectionError, ValueError) as error:
            raise InvalidInputError(f"got the Ray address {address!r}, where no cluster answers: {error}") from error
    return ray
