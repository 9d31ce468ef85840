"""Settings of judges, and of the stages that a task with judges has."""

from pathlib import Path
from typing import Annotated

import msgspec

from tracekit.config import RunConfig
from tracekit.format.layout import Layout

__all__ = ["JUDGED_BY", "JudgeConfig", "answers_layout"]

JUDGED_BY = ("judge", "client", "output.dataset_config", "model.device", "model.dtype", "model.quantize")
"""Settings that the stage `evaluate` reads: a judge that is a local model is loaded as the tested model is."""


class JudgeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who judges the answers."""

    judge: str = "rules"
    """`rules` (phrases, no model), or a model that is asked: Hub id, folder, `.gguf` file, endpoint."""
    judge_max_new_tokens: Annotated[int, msgspec.Meta(ge=8)] = 64
    """Longest reply of a judge; the JSON object takes about ten. A model that reasons first needs some thousand."""


def answers_layout(config: RunConfig, task: str) -> Layout:
    """The configuration that a run writes, or has written."""
    assert config.output.out is not None, "stages are called with a folder"
    return Layout(Path(config.output.out), config.output.dataset_config or task)
