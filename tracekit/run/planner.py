"""The planner: holds what is asked for against what a folder was begun with, and settles the plan that is worked on.

    asked for    a folder that is            what follows
    the same     unfinished, finished        its plan goes on; nothing to do
    more         unfinished, finished        a second plan, the growth, with shards appended for what is new
    less         finished                    nothing to do
    less         unfinished                  PlanMismatchError, with the command that it goes on with
    other        -                           PlanMismatchError, with every difference

The growth lies beside the plan, and takes its place once all of its shards are done. Until then readers see what was
there before. A run that asks for no more than the plan leaves it alone; one that asks for all of it resumes it.
A run that asks for something else beyond the plan replaces the growth, and deletes what only the old one holds.

More and less are differences in settings that the configuration names in `grows`, and in nothing else; examples are
told apart by `Example.index`. Batches that are planned stay as they are: a smaller setting of `eases` is no difference.
"""

from collections.abc import Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

import msgspec

from tracekit.config import RunConfig
from tracekit.console import say
from tracekit.errors import PlanMismatchError
from tracekit.format.layout import Layout, create_once, locked, sync_folder, write_atomic
from tracekit.format.manifest import Growth, Manifest, Plan, SourceInfo, read_growth, read_plan, read_schema, to_bytes
from tracekit.format.shards import discard_shard
from tracekit.records import ModelInfo, RecordSchema, schema_differences
from tracekit.run.command import command_line, with_out
from tracekit.run.finish import check_can_grow, done_shards, finish, reopen
from tracekit.run.plan import (
    Devices,
    deal,
    difference_lines,
    differences,
    make_plan,
    mismatch,
    num_shards,
    public_run,
)
from tracekit.task import Example, Task

__all__ = ["Planner", "Standing", "Wanted", "finish_planned", "in_stored_order"]

ExampleT = TypeVar("ExampleT", bound=Example)
ConfigT = TypeVar("ConfigT", bound=RunConfig)
Standing: TypeAlias = Literal["same", "more", "less"]
"""What is asked for, held against what a folder was begun with."""


class Wanted(NamedTuple, Generic[ExampleT]):
    """The examples of a run, and what else its plan is made of."""

    examples: Sequence[ExampleT]
    lengths: Sequence[int]
    """Prompt tokens, example by example."""
    source: SourceInfo
    info: ModelInfo
    devices: Devices


class FolderState(NamedTuple):
    """What a folder was begun with."""

    plan: Plan | None
    """Its plan; None where nothing was begun."""
    growth: Plan | None
    """What it grows to; None where it does not grow."""

    @classmethod
    def read(cls, layout: Layout) -> "FolderState":
        """What a folder holds now."""
        if not layout.plan.exists():
            return cls(None, None)
        return cls(read_plan(layout, to_continue=True), read_growth(layout, to_continue=True))


