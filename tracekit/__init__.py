"""tracekit: run language models over real tasks and record what happens inside, as datasets that can be trusted.

Public names are loaded when they are first used; importing tracekit, and reading a dataset with it, loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tracekit.version import __version__

if TYPE_CHECKING:
    from tracekit.store import Sample, TraceStore
    from tracekit.verifier import verify

__all__ = ["Sample", "TraceStore", "__version__", "verify"]

_HOMES = {"Sample": "tracekit.store", "TraceStore": "tracekit.store", "verify": "tracekit.verifier"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tracekit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
