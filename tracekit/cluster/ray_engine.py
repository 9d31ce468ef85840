"""The Ray engine: a plan's shards on a pool of Ray actors, one model each.

    driver      plan, folder, sidecars that come by wire, finish        tracekit.cluster.ray_engine, pool
    actors      a shard each, batch by batch                            tracekit.cluster.worker

Ray starts actors where there is room, and anew where they die.
"""

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from tracekit.cluster.pool import Pool, Slot, called
from tracekit.cluster.session import Share, connected, share
from tracekit.cluster.worker import Begin, NodeJob, NodeWorker, own_folder
from tracekit.config import ClusterConfig, ModelConfig
from tracekit.console import say
from tracekit.format.layout import PARTIAL_SUFFIX, Layout, locked
from tracekit.format.manifest import Plan, read_growth
from tracekit.ranks import Rank
from tracekit.run.engine import Job
from tracekit.run.plan import Devices, Estimate
from tracekit.task import TaskRef

__all__ = ["RayEngine"]

_MAX_RESTARTS = 10
"""Of one worker, by Ray: nodes come and go, but a worker that dies of itself must not do so for ever."""


class RayEngine:
    """Workers on Ray. Use as a context manager: workers and their models stay for all jobs in it.

    Raises:
        ConfigError: ray is not installed.
        ClusterError: no cluster answers, or none of its nodes can take a worker.
    """

    def __init__(self, settings: ClusterConfig) -> None:
        self._settings = settings
        self._stack = ExitStack()
        self._ray: Any = None
        self._slots: list[Slot] = []
        self._num_threads = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *of: object) -> None:
        self._stack.close()

    def devices(self, config: ModelConfig, stored: Plan | None) -> Devices:
        """GPUs where the cluster has any, or as asked; a run that goes on stays on the devices of its plan."""
        if stored is not None:
            kind = stored.device_type if config.device == "auto" else config.device.partition(":")[0]
            self._num_threads = stored.num_threads
        else:
            kind, asked = self._kind(config.device), os.environ.get("OMP_NUM_THREADS", "")
            self._num_threads = int(asked) if asked.isdigit() else max(1, int(self._share(kind).num_cpus))
        return Devices(kind, self._num_threads)

    @contextmanager
    def open(self, job: Job[Any], num_tasks: int) -> "Iterator[RayWork]":
        """Start as many workers as there are shards to do, or as asked, and have them load the model."""
        config, ray = job.config, self._connected()
        kind = self._kind(config.model.device)
        most = 1 if config.output.dry_run else max(1, num_tasks)
        asked = self._share(kind, most=most)
        wanted = min(most, asked.num_workers)
        self._start(wanted, asked)
        if config.model.device_map == "none":
            config = msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, device=kind))
        node_job = NodeJob.of(uuid.uuid4().hex, TaskRef.of(job.task), config, job.examples, job.info)
        yield RayWork(ray, self._slots[:wanted], ray.put(node_job), job, self._settings)

    def _connected(self) -> Any:
        if self._ray is None:
            self._ray = self._stack.enter_context(connected(self._settings.ray_address))
        return self._ray

    def _kind(self, device: str) -> str:
        """The kind of device that is meant: numbers of devices mean nothing on a cluster."""
        if device != "auto":
            return device.partition(":")[0]
        return "cuda" if self._connected().cluster_resources().get("GPU", 0) >= 1 else "cpu"

    def _share(self, kind: str, *, most: int | None = None) -> Share:
        """What each worker asks for, of as many as were asked for, and not more than there is work for."""
        settings, nodes = self._settings, self._connected().nodes()
        asked = settings.num_workers
        number = asked if asked is None or most is None else min(asked, most)
        return share(nodes, num_workers=number, gpus_per_worker=settings.gpus_per_worker, on_gpus=kind == "cuda")

    def _start(self, num_workers: int, asked: Share) -> None:
        """Start what is missing. Each worker has a place of its own, so that Ray starts it anew on the same node."""
        ray = self._ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = {"CPU": asked.num_cpus, **({"GPU": asked.num_gpus} if asked.num_gpus else {})}
        environment = {"env_vars": {"OMP_NUM_THREADS": str(self._num_threads)}}  # of numpy; torch's are the plan's
        for number in range(len(self._slots), num_workers):
            place = placement_group([bundle])
            self._stack.callback(remove_placement_group, place)
            actor = (
                ray.remote(NodeWorker)
                .options(
                    num_cpus=asked.num_cpus,
                    num_gpus=asked.num_gpus,
                    max_restarts=_MAX_RESTARTS,
                    max_task_retries=-1,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=0),
                    runtime_env=environment,
                )
                .remote(Rank(number, asked.num_workers, 0), str(Path.cwd()))
            )
            self._slots.append(Slot(number, actor))
            self._stack.callback(ray.kill, actor)
        few = f", for no more shards than {num_workers} are to do" * (num_workers < (self._settings.num_workers or 0))
        resources = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
        say(f"{num_workers} worker{'s' * (num_workers != 1)} on Ray{few}, each with {resources}")


