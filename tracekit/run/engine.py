"""Engines: who does the shard tasks of a plan. This process alone, or as one of several ranks; others bring their own.

    Engine  opens a job ->  Work  estimates it, and does its shards

What is done is where the sidecar is (tracekit.run.finish), so any engine goes on with what another began.
"""

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from types import FrameType
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from tqdm import tqdm

from tracekit.config import ModelConfig, RunConfig
from tracekit.console import say
from tracekit.errors import ShardLockedError
from tracekit.format.layout import Layout, append_line
from tracekit.format.manifest import Plan, ShardTask
from tracekit.model.placement import computing_device
from tracekit.ranks import this_rank
from tracekit.records import ModelInfo
from tracekit.run.finish import done_shards
from tracekit.run.plan import Devices, Estimate
from tracekit.run.worker import Loader, Progress, Worker
from tracekit.sites import resolve_sites
from tracekit.task import Example, Task, Tracer

__all__ = ["Engine", "Job", "LocalEngine", "Work", "log_step", "progress_bar", "stop_flag"]

ExampleT = TypeVar("ExampleT", bound=Example)


class Job(NamedTuple, Generic[ExampleT]):
    """A run, ready for whoever works at it."""

    task: Task[Any, ExampleT]
    config: RunConfig
    layout: Layout
    examples: Sequence[ExampleT]
    """All of the source, those too that do not fit."""
    info: ModelInfo
    tokenizer: Any
    tracer: Tracer[ExampleT]
    """The task, opened with this tokenizer and these examples."""


class Work(Protocol):
    """A job at work."""

    def estimate(self, examples: Sequence[Any], lengths: Sequence[int], samples_per_shard: int) -> Estimate:
        """What these examples will cost, measured on a few."""
        ...

    def batch_size(self, asked: int | Literal["auto"], examples: Sequence[Any], lengths: Sequence[int]) -> int:
        """Examples a batch."""
        ...

    def captured_from(self) -> Literal["decoding", "pass"]:
        """How traces of answers are taken."""
        ...

    def shards(self, plan: Plan, on_shard: Callable[[str], object]) -> bool:
        """Do every shard that is not done; returns whether a signal stopped it. `on_shard` is given every name."""
        ...


class Engine(Protocol):
    """Who does the work."""

    def devices(self, config: ModelConfig, stored: Plan | None) -> Devices:
        """Where the model of a run will be, of one that goes on as its plan says.

        Raises:
            ConfigError: no such device.
        """
        ...

    def open(self, job: Job[Any], num_tasks: int) -> AbstractContextManager[Work]:
        """Get ready to work, at so many shards."""
        ...


class LocalEngine:
    """This process: alone, or a rank that takes its share of the shards first. Keeps its model for the next job."""

    def __init__(self) -> None:
        self.loader = Loader()

    def devices(self, config: ModelConfig, stored: Plan | None) -> Devices:
        """This machine's.

        Raises:
            ConfigError: no such device here.
        """
        return Devices(computing_device(config).type, torch.get_num_threads())

    @contextmanager
    def open(self, job: Job[Any], num_tasks: int) -> Iterator[Work]:
        """Load the model."""
        sites = resolve_sites(job.config.capture.sites)
        traced = self.loader.load(job.config.model, job.info, job.tokenizer, sites, job.tracer.loads)
        yield LocalWork(Worker(traced, job.tracer, job.examples, job.config, job.layout, this_rank()), job)


class LocalWork:
    """A model in this process."""

    def __init__(self, worker: Worker[Any], job: Job[Any]) -> None:
        self._worker, self._job, self._rank = worker, job, this_rank()
        self.estimate, self.batch_size, self.captured_from = worker.estimate, worker.batch_size, worker.captured_from

    def shards(self, plan: Plan, on_shard: Callable[[str], object]) -> bool:
        """Do every shard that is not done; returns whether a signal stopped it."""
        layout = self._job.layout
        torch.set_num_threads(plan.num_threads)
        self._worker.follow(plan)
        done = done_shards(layout, plan)
        todo = self._rank.own_first([shard for shard in plan.shards if shard.name not in done])
        for shard in plan.shards:
            if shard.name in done:
                on_shard(shard.name)
        with stop_flag() as stopped, progress_bar(plan, todo, disable=not self._rank.is_first) as bar:
            for shard in todo:
                if stopped():
                    return True
                try:
                    if self._shard(shard, bar, stopped):
                        return True
                except ShardLockedError:
                    if self._rank.world_size == 1:
                        raise
                    continue  # another rank is at it
                on_shard(shard.name)
        return False

    def _shard(self, shard: ShardTask, bar: Any, stopped: Callable[[], bool]) -> bool:
        """Do one shard from where it stands; returns whether a signal stopped it."""
        shown = 0
        with closing(self._worker.steps(shard)) as steps:
            for step in steps:
                bar.update(step.num_done - shown)
                shown = step.num_done
                log_step(self._job.layout, step)
                if stopped() and not step.is_finished:
                    return True
        return False


def progress_bar(plan: Plan, todo: Sequence[ShardTask], *, disable: bool = False) -> Any:
    """A bar over the examples of a plan, where all but `todo` is done."""
    total, left = (sum(len(batch) for shard in shards for batch in shard.batches) for shards in (plan.shards, todo))
    return tqdm(total=total, initial=total - left, unit="q", desc=plan.config, disable=disable)


def log_step(layout: Layout, step: Progress) -> None:
    """One line a batch in the run log."""
    if step.line is not None:
        append_line(layout.log, json.dumps(step.line))


@contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or SIGTERM asks to stop after the batch, the second stops at once."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        say("stopping after this batch; once more to stop at once")

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: nothing to catch here
        before = {}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
