"""TriviaQA: short factual questions with many accepted answers.

Address   https://huggingface.co/datasets/mandarjoshi/trivia_qa, configuration rc.nocontext
Paper     Joshi et al. 2017, TriviaQA: A Large Scale Distantly Supervised Challenge Dataset for Reading Comprehension
Licence   unknown (the Hub card says so); the questions come from trivia web sites
One row   {"question": "Which American-born Sinclair won the Nobel Prize for Literature in 1930?",
           "question_id": "tc_1", "answer": {"value": "Sinclair Lewis", "aliases": ["Harry Sinclair Lewis", ...], ...}}

    python -m builders.trivia_qa --model Qwen/Qwen3-4B-Instruct-2507 --quantize int8 --split train --limit 1000
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from builders.kit.cells import Cells, Columns
from builders.kit.columns import QuestionSource
from builders.kit.scoring import exact_match, f1, find_alias
from builders.kit.sources import HubSource, SourceRow, read_examples
from builders.trivia_qa.record import TriviaQARecord
from tracekit.config import AnswersConfig, ShotsConfig
from tracekit.errors import SourceError
from tracekit.records import Mean, Number, answered
from tracekit.task import Example, Examples, Task

if TYPE_CHECKING:
    from tracekit.answering import Answered
    from tracekit.model.answers import Answer
    from tracekit.model.prompts import Exchange

__all__ = ["TASK", "TriviaExample", "TriviaQAConfig", "parse_row"]

SOURCE = HubSource("mandarjoshi/trivia_qa", "rc.nocontext")
SAMPLE = Path(__file__).with_name("trivia_qa.jsonl")
COLUMNS: Columns = {
    "question": ("question", "context"),
    "answer": ("answer", "answers", "aliases"),
    "id": ("question_id", "id"),
}
"""The columns that are read."""
SYSTEM = "Answer the question with the answer alone: a name, a number or a few words. Do not write a sentence."

_PREFIX, _SUFFIX = "Question:", "Answer:"


class TriviaQAConfig(AnswersConfig, frozen=True, kw_only=True):
    """Questions of TriviaQA, answered and traced."""

    source: QuestionSource = QuestionSource()
    """Which data."""
    prompt: ShotsConfig = ShotsConfig()
    """How a question becomes a prompt."""
    correctness: Literal["exact_match", "alias_in_answer"] = "exact_match"
    """What counts as right: the answer is an alias, or an alias occurs in it; both after TriviaQA's normalisation."""


class TriviaExample(Example, frozen=True, kw_only=True):
    """One question and everything that counts as its answer."""

    question: str
    """The question."""
    answers: list[str]
    """Accepted answers, the main one first."""

    @property
    def text(self) -> str:
        """The question."""
        return self.question


def parse_row(row: SourceRow) -> TriviaExample:
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


def examples(config: TriviaQAConfig) -> Examples[TriviaExample]:
    """The questions of the source."""
    return read_examples(config.source, default=SOURCE, sample=SAMPLE, columns=COLUMNS, parse=parse_row)


def shots(config: TriviaQAConfig) -> "Sequence[Exchange]":
    """The packaged questions, solved."""
    from tracekit.model.prompts import Exchange

    sample = QuestionSource(source="sample")
    found = read_examples(sample, default=SOURCE, sample=SAMPLE, columns=COLUMNS, parse=parse_row).examples
    return [Exchange(one.question, one.answers[0]) for one in found]


def judge(example: TriviaExample, answer: "Answered", config: TriviaQAConfig) -> dict[str, Any]:
    """Whether an answer is right, and where the accepted one stands in it."""
    accepted, match = example.answers, find_alias(answer.text, example.answers)
    is_exact = exact_match(answer.text, accepted)
    return {
        "question": example.question,
        "ground_truth_answers": accepted,
        "global_example_id": example.index,
        "shard": answer.place.shard,
        "index_in_shard": answer.place.first_index,
        "matched_alias": match.alias if match else None,
        "matched_alias_span": _tokens_of(answer.parsed, match.start, match.stop) if match else None,
        "is_correct": is_exact if config.correctness == "exact_match" else match is not None,
        "correctness_rule": config.correctness,
        "exact_match": is_exact,
        "f1": f1(answer.text, accepted),
    }


def _tokens_of(parsed: "Answer", start: int, stop: int) -> list[int]:
    """Token range of a character range of the answer."""
    from tracekit.model.prompts import tokens_of

    return list(tokens_of(parsed.offsets, parsed.start_char + start, parsed.start_char + stop))


TASK = Task(
    name="trivia_qa",
    title="Short factual questions, the model's answers, and whether they are right.",
    category="question-answering",
    config=TriviaQAConfig,
    record=TriviaQARecord,
    examples=examples,
    ask=lambda example, config: example.question,
    judge=judge,
    system=SYSTEM,
    shots=shots,
    card="trivia_qa.md.j2",
    outcome=answered(
        asked="question",
        gold="ground_truth_answers",
        correct="is_correct",
        rule="correctness",
        same=["question"],
        shard="shard",
        numbers=[*answered().numbers, Number(name="f1", field="f1")],
        means=[
            *answered(correct="is_correct").means,
            Mean(name="exact_match", field="exact_match", definition="Share of answers that equal an accepted one."),
            Mean(name="f1", field="f1", definition="Best token F1 over the accepted answers, 0 to 1."),
        ],
    ),
)
