"""Shards of a plan on a cluster: workers on Ray, which starts them, starts them anew, and carries what they say."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracekit.cluster.ray_engine import RayEngine

__all__ = ["RayEngine"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tracekit.cluster' has no attribute {name!r}")
    from tracekit.cluster.ray_engine import RayEngine

    return RayEngine
