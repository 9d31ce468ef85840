"""What runs on a node: a worker of tracekit.run behind calls that may be made again. Asks Ray only where it is.

    open      task and model, from a job
    begin     take a place in a run: in the folder of the dataset where it is seen from here, else in one of its own
    step      open a shard, or do the next batch of it
    drain     wait until every shard that was made here is on the Hub

A call that was lost with its process is made again in the next one: `step` goes on from the shard's journal. A worker
that does not see the folder stages its shards on the Hub, and hands over their sidecars.
"""

import hashlib
import os
import pickle
import queue
import shutil
import socket
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tracekit.answering import open_tracer
from tracekit.config import RunConfig
from tracekit.console import heard
from tracekit.errors import ConfigError, ShardLockedError
from tracekit.format.journal import Sent, read_journal, sent_shards
from tracekit.format.layout import Layout
from tracekit.format.manifest import Plan, ShardTask
from tracekit.model.models import load_tokenizer
from tracekit.model.placement import computing_device
from tracekit.publish.stager import Stager
from tracekit.ranks import Rank
from tracekit.records import ModelInfo
from tracekit.run.plan import Estimate, versions
from tracekit.run.worker import Loader, Progress, Worker
from tracekit.sites import resolve_sites
from tracekit.task import Task, TaskRef

__all__ = ["Begin", "MadeShard", "NodeJob", "NodeWorker", "WorkerPlace", "WorkerReply", "is_staging", "own_folder"]


class NodeJob(NamedTuple):
    """A job as it travels: tokenizer, task and model are opened where it arrives."""

    key: str
    """Tells jobs apart."""
    task: TaskRef
    packed: bytes
    """Configuration and examples, pickled: a worker imports the task before it knows their types. The device of the
    configuration is a kind of device, not one of them."""
    info: ModelInfo

    @classmethod
    def of(cls, key: str, task: TaskRef, config: RunConfig, examples: Sequence[Any], info: ModelInfo) -> "NodeJob":
        """A job, ready to travel."""
        return cls(key, task, pickle.dumps((config, list(examples))), info)


class _Unpacked(NamedTuple):
    """A job where it arrived."""

    key: str
    task: Task[Any, Any]
    config: RunConfig
    examples: Sequence[Any]
    info: ModelInfo

    @classmethod
    def of(cls, job: NodeJob) -> "_Unpacked":
        task = job.task.found()
        config, examples = pickle.loads(job.packed)  # noqa: S301 - the driver of this run packed it
        return cls(job.key, task, config, examples, job.info)


class Begin(NamedTuple):
    """The run that a worker takes part in."""

    plan: Plan
    """Without its shards: they come one by one."""
    folder: Path
    """The dataset, as the driver names it."""
    marker: str
    """A file that the driver laid into the shards' folder: who sees it shares the folder."""
    own_folder: Path
    """Where to work where the folder is not seen, or is not to be worked in."""
    is_apart: bool
    """Whether to work there in any case."""


class WorkerPlace(NamedTuple):
    """Where a worker is."""

    node_id: str
    host: str
    is_shared: bool
    """Whether it works in the folder of the dataset."""


class MadeShard(NamedTuple):
    """A shard that the Hub has and the driver does not."""

    name: str
    sidecar: bytes
    sent: Sent


class WorkerReply(NamedTuple):
    """What a call brings back."""

    step: Progress | None = None
    """Where the shard stands."""
    is_locked: bool = False
    """Whether another process is at the shard."""
    is_begun: bool = True
    """False where this process has left the run, or is new and knows of none."""
    made: tuple[MadeShard, ...] = ()
    said: tuple[str, ...] = ()


def is_staging(config: RunConfig) -> bool:
    """Whether shards go to the Hub as they are made, and need not stay here."""
    return config.publish.publish is not None and config.publish.free_local