class Planner(Generic[ExampleT]):
    """Plans one run into one configuration of a folder."""

    def __init__(
        self,
        task: Task[Any, ExampleT],
        config: RunConfig,
        asked: Wanted[ExampleT],
        layout: Layout,
        typed: RunConfig | None = None,
    ) -> None:
        self._task, self._config, self._asked, self._layout = task, config, asked, layout
        self._typed = config if typed is None else _with(typed, {name: _get(config, name) for name in config.grows})
        self._run = public_run(config, asked.info, asked.source)

    @property
    def num_examples(self) -> int:
        """Examples that are asked for."""
        return len(self._asked.examples)

    def standing(self, stored: Plan) -> Standing:
        """Whether the same is asked for as a folder was begun with, or more, or less.

        Raises:
            PlanMismatchError: something else; the message shows every difference.
        """
        fresh = self._plan(stored.batch_size)
        found = differences(stored, fresh)
        if self._layout.schema.exists():
            found |= schema_differences(read_schema(self._layout), RecordSchema.of(self._task.record))
        growing = self._growing(found)
        eased = {name for name in found if self._is_eased(name.removeprefix("run."), *found[name])}
        if others := found.keys() - growing - eased:
            raise mismatch(self._layout.root, stored, _only(found, others))
        there, now = _indices(stored), {example.index for example in self._asked.examples}
        if there == now:
            is_as_planned = sum(map(len, _batches(stored))) == len(there)
            if not is_as_planned or not (stored.grown or growing or stored.shards == fresh.shards):
                raise self._edited(stored)
            return "same"
        if not growing:
            raise self._edited(stored)
        if there - now and now - there:
            raise PlanMismatchError(
                f"{self._layout.root} was begun with {len(there - now)} examples of {stored.config!r} that this run "
                f"leaves out:\n{difference_lines(_only(found, growing))}\n"
                "A folder only grows: ask for what is there as well, or choose another --out (or --dataset-config)"
            )
        return "more" if now - there else "less"

    def resumes(self, growth: Plan) -> bool:
        """Whether a run that asks for more than the plan asks for all of a growth that was begun."""
        return _indices(growth) <= {example.index for example in self._asked.examples}

    def missing(self, stored: Plan | None) -> tuple[list[ExampleT], list[int]]:
        """The examples that a plan does not hold, with their lengths; without a plan all of them."""
        there = set[int]() if stored is None else _indices(stored)
        pairs = zip(self._asked.examples, self._asked.lengths, strict=True)
        new = [(example, length) for example, length in pairs if example.index not in there]
        return [example for example, _ in new], [length for _, length in new]

    def num_tasks(self, stored: Plan | None) -> int:
        """Shards that are to be done, of a plan that holds some of them or of none."""
        new, _ = self.missing(stored)
        num_stored = 0 if stored is None else len(stored.shards) - len(done_shards(self._layout, stored))
        return num_stored + num_shards(new, self._config.output.samples_per_shard)

    def too_little(self, stored: Plan, why: str) -> PlanMismatchError:
        """The error for a run that asks for less than a folder was begun with."""
        found = differences(stored, self._plan(stored.batch_size))
        return PlanMismatchError(
            f"{self._layout.root} was begun with more of {stored.config!r} than this run asks for, {why}:\n"
            f"{difference_lines(_only(found, self._growing(found)))}\nRun what it was begun with:\n"
            + with_out(stored.command, str(self._layout.root), margin="    ")
        )

    def settle(
        self, begun: FolderState, stored: Plan | None, batch_size: int, captured_from: Literal["decoding", "pass"]
    ) -> Plan:
        """Write the first plan, or a growth: the stored one with what is missing appended; the plan that holds.

        `begun` is what the folder held when this run looked. Where another process was first, its plan holds.

        Raises:
            PlanMismatchError: another process was first, with something else.
            ShardLockedError: another process works at a growth that this one would replace.
            DatasetError: the configuration was downloaded, and cannot grow.
        """
        if stored is None:
            command = command_line(self._task.command, self._typed, self._layout)
            plan = msgspec.structs.replace(self._plan(batch_size), command=command, captured_from=captured_from)
        else:
            plan = self._grown(stored, batch_size)
        if create_once(self._layout.plan, to_bytes(plan)) if stored is None else _replace(self._layout, begun, plan):
            return plan
        first = read_growth(self._layout) or read_plan(self._layout)
        if self.standing(first) != "same" or in_stored_order(self._config, first.run) != self._config:
            raise PlanMismatchError(
                f"another process planned {first.config!r} in {self._layout.root} at the same time; run this again"
            )
        return first

    def _plan(self, batch_size: int) -> Plan:
        return make_plan(
            name=self._layout.config,
            task=self._task,
            run=self._run,
            config=self._config,
            model=self._asked.info,
            source=self._asked.source,
            examples=self._asked.examples,
            lengths=self._asked.lengths,
            batch_size=batch_size,
            devices=self._asked.devices,
        )

    def _grown(self, stored: Plan, batch_size: int) -> Plan:
        """A plan with what is missing appended: the stored shards first, as they are."""
        eased = {name: _get(stored.run, name) for name in self._config.eases}
        run = _with(self._run, eased)
        examples, lengths = self.missing(stored)
        first = 1 + max((shard.number for shard in stored.shards), default=-1)
        more = deal(examples, lengths, config=self._config, batch_size=batch_size, first_shard=first)
        return msgspec.structs.replace(
            stored,
            run=run,
            source=self._asked.source,
            batch_size=max(stored.batch_size, batch_size),
            shards=[*stored.shards, *more],
            command=command_line(self._task.command, _with(self._typed, eased), self._layout),
            grown=[*stored.grown, Growth(num_shards=len(stored.shards), command=stored.command)],
        )

    def _growing(self, found: dict[str, tuple[Any, Any]]) -> set[str]:
        """Those of the differences that may be."""
        growing = {f"run.{name}" for name in self._config.grows} & found.keys()
        if "run.source.limit" in growing:
            growing |= {"source.num_used"} & found.keys()
        return growing

    def _is_eased(self, name: str, old: Any, new: Any) -> bool:
        """Whether a setting of `eases` is one that the plan's batches can be computed with: smaller than was asked
        for, or any where `auto` was."""
        return name in self._config.eases and isinstance(new, int) and (not isinstance(old, int) or new <= old)

    def _edited(self, stored: Plan) -> PlanMismatchError:
        return PlanMismatchError(
            f"{self._layout.root} was begun with another plan for {stored.config!r}:\n"
            "    shards: the plan's batches are not those that its own configuration makes; was it edited?\n"
            "Choose another --out (or --dataset-config)"
        )


