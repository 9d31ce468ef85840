"""The pool: hands shards to workers as they come free, and takes back what dead workers had in hand.

Every worker has at most one call under way, for one batch; between two of them a run may stop. Calls that were lost
with their process fail at once instead of waiting for it: Ray starts the process anew (`max_restarts`) and repeats what
may wait (`begin`), but the shard goes to whoever is free first: no run waits for a node that does not come back.

A shard that was begun where the folder is not seen has its journal on that node, and waits for it as long as it lives.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tracekit.cluster.worker import Begin, MadeShard, WorkerPlace, WorkerReply
from tracekit.console import say
from tracekit.errors import ClusterError
from tracekit.format.journal import write_journal
from tracekit.format.layout import Layout, write_atomic
from tracekit.format.manifest import Plan, ShardTask
from tracekit.run.engine import log_step, progress_bar, stop_flag
from tracekit.run.finish import done_shards

__all__ = ["Pool", "Slot", "called"]

_WAKE_SECONDS = 1.0
"""How often signals and dead nodes are looked at while no worker says anything."""
_PATIENCE = 30
"""Looks before it is said that no worker has begun."""
_MAX_DEATHS = 3
"""Workers that one shard may bring down: the fourth would die as well."""


class Slot:
    """A worker as the driver knows it."""

    def __init__(self, number: int, actor: Any) -> None:
        self.number, self.actor = number, actor
        self.begun: WorkerPlace | None = None
        """Where it is; None while it is on its way."""
        self.last: WorkerPlace | None = None
        """Where it was last."""
        self.shard: ShardTask | None = None
        """The one in hand."""
        self.kept: deque[ShardTask] = deque()
        """Those that have something on its node."""
        self.unsent: dict[str, ShardTask] = {}
        """Those that it has made and the driver does not know to be on the Hub."""
        self.is_lost = False

    @property
    def held(self) -> list[ShardTask]:
        """Everything that would have to be made by somebody if it were lost."""
        return [*([self.shard] if self.shard else []), *self.kept, *self.unsent.values()]

    def leave(self) -> None:
        """Forget the run, for the next one."""
        self.begun = self.last = self.shard = None
        self.kept.clear()
        self.unsent.clear()


def called(ray: Any, reference: Any) -> Any:
    """What a call brings; what it raised is raised as it was there.

    Raises:
        TracekitError: as in one process.
        ClusterError: the worker cannot be started, or died too often.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise _as_raised(error) from error
    except ray.exceptions.RayError as error:  # a process that died, or that Ray's memory monitor ended
        raise ClusterError(f"a worker cannot be had: {_reason(error)}") from error


def _as_raised(error: Any) -> Exception:
    """What a call raised where it ran."""
    return error.cause if isinstance(error.cause, Exception) else error


