"""tracekit: run language models over real tasks and record what happens inside, as datasets that can be trusted.

Public names are loaded when they are first used; importing tracekit, and reading a dataset with it, loads no torch.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tracekit.version import __version__

if TYPE_CHECKING:
    from tracekit.cli import run_task as main
    from tracekit.config import AnswersConfig, RunConfig, ShotsConfig
    from tracekit.format.manifest import SourceInfo
    from tracekit.model.patching import patch
    from tracekit.model.prompts import Exchange
    from tracekit.read.loading import load_dataset, wds_decoder
    from tracekit.read.store import Sample, TraceStore
    from tracekit.read.verifier import verify
    from tracekit.records import AnsweredRecord, Outcome, Record, answered
    from tracekit.task import Example, Examples, Task

__all__ = [
    "AnsweredRecord",
    "AnswersConfig",
    "Example",
    "Examples",
    "Exchange",
    "Outcome",
    "Record",
    "RunConfig",
    "Sample",
    "ShotsConfig",
    "SourceInfo",
    "Task",
    "TraceStore",
    "__version__",
    "answered",
    "load_dataset",
    "main",
    "patch",
    "verify",
    "wds_decoder",
]

_HOMES = {
    "AnsweredRecord": "tracekit.records",
    "AnswersConfig": "tracekit.config",
    "Example": "tracekit.task",
    "Examples": "tracekit.task",
    "Exchange": "tracekit.model.prompts",
    "Outcome": "tracekit.records",
    "Record": "tracekit.records",
    "RunConfig": "tracekit.config",
    "Sample": "tracekit.read.store",
    "ShotsConfig": "tracekit.config",
    "SourceInfo": "tracekit.format.manifest",
    "Task": "tracekit.task",
    "TraceStore": "tracekit.read.store",
    "answered": "tracekit.records",
    "load_dataset": "tracekit.read.loading",
    "main": "tracekit.cli",
    "patch": "tracekit.model.patching",
    "verify": "tracekit.read.verifier",
    "wds_decoder": "tracekit.read.loading",
}
_OTHER_NAMES = {"main": "run_task"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tracekit' has no attribute {name!r}")
    try:
        found = getattr(import_module(_HOMES[name]), _OTHER_NAMES.get(name, name))
        fault = _hiding() if name == "main" else None  # what runs a task imports much more, later
    except (ImportError, AttributeError) as error:
        if (fault := _hiding()) is None:
            raise
        raise ImportError(fault) from error
    if fault is not None:
        raise ImportError(fault)
    return found


def _hiding() -> str | None:
    """What to say of a file beside the program that is imported in the place of a module of Python's own."""
    folder = sys.path[0] or "."
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208 - pathlib imports what may be hidden
    except OSError:
        return None
    for name in names:
        if name.endswith(".py") and name[:-3] in sys.stdlib_module_names:
            return f"{folder}/{name}: rename the file; it hides Python's own module {name[:-3]!r}"
    return None


def __dir__() -> list[str]:
    return __all__