def in_stored_order(config: ConfigT, run: dict[str, Any]) -> ConfigT:
    """A configuration whose lists that may grow begin as in a plan's `run`, so that the number of what stands in them
    stays what it was."""
    changed = config
    for name in config.grows:
        value, stored = _get(config, name), _get(run, name)
        if isinstance(value, tuple) and isinstance(stored, list):
            known = [one for one in stored if one in value]
            changed = _with(changed, {name: (*known, *(one for one in value if one not in stored))})
    return changed


def finish_planned(layout: Layout, plan: Plan, task: Task[Any, Any]) -> Manifest | None:
    """Finish a configuration, of a growth the whole; None where another process has changed what is planned.

    Raises: as `tracekit.run.finish.finish`.
    """
    with locked(layout.plan):
        growth = read_growth(layout)
        if growth is not None and growth.shards == plan.shards:
            reopen(layout)  # before the plan: a manifest never stands beside a plan that it does not know
            layout.growth.replace(layout.plan)
            sync_folder(layout.plan.parent)
    with locked(layout.plan):  # the lock of what is the plan by now
        return finish(layout, plan, task) if read_plan(layout).shards == plan.shards else None


def _replace(layout: Layout, begun: FolderState, plan: Plan) -> bool:
    """Write a growth, in the place of one that was begun; False, and nothing changed, where another process was first.

    Raises: as `Planner.settle`.
    """
    with locked(layout.plan):
        if FolderState.read(layout) != begun:
            return False
        check_can_grow(layout)
        assert begun.plan is not None, layout
        _discard_others(layout, begun.plan, begun.growth, plan)
        write_atomic(layout.growth, to_bytes(plan))
    return True


def _discard_others(layout: Layout, plan: Plan, before: Plan | None, growth: Plan) -> None:
    """Delete the shards beyond a plan that are not those of its growth: of an earlier growth that asked for others.

    Raises: as `tracekit.format.shards.discard_shard`.
    """
    tasks = {task.name: task for task in (before.shards if before else ())}
    if before is not None and Growth(num_shards=len(before.shards), command=before.command) in growth.grown:
        kept = before.shards  # it grew once more
    elif before is not None and {**before.run, "source": None} == {**growth.run, "source": None}:
        kept = [task for task in growth.shards if tasks.get(task.name) == task]
    else:
        kept = plan.shards
    names = {*tasks, *(task.name for task in growth.shards)} - {task.name for task in kept}
    num_samples = sum(discard_shard(layout, name) for name in sorted(names))
    if num_samples:
        say(f"{num_samples} samples of another growth, which this run does not ask for, were deleted")


def _batches(plan: Plan) -> list[list[int]]:
    return [batch for shard in plan.shards for batch in shard.batches]


def _indices(plan: Plan) -> set[int]:
    return {index for batch in _batches(plan) for index in batch}


def _only(found: dict[str, tuple[Any, Any]], names: set[str]) -> dict[str, tuple[Any, Any]]:
    return {name: found[name] for name in sorted(names)}


def _get(of: Any, name: str) -> Any:
    """A setting by its path, `source.limit`, of a configuration or of one as it is written down; None if not there."""
    for part in name.split("."):
        of = of.get(part) if isinstance(of, dict) else getattr(of, part)
    return of


def _with(of: Any, values: dict[str, Any]) -> Any:
    """The same with settings changed, by their paths."""
    for name, value in values.items():
        first, _, rest = name.partition(".")
        inner = _with(_get(of, first), {rest: value}) if rest else value
        of = {**of, first: inner} if isinstance(of, dict) else msgspec.structs.replace(of, **{first: inner})
    return of
