"""A worker: a loaded model at work on the shard tasks of a plan. Every engine does a shard by this code.

A shard is done batch by batch; between two batches whoever drives the worker may stop, and what is there stays.
"""

import resource
import time
from collections.abc import Generator, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec
import torch

from tracekit.config import ModelConfig, RunConfig
from tracekit.console import now, say
from tracekit.errors import CaptureError
from tracekit.format.layout import Layout
from tracekit.format.manifest import Plan, ShardTask, Verification
from tracekit.format.shards import ShardWriter
from tracekit.model.memory import is_out_of_memory, memory_reader, num_fitting
from tracekit.model.models import load_model
from tracekit.model.proof import choose_capture, replay, replay_scored
from tracekit.model.traced import CaptureFrom, Loads, TracedModel
from tracekit.ranks import Rank
from tracekit.records import ModelInfo
from tracekit.run.encode import batch_of, note_of, stored_form
from tracekit.run.padding import padded, to_replay
from tracekit.run.plan import Estimate, num_shards
from tracekit.storage import StorageForm
from tracekit.task import Example, Place, TracedSample, Tracer

__all__ = ["NUM_MEASURED", "Loader", "Progress", "Worker", "in_parts"]

NUM_MEASURED = 2
"""Examples that an estimate is made of."""
_CPU_BATCH = 8
_MAX_AUTO_BATCH = 64
_MEMORY_SHARE = 0.6

ExampleT = TypeVar("ExampleT", bound=Example)


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


class Progress(NamedTuple):
    """Where a shard stands after it was opened, or after a batch."""

    num_done: int
    """Examples of the shard that are there."""
    is_finished: bool
    """Whether the shard is done, sidecar and all."""
    line: dict[str, Any] | None
    """The batch's line of the run log; None where none was computed."""


