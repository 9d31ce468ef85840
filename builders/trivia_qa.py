"""TriviaQA: short factual questions with many accepted answers.

Address   https://huggingface.co/datasets/mandarjoshi/trivia_qa, configuration rc.nocontext
Paper     Joshi et al. 2017, TriviaQA: A Large Scale Distantly Supervised Challenge Dataset for Reading Comprehension
Licence   unknown (the Hub card says so); the questions come from trivia web sites
One row   {"question": "Which American-born Sinclair won the Nobel Prize for Literature in 1930?",
           "question_id": "tc_1", "answer": {"value": "Sinclair Lewis", "aliases": ["Harry Sinclair Lewis", ...], ...}}

    python -m builders.trivia_qa --model Qwen/Qwen3-4B-Instruct-2507 --quantize int8 --split train --limit 1000
"""

from builders.configs import TriviaQAConfig
from tracekit.cli import run_builder

if __name__ == "__main__":  # flags are read before torch is imported: what follows imports it
    run_builder("builders.trivia_qa", TriviaQAConfig)

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from builders.cells import Cells, Columns
from builders.scoring import exact_match, f1, find_alias
from builders.sources import HubSource, Row, read_examples
from tracekit.config import SourceConfig
from tracekit.errors import SourceError
from tracekit.format.manifest import SourceInfo
from tracekit.model.answers import Answer, parse_answer
from tracekit.model.capture import Text, Trace, capture
from tracekit.model.generation import Generated, answer_deterministically, answer_sampled, settings_of
from tracekit.model.prompts import Exchange, Prompter, draw_shots, sha256_text, tokens_of
from tracekit.model.traced import TracedModel
from tracekit.records import (
    SampledAnswer,
    TriviaQARecord,
)
from tracekit.run.plan import Example
from tracekit.run.task import Place, Sample, Task, answered_fields, floats

__all__ = ["BUILDER", "TriviaExample", "TriviaQABuilder", "TriviaQAConfig", "parse_row"]

SOURCE = HubSource("mandarjoshi/trivia_qa", "rc.nocontext")
SAMPLE = Path(__file__).parent / "samples" / "trivia_qa.jsonl"
COLUMNS: Columns = {
    "question": ("question", "context"),
    "answer": ("answer", "answers", "aliases"),
    "id": ("question_id", "id"),
}
"""The columns that are read."""
SYSTEM = "Answer the question with the answer alone: a name, a number or a few words. Do not write a sentence."

_PREFIX, _SUFFIX = "Question:", "Answer:"


class TriviaExample(Example, frozen=True, kw_only=True):
    """One question and everything that counts as its answer."""

    example_id: str
    """The source's id, else the row."""
    question: str
    """The question."""
    answers: list[str]
    """Accepted answers, the main one first."""

    @property
    def text(self) -> str:
        """The question."""
        return self.question


def parse_row(row: Row) -> TriviaExample:
    """A row of TriviaQA's own form, or of the flat form, as an example.

    Raises:
        SourceError: no question, or no answer.
    """
    cells = Cells(row, COLUMNS)
    question = _bare(cells.text("question", what="question"))
    if not question:
        raise SourceError(f"no question; expected more than {_PREFIX!r} and {_SUFFIX!r}; columns: {cells.listed}")
    return TriviaExample(index=row.index, example_id=cells.identity(), question=question, answers=cells.answers())


def _bare(question: str) -> str:
    """The question without the prefix and suffix of a ready-made prompt."""
    return question.strip().removeprefix(_PREFIX).removesuffix(_SUFFIX).strip()


class TriviaQABuilder:
    """Questions in, answered and traced samples out."""

    name = "trivia_qa"

    def examples(self, config: TriviaQAConfig) -> tuple[Sequence[TriviaExample], SourceInfo]:
        """The questions of the source."""
        found = read_examples(config.source, default=SOURCE, sample=SAMPLE, columns=COLUMNS, parse=parse_row)
        return found.examples, found.info

    def open(self, config: TriviaQAConfig, tokenizer: Any, examples: Sequence[TriviaExample]) -> "TriviaQATask":
        """Render every prompt."""
        return TriviaQATask(config, tokenizer, examples)


