"""Answering: the flow of every task that asks one question an example. Prompts, answers, traces, records.

    example --ask--> prompt --answer--> answer and trace --judge--> record

The task says what is asked and what it thinks of an answer; templates, solved examples, sampled answers and the fields
that all such records share are made here. Prompts are rendered when they are needed: a run over many examples keeps
their lengths alone.
"""

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from tracekit.config import CaptureConfig, GenerationConfig, RunConfig, SamplesConfig, ShotsConfig
from tracekit.errors import ConfigError
from tracekit.model.answers import Answer, parse_answer
from tracekit.model.capture import Trace
from tracekit.model.choices import ChoiceTrace
from tracekit.model.decoding import AnswerTrace, ToAnswer, answer_several, answer_traced
from tracekit.model.generation import Generated, settings_of
from tracekit.model.prompts import Exchange, Prompt, Prompter, draw_shots, sha256_text
from tracekit.model.traced import TracedModel
from tracekit.model.vocabulary import token_strings
from tracekit.records import NOTHING_GENERATED, SCHEMA_VERSION, AnsweredRecord, Record, SampledAnswer
from tracekit.task import Example, Place, Task, TracedSample, Tracer

__all__ = ["Answered", "AnsweringTracer", "answered_fields", "open_tracer", "read_fields"]

ExampleT = TypeVar("ExampleT", bound=Example)


class Answered(NamedTuple):
    """An answer, for the task to judge."""

    text: str
    """The answer alone: no prompt, no reasoning, no special tokens."""
    parsed: Answer
    """Where it stands in the whole text."""
    generated: Generated
    """Its tokens."""
    sample_index: int
    """0 is the deterministic answer."""
    place: Place
    """Where its sample goes; of a sampled answer that is not traced, its question's."""


def open_tracer(
    task: Task[Any, ExampleT], config: RunConfig, tokenizer: Any, examples: Sequence[ExampleT]
) -> Tracer[ExampleT]:
    """A task at work on a configuration."""
    if task.tracer is not None:
        return task.call("tracer", config, tokenizer, examples)
    return AnsweringTracer(task, config, tokenizer)


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
        "captured_from": trace.captured_from,
        "finish_reason": output.finish_reason,
        "num_layers": traced.num_layers,
    }


def read_fields(
    traced: TracedModel,
    prompt: str,
    token_ids: list[int],
    offsets: list[list[int]],
    trace: Trace | ChoiceTrace,
    place: Place,
) -> dict[str, Any]:
    """The fields of a record that are the same for every task in which a model only reads."""
    return {
        "schema_version": SCHEMA_VERSION,
        "sample_index": 0,
        "config": place.config,
        "model": traced.info,
        "prompt": prompt,
        "prompt_sha256": sha256_text(prompt),
        "token_ids": token_ids,
        "tokens": token_strings(traced.tokenizer, token_ids),
        "token_offsets": offsets,
        "prompt_length": len(token_ids),
        "last_prompt_index": len(token_ids) - 1,
        "first_answer_index": None,
        "last_answer_index": None,
        "eos_included": False,
        "tensors": trace.specs,
        "generation": NOTHING_GENERATED,
        "num_layers": traced.num_layers,
    }


