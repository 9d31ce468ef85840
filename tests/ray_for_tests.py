"""Builders that go wrong, in a module that workers can import; and the workers of this process's Ray, as processes."""

import os
from collections.abc import Sequence
from typing import Any

import psutil

from builders.trivia_qa.task import TASK as TRIVIA_QA
from builders.trivia_qa.task import TriviaExample, TriviaQAConfig, TriviaQATask
from tracekit.errors import CaptureError
from tracekit.model.traced import TracedModel
from tracekit.task import Place, Sample

__all__ = ["BrokenBuilder", "DyingBuilder", "workers"]

WRONG = 7
"""Index of the question that goes wrong."""


class _Broken(TriviaQATask):
    def trace(self, traced: TracedModel, examples: Sequence[TriviaExample], place: Place) -> list[Sample]:
        if WRONG in {example.index for example in examples} and place.config:
            raise CaptureError(f"question {WRONG} cannot be traced")
        return super().trace(traced, examples, place)


class _Dying(TriviaQATask):
    def trace(self, traced: TracedModel, examples: Sequence[TriviaExample], place: Place) -> list[Sample]:
        if WRONG in {example.index for example in examples} and place.config:
            os._exit(1)
        return super().trace(traced, examples, place)


class BrokenBuilder(TRIVIA_QA):
    """A question cannot be traced."""

    def open(self, config: TriviaQAConfig, tokenizer: Any, examples: Sequence[TriviaExample]) -> TriviaQATask:
        return _Broken(config, tokenizer, examples)


class DyingBuilder(TRIVIA_QA):
    """A question ends the process."""

    def open(self, config: TriviaQAConfig, tokenizer: Any, examples: Sequence[TriviaExample]) -> TriviaQATask:
        return _Dying(config, tokenizer, examples)


def workers(of: int) -> list[psutil.Process]:
    """The worker processes below a process, those at a shard first."""
    below = [process for process in psutil.Process(of).children(recursive=True) if process.is_running()]
    named = [(process, " ".join(process.cmdline()[:1])) for process in below]
    found = [(process, name) for process, name in named if name.startswith("ray::NodeWorker")]
    return [process for process, name in sorted(found, key=lambda pair: not pair[1].endswith("step"))]
