"""Backends: where answers come from. One contract (`base.Backend`), several kinds.

    replay   recorded outcomes; calls no model
    local    a weights folder on this machine, through transformers

A live backend over provider APIs joins them by the same contract.
"""

from __future__ import annotations

from routewright.backends.base import Backend, Sampling
from routewright.errors import UserError
from routewright.pool import Pool

__all__ = ["Backend", "Sampling", "backend_for"]


def backend_for(pool: Pool, models: list[str], batch_size: int = 64) -> Backend:
    """The backend that can call these models of a pool, built before any call so that a gap costs nothing.

    Raises UserError for a model that has nowhere to be called.
    """
    for name in models:
        spec = pool[name]
        if not spec.path:
            live = f"only litellm_id {spec.litellm_id!r}, and live calls are not supported yet"
            raise UserError(f"{pool.source or pool.name}: model {name!r} has {live if spec.litellm_id else 'no path'}; "
                            "give it `path:`, a weights folder relative to the pool file, or leave it out "
                            "with --models")
    from routewright.backends.local import LocalBackend
    return LocalBackend(pool, batch_size=batch_size)
