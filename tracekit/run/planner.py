"""The planner: holds what is asked for against what a folder was begun with, and settles the plan that is worked on.

    asked for    a folder that is            what follows
    the same     unfinished, finished        its plan goes on; nothing to do
    more         unfinished, finished        shards are appended for what is new; of what is stored no byte changes
    less         finished                    nothing to do
    less         unfinished                  PlanMismatchError, with the command that it goes on with
    other        -                           PlanMismatchError, with every difference

More and less are differences in settings that the configuration names in `grows`, and in nothing else; examples are
told apart by `Example.index`. Batches that are planned stay as they are: a smaller setting of `eases` is no difference.
"""

from collections.abc import Sequence
from textwrap import indent
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

import msgspec

from tracekit.config import RunConfig
from tracekit.errors import PlanMismatchError
from tracekit.format.layout import Layout, create_once, locked, write_atomic
from tracekit.format.manifest import Growth, Manifest, Plan, SourceInfo, read_plan, to_bytes
from tracekit.records import ModelInfo
from tracekit.run.command import command_line, with_out
from tracekit.run.finish import done_shards, finish, reopen
from tracekit.run.plan import (
    Devices,
    Example,
    deal,
    difference_lines,
    differences,
    make_plan,
    mismatch,
    num_shards,
    public_run,
)

__all__ = ["Asked", "Planner", "Standing", "finish_planned", "in_stored_order"]

ExampleT = TypeVar("ExampleT", bound=Example)
ConfigT = TypeVar("ConfigT", bound=RunConfig)
Standing: TypeAlias = Literal["same", "more", "less"]
"""What is asked for, held against what a folder was begun with."""


class Asked(NamedTuple, Generic[ExampleT]):
    """The examples of a run, and what else its plan is made of."""

    examples: Sequence[ExampleT]
    lengths: Sequence[int]
    """Prompt tokens, example by example."""
    source: SourceInfo
    info: ModelInfo
    devices: Devices


class Planner(Generic[ExampleT]):
    """Plans one run into one configuration of a folder."""

    def __init__(
        self, task: str, config: RunConfig, asked: Asked[ExampleT], layout: Layout, typed: RunConfig | None = None
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
            + indent(with_out(stored.command, str(self._layout.root)), "    ")
        )

    def settle(self, stored: Plan | None, batch_size: int) -> Plan:
        """Write the first plan, or the stored one with what is missing appended; the plan that holds.

        A configuration that was finished is open from then on. Where another process was first, its plan holds.

        Raises:
            PlanMismatchError: another process was first, with something else.
            DatasetError: the configuration was downloaded, and cannot grow.
        """
        if stored is None:
            command = command_line(self._task, self._typed, self._layout)
            plan = msgspec.structs.replace(self._plan(batch_size), command=command)
        else:
            plan = self._grown(stored, batch_size)
        if create_once(self._layout.plan, to_bytes(plan)) if stored is None else _replace(self._layout, stored, plan):
            return plan
        first = read_plan(self._layout)
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
            command=command_line(self._task, _with(self._typed, eased), self._layout),
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


def finish_planned(layout: Layout, plan: Plan) -> Manifest | None:
    """Finish a configuration; None where its plan has grown since, by another process, which has more to do.

    Raises: as `tracekit.run.finish.finish`.
    """
    with locked(layout.plan):
        return finish(layout, plan) if read_plan(layout).shards == plan.shards else None


def _replace(layout: Layout, stored: Plan, plan: Plan) -> bool:
    """Put a plan in the place of another; False, and nothing changed, where another process was first."""
    with locked(layout.plan):
        if read_plan(layout) != stored:
            return False
        reopen(layout)  # before the plan: a manifest never stands beside a plan that it does not know
        write_atomic(layout.plan, to_bytes(plan))
    return True


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