class Worker(Generic[ExampleT]):
    """A loaded model at work on shard tasks. `rank` says in the run log who made what."""

    def __init__(
        self,
        traced: TracedModel,
        tracer: Tracer[ExampleT],
        examples: Sequence[ExampleT],
        config: RunConfig,
        layout: Layout,
        rank: Rank,
    ) -> None:
        self._traced, self._tracer, self._layout, self._rank = traced, tracer, layout, rank
        self._by_index = {example.index: example for example in examples}
        self._config = layout.config
        asked: Any = getattr(config.capture, "capture_from", "auto") if tracer.answers else "pass"
        self._capture_from: CaptureFrom = asked
        generation = getattr(config, "generation", None)
        counts: list[int] = [getattr(generation, name, 1) for name in ("num_beams", "num_samples")]
        self._repeats = max(counts) > 1
        self._captured_from: Literal["decoding", "pass"] | None = None
        self._capture, self._batch_size = config.capture.whole, config.output.batch_size
        self._memory = memory_reader(*traced.devices)

    def captured_from(self) -> Literal["decoding", "pass"]:
        """How traces of answers are taken, as asked for or as the model proves.

        Raises:
            ModelError: what is asked for is not proven.
        """
        if self._captured_from is None:
            self._captured_from = choose_capture(self._traced, self._capture_from, repeats=self._repeats)
        return self._captured_from

    def follow(self, plan: Plan) -> None:
        """Take traces of answers as a plan says.

        Raises:
            ModelError: as it is loaded here, the model does not prove what it proved when the plan was made.
        """
        asked = plan.captured_from if self._tracer.answers else "pass"
        self._captured_from = choose_capture(self._traced, asked, repeats=self._repeats)

    def steps(self, shard: ShardTask) -> Generator[Progress]:
        """Do one shard from where it stands: a step when it is open, and one a batch. Closing stops between batches.

        Raises:
            ShardLockedError: another process is at it.
            TracekitError: anything of tracekit.errors; finished batches stay.
        """
        sizes = [len(batch) for batch in shard.batches]
        with ShardWriter(self._layout, shard.name, shard.number) as writer:
            first = len(sizes) if writer.is_done else writer.num_batches  # done by another, since the list was made
            if first == len(sizes) and not writer.is_done:
                writer.finish()
            yield Progress(sum(sizes[:first]), first == len(sizes), None)
            for number in range(first, len(sizes)):
                line = self._do(writer, shard, number)
                if is_last := number + 1 == len(sizes):
                    writer.finish()
                yield Progress(sum(sizes[: number + 1]), is_last, line)

    def _do(self, writer: ShardWriter, shard: ShardTask, number: int) -> dict[str, Any]:
        """Compute and write one batch; its line of the run log."""
        started = time.monotonic()
        examples = self._examples(shard, number)
        asked = self._at_once(shard)
        self._tracer.check_memory(self._traced, examples)
        place = Place(self._config, shard.number, writer.num_samples, self.captured_from() == "decoding")
        parts = self._batch(writer, examples, place, asked)
        samples = [sample for part in parts for sample in part]
        chosen = to_replay(
            [one for part in parts for one in padded(self._traced, part)],
            self._capture.num_replays,
            is_outer=number in (0, len(shard.batches) - 1),
            so_far=writer.padding,
        )
        verification = self._replayed([one.sample for one in chosen]) if chosen else None
        try:
            batch = batch_of(samples, self._capture)
        except MemoryError as error:
            raise _no_memory("bringing a batch into its storage form") from error
        size = now_at_once = writer.size(asked)
        if number + 1 < len(shard.batches):
            size = self._tracer.next_size(size, examples, self._examples(shard, number + 1))
        writer.append(
            batch.samples,
            verification,
            batch.norms,
            batch.losses,
            padding=max((one.padding for one in chosen), default=0),
            size=None if size == now_at_once else (size, asked),
        )
        sizes = in_parts(len(examples), now_at_once)
        return self._line(shard, number, sizes, len(samples), time.monotonic() - started)

    def _examples(self, shard: ShardTask, number: int) -> list[ExampleT]:
        return [self._by_index[index] for index in shard.batches[number]]

    def _at_once(self, shard: ShardTask) -> int:
        """Most examples that a shard runs at once to begin with: a whole batch, or fewer where that is asked for."""
        whole = max(map(len, shard.batches))
        asked = self._batch_size if self._tracer.batch_size is None else self._tracer.at_once
        return min(asked, whole) if isinstance(asked, int) else whole

    def _batch(
        self, writer: ShardWriter, examples: list[ExampleT], place: Place, asked: int
    ) -> list[list[TracedSample]]:
        """Trace one batch, part by part; the size of its parts is journalled before it is used.

        What decides the size lies in the plan and in the shard's journal alone: a shard has the same bytes whoever
        makes it, after whichever others, and however often it is resumed. Where memory runs out, parts are halved.
        """
        while True:
            size = writer.size(asked)
            if size < len(examples):
                writer.note_size(size, asked=asked)
            try:
                return self._in_parts(examples, size, place)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if min(size, len(examples)) == 1:
                    raise _no_memory("one example alone") from error
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            size = min(size, len(examples)) // 2
            say(f"out of memory: batch {writer.num_batches} continues in parts of {size}")
            writer.note_size(size, asked=asked)

    def _in_parts(self, examples: list[ExampleT], size: int, place: Place) -> list[list[TracedSample]]:
        """Samples of each part of a batch, `size` examples at once."""
        parts: list[list[TracedSample]] = []
        for start in range(0, len(examples), size):
            parts.append(self._tracer.trace(self._traced, examples[start : start + size], place))
            place = place._replace(first_index=place.first_index + len(parts[-1]))
        return parts

    def _replayed(self, samples: Sequence[TracedSample]) -> Verification:
        """Run samples again alone.

        Raises:
            CaptureError: an error is past the tolerance, or there is no memory for it.
        """
        try:
            return self._replay(samples)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise _no_memory("replaying a sample with all its attention (--num-replays 0 leaves it out)") from error

    def _replay(self, samples: Sequence[TracedSample]) -> Verification:
        result = Verification.nothing()
        for sample in samples:
            key, text = sample.record.key, sample.text
            result = result.with_more(replay(self._traced, key, text, sample.trace, self._capture))
            if sample.scored:
                prompt_ids = text.token_ids[: text.prompt_length]
                result = result.with_more(replay_scored(self._traced, key, prompt_ids, sample.scored))
        return result

    def estimate(self, examples: Sequence[ExampleT], lengths: Sequence[int], samples_per_shard: int) -> Estimate:
        """Trace a small batch of middling length, and reckon up from it."""
        order = sorted(range(len(examples)), key=lambda i: (lengths[i], i))
        middle = len(order) // 2
        cell = examples[order[middle]].cell
        near = [examples[i] for i in order[max(0, middle - NUM_MEASURED // 2) :] if examples[i].cell == cell]
        chosen = near[:NUM_MEASURED]
        place = Place("", 0, 0, self.captured_from() == "decoding")
        started = time.monotonic()
        samples = self._tracer.trace(self._traced, chosen, place)
        batch_of(samples, self._capture)  # for the time that it takes
        seconds = time.monotonic() - started
        stored = stored_form(samples[0], self._capture)
        if (note := note_of(stored, self._capture)) is not None:
            say(note)
        overhead = self._tracer.overhead(examples)
        per_question = len(samples) / len(chosen)
        num_answer = sum(len(s.text.token_ids) - s.text.prompt_length for s in samples) / len(samples)
        total = sum(_scaled_bytes(samples[0], stored, length + num_answer) * per_question for length in lengths)
        return Estimate(
            num_examples=len(examples),
            num_prompt_tokens=sum(lengths),
            bytes_per_sample=round(total / max(1, len(examples) * per_question)),
            total_bytes=round(total),
            num_shards=num_shards(examples, samples_per_shard),
            seconds=max(0.0, seconds - overhead.spent) / len(chosen) * len(examples) + overhead.expected,
            num_measured=len(chosen),
            overhead_seconds=overhead.expected,
            overhead=overhead.what,
        )

    def batch_size(self, asked: int | str, examples: Sequence[ExampleT], lengths: Sequence[int]) -> int:
        """Examples a batch: as settled or asked, or on an accelerator what its free memory holds of the longest one."""
        if self._tracer.batch_size is not None:
            return self._tracer.batch_size
        if isinstance(asked, int):
            return asked
        longest = examples[max(range(len(examples)), key=lambda i: lengths[i])]
        place = Place("", 0, 0, self.captured_from() == "decoding")
        fitting = num_fitting(
            self._traced.devices,
            lambda: self._tracer.trace(self._traced, [longest], place),
            share=_MEMORY_SHARE,
        )
        if fitting is None:
            return min(_CPU_BATCH, len(examples))
        return max(1, min(fitting, _MAX_AUTO_BATCH, len(examples)))

    def _line(self, shard: ShardTask, batch: int, parts: list[int], num_samples: int, seconds: float) -> dict[str, Any]:
        """A line of the run log: everything that differs from run to run lives there, not in the data."""
        return {
            "time": now(),
            "shard": shard.name,
            "batch": batch,
            "parts": parts,
            "num_samples": num_samples,
            "seconds": round(seconds, 3),
            "max_memory_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "device": ", ".join(map(str, self._traced.devices)),
            "rank": self._rank.number,
            "world_size": self._rank.world_size,
            "used_memory_share": self._memory.read() if self._memory.read else None,
        }


def in_parts(count: int, size: int) -> list[int]:
    """Sizes of the parts of `count` examples, at most `size` each."""
    whole, rest = divmod(count, size)
    return [size] * whole + [rest] * (rest > 0)


def _no_memory(what: str) -> CaptureError:
    return CaptureError(
        f"out of memory at {what}. Finished batches are safe. Fewer --sites or --layers, a smaller --max-new-tokens or "
        "--num-beams, --dtype bfloat16 or --quantize int8 need less"
    )


def _scaled_bytes(sample: TracedSample, stored: StorageForm, num_tokens: float) -> float:
    """Bytes of a sample like this one with so many tokens: attention grows with the square, the rest in proportion."""
    ratio = num_tokens / len(sample.text.token_ids)
    size = float(len(msgspec.json.encode(sample.record))) * ratio
    for spec in stored.specs:
        power = 2 if {"S", "W"} & {*spec.axes} else spec.axes.count("T")
        size += stored.tensors[spec.name].nbytes * ratio**power
    return size
