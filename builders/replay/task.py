"""Replay: capture for prompts and answers that were produced elsewhere, by a serving engine or an API.

A fast engine writes the answers, this builder runs each prompt with its answer through the model once, teacher-forced,
and records what the other builders record. Forms of the source are described in builders/replay/answers.py.

    python -m builders.replay --source answers.jsonl --model Qwen/Qwen3-4B-Instruct-2507 --out traces/replayed
"""

from pathlib import Path

import msgspec

from builders.kit.columns import TableSource
from builders.kit.sources import HubSource, read_examples
from builders.replay.answers import NAMES, AnswerExample, parse_row
from builders.replay.record import ReplayRecord
from tracekit.config import PromptedConfig
from tracekit.errors import ConfigError
from tracekit.records import answered
from tracekit.task import Examples, Task, lazy

__all__ = ["TASK", "ReplayConfig"]

_SAMPLE = Path(__file__).with_name("replay.jsonl")


class ReplayConfig(PromptedConfig, frozen=True, kw_only=True):
    """Prompts and answers from elsewhere, traced."""

    source: TableSource = TableSource(split="train")
    """Which answers: --source FILE, or `sample`."""


def examples(config: ReplayConfig) -> Examples[AnswerExample]:
    """The prompts and answers of the source.

    Raises:
        ConfigError: no source was named.
    """
    if config.source.source == "default":
        raise ConfigError(
            "this task has no dataset of its own - at `$.source.source`; name a file with prompts and "
            "answers, or `sample`"
        )
    return read_examples(
        config.source, default=HubSource("", None), sample=_SAMPLE, columns={"id": NAMES}, parse=parse_row
    )


TASK = Task(
    name="replay",
    title="Prompts and answers that were produced elsewhere, as the model of this dataset reads them.",
    category="text-generation",
    config=ReplayConfig,
    record=ReplayRecord,
    examples=examples,
    tracer=lazy("builders.replay.tracer:ReplayTracer"),
    card="replay.md.j2",
    outcome=answered(
        asked="messages",
        means=[
            msgspec.structs.replace(
                answered().means[0], warning="of the answers were cut before they ended; make them with a larger limit"
            )
        ],
    ),
)
