"""A run: plan, execute, finish. Shards are units of work; done is where the sidecar is.

Running the same command again does the shards that are not done and nothing else. Ctrl-C and SIGTERM finish the batch
in hand and say how to go on.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from tracekit.answering import open_tracer
from tracekit.card.readme import card_template
from tracekit.config import RunConfig, SamplesConfig, check
from tracekit.console import logged, note, say
from tracekit.errors import (
    ConfigError,
    DatasetError,
    NoSpaceError,
    SourceError,
    TracekitError,
)
from tracekit.format.layout import (
    MAX_SHARDS,
    Layout,
    forget,
    is_no_space,
    key_fault,
    may_become_dataset,
    sweep,
    write_atomic,
)
from tracekit.format.manifest import (
    TOO_LONG,
    Manifest,
    Plan,
    SourceInfo,
    read_manifest,
)
from tracekit.model.models import load_tokenizer, max_positions, model_info
from tracekit.model.prompts import is_surely_longer
from tracekit.ranks import this_rank
from tracekit.records import RecordSchema
from tracekit.run.command import growth_note
from tracekit.run.engine import Engine, Job, LocalEngine, Work
from tracekit.run.finish import done_shards, is_finished
from tracekit.run.plan import Estimate, check_space
from tracekit.run.planner import FolderState, Planner, Standing, Wanted, finish_planned, in_stored_order
from tracekit.run.worker import NUM_MEASURED
from tracekit.sites import resolve_sites
from tracekit.sizes import duration, filesize
from tracekit.task import Example, Examples, Task, Tracer

__all__ = ["Ended", "execute", "preflight", "run"]

_NUM_KEPT = 6
"""Shards on the disk at most where each is deleted once the Hub has it: made, waiting, being sent, and some slack."""

ExampleT = TypeVar("ExampleT", bound=Example)
ConfigT = TypeVar("ConfigT", bound=RunConfig)


class Ended(NamedTuple):
    """How a run ended."""

    folder: Path
    config: str
    manifest: Manifest | None = None
    """The finished configuration; None after a dry run or an interruption."""
    estimate: Estimate | None = None
    """What a run will cost; None where nothing had to be planned."""
    was_complete: bool = False
    """True where there was nothing left to do."""
    interrupted: bool = False
    """True where the run was asked to stop."""
    num_left: int = 0
    """Shards that other processes still work at; the last of them finishes."""


def execute(
    task: Task[ConfigT, ExampleT],
    config: ConfigT,
    out: Path,
    *,
    on_shard: Callable[[str], object] = lambda name: None,
    engine: Engine | None = None,
) -> Ended:
    """Check a configuration, and run a task into a folder, or resume what is there.

    `on_shard` is given the name of every finished shard, those of earlier runs first. It may delete the shard once the
    journal (tracekit.format.journal) says that the Hub has it. `engine` does the work, this process by default.

    Raises:
        TracekitError: anything of tracekit.errors; whatever was finished before stays.
    """
    return run(task, check(config), out, on_shard=on_shard, engine=engine)


def run(
    task: Task[ConfigT, ExampleT],
    config: ConfigT,
    out: Path,
    *,
    on_shard: Callable[[str], object] = lambda name: None,
    engine: Engine | None = None,
) -> Ended:
    """As `execute`, of a configuration that is checked."""
    try:
        with logged() as open_log:
            try:
                return _Run(task, config, out, open_log).on(_engine(config, engine), on_shard)
            except TracekitError as error:
                note(f"error: {error}")
                raise
    except OSError as error:
        if is_no_space(error) and not isinstance(error, NoSpaceError):
            raise NoSpaceError(
                error.errno, f"the disk is full ({error}). Every finished batch is safe; free some space and run again"
            ) from error
        raise


def preflight(task: Task[ConfigT, ExampleT], config: ConfigT) -> None:
    """See that a checked configuration can begin: source, tokenizer and lengths, without loading the model.

    Raises:
        TracekitError: as `run` would, before anything is computed.
    """
    _prepare(task, config.settled(), Layout(Path(), task.name))


class _Run(Generic[ConfigT, ExampleT]):
    """One run into one configuration of a folder."""

    def __init__(
        self, task: Task[ConfigT, ExampleT], config: ConfigT, out: Path, open_log: Callable[[Path], None]
    ) -> None:
        _check_rank(config)
        self._task, self._typed, self._open_log = task, config, open_log
        self._layout = Layout(out, config.output.dataset_config or task.name)
        self._begun = _begun(self._layout)
        latest = self._begun.growth or self._begun.plan
        settled = config.settled()
        self._config = settled if latest is None else in_stored_order(settled, latest.run)
        self._output = config.output

    def on(self, engine: Engine, on_shard: Callable[[str], object]) -> Ended:
        """Do what is not done."""
        config, layout, begun = self._config, self._layout, self._begun
        say(f"reading {getattr(config.source, 'source', self._task.name)}")
        ready = _prepare(self._task, config, layout)
        for skipped in ready.source.skipped:
            say(f"skipped: {skipped}")
        lengths = [ready.job.tracer.length(example) for example in ready.examples]
        devices = engine.devices(config.model, begun.plan)
        asked = Wanted(ready.examples, lengths, ready.source, ready.job.info, devices)
        planner = Planner(self._task, config, asked, layout, self._typed)
        stored = begun.plan
        standing = None if stored is None else planner.standing(stored)
        if standing == "more" and begun.growth is not None and planner.resumes(begun.growth):
            stored, standing = begun.growth, planner.standing(begun.growth)
        if stored is not None and standing is not None and not self._output.dry_run:
            self._open_log(layout.text_log)
            sweep(layout.root)
            if (ended := self._what_is_there(planner, stored, standing)) is not None:
                return ended
        num_tasks = planner.num_tasks(None if self._output.force_run else stored)
        estimate = None
        with closing(ready.job.tracer), engine.open(ready.job, num_tasks) as work:
            if stored is not None and self._output.force_run and not self._output.dry_run:
                say(f"deleting what {str(layout.root)!r} has of {layout.config}")
                forget(layout)
                stored = standing = None
            plan = stored
            if plan is None or standing == "more" or self._output.dry_run:
                plan, estimate = self._planned(work, planner, stored if standing == "more" else None)
            if plan is None:
                return self._ended(estimate=estimate)
            self._open_log(layout.text_log)
            if not layout.schema.exists():
                write_atomic(layout.schema, RecordSchema.of(self._task.record).to_bytes())
            if work.shards(plan, on_shard):
                return self._ended(estimate=estimate, interrupted=True)
        if num_left := len(plan.shards) - len(done_shards(layout, plan)):
            return self._ended(estimate=estimate, num_left=num_left)
        say("finishing")
        return self._finished(plan, estimate=estimate)

    def _ended(self, **how: Any) -> Ended:
        return Ended(self._layout.root, self._layout.config, **how)

    def _finished(self, plan: Plan, **how: Any) -> Ended:
        """The end of a run whose shards are all done; interrupted where another process has changed the plan."""
        manifest = finish_planned(self._layout, plan, self._task)
        return self._ended(manifest=manifest, interrupted=manifest is None, **how)

    def _planned(self, work: Work, planner: Planner[Any], stored: Plan | None) -> "_Planned":
        """Measure what is to be computed, beyond a stored plan if there is one, and plan it."""
        new, lengths = planner.missing(stored)
        say(f"measuring on {min(NUM_MEASURED, len(new))} examples")
        num_there = 0 if stored is None else planner.num_examples - len(new)
        estimate = work.estimate(new, lengths, self._output.samples_per_shard)._replace(num_there=num_there)
        if self._output.dry_run:
            return _Planned(None, estimate)
        _check_estimate(estimate, self._config, self._layout.root)
        batch_size = work.batch_size(self._output.batch_size, new, lengths)
        return _Planned(planner.settle(self._begun, stored, batch_size, work.captured_from()), estimate)

    def _what_is_there(self, planner: Planner[Any], stored: Plan, standing: Standing) -> Ended | None:
        """The end of a run that has nothing to compute for a plan that is stored; None where it has.

        Raises:
            PlanMismatchError: less is asked for than what is planned there, and that is not finished or would be
                deleted.
        """
        layout, begun, is_forced = self._layout, self._begun, self._output.force_run
        is_done = done_shards(layout, stored) >= {shard.name for shard in stored.shards}
        if is_forced and begun.growth is not None and not planner.resumes(begun.growth):
            raise planner.too_little(begun.growth, "and --force-run would delete all of it")
        if standing == "less" and is_forced:
            raise planner.too_little(stored, "and --force-run would delete all of it")
        if standing == "less" and not is_done:
            raise planner.too_little(stored, "and is not finished")
        if standing == "more" or is_forced or not is_done:
            return None
        if standing == "less":
            say(f"{str(layout.root)!r} holds all that is asked for, and more")
        if stored is begun.plan and (note := growth_note(layout)) is not None:
            say(note)
        if is_finished(layout) and stored is begun.plan:
            return self._ended(manifest=read_manifest(layout), was_complete=True)
        return self._finished(stored)


def _engine(config: RunConfig, engine: Engine | None) -> Engine:
    """The engine that is given, else this process.

    Raises:
        ConfigError: another one is asked for.
    """
    if engine is None and config.cluster.engine != "local":
        raise ConfigError(
            f"engine {config.cluster.engine!r} - at `$.cluster.engine`; from code give execute(..., engine=), as "
            "tracekit.cluster.RayEngine"
        )
    return engine or LocalEngine()


def _check_rank(config: RunConfig) -> None:
    """Refuse what several processes at once would undo for one another."""
    rank = this_rank()
    if rank.world_size > 1 and config.cluster.engine != "local":
        raise ConfigError(
            f"--engine {config.cluster.engine} starts workers itself, and {rank.world_size} processes were started; "
            "run it in one process"
        )
    if rank.world_size > 1 and (config.output.force_run or config.publish.publish is not None):
        what = "--force-run deletes" if config.output.force_run else "--publish sends"
        raise ConfigError(
            f"{what} as it goes, which {rank.world_size} processes at once cannot; run it in one process"
            + ("" if config.output.force_run else ", or publish the finished folder: tracekit publish")
        )


class _Planned(NamedTuple):
    """A plan that holds, None after a dry run; and what it will cost."""

    plan: Plan | None
    estimate: Estimate


def _begun(layout: Layout) -> FolderState:
    """What a folder was begun with, if it was.

    Raises:
        ConfigError: the folder is a file.
        DatasetError: the folder holds something else.
    """
    out = layout.root
    in_the_way = next((path for path in (out, *out.absolute().parents) if path.exists() and not path.is_dir()), None)
    if in_the_way is not None:
        raise ConfigError(f"--out {str(out)!r}: {str(in_the_way)!r} is a file; give a folder")
    if not (layout.plan.exists() or may_become_dataset(out)):
        raise DatasetError(f"{str(out)!r} exists and is not a tracekit dataset; choose another --out")
    return FolderState.read(layout)


class _Ready(NamedTuple, Generic[ExampleT]):
    """A configuration about to be run."""

    job: Job[ExampleT]
    examples: Sequence[ExampleT]
    """Those that fit."""
    source: SourceInfo


def _prepare(task: Task[ConfigT, ExampleT], config: ConfigT, layout: Layout) -> _Ready[ExampleT]:
    """Read the examples, open the task, and leave out what does not fit."""
    card_template(task)  # the card is made when all else is done
    examples, source = _examples(task, config)
    tokenizer = load_tokenizer(config.model)
    examples, source = _without_endless(examples, source, tokenizer, config)
    tracer = open_tracer(task, config, tokenizer, examples)
    info = model_info(config.model, variant=tracer.variant, sites=resolve_sites(config.capture.sites))
    job = Job(task, config, layout, examples, info, tokenizer, tracer)
    return _Ready(job, *_that_fit(examples, source, tracer, config))


def _examples(task: Task[ConfigT, ExampleT], config: ConfigT) -> Examples[ExampleT]:
    """The examples of a task; a plain list is cut here, and known by the SHA-256 of what is in it.

    Raises:
        SourceError: `--offset` leaves none, one is no Example or has a key that no sample may have, or two have one.
    """
    given = task.call("examples", config)
    listed = given.examples if isinstance(given, Examples) else given or ()
    found = list(listed) if isinstance(listed, Iterable) else [listed]
    keys: dict[str, int] = {}
    for number, one in enumerate(found):
        if not isinstance(one, Example) or type(one.index) is not int:
            raise SourceError(
                f"{task.name}: its example {number} is {one!r:.200}; each has to be a tracekit.Example, and "
                "its `index` an int"
            )
        if (fault := key_fault(one.key)) is not None:
            raise SourceError(f"{task.name}: its example {number} has {fault}")
        if keys.setdefault(one.key, number) != number:
            raise SourceError(
                f"{task.name}: its examples {keys[one.key]} and {number} have one key, {one.key!r}; give each its own "
                f"`index` (now {one.index})"
            )
    generation = getattr(config, "generation", None)
    num_drawn = generation.num_samples if isinstance(generation, SamplesConfig) and generation.trace_samples else 1
    for key, one, sample_index in ((one.answer_key(n), one, n) for one in found for n in range(1, num_drawn)):
        fault = f"the key of the example {keys[key]}, {key!r}" if key in keys else key_fault(key)
        if fault is not None:
            raise SourceError(
                f"{task.name}: answer {sample_index} of its example {one.key!r} would have {fault}; change one of the "
                "keys, or leave --trace-samples out"
            )
    is_cut = isinstance(given, Examples)  # by the task
    offset, limit = config.source.offset, config.source.limit
    chosen = found if is_cut else found[offset:][:limit]
    if not chosen:
        raise SourceError(f"{task.name} has {len(found)} examples, so --offset {offset} leaves none")
    if is_cut:
        return given
    info = SourceInfo(
        id=task.name,
        revision=f"sha256:{hashlib.sha256(msgspec.json.encode(found)).hexdigest()}",
        subset=None,
        split=config.source.split,
        num_rows=len(found),
        num_used=len(chosen),
        skipped=[],
    )
    return Examples(chosen, info)


def _check_estimate(estimate: Estimate, config: RunConfig, out: Path) -> None:
    """Say what a run will cost, and refuse one that fits neither the disk nor the Hub."""
    say(f"about {duration(estimate.seconds)} and {filesize(estimate.total_bytes)}")
    check_space(out, estimate, num_kept=_NUM_KEPT if config.publish.free_local else None)
    if config.publish.publish is not None and estimate.num_shards > MAX_SHARDS:
        raise ConfigError(
            f"{estimate.num_shards} shards are more than the {MAX_SHARDS} files that the Hub takes in a folder; raise "
            "--samples-per-shard"
        )


def _without_endless(
    examples: Sequence[ExampleT], source: SourceInfo, tokenizer: Any, config: RunConfig
) -> tuple[Sequence[ExampleT], SourceInfo]:
    """Examples whose text is not too long at first sight: no text of many megabytes is tokenised to see that.

    Raises:
        SourceError: as `_that_fit`.
    """
    limit = max_positions(config.model)
    if limit is None:
        return examples, source
    texts = {example.source_row: example.text for example in examples}
    return _without(
        examples,
        source,
        {
            row: f"its text of {len(text)} characters takes more positions than the {limit} that the model has"
            for row, text in texts.items()
            if is_surely_longer(tokenizer, text, limit)
        },
        config,
    )


def _that_fit(
    examples: Sequence[ExampleT], source: SourceInfo, tracer: Tracer[ExampleT], config: RunConfig
) -> tuple[Sequence[ExampleT], SourceInfo]:
    """Examples whose prompt and answer the model has positions for.

    Raises:
        SourceError: one does not fit, and `on_bad_row` is `error`; or none fits.
    """
    own, limit = tracer.max_positions, max_positions(config.model)
    limit, whose = (own, "the limit is") if own is not None and own < (limit or own + 1) else (limit, "the model has")
    lengths = {e.source_row: tracer.num_positions(e) for e in examples} if limit is not None else {}
    why = {
        row: f"it takes {length} positions, new tokens included; {whose} {limit}"
        for row, length in lengths.items()
        if limit is not None and length > limit
    }
    return _without(examples, source, why, config)


def _without(
    examples: Sequence[ExampleT], source: SourceInfo, too_long: Mapping[int, str], config: RunConfig
) -> tuple[Sequence[ExampleT], SourceInfo]:
    """The examples of other rows than those that are too long, and why these are left out."""
    why = [f"{source.id} row {row}: {TOO_LONG}: {reason}" for row, reason in too_long.items()]
    if why and (config.source.on_bad_row == "error" or len(why) == len({e.source_row for e in examples})):
        raise SourceError(f"{why[0]}. Shorten it, lower --max-new-tokens, or pass --on-bad-row skip")
    fitting = [example for example in examples if example.source_row not in too_long]
    # a row may make several examples, so rows are counted down, not examples up
    num_used = source.num_used - len(why)
    return fitting, msgspec.structs.replace(source, num_used=num_used, skipped=[*source.skipped, *why])