class NodeWorker:
    """One model on one node. Every method but the first needs a worker that is open, as a new process is not."""

    def __init__(self, rank: Rank, driver_folder: str) -> None:
        if Path(driver_folder).is_dir():  # so that relative paths mean what they mean to the driver
            os.chdir(driver_folder)
        self._rank, self._loader = rank, Loader()
        self._given: _Unpacked | None = None
        self._job: _Unpacked | None = None
        self._tracer: Any = None
        self._traced: Any = None
        self._layout = Layout(Path(), "")
        self._stager: Stager | None = None
        self._sent: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._stack = ExitStack()
        self._worker: Worker[Any] | None = None
        self._shard: str | None = None
        self._steps: Generator[Progress] | None = None

    def open(self, job: NodeJob) -> tuple[str, ...]:
        """Open task and model, unless they are; returns what was said meanwhile.

        Raises:
            TracekitError: what opening them raises in one process.
        """
        given = self._unpacked(job)
        if self._job is given:
            return ()
        self.end()
        if self._tracer is not None:
            self._tracer.close()
        with heard() as said:
            tokenizer = load_tokenizer(given.config.model)
            self._tracer = open_tracer(given.task, given.config, tokenizer, given.examples)
            sites = resolve_sites(given.config.capture.sites)
            self._traced = self._loader.load(given.config.model, given.info, tokenizer, sites, self._tracer.loads)
        self._job = given
        return tuple(said)

    def estimate(self, job: NodeJob, indices: Sequence[int], lengths: Sequence[int], size: int) -> Estimate:
        """What these examples will cost this one worker; `size` samples go into a shard."""
        self.open(job)
        return self._made_worker(Layout(Path(), "")).estimate(self._examples(indices), lengths, size)

    def batch_size(self, job: NodeJob, asked: Any, indices: Sequence[int], lengths: Sequence[int]) -> int:
        """Examples a batch, by the memory of this device."""
        self.open(job)
        return self._made_worker(Layout(Path(), "")).batch_size(asked, self._examples(indices), lengths)

    def captured_from(self, job: NodeJob) -> str:
        """How traces of answers are taken."""
        self.open(job)
        return self._made_worker(Layout(Path(), "")).captured_from()

    def begin(self, job: NodeJob, run: Begin) -> tuple[WorkerPlace, tuple[str, ...]]:
        """Take part in a run.

        Raises:
            ConfigError: another version of what the bytes depend on; a folder that is not shared, and no Hub either.
            TracekitError: as `open`; as Stager where shards are staged from here.
        """
        self.end()
        config = self._unpacked(job).config
        host, shared = socket.gethostname(), Layout(run.folder, run.plan.config)
        _check_versions(run.plan, host)
        is_shared = not run.is_apart and (shared.shard("any").parent / run.marker).exists()
        if not is_shared and not is_staging(config):
            raise ConfigError(
                f"the worker on {host} does not see {str(run.folder)!r} of the driver. Put --out where all "
                "nodes share, under the same path; or let each worker send its shards to the Hub as they are made: "
                "--publish owner/name --version v1.0.0 --free-local"
            )
        said = self.open(job)
        if (here := computing_device(config.model).type) != run.plan.device_type:
            raise ConfigError(f"the worker on {host} has a device {here!r}, the plan {run.plan.device_type!r}")
        torch.set_num_threads(run.plan.num_threads)
        self._layout = shared if is_shared else Layout(run.own_folder, run.plan.config)
        if not is_shared:
            self._stager = self._stack.enter_context(Stager(self._layout, config.publish, self._sent.put))
        self._worker = self._made_worker(self._layout)
        self._worker.follow(run.plan)
        return WorkerPlace(_node_id(), host, is_shared), said

    def step(self, shard: ShardTask) -> WorkerReply:
        """Open a shard where it stands, or do its next batch; one after the other until it is finished.

        Raises:
            TracekitError: as in one process; finished batches stay.
        """
        if self._worker is None:
            return WorkerReply(is_begun=False)
        with heard() as said:
            try:
                step = self._next(self._worker, shard)
            except ShardLockedError:
                self._leave()
                return WorkerReply(is_locked=True, said=tuple(said))
            if step.is_finished:
                self._leave()
                if self._stager is not None:
                    self._stager.add(shard.name)
        return WorkerReply(step, made=self._handed_over(), said=tuple(said))

    def drain(self) -> WorkerReply:
        """Leave the run once the Hub has all that was made here."""
        with heard() as said:
            self.end()
        return WorkerReply(is_begun=False, made=self._handed_over(), said=tuple(said))

    def forget(self, run: Begin) -> None:
        """Delete what workers of a run that is over have kept here of shards that the driver has taken over."""
        shutil.rmtree(run.own_folder, ignore_errors=True)

    def end(self) -> None:
        """Leave the run: the shard in hand stays as it is, what is made is sent."""
        self._leave()
        self._worker = None
        self._stack.close()
        self._stager = None

    def _unpacked(self, job: NodeJob) -> _Unpacked:
        if self._given is None or self._given.key != job.key:
            self._given = _Unpacked.of(job)
        return self._given

    def _examples(self, indices: Sequence[int]) -> list[Any]:
        assert self._job is not None
        by_index = {example.index: example for example in self._job.examples}
        return [by_index[index] for index in indices]

    def _made_worker(self, layout: Layout) -> Worker[Any]:
        assert self._job is not None
        return Worker(self._traced, self._tracer, self._job.examples, self._job.config, layout, self._rank)

    def _next(self, worker: Worker[Any], shard: ShardTask) -> Progress:
        if self._stager is not None and shard.name in sent_shards(self._layout):  # by a process that died since
            return Progress(sum(map(len, shard.batches)), True, None)
        if self._shard != shard.name:
            self._leave()
            self._shard, self._steps = shard.name, worker.steps(shard)
        assert self._steps is not None
        return next(self._steps)

    def _leave(self) -> None:
        """Let go of the shard in hand."""
        if self._steps is not None:
            self._steps.close()
        self._shard = self._steps = None

    def _handed_over(self) -> tuple[MadeShard, ...]:
        """Shards that the Hub has got since the last time."""
        made: list[MadeShard] = []
        while not self._sent.empty():
            name = self._sent.get()
            path = self._layout.shard(name).relative_to(self._layout.root).as_posix()
            made.append(
                MadeShard(name, self._layout.sidecar(name).read_bytes(), read_journal(self._layout.root)[path][-1])
            )
        return tuple(made)


def _node_id() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def own_folder(base: Path, plan: Path) -> Path:
    """Where workers that do not see a dataset's folder keep what they make of this plan, and of no other."""
    begun = f"{plan.stat().st_mtime_ns} ".encode() + plan.read_bytes()
    return base / f"worker-{hashlib.sha256(begun).hexdigest()[:12]}"


def _check_versions(plan: Plan, host: str) -> None:
    """Refuse a node with other versions than the plan was made with."""
    here = versions()
    for name in sorted(plan.versions.keys() | here.keys()):
        there, ours = plan.versions.get(name, "none"), here.get(name, "none")
        if there != ours:
            raise ConfigError(
                f"the worker on {host} has {name} {ours}, the plan was made with {there}; every node needs the same "
                "versions of " + ", ".join(sorted(plan.versions))
            )