class AnsweringTracer(Tracer[ExampleT], Generic[ExampleT]):
    """Questions in, answered and traced samples out."""

    answers = True
    is_one_line = True
    """Whether a plain prompt's answer ends with its first line: a base model goes on with the next question."""

    def __init__(self, task: Task[Any, ExampleT], config: Any, tokenizer: Any) -> None:
        self._task, self._config, self._tokenizer = task, config, tokenizer
        self._prompter = Prompter(tokenizer, config.prompt, default_system=task.system)
        self.variant = self._prompter.variant
        self._num_shots = config.prompt.num_shots if isinstance(config.prompt, ShotsConfig) else 0
        self._pool: Sequence[Exchange] = task.call("shots", config) if task.shots and self._num_shots else ()
        for shot in self._pool:
            if not isinstance(shot, Exchange):
                raise ConfigError(f"task {task.name!r}: `shots` gave {shot!r:.200}; each has to be a tracekit.Exchange")
        self._lengths: dict[int, int] = {}

    def prompt(self, example: ExampleT) -> Prompt:
        """What the model reads of an example."""
        assert self._task.ask is not None, self._task.name
        question = self._task.call("ask", example, self._config)
        if not isinstance(question, str) or not question.strip():
            raise ConfigError(
                f"task {self._task.name!r}: `ask` of the example {example.key} gave {question!r:.200}; expected a text "
                "that is not empty"
            )
        return self._prompter.prompt(question, self._shots(example, question))

    def answer(
        self,
        traced: TracedModel,
        examples: Sequence[ExampleT],
        asked: Sequence[ToAnswer],
        settings: CaptureConfig,
        place: Place,
    ) -> list[list[AnswerTrace]]:
        """Answers to each prompt of a batch: the deterministic one captured, and after it those that are drawn."""
        generation: GenerationConfig = self._config.generation
        if not isinstance(generation, SamplesConfig):
            made = answer_traced(traced, asked, generation, settings, from_decoding=place.from_decoding)
            return [[one] for one in made]
        run_seed, numbers = self._config.output.seed, range(1, generation.num_samples)
        return answer_several(
            traced,
            asked,
            [[f"{run_seed} {example.key} {number}" for number in numbers] for example in examples],
            generation,
            settings,
            are_traced=generation.trace_samples,
            from_decoding=place.from_decoding,
        )

    def fields(self, example: ExampleT, answer: Answered, shared: dict[str, Any]) -> dict[str, Any]:
        """The fields of a record: those that all records of answers share, and the task's own."""
        return shared | self._judged(example, answer, shared)

    def length(self, example: ExampleT) -> int:
        """Prompt tokens."""
        if example.index not in self._lengths:
            self._lengths[example.index] = len(self.prompt(example).token_ids)
        return self._lengths[example.index]

    def num_positions(self, example: ExampleT) -> int:
        """Prompt and longest answer."""
        return self.length(example) + self._config.generation.max_new_tokens

    def trace(self, traced: TracedModel, examples: Sequence[ExampleT], place: Place) -> list[TracedSample]:
        """Answer a batch and capture it; sampled answers follow their question's own where they are traced."""
        prompts = [self.prompt(example) for example in examples]
        asked = [ToAnswer(prompt.token_ids) for prompt in prompts]
        generation, settings = getattr(self._config, "generation", None), self._config.capture
        are_traced = isinstance(generation, SamplesConfig) and generation.trace_samples
        made = self.answer(traced, examples, asked, settings, place)
        samples: list[TracedSample] = []
        for example, prompt, (first, *own) in zip(examples, prompts, made, strict=True):
            whole = [first, *(own if are_traced else [])]
            for sample_index, one in enumerate(whole):
                here = place._replace(first_index=place.first_index + len(samples))
                rest = [] if sample_index else own
                samples.append(self._sample(traced, example, prompt, sample_index, one, rest, here))
        return samples

    def _shots(self, example: ExampleT, question: str) -> list[Exchange]:
        """Solved examples for one question."""
        if not self._num_shots:
            return []
        return draw_shots(
            self._pool,
            self._num_shots,
            seed=self._config.output.seed,
            index=example.index,
            asked=lambda other: other.question == question,
        )

    def _answered(self, prompt: Prompt, answer: Generated, sample_index: int, place: Place) -> Answered:
        parsed = parse_answer(
            self._tokenizer,
            prompt,
            answer.token_ids,
            eos_included=answer.eos_included,
            is_one_line=self.is_one_line,
        )
        return Answered(parsed.text, parsed, answer, sample_index, place)

    def _sample(
        self,
        traced: TracedModel,
        example: ExampleT,
        prompt: Prompt,
        sample_index: int,
        made: AnswerTrace,
        others: Sequence[AnswerTrace],
        place: Place,
    ) -> TracedSample:
        answer, text, trace = made
        answered = self._answered(prompt, answer, sample_index, place)
        shared = answered_fields(traced, prompt, answered.parsed, answer, trace, place) | {
            "key": example.answer_key(sample_index),
            "example_id": example.example_id or str(example.index),
            "question_id": example.question_id,
            "sample_index": sample_index,
            "split": self._config.source.split,
            "input_sha256": sha256_text(prompt.input_text),
            "seed": self._config.output.seed,
            "generated_text": answered.parsed.whole_text,
            "generated_answer": answered.text,
            "generated_token_ids": answer.token_ids,
            "token_logprobs": trace.next_tokens.logprobs.tolist(),
            "token_entropies": trace.next_tokens.entropies.tolist(),
            "is_truncated": not answered.parsed.has_ended,
        }
        if issubclass(self._task.record, AnsweredRecord):
            settings = settings_of(self._config.generation, do_sample=sample_index > 0)
            shared |= {
                "generation": settings,
                "beam_score": float(trace.next_tokens.logprobs.mean()) if settings.num_beams > 1 else None,
            }
            shared["samples"] = [
                self._summary(example, prompt, number, one, place, shared) for number, one in enumerate(others, start=1)
            ]
        record: Record = self._task.record(**self.fields(example, answered, shared))
        return TracedSample(record, text, trace)

    def _judged(self, example: ExampleT, answer: Answered, shared: dict[str, Any]) -> dict[str, Any]:
        """What the task says of an answer.

        Raises:
            ConfigError: it says nothing, leaves out a field, or names one that it does not have or that is not its own.
        """
        judged = self._task.call("judge", example, answer, self._config)
        where = f"task {self._task.name!r}: `judge` of the example {example.key}"
        if not isinstance(judged, dict):
            raise ConfigError(f"{where} gave {judged!r:.200}; it has to give a dictionary of fields")
        names = {one.name: one for one in msgspec.structs.fields(self._task.record)}
        for name in judged:
            if name in shared:
                raise ConfigError(f"{where} gave {name!r}, which the library fills in; leave it out")
            if name not in names:
                raise ConfigError(f"{where} gave {name!r}, which is no field of {self._task.record.__name__}")
        given = judged.keys() | shared.keys()
        if missing := [name for name, one in names.items() if one.required and name not in given]:
            raise ConfigError(f"{where} gave no {missing[0]!r}; return it, or give the field a default")
        return judged

    def _summary(
        self,
        example: ExampleT,
        prompt: Prompt,
        sample_index: int,
        made: AnswerTrace,
        place: Place,
        shared: dict[str, Any],
    ) -> SampledAnswer:
        """A sampled answer as the record of its question lists it."""
        answered = self._answered(prompt, made.generated, sample_index, place)
        correct = self._task.outcome.correct
        judged = {} if correct is None else self._judged(example, answered, shared)
        return SampledAnswer(
            sample_index=sample_index,
            text=answered.text,
            token_ids=made.generated.token_ids,
            token_logprobs=made.trace.next_tokens.logprobs.tolist(),
            finish_reason=made.generated.finish_reason,
            is_correct=None if correct is None else judged.get(correct),
        )
