"""Tasks that go wrong, in a module that workers can import; and the workers of this process's Ray, as processes."""

import os
from collections.abc import Sequence
from typing import Any

import psutil

from builders.trivia_qa.record import TriviaQARecord
from builders.trivia_qa.task import TASK as TRIVIA_QA
from builders.trivia_qa.task import TriviaExample, TriviaQAConfig
from tracekit.answering import AnsweringTracer
from tracekit.errors import CaptureError
from tracekit.model.traced import TracedModel
from tracekit.records import Record
from tracekit.task import Place, Task, TracedSample

__all__ = ["BROKEN", "DYING", "workers"]

WRONG = 7
"""Index of the question that goes wrong."""


class _Broken(AnsweringTracer[TriviaExample]):
    def trace(self, traced: TracedModel, examples: Sequence[TriviaExample], place: Place) -> list[TracedSample]:
        if WRONG in {example.index for example in examples} and place.config:
            raise CaptureError(f"question {WRONG} cannot be traced")
        return super().trace(traced, examples, place)


class _Dying(AnsweringTracer[TriviaExample]):
    def trace(self, traced: TracedModel, examples: Sequence[TriviaExample], place: Place) -> list[TracedSample]:
        if WRONG in {example.index for example in examples} and place.config:
            os._exit(1)
        return super().trace(traced, examples, place)


class DyingRecord(TriviaQARecord, frozen=True, kw_only=True, tag="dying"):
    """A record that is never made."""


def _failing(name: str, record: type[Record], tracer: type[AnsweringTracer[Any]]) -> Task[Any, Any]:
    return Task(
        name=name,
        title=TRIVIA_QA.title,
        config=TriviaQAConfig,
        record=record,
        examples=TRIVIA_QA.examples,
        tracer=lambda config, tokenizer, examples: tracer(TRIVIA_QA, config, tokenizer),
        outcome=TRIVIA_QA.outcome,
    )


BROKEN = _failing("trivia_qa", TriviaQARecord, _Broken)
"""A question cannot be traced."""
DYING = _failing("dying", DyingRecord, _Dying)
"""A question ends the process."""


def workers(of: int) -> list[psutil.Process]:
    """The worker processes below a process, those at a shard first."""
    below = [process for process in psutil.Process(of).children(recursive=True) if process.is_running()]
    named = [(process, " ".join(process.cmdline()[:1])) for process in below]
    found = [(process, name) for process, name in named if name.startswith("ray::NodeWorker")]
    return [process for process, name in sorted(found, key=lambda pair: not pair[1].endswith("step"))]
