"""A run: plan, execute, finish. Shards are units of work; done is where the sidecar is.

A builder is anything with the Builder protocol; this module never imports one. Running the same command again does the
shards that are not done and nothing else. Ctrl-C and SIGTERM finish the batch in hand and say how to go on.
"""

import json
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec
import torch
from tqdm import tqdm

from tracekit.config import CaptureConfig, ModelConfig, RunConfig, check
from tracekit.errors import (
    CaptureError,
    ConfigError,
    DatasetError,
    NoSpaceError,
    ShardLockedError,
    SourceError,
    TracekitError,
)
from tracekit.format.layout import MAX_SHARDS, Layout, append_line, forget, is_no_space, may_become_dataset
from tracekit.format.manifest import (
    Manifest,
    Plan,
    ShardTask,
    SourceInfo,
    Verification,
    read_plan,
    read_struct,
)
from tracekit.format.shards import ShardWriter
from tracekit.model.memory import is_out_of_memory, memory_reader, num_fitting
from tracekit.model.models import load_model, load_tokenizer, max_positions, model_info
from tracekit.model.placement import computing_device
from tracekit.model.proof import replay, replay_scored
from tracekit.model.traced import Loads, TracedModel
from tracekit.ranks import this_rank
from tracekit.records import ModelInfo, encode_record
from tracekit.run.finish import done_shards, is_finished
from tracekit.run.metrics import hidden_norms
from tracekit.run.plan import Estimate, Example, check_space, num_shards
from tracekit.run.planner import Asked, Planner, finish_planned, in_stored_order
from tracekit.run.task import Builder, Place, Sample, Task, in_parts
from tracekit.sites import resolve_sites
from tracekit.sizes import duration, filesize
from tracekit.talk import logged, note, now, say
from tracekit.tensors import encode

__all__ = ["Loader", "Outcome", "execute", "preflight"]

_CPU_BATCH = 8
_MAX_AUTO_BATCH = 64
_MEMORY_SHARE = 0.6
_NUM_MEASURED = 2
_NUM_KEPT = 6
"""Shards on the disk at most where each is deleted once the Hub has it: made, waiting, being sent, and some slack."""

ExampleT = TypeVar("ExampleT", bound=Example)
ConfigT = TypeVar("ConfigT", bound=RunConfig)


class Loader:
    """Loads models, and keeps the last one: runs one after the other with the same model load it once."""

    def __init__(self) -> None:
        self._wanted: object = None
        self._traced: TracedModel | None = None

    def load(
        self, config: ModelConfig, info: ModelInfo, tokenizer: Any, sites: Sequence[str], loads: Loads
    ) -> TracedModel:
        """A model, loaded now or the last time.

        Raises: as `tracekit.model.models.load_model`.
        """
        wanted = (config, info, tuple(sites), loads)
        if self._traced is None or wanted != self._wanted:
            self._traced = None  # its memory is wanted
            say(f"loading {info.id}")
            self._traced = load_model(config, info, tokenizer, sites, loads=loads)
            self._wanted = wanted
        return self._traced


class Outcome(NamedTuple):
    """How a run ended."""

    folder: Path
    config: str
    manifest: Manifest | None
    """The finished configuration; None after a dry run or an interruption."""
    estimate: Estimate | None
    """What a run will cost; None where nothing had to be planned."""
    was_complete: bool
    """True where there was nothing left to do."""
    interrupted: bool
    """True where the run was asked to stop."""
    num_left: int = 0
    """Shards that other processes still work at; the last of them finishes."""


def execute(
    builder: Builder[ConfigT, ExampleT],
    config: ConfigT,
    out: Path,
    *,
    on_shard: Callable[[str], object] = lambda name: None,
    loader: Loader | None = None,
) -> Outcome:
    """Run a builder into a folder, or go on with what is there.

    `on_shard` is given the name of every finished shard, those of earlier runs first. It may delete the shard once the
    journal (tracekit.format.journal) says that the Hub has it.

    Raises:
        TracekitError: anything of tracekit.errors; whatever was finished before stays.
    """
    try:
        with logged() as open_log:
            try:
                return _execute(builder, check(config), out, on_shard, loader or Loader(), open_log)
            except TracekitError as error:
                note(f"error: {error}")
                raise
    except OSError as error:
        if is_no_space(error) and not isinstance(error, NoSpaceError):
            raise NoSpaceError(
                error.errno, f"the disk is full ({error}). Every finished batch is safe; free some space and run again"
            ) from error
        raise


