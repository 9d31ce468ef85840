"""Answering: the task of every builder that asks one question an example and records the answer as it comes.

A builder says what is asked and makes its record of the fields that all such records share.
"""

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from tracekit.config import RunConfig
from tracekit.model.answers import parse_answer
from tracekit.model.capture import Text, capture
from tracekit.model.generation import Generated, answer_once, settings_of
from tracekit.model.prompts import Prompt, Prompter, sha256_text
from tracekit.model.traced import TracedModel
from tracekit.records import Record
from tracekit.run.plan import Example
from tracekit.run.task import Place, Sample, Task, answered_fields, floats

__all__ = ["AnsweringTask", "Asked"]

ExampleT = TypeVar("ExampleT", bound=Example)


class Asked(NamedTuple, Generic[ExampleT]):
    """An example and what it asks."""

    example: ExampleT
    """The example."""
    key: str
    """Key of its sample."""
    example_id: str
    """The source's own id."""
    question_id: str
    """Shared by the examples that belong together."""
    question: str
    """What the model is asked."""


class AnsweringTask(Task[ExampleT]):
    """One answer to each question, deterministic; builders write `record`."""

    is_one_line = True
    """Whether a plain prompt's answer ends with its first line: a base model goes on with the next question."""

    def __init__(
        self, config: RunConfig, tokenizer: Any, asked: Sequence[Asked[ExampleT]], *, default_system: str = ""
    ) -> None:
        self._config, self._tokenizer = config, tokenizer
        prompter = Prompter(tokenizer, config.prompt, default_system=default_system)
        self.variant = prompter.variant
        self._asked = {one.example.index: one for one in asked}
        self._prompts = {one.example.index: self.prompt_of(prompter, one) for one in asked}

    def prompt_of(self, prompter: Prompter, asked: Asked[ExampleT]) -> Prompt:
        """What the model reads of an example."""
        return prompter.prompt(asked.question)

    def outputs(self, traced: TracedModel, examples: Sequence[ExampleT]) -> list[Generated]:
        """The answers to a batch."""
        ids = [self._prompts[example.index].token_ids for example in examples]
        return answer_once(traced, ids, self._config.generation, None)

    def record(self, example: ExampleT, shared: dict[str, Any]) -> Record:
        """The record of an example, from the fields that all records of answers have."""
        raise NotImplementedError

    def length(self, example: ExampleT) -> int:
        """Prompt tokens."""
        return len(self._prompts[example.index].token_ids)

    def num_positions(self, example: ExampleT) -> int:
        """Prompt and longest answer."""
        return self.length(example) + self._config.generation.max_new_tokens

    def trace(self, traced: TracedModel, examples: Sequence[ExampleT], place: Place) -> list[Sample]:
        """Answer a batch, then capture it."""
        prompts = [self._prompts[example.index] for example in examples]
        settings, outputs = self._config.generation, self.outputs(traced, examples)
        texts = [
            Text(prompt.token_ids + output.token_ids, len(prompt.token_ids))
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        samples = []
        for example, text, output, trace in zip(
            examples, texts, outputs, capture(traced, texts, self._config.capture), strict=True
        ):
            prompt, asked = self._prompts[example.index], self._asked[example.index]
            parsed = parse_answer(
                self._tokenizer,
                prompt,
                output.token_ids,
                eos_included=output.eos_included,
                is_one_line=self.is_one_line,
            )
            here = place._replace(first_index=place.first_index + len(samples))
            shared = answered_fields(traced, prompt, parsed, output, trace, here) | {
                "key": asked.key,
                "example_id": asked.example_id,
                "question_id": asked.question_id,
                "sample_index": 0,
                "split": self._config.source.split,
                "input_sha256": sha256_text(prompt.input_text),
                "generation": settings_of(settings, do_sample=False),
                "seed": self._config.output.seed,
                "generated_text": parsed.whole_text,
                "generated_answer": parsed.text,
                "generated_token_ids": output.token_ids,
                "token_logprobs": floats(trace.logprobs),
                "token_entropies": floats(trace.entropies),
                "is_truncated": not parsed.has_ended,
            }
            samples.append(Sample(self.record(example, shared), text, trace))
        return samples