class RayWork:
    """A job on Ray."""

    def __init__(self, ray: Any, slots: Sequence[Slot], job_ref: Any, job: Job[Any], settings: ClusterConfig) -> None:
        self._ray, self._slots, self._job_ref, self._job, self._settings = ray, slots, job_ref, job, settings

    def estimate(self, examples: Sequence[Any], lengths: Sequence[int], samples_per_shard: int) -> Estimate:
        """What these examples will cost, measured by one worker while the others load the model.

        Raises:
            TracekitError: as in one process.
        """
        actor, *others = [slot.actor for slot in self._slots]
        for other in others:  # what goes wrong there is seen when it is asked to begin
            other.open.remote(self._job_ref)
        indices = [example.index for example in examples]
        estimate = called(self._ray, actor.estimate.remote(self._job_ref, indices, lengths, samples_per_shard))
        alike = estimate.seconds - estimate.overhead_seconds
        return estimate._replace(seconds=estimate.overhead_seconds + alike / len(self._slots))

    def batch_size(self, asked: int | Literal["auto"], examples: Sequence[Any], lengths: Sequence[int]) -> int:
        """Examples a batch, by the memory of one worker's device.

        Raises:
            TracekitError: as in one process.
        """
        actor = self._slots[0].actor
        indices = [example.index for example in examples]
        return called(self._ray, actor.batch_size.remote(self._job_ref, asked, indices, lengths))

    def captured_from(self) -> Literal["decoding", "pass"]:
        """How traces of answers are taken, as one worker finds.

        Raises:
            TracekitError: as in one process.
        """
        return called(self._ray, self._slots[0].actor.captured_from.remote(self._job_ref))

    def shards(self, plan: Plan, on_shard: Callable[[str], object]) -> bool:
        """Do every shard that is not done; returns whether a signal stopped it.

        Raises:
            TracekitError: as in one process, from whichever worker it came.
            ClusterError: a shard brings down every worker that takes it, or no worker is left.
        """
        layout = Layout(self._job.layout.root.absolute(), self._job.layout.config)
        base = Path(self._settings.worker_folder or layout.root)
        planned = layout.growth if read_growth(layout) == plan else layout.plan
        with _marker(layout) as marker:
            begin = Begin(
                plan=msgspec.structs.replace(plan, shards=[]),
                folder=layout.root,
                marker=marker,
                own_folder=own_folder(base.absolute(), planned),
                is_apart=self._settings.worker_folder is not None,
            )
            return Pool(self._ray, self._slots, self._job_ref, begin, layout).run(plan, on_shard)


@contextmanager
def _marker(layout: Layout) -> Iterator[str]:
    """A file in the shards' folder that nobody else can have laid there; its name."""
    path = layout.shard("any").parent / f"driver-{uuid.uuid4().hex}{PARTIAL_SUFFIX}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with locked(path):
        try:
            yield path.name
        finally:
            path.unlink(missing_ok=True)