class Pool:
    """One run over the workers of a job."""

    def __init__(self, ray: Any, slots: Sequence[Slot], job_ref: Any, begin: Begin, layout: Layout) -> None:
        self._ray, self._slots, self._job_ref, self._begin, self._layout = ray, slots, job_ref, begin, layout
        self._on_shard: Callable[[str], object] = lambda name: None
        self._bar: Any = None
        self._calls: dict[Any, Slot] = {}
        self._todo: deque[ShardTask] = deque()
        self._locked: list[ShardTask] = []
        self._is_second_try = False
        self._num_done: Counter[str] = Counter()
        self._deaths: Counter[str] = Counter()

    def run(self, plan: Plan, on_shard: Callable[[str], object]) -> bool:
        """Do every shard that is not done; returns whether a signal stopped it.

        Raises: as `tracekit.cluster.ray_engine.RayWork.shards`.
        """
        done = done_shards(self._layout, plan)
        self._todo.extend(shard for shard in plan.shards if shard.name not in done)
        for shard in plan.shards:
            if shard.name in done:
                on_shard(shard.name)
        self._on_shard = on_shard
        try:
            with stop_flag() as stopped, progress_bar(plan, self._todo) as self._bar:
                self._work(stopped)
                is_stopped = stopped() and bool(self._todo or self._held())
            if not is_stopped:
                self._forget()
        finally:
            for slot in self._slots:
                slot.leave()
        return is_stopped

    def _work(self, stopped: Callable[[], bool]) -> None:
        num_looks = 0
        while self._is_at_work(stopped()):
            for slot in self._slots:
                self._give(slot, is_stopping=stopped())
            assert self._calls, "nothing is under way, and not all is done"
            ready, _ = self._ray.wait([*self._calls], num_returns=1, timeout=_WAKE_SECONDS)
            for reference in ready:
                self._take(reference)
            if ready:
                continue
            self._leave_dead_nodes()
            num_looks += not any(slot.last for slot in self._slots)
            if num_looks == _PATIENCE:
                say(f"no worker has begun yet; the cluster has free: {self._ray.available_resources()}")

    def _forget(self) -> None:
        """Have what workers kept in folders of their own deleted: all of it has come here."""
        apart = [slot for slot in self._slots if slot.last and not (slot.last.is_shared or slot.is_lost)]
        calls = [slot.actor.forget.options(max_task_retries=0).remote(self._begin) for slot in apart]
        if calls:
            self._ray.wait(calls, num_returns=len(calls), timeout=_WAKE_SECONDS)

    def _held(self) -> list[ShardTask]:
        return [shard for slot in self._slots for shard in slot.held]

    def _is_at_work(self, is_stopping: bool) -> bool:
        """Whether anything is left to wait for."""
        if is_stopping:
            return any(
                slot.begun and (slot.shard or slot.unsent or slot in self._calls.values()) for slot in self._slots
            )
        if not self._todo and not self._held() and self._locked:  # their holders may have died since: once more
            self._todo.extend(self._locked)
            self._locked.clear()
            self._is_second_try = True
        if not (self._todo or self._held()):
            return False
        if all(slot.is_lost for slot in self._slots):
            raise ClusterError(
                f"every worker died, {sum(self._deaths.values())} times in all. Every finished batch is kept: look "
                "into Ray's logs (/tmp/ray/session_latest/logs on the nodes), then run the same command again"
            )
        return True

    def _give(self, slot: Slot, *, is_stopping: bool) -> None:
        """Give a worker that has no call under way its next one."""
        if slot.is_lost or slot in self._calls.values():
            return
        has_work = bool(slot.shard or slot.kept or self._todo) and not is_stopping
        if slot.begun is None:
            if has_work:
                self._call(slot, slot.actor.begin.remote(self._job_ref, self._begin))
            return
        if has_work and slot.shard is None:
            slot.shard = slot.kept.popleft() if slot.kept else self._todo.popleft()
        if has_work:
            self._call(slot, slot.actor.step.options(max_task_retries=0).remote(slot.shard))
        elif slot.unsent or (slot.shard and is_stopping):
            self._call(slot, slot.actor.drain.options(max_task_retries=0).remote())

    def _call(self, slot: Slot, reference: Any) -> None:
        self._calls[reference] = slot

    def _take(self, reference: Any) -> None:
        """Take in what a call has brought."""
        slot = self._calls.pop(reference)
        errors = self._ray.exceptions
        try:
            answer = self._ray.get(reference)
        except errors.RayTaskError as error:
            raise _as_raised(error) from error
        except errors.RayError as error:  # the process died, or Ray's memory monitor ended it
            self._died(slot, error)
            return
        if isinstance(answer, WorkerReply):
            self._took(slot, answer)
        else:
            slot.begun, said = answer
            slot.last = slot.begun
            self._repeat(slot, said)

    def _took(self, slot: Slot, reply: WorkerReply) -> None:
        """Take in where a worker is with its shard."""
        self._repeat(slot, reply.said)
        for made in reply.made:
            self._receive(slot, made)
        if not reply.is_begun:
            slot.begun = None
            self._release(slot)
            return
        shard, step = slot.shard, reply.step
        assert shard is not None, reply
        if reply.is_locked:
            if not self._is_second_try:
                self._locked.append(shard)
            slot.shard = None
            return
        assert step is not None, reply
        log_step(self._layout, step)
        self._show(shard, step.num_done)
        if step.is_finished:
            slot.shard = None
            assert slot.begun is not None, slot.number
            if slot.begun.is_shared:
                self._on_shard(shard.name)
            elif shard.name not in {made.name for made in reply.made}:
                slot.unsent[shard.name] = shard

    def _receive(self, slot: Slot, made: MadeShard) -> None:
        """Write down a shard that the Hub has, so that it counts as done here too."""
        write_atomic(self._layout.sidecar(made.name), made.sidecar)
        write_journal(self._layout.root, [made.sent])
        slot.unsent.pop(made.name, None)
        self._on_shard(made.name)

    def _died(self, slot: Slot, error: Exception) -> None:
        """A call was lost with its process: what it had in hand goes on, there or elsewhere.

        Raises:
            ClusterError: its shard has brought down too many.
        """
        if slot.begun is None:  # lost while it was to begin, which Ray makes again as long as it may
            slot.is_lost = True
            say(f"worker {slot.number} is lost: {_reason(error)}")
            self._release(slot)
            return
        say(f"worker {slot.number} on {slot.begun.host} died; its shard goes on from its journal")
        if slot.shard is not None:
            self._deaths[slot.shard.name] += 1
            if self._deaths[slot.shard.name] > _MAX_DEATHS:
                raise ClusterError(
                    f"{slot.shard.name} brought down {_MAX_DEATHS + 1} workers, one after the other; the last: "
                    f"{_reason(error)}. Is memory short? Every finished batch is kept; a smaller --batch-size goes on"
                )
        is_shared, slot.begun = slot.begun.is_shared, None
        if is_shared:
            self._release(slot)
        else:
            slot.kept.extendleft(reversed([*slot.unsent.values(), *([slot.shard] if slot.shard else [])]))
            slot.shard, slot.unsent = None, {}

    def _leave_dead_nodes(self) -> None:
        """Give to others what waits for a node that is no more: calls to its workers wait until there is room."""
        waiting = [slot for slot in self._slots if slot.last is not None and slot.held]
        alive = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]} if waiting else set()
        for slot in waiting:
            if slot.last is not None and slot.last.node_id not in alive:
                say(f"the node of worker {slot.number}, {slot.last.host}, is no more; its shards go to others")
                self._calls = {reference: other for reference, other in self._calls.items() if other is not slot}
                self._release(slot)
                slot.begun = slot.last = None

    def _release(self, slot: Slot) -> None:
        self._todo.extendleft(reversed(slot.held))
        slot.shard = None
        slot.kept.clear()
        slot.unsent.clear()

    def _show(self, shard: ShardTask, num_done: int) -> None:
        self._bar.update(num_done - self._num_done[shard.name])
        self._num_done[shard.name] = num_done

    def _repeat(self, slot: Slot, said: Iterable[str]) -> None:
        for line in said:
            say(f"worker {slot.number}: {line}")


def _reason(error: Exception) -> str:
    """The line of Ray's long message that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[-2:])[:400] if lines else type(error).__name__