def preflight(builder: Builder[ConfigT, ExampleT], config: ConfigT) -> None:
    """See that a configuration can begin: settings, source, tokenizer and lengths, without loading the model.

    Raises:
        TracekitError: as `execute` would, before anything is computed.
    """
    _prepare(builder, check(config).settled())


def _execute(
    builder: Builder[ConfigT, ExampleT],
    config: ConfigT,
    out: Path,
    on_shard: Callable[[str], object],
    loader: Loader,
    open_log: Callable[[Path], None],
) -> Outcome:
    layout = Layout(out, config.output.dataset_config or builder.name)
    _check_rank(config)
    stored = _stored_plan(layout)
    config = config.settled() if stored is None else in_stored_order(config.settled(), stored.run)
    say(f"reading {config.source.source}")
    ready = _prepare(builder, config)
    for skipped in ready.source.skipped:
        say(f"skipped: {skipped}")
    lengths = [ready.task.length(example) for example in ready.examples]
    device = computing_device(config.model)
    asked = Asked(ready.examples, lengths, ready.source, ready.info, device.type)
    planner = Planner(builder.name, config, asked, layout)
    standing = None if stored is None else planner.standing(stored)
    output = config.output
    if stored is not None and not output.dry_run:
        open_log(layout.text_log)
        if (outcome := _what_is_there(layout, stored, planner, is_forced=output.force_run)) is not None:
            return outcome
    traced = loader.load(
        config.model, ready.info, ready.tokenizer, resolve_sites(config.capture.sites), ready.task.loads
    )
    if stored is not None and output.force_run and not output.dry_run:
        say(f"deleting what {str(out)!r} has of {layout.config}")
        forget(layout)
        stored = standing = None
    by_index = {example.index: example for example in ready.examples}
    run = _Run(traced, ready.task, by_index, layout, config.capture, output.batch_size)
    estimate = None
    with closing(ready.task):
        plan = stored
        if plan is None or standing == "more" or output.dry_run:
            plan, estimate = _planned(run, planner, stored if standing == "more" else None, config, out)
        if plan is None:
            return Outcome(out, layout.config, None, estimate, False, False)
        open_log(layout.text_log)
        torch.set_num_threads(plan.num_threads)
        if run.shards(plan, on_shard):
            return Outcome(out, layout.config, None, estimate, False, True)
    if num_left := len(plan.shards) - len(done_shards(layout, plan)):
        return Outcome(out, layout.config, None, estimate, False, False, num_left)
    say("finishing")
    manifest = finish_planned(layout, plan)
    return Outcome(out, layout.config, manifest, estimate, False, manifest is None)


def _check_rank(config: RunConfig) -> None:
    """Refuse what several processes at once would undo for one another."""
    rank = this_rank()
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


def _planned(run: "_Run[Any]", planner: Planner[Any], stored: Plan | None, config: RunConfig, out: Path) -> _Planned:
    """Measure what is to be computed, beyond a stored plan if there is one, and plan it."""
    new, lengths = planner.missing(stored)
    say(f"measuring on {min(_NUM_MEASURED, len(new))} examples")
    num_there = 0 if stored is None else planner.num_examples - len(new)
    estimate = run.estimate(new, lengths, config.output.samples_per_shard)._replace(num_there=num_there)
    if config.output.dry_run:
        return _Planned(None, estimate)
    _check_estimate(estimate, config, out)
    return _Planned(planner.settle(stored, run.batch_size(config.output.batch_size, new, lengths)), estimate)


def _stored_plan(layout: Layout) -> Plan | None:
    """The plan that a folder was begun with, if it was.

    Raises:
        ConfigError: the folder is a file.
        DatasetError: the folder holds something else.
    """
    out = layout.root
    in_the_way = next((path for path in (out, *out.absolute().parents) if path.exists() and not path.is_dir()), None)
    if in_the_way is not None:
        raise ConfigError(f"--out {str(out)!r}: {str(in_the_way)!r} is a file; give a folder")
    if layout.plan.exists():
        return read_plan(layout)
    if not may_become_dataset(out):
        raise DatasetError(f"{str(out)!r} exists and is not a tracekit dataset; choose another --out")
    return None


