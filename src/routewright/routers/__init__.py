"""Routers: they look at a prompt before any model is called and estimate how good each model's answer would be."""

from routewright.routers.base import (
    ROUTER_KINDS,
    Router,
    expand,
    from_entry,
    load_router,
    make_router,
    write_card,
)

__all__ = ["ROUTER_KINDS", "Router", "expand", "from_entry", "load_router", "make_router", "write_card"]
