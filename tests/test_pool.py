"""The pool of workers with a Ray that does what a test says: which call comes back next, and which is lost."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="no package ray")

from tracekit.cluster.pool import Pool, Slot, called
from tracekit.cluster.worker import Begin, WorkerPlace, WorkerReply
from tracekit.errors import ClusterError
from tracekit.format.layout import Layout
from tracekit.format.manifest import read_plan
from tracekit.run.worker import Progress


class RayError(Exception):
    pass


class RayTaskError(RayError):
    pass


class OutOfMemoryError(RayError):
    """No RayActorError: what Ray's memory monitor leaves of a call."""


class ScriptedRay:
    """Calls come back in a given order: `who.method`."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, order: list[str]) -> None:
        self.order, self.log = order, []

    def wait(self, references: list[Any], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        named = {reference.name: reference for reference in references}
        if self.order and self.order[0] in named:
            return [named[self.order.pop(0)]], []
        return references[:1], []

    def get(self, reference: Any) -> Any:
        self.log.append(reference.name)
        return reference.call()

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "n", "Alive": True}]


class Method:
    def __init__(self, name: str, call: Callable[..., Any]) -> None:
        self._name, self._call = name, call

    def options(self, **options: Any) -> "Method":
        return self

    def remote(self, *arguments: Any) -> Any:
        return Reference(self._name, lambda: self._call(*arguments))


class Reference:
    def __init__(self, name: str, call: Callable[[], Any]) -> None:
        self.name, self.call = name, call


def slot(number: int, who: str, step: Callable[[int], WorkerReply], begin: Callable[[], Any] | None = None) -> Slot:
    """A worker in a folder of its own whose steps are given by their number."""
    counted = iter(range(1, 100))
    methods = {
        "begin": lambda *arguments: (WorkerPlace("n", who, False), ()) if begin is None else begin(),
        "step": lambda shard: step(next(counted)),
        "drain": lambda: WorkerReply(is_begun=False),
        "forget": lambda *arguments: None,
    }
    actor = SimpleNamespace(**{name: Method(f"{who}.{name}", call) for name, call in methods.items()})
    return Slot(number, actor)


@pytest.fixture
def begun(finished: Path, tmp_path: Path) -> Layout:
    """A folder with a plan of three shards, and none of them."""
    root = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(root / "data")
    shutil.rmtree(root / "manifests")
    return Layout(root, "trivia_qa")


def pool(ray: ScriptedRay, slots: list[Slot], layout: Layout) -> Pool:
    begin = Begin(read_plan(layout), layout.root, "marker", layout.root / "own", True)
    return Pool(ray, slots, None, begin, layout)


def unfinished(number: int) -> WorkerReply:
    return WorkerReply(Progress(number, False, None))


def test_ctrl_c_while_a_dead_worker_with_a_shard_of_its_own_begins_anew(begun: Layout):
    def dies_once(number: int) -> WorkerReply:
        if number == 1:
            raise OutOfMemoryError("killed")
        return unfinished(number)

    def interrupts(number: int) -> WorkerReply:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return unfinished(number)

    ray = ScriptedRay(["A.begin", "B.begin", "B.step", "A.step", "B.step", "A.begin"])
    slots = [slot(0, "A", dies_once), slot(1, "B", interrupts)]
    assert pool(ray, slots, begun).run(read_plan(begun), lambda name: None) is True
    assert ray.log[:6] == ["A.begin", "B.begin", "B.step", "A.step", "B.step", "A.begin"]


def test_workers_that_memory_ends_before_they_begin_are_lost(begun: Layout):
    def ended() -> Any:
        raise OutOfMemoryError("Task was killed due to the node running low on memory")

    slots = [slot(0, "A", unfinished, begin=ended)]
    with pytest.raises(ClusterError, match="every worker died"):
        pool(ScriptedRay([]), slots, begun).run(read_plan(begun), lambda name: None)


def test_a_call_that_is_lost_says_that_no_worker_can_be_had():
    def ended() -> Any:
        raise OutOfMemoryError("low on memory")

    with pytest.raises(ClusterError, match="a worker cannot be had: low on memory"):
        called(ScriptedRay([]), Reference("A.estimate", ended))