def _what_is_there(layout: Layout, stored: Plan, planner: Planner[Any], *, is_forced: bool) -> Outcome | None:
    """The outcome of a run that has nothing to compute; None where it has.

    Raises:
        PlanMismatchError: less is asked for than what is planned there, and that is not finished or would be deleted.
    """
    standing = planner.standing(stored)
    is_done = done_shards(layout, stored) >= {shard.name for shard in stored.shards}
    if standing == "less" and is_forced:
        raise planner.too_little(stored, "and --force-run would delete all of it")
    if standing == "less" and not is_done:
        raise planner.too_little(stored, "and is not finished")
    if standing == "more" or is_forced or not is_done:
        return None
    if standing == "less":
        say(f"{str(layout.root)!r} holds all that is asked for, and more")
    was_complete = is_finished(layout)
    manifest = read_struct(layout.manifest, Manifest) if was_complete else finish_planned(layout, stored)
    return Outcome(layout.root, layout.config, manifest, None, was_complete, manifest is None)


class _Ready(NamedTuple, Generic[ExampleT]):
    """A configuration about to be run."""

    examples: Sequence[ExampleT]
    source: SourceInfo
    tokenizer: Any
    task: Task[ExampleT]
    info: ModelInfo


def _prepare(builder: Builder[ConfigT, ExampleT], config: ConfigT) -> _Ready[ExampleT]:
    """Read the examples, open the task, and leave out what does not fit."""
    examples, source = builder.examples(config)
    tokenizer = load_tokenizer(config.model)
    task = builder.open(config, tokenizer, examples)
    info = model_info(config.model, variant=task.variant, sites=resolve_sites(config.capture.sites))
    examples, source = _that_fit(examples, source, task, config)
    return _Ready(examples, source, tokenizer, task, info)


def _check_estimate(estimate: Estimate, config: RunConfig, out: Path) -> None:
    """Say what a run will cost, and refuse one that fits neither the disk nor the Hub."""
    say(f"about {duration(estimate.seconds)} and {filesize(estimate.total_bytes)}")
    check_space(out, estimate, num_kept=_NUM_KEPT if config.publish.free_local else None)
    if config.publish.publish is not None and estimate.num_shards > MAX_SHARDS:
        raise ConfigError(
            f"{estimate.num_shards} shards are more than the {MAX_SHARDS} files that the Hub takes in a folder; raise "
            "--samples-per-shard"
        )


def _that_fit(
    examples: Sequence[ExampleT], source: SourceInfo, task: Task[ExampleT], config: RunConfig
) -> tuple[Sequence[ExampleT], SourceInfo]:
    """Examples whose prompt and answer the model has positions for; the others are malformed rows.

    Raises:
        SourceError: one does not fit, and `on_bad_row` is `error`; or none fits.
    """
    own, limit = task.max_positions, max_positions(config.model)
    limit, whose = (own, "the limit is") if own is not None and own < (limit or own + 1) else (limit, "the model has")
    too_long = {e.source_row: e for e in examples if limit is not None and task.num_positions(e) > limit}
    why = [
        f"{source.id} row {row}: it takes {task.num_positions(e)} positions, new tokens included; {whose} {limit}"
        for row, e in too_long.items()
    ]
    if why and (config.source.on_bad_row == "error" or len(why) == len({e.source_row for e in examples})):
        raise SourceError(f"{why[0]}. Shorten it, lower --max-new-tokens, or pass --on-bad-row skip")
    fitting = [example for example in examples if example.source_row not in too_long]
    # a row may make several examples, so rows are counted down, not examples up
    num_used = source.num_used - len(why)
    return fitting, msgspec.structs.replace(source, num_used=num_used, skipped=[*source.skipped, *why])


