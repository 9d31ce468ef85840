"""What a builder offers, and what it hands over: examples in, samples out. `tracekit.run.runner` drives it.

A builder reads its examples and opens a task; the task says how long each example is, and traces batches of them.
"""

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from tracekit.config import RunConfig
from tracekit.format.manifest import SourceInfo
from tracekit.model.answers import Answer
from tracekit.model.capture import Text, Trace
from tracekit.model.choices import Choices, ChoiceTrace
from tracekit.model.generation import Generated
from tracekit.model.prompts import Prompt, sha256_text
from tracekit.model.proof import Scored
from tracekit.model.traced import Loads, TracedModel
from tracekit.model.vocabulary import token_strings
from tracekit.records import SCHEMA_VERSION, Record
from tracekit.run.plan import Example

__all__ = ["Builder", "Overhead", "Place", "Sample", "Task", "answered_fields", "floats", "in_parts"]

ExampleT = TypeVar("ExampleT", bound=Example)
ConfigT_contra = TypeVar("ConfigT_contra", bound=RunConfig, contravariant=True)


class Place(NamedTuple):
    """Where samples go in the dataset."""

    config: str
    """Name of the configuration."""
    shard: int
    """Number of the shard."""
    first_index: int
    """Place of the first of them in its shard."""


class Overhead(NamedTuple):
    """Seconds that go into a run whatever the number of samples in a cell."""

    spent: float = 0.0
    """Those of the traces so far."""
    expected: float = 0.0
    """Those of a whole run."""
    what: str = ""
    """What they go into, in words."""


class Sample(NamedTuple):
    """One sample, ready to be written."""

    record: Record
    text: Text | Choices
    trace: Trace | ChoiceTrace
    scored: Sequence[Scored] = ()
    """Continuations of the text that were scored in passes of their own."""
    allow_nonfinite: bool = False
    """Whether values may be not finite."""


def answered_fields(
    traced: TracedModel, prompt: Prompt, answer: Answer, output: Generated, trace: Trace, place: Place
) -> dict[str, Any]:
    """The fields of a record that are the same for every task in which a model answers a prompt."""
    span = answer.span("answer")
    token_ids = prompt.token_ids + output.token_ids
    return {
        "schema_version": SCHEMA_VERSION,
        "config": place.config,
        "model": traced.info,
        "prompt": prompt.text,
        "prompt_sha256": sha256_text(prompt.text),
        "template_sha256": prompt.template_sha256,
        "token_ids": token_ids,
        "tokens": token_strings(traced.tokenizer, token_ids),
        "token_offsets": answer.offsets,
        "prompt_length": len(prompt.token_ids),
        "spans": [*prompt.spans, *answer.spans],
        "last_prompt_index": len(prompt.token_ids) - 1,
        "first_answer_index": span.start if span else None,
        "last_answer_index": span.stop - 1 if span else None,
        "eos_included": output.eos_included,
        "tensors": trace.specs,
        "finish_reason": output.finish_reason,
        "num_layers": traced.num_layers,
    }


def in_parts(count: int, size: int) -> list[int]:
    """Sizes of the parts of `count` examples, at most `size` each."""
    whole, rest = divmod(count, size)
    return [size] * whole + [rest] * (rest > 0)


def floats(values: np.ndarray) -> list[float]:
    """An array as numbers that JSON knows."""
    return [float(value) for value in values]


class Task(Generic[ExampleT]):
    """A builder at work on one configuration. Builders inherit from it and write the first three methods."""

    variant: str
    """`chat` or `base`."""
    loads: Loads = "lm"
    """As what the model is loaded."""
    batch_size: int | None = None
    """Examples a batch, where the task settles it; None leaves it to `--batch-size` and the device."""
    at_once: int | None = None
    """Most examples of a batch that run at once, where the task settles it; a shard begins with so many."""
    max_positions: int | None = None
    """Most positions of an example, where the task allows fewer than the model."""

    def length(self, example: ExampleT) -> int:
        """Tokens of an example before anything is generated: batches are made of examples of like length."""
        raise NotImplementedError

    def num_positions(self, example: ExampleT) -> int:
        """Positions that the longest sequence of an example takes, generated tokens included."""
        raise NotImplementedError

    def trace(self, traced: TracedModel, examples: Sequence[ExampleT], place: Place) -> list[Sample]:
        """Run a batch of examples through the model; samples stand in the order of the examples."""
        raise NotImplementedError

    def check_memory(self, traced: TracedModel, examples: Sequence[ExampleT]) -> None:
        """Look at the device before a batch; what is done is written.

        Raises:
            MemoryPressureError: memory is nearly full.
        """

    def next_size(self, size: int, done: Sequence[ExampleT], following: Sequence[ExampleT]) -> int:
        """Most examples that run at once in the batch that follows another in its shard; as many as now by default.
        The journal notes what this returns, so that a resumed run does the same."""
        return size

    def overhead(self, examples: Sequence[ExampleT]) -> Overhead:
        """What traces do once a cell, by what those so far took; `examples` are those of the whole run."""
        return Overhead()

    def close(self) -> None:
        """The run is over, or has failed: leave the model as it was."""


class Builder(Protocol[ConfigT_contra, ExampleT]):
    """What a builder module offers."""

    name: str
    """Name of the task."""

    def examples(self, config: ConfigT_contra) -> tuple[Sequence[ExampleT], SourceInfo]:
        """The examples of the source."""
        ...

    def open(self, config: ConfigT_contra, tokenizer: Any, examples: Sequence[ExampleT]) -> Task[ExampleT]:
        """Get ready to trace them."""
        ...
