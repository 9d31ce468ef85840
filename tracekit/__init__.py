"""tracekit: run language models over real tasks and record what happens inside, as datasets that can be trusted.

Public names are loaded when they are first used; importing tracekit, and reading a dataset with it, loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tracekit.version import __version__

if TYPE_CHECKING:
    from tracekit.model.patching import patch
    from tracekit.read.loading import load_dataset, wds_decoder
    from tracekit.read.store import Sample, TraceStore
    from tracekit.read.verifier import verify

__all__ = ["Sample", "TraceStore", "__version__", "load_dataset", "patch", "verify", "wds_decoder"]

_HOMES = {
    "Sample": "tracekit.read.store",
    "TraceStore": "tracekit.read.store",
    "load_dataset": "tracekit.read.loading",
    "patch": "tracekit.model.patching",
    "verify": "tracekit.read.verifier",
    "wds_decoder": "tracekit.read.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tracekit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