class _Run(Generic[ExampleT]):
    """A loaded model at work on shard tasks."""

    def __init__(
        self,
        traced: TracedModel,
        task: Task[ExampleT],
        by_index: dict[int, ExampleT],
        layout: Layout,
        capture: CaptureConfig,
        batch_size: int | Literal["auto"],
    ) -> None:
        self._traced, self._task, self._by_index = traced, task, by_index
        self._layout, self._capture, self._batch_size = layout, capture, batch_size
        self._memory = memory_reader(*traced.devices)
        self._rank = this_rank()

    def shards(self, plan: Plan, on_shard: Callable[[str], object]) -> bool:
        """Do every shard that is not done; returns whether a signal stopped it."""
        if (size := _last_part_size(self._layout, self._batch_size)) is not None:
            self._task.shrink(size)
        done = done_shards(self._layout, plan)
        todo = self._rank.own_first([shard for shard in plan.shards if shard.name not in done])
        for shard in plan.shards:
            if shard.name in done:
                on_shard(shard.name)
        total = sum(len(batch) for shard in plan.shards for batch in shard.batches)
        left = sum(len(batch) for shard in todo for batch in shard.batches)
        shown = {"unit": "q", "desc": plan.config, "disable": not self._rank.is_first}
        with _stop_flag() as stopped, tqdm(total=total, initial=total - left, **shown) as bar:
            for shard in todo:
                if stopped():
                    return True
                try:
                    if self._shard(shard, plan.config, bar, stopped):
                        return True
                except ShardLockedError:
                    if self._rank.world_size == 1:
                        raise
                    continue  # another rank is at it
                on_shard(shard.name)
        return False

    def _shard(self, shard: ShardTask, config_name: str, bar: Any, stopped: Callable[[], bool]) -> bool:
        """Do one shard from where it stands; returns whether a signal stopped it."""
        with ShardWriter(self._layout, shard.name, shard.number) as writer:
            if writer.is_done:  # by another process, since the list was made
                return False
            bar.update(sum(len(batch) for batch in shard.batches[: writer.num_batches]))
            for number in range(writer.num_batches, len(shard.batches)):
                if stopped():
                    return True
                started = time.monotonic()
                examples = [self._by_index[index] for index in shard.batches[number]]
                place = Place(config_name, shard.number, writer.num_samples)
                samples, parts = self._batch(writer, number, examples, place)
                verification = self._replayed(samples) if number == 0 else None
                encoded = [(s.record.key, encode_record(s.record), encode(s.trace.tensors)) for s in samples]
                norms = hidden_norms((s.trace.specs, s.trace.tensors) for s in samples)
                writer.append(encoded, verification, norms)
                bar.update(len(examples))
                self._log(shard, number, parts, len(samples), time.monotonic() - started)
            writer.finish()
        return False

    def _batch(
        self, writer: ShardWriter, number: int, examples: list[ExampleT], place: Place
    ) -> tuple[list[Sample], list[int]]:
        """Trace one batch, in smaller parts where memory runs out; the parts are journalled before they are used."""
        noted = writer.parts(number)
        parts = noted or self._parts(examples)
        if noted is not None:  # by a process that died over this batch
            self._task.shrink(max(noted))
        elif len(parts) > 1:
            writer.note_parts(number, parts)
        while True:
            try:
                samples: list[Sample] = []
                start = 0
                for size in parts:
                    here = place._replace(first_index=place.first_index + len(samples))
                    samples += self._task.trace(self._traced, examples[start : start + size], here)
                    start += size
                return samples, parts
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if max(parts) == 1:
                    raise _no_memory("one example alone") from error
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            size = max(parts) // 2
            parts = in_parts(len(examples), size)
            say(f"out of memory: batch {number} goes on in parts of {size}")
            self._task.shrink(size)
            writer.note_parts(number, parts)

    def _parts(self, examples: list[ExampleT]) -> list[int]:
        """Sizes of the parts of a batch: what the task says, else not more at once than was asked for."""
        if self._task.batch_size is None and isinstance(self._batch_size, int):
            return in_parts(len(examples), self._batch_size)
        return self._task.parts(self._traced, examples)

    def _replayed(self, samples: Sequence[Sample]) -> Verification:
        try:
            return self._replay(samples)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise _no_memory("replaying a sample with all its attention (--num-replays 0 leaves it out)") from error

    def _replay(self, samples: Sequence[Sample]) -> Verification:
        """Run a few samples again alone: the shortest, which was padded most, first."""
        ordered = sorted(samples, key=lambda sample: (len(sample.text.token_ids), sample.record.key))
        count = min(self._capture.num_replays, len(ordered))
        chosen = [ordered[i * (len(ordered) - 1) // max(count - 1, 1)] for i in range(count)]
        result = Verification.nothing()
        for sample in chosen:
            key, text = sample.record.key, sample.text
            replayed = replay(
                self._traced, key, text, sample.trace, self._capture, allow_nonfinite=sample.allow_nonfinite
            )
            result = result.with_more(replayed)
            if sample.scored:
                prompt_ids = text.token_ids[: text.prompt_length]
                result = result.with_more(replay_scored(self._traced, key, prompt_ids, sample.scored))
        return result

    def estimate(self, examples: Sequence[ExampleT], lengths: Sequence[int], samples_per_shard: int) -> Estimate:
        """Trace a small batch of middling length, and reckon up from it."""
        order = sorted(range(len(examples)), key=lambda i: (lengths[i], i))
        middle = len(order) // 2
        cell = examples[order[middle]].cell
        near = [examples[i] for i in order[max(0, middle - _NUM_MEASURED // 2) :] if examples[i].cell == cell]
        chosen = near[:_NUM_MEASURED]
        started = time.monotonic()
        samples = self._task.trace(self._traced, chosen, Place("", 0, 0))
        encoded = [len(encode_record(s.record)) + encode(s.trace.tensors).size for s in samples]
        seconds = time.monotonic() - started
        overhead = self._task.overhead(examples)
        per_question = len(samples) / len(chosen)
        num_answer = sum(len(s.text.token_ids) - s.text.prompt_length for s in samples) / len(samples)
        total = sum(_scaled_bytes(samples[0], length + num_answer) * per_question for length in lengths)
        return Estimate(
            num_examples=len(examples),
            num_prompt_tokens=sum(lengths),
            bytes_per_sample=round(total / max(1, len(examples) * per_question)) if encoded else 0,
            total_bytes=round(total),
            num_shards=num_shards(examples, samples_per_shard),
            seconds=max(0.0, seconds - overhead.spent) / len(chosen) * len(examples) + overhead.expected,
            num_measured=len(chosen),
            overhead_seconds=overhead.expected,
            overhead=overhead.what,
        )

    def batch_size(self, asked: int | str, examples: Sequence[ExampleT], lengths: Sequence[int]) -> int:
        """Examples a batch: as settled or asked, or on an accelerator what its free memory holds of the longest one."""
        if self._task.batch_size is not None:
            return self._task.batch_size
        if isinstance(asked, int):
            return asked
        longest = examples[max(range(len(examples)), key=lambda i: lengths[i])]
        fitting = num_fitting(
            self._traced.devices,
            lambda: self._task.trace(self._traced, [longest], Place("", 0, 0)),
            share=_MEMORY_SHARE,
        )
        if fitting is None:
            return min(_CPU_BATCH, len(examples))
        return max(1, min(fitting, _MAX_AUTO_BATCH, len(examples)))

    def _log(self, shard: ShardTask, batch: int, parts: list[int], num_samples: int, seconds: float) -> None:
        """One line a batch in the run log: everything that differs from run to run lives here, not in the data."""
        line = {
            "time": now(),
            "shard": shard.name,
            "batch": batch,
            "parts": parts,
            "asked_batch_size": self._batch_size,
            "num_samples": num_samples,
            "seconds": round(seconds, 3),
            "max_memory_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "device": ", ".join(map(str, self._traced.devices)),
            "rank": self._rank.number,
            "world_size": self._rank.world_size,
            "used_memory_share": self._memory.read() if self._memory.read else None,
        }
        append_line(self._layout.log, json.dumps(line))


def _last_part_size(layout: Layout, batch_size: int | str) -> int | None:
    """The largest part of the batch that the same command computed last, by the run log; None where it was whole."""
    lines = layout.log.read_text(encoding="utf-8").splitlines() if layout.log.exists() else []
    try:
        last = json.loads(lines[-1]) if lines else {}
    except json.JSONDecodeError:  # torn when the machine went down
        return None
    is_same = last.get("asked_batch_size") == batch_size and len(last.get("parts", ())) > 1
    return max(last["parts"]) if is_same else None


def _no_memory(what: str) -> CaptureError:
    return CaptureError(
        f"out of memory at {what}. Finished batches are safe. Fewer --sites or --layers, a smaller --max-new-tokens or "
        "--num-beams, --dtype bfloat16 or --quantize int8 need less"
    )


def _scaled_bytes(sample: Sample, num_tokens: float) -> float:
    """Bytes of a sample like this one with so many tokens: attention grows with the square, the rest in proportion."""
    ratio = num_tokens / len(sample.text.token_ids)
    size = float(len(msgspec.json.encode(sample.record))) * ratio
    for spec in sample.trace.specs:
        size += sample.trace.tensors[spec.name].nbytes * (ratio if spec.layout == "dense" else ratio**2)
    return size


@contextmanager
def _stop_flag() -> Iterator[Callable[[], bool]]:
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
