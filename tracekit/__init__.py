"""tracekit: run language models over real tasks and record what happens inside, as datasets that can be trusted.

Public names are loaded when they are first used; importing tracekit, and reading a dataset with it, loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tracekit.version import __version__

if TYPE_CHECKING:
    from tracekit.loading import load_dataset, wds_decoder
    from tracekit.patching import patch
    from tracekit.store import Sample, TraceStore
    from tracekit.verifier import verify

__all__ = ["Sample", "TraceStore", "__version__", "load_dataset", "patch", "verify", "wds_decoder"]

_HOMES = {
    "Sample": "tracekit.store",
    "TraceStore": "tracekit.store",
    "load_dataset": "tracekit.loading",
    "patch": "tracekit.patching",
    "verify": "tracekit.verifier",
    "wds_decoder": "tracekit.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tracekit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