class TriviaQATask(Task[TriviaExample]):
    """One configuration of TriviaQA at work."""

    def __init__(self, config: TriviaQAConfig, tokenizer: Any, examples: Sequence[TriviaExample]) -> None:
        self._config, self._tokenizer = config, tokenizer
        prompter = Prompter(tokenizer, config.prompt, default_system=SYSTEM)
        whole_sample = SourceConfig(source="sample")
        self._pool = read_examples(
            whole_sample, default=SOURCE, sample=SAMPLE, columns=COLUMNS, parse=parse_row
        ).examples
        self.variant = prompter.variant
        self._prompts = {example.index: prompter.prompt(example.question, self._shots(example)) for example in examples}

    def length(self, example: TriviaExample) -> int:
        """Prompt tokens."""
        return len(self._prompts[example.index].token_ids)

    def num_positions(self, example: TriviaExample) -> int:
        """Prompt and longest answer."""
        return self.length(example) + self._config.generation.max_new_tokens

    def trace(self, traced: TracedModel, examples: Sequence[TriviaExample], place: Place) -> list[Sample]:
        """Answer a batch, then capture it; sampled answers follow their question's own where they are traced."""
        generation = self._config.generation
        ids = [self._prompts[example.index].token_ids for example in examples]
        first = answer_deterministically(traced, ids, generation)
        others: list[list[Generated]] = [[] for _ in examples]
        for sample_index in range(1, generation.num_samples):
            seeds = [f"{self._config.output.seed} {_key(example, 0)} {sample_index}" for example in examples]
            for answers, answer in zip(others, answer_sampled(traced, ids, generation, seeds), strict=True):
                answers.append(answer)
        traces = self._capture(traced, examples, first, self._config.capture)
        silent = msgspec.structs.replace(self._config.capture, sites=("none",))
        settings = self._config.capture if generation.trace_samples else silent
        other_traces = [
            self._capture(traced, examples, [answers[i] for answers in others], settings)
            for i in range(generation.num_samples - 1)
        ]
        samples: list[Sample] = []
        for i, example in enumerate(examples):
            drawn = list(zip(others[i], [column[i] for column in other_traces], strict=True))
            summaries = [self._sampled(example, n, *pair) for n, pair in enumerate(drawn, start=1)]
            whole = [(first[i], traces[i], summaries)]
            whole += [(answer, trace, []) for answer, trace in drawn] if generation.trace_samples else []
            for sample_index, (answer, trace, rest) in enumerate(whole):
                here = place._replace(first_index=place.first_index + len(samples))
                samples.append(self._sample(traced, example, sample_index, answer, trace, rest, here))
        return samples

    def _capture(
        self, traced: TracedModel, examples: Sequence[TriviaExample], answers: Sequence[Generated], settings: Any
    ) -> list[Trace]:
        texts = [self._text(example, answer) for example, answer in zip(examples, answers, strict=True)]
        return capture(traced, texts, settings)

    def _text(self, example: TriviaExample, answer: Generated) -> Text:
        prompt = self._prompts[example.index].token_ids
        return Text(prompt + answer.token_ids, len(prompt))

    def _shots(self, example: TriviaExample) -> list[Exchange]:
        """Solved examples for one question."""
        shots = draw_shots(
            self._pool,
            self._config.prompt.num_shots,
            seed=self._config.output.seed,
            index=example.index,
            asked=lambda other: other.question == example.question,
        )
        return [Exchange(other.question, other.answers[0]) for other in shots]

    def _parse(self, example: TriviaExample, answer: Generated) -> Answer:
        prompt = self._prompts[example.index]
        return parse_answer(self._tokenizer, prompt, answer.token_ids, eos_included=answer.eos_included)

    def _is_correct(self, text: str, answers: list[str]) -> bool:
        if self._config.correctness == "exact_match":
            return exact_match(text, answers)
        return find_alias(text, answers) is not None

    def _sampled(self, example: TriviaExample, sample_index: int, answer: Generated, trace: Trace) -> SampledAnswer:
        text = self._parse(example, answer).text
        return SampledAnswer(
            sample_index=sample_index,
            text=text,
            token_ids=answer.token_ids,
            token_logprobs=floats(trace.logprobs),
            finish_reason=answer.finish_reason,
            is_correct=self._is_correct(text, example.answers),
        )

    def _sample(
        self,
        traced: TracedModel,
        example: TriviaExample,
        sample_index: int,
        answer: Generated,
        trace: Trace,
        samples: list[SampledAnswer],
        place: Place,
    ) -> Sample:
        prompt, text = self._prompts[example.index], self._text(example, answer)
        parsed = self._parse(example, answer)
        match = find_alias(parsed.text, example.answers)
        settings = settings_of(self._config.generation, do_sample=sample_index > 0)
        record = TriviaQARecord(
            **answered_fields(traced, prompt, parsed, answer, trace, place),
            key=_key(example, sample_index),
            example_id=example.example_id,
            question_id=example.example_id,
            sample_index=sample_index,
            split=self._config.source.split,
            input_sha256=sha256_text(prompt.input_text),
            generation=settings,
            seed=self._config.output.seed,
            question=example.question,
            generated_text=parsed.whole_text,
            generated_answer=parsed.text,
            generated_token_ids=answer.token_ids,
            ground_truth_answers=example.answers,
            global_example_id=example.index,
            shard=place.shard,
            index_in_shard=place.first_index,
            token_logprobs=floats(trace.logprobs),
            token_entropies=floats(trace.entropies),
            is_truncated=not parsed.has_ended,
            beam_score=float(trace.logprobs.mean()) if settings.num_beams > 1 else None,
            matched_alias=match.alias if match else None,
            matched_alias_span=_alias_tokens(parsed, match.start, match.stop) if match else None,
            is_correct=self._is_correct(parsed.text, example.answers),
            correctness_rule=self._config.correctness,
            exact_match=exact_match(parsed.text, example.answers),
            f1=f1(parsed.text, example.answers),
            samples=samples,
        )
        return Sample(record, text, trace)


def _key(example: TriviaExample, sample_index: int) -> str:
    """Row in the source, and for a sampled answer its number: unique in a configuration, also after a merge."""
    return f"{example.index:06d}" + (f"_{sample_index:03d}" if sample_index else "")


def _alias_tokens(parsed: Answer, start: int, stop: int) -> list[int]:
    """Token range of a character range of the answer."""
    return list(tokens_of(parsed.offsets, parsed.start_char + start, parsed.start_char + stop))


BUILDER = TriviaQABuilder()
