"""The task of the logging server: requests, and what the model answered."""

from typing import Any

from tracekit.config import AnswerCaptureConfig, PromptedConfig
from tracekit.errors import ConfigError
from tracekit.records import Number, answered
from tracekit.serve.record import ServeRecord
from tracekit.task import Task

__all__ = ["TASK", "ServeConfig"]


class ServeConfig(PromptedConfig, frozen=True, kw_only=True):
    """What a server records."""

    capture: AnswerCaptureConfig = AnswerCaptureConfig()
    """What is recorded."""


def _refuse(*given: Any) -> Any:
    raise ConfigError("samples of a server come from its clients; run `tracekit serve`")


TASK = Task(
    name="serve",
    title="Requests that a logging server answered, in the order in which they were answered.",
    category="text-generation",
    config=ServeConfig,
    record=ServeRecord,
    examples=_refuse,
    tracer=_refuse,
    card="serve.md.j2",
    outcome=answered(
        asked="messages",
        same=["prompt"],
        shard="shard",
        drawn_are_extra=False,
        numbers=[*answered().numbers, Number(name="truncated_share", field="is_truncated")],
    ),
)
