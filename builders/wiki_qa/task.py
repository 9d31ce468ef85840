"""WikiQA: questions that a model writes about encyclopedia articles, answered without them, and judged.

    python -m builders.wiki_qa --stages questions answers evaluate --model Qwen/Qwen3-4B-Instruct-2507 --limit 200

    questions   a section of 200 to 500 tokens of an article -> a question -> its answer from the section alone
    answers     the tested model answers without the article, and is traced
    evaluate    a judge says who abstained, who was right and who made something up

Each stage reads what the one before wrote, and goes on where it was stopped. Articles are described in articles.py,
what the question writer is asked in prompts.py, judges in builders/judging.
"""

from typing import TYPE_CHECKING, Any

import msgspec

from builders.judging.config import answers_layout
from builders.kit.sources import SourceRow, read_examples
from builders.wiki_qa.articles import SAMPLE, SOURCE
from builders.wiki_qa.config import WikiQAConfig
from builders.wiki_qa.questions import WikiQuestion, read_questions
from builders.wiki_qa.record import WikiQARecord
from tracekit.errors import SourceError
from tracekit.records import answered
from tracekit.task import Example, Examples, Task, lazy

if TYPE_CHECKING:
    from tracekit.answering import Answered

__all__ = ["TASK", "WikiExample", "WikiQAConfig"]


class WikiExample(Example, frozen=True, kw_only=True):
    """One question of the file."""

    question: WikiQuestion
    """The question and where it is from."""
    question_model: str
    """Who wrote it."""
    prompts_sha256: str
    """SHA-256 of the prompts it was asked with."""
    article_source: str
    """Where the articles are from."""

    @property
    def text(self) -> str:
        """The question."""
        return self.question.question


def examples(config: WikiQAConfig) -> Examples[WikiExample]:
    """The questions that the stage before wrote.

    Raises:
        SourceError: there are none.
    """
    layout = answers_layout(config, TASK.name)
    about = read_questions(layout)
    if about is None:
        raise SourceError(
            f"{layout.questions} is not there; write the questions first: {TASK.command} --stages questions --out "
            f"{layout.root} (and the flags of the source and of the question model)"
        )
    articles = f"{about.source.id}@{about.source.revision}" if about.source.revision else about.source.id

    def parse(row: SourceRow) -> WikiExample:
        try:
            question = msgspec.convert(row.data, WikiQuestion)
        except msgspec.ValidationError as error:
            raise SourceError(f"no question of {TASK.name}: {error}") from error
        return WikiExample(
            index=row.index,
            example_id=question.id,
            question=question,
            question_model=about.question_model,
            prompts_sha256=about.prompts_sha256,
            article_source=articles,
        )

    return read_examples(config.settled().source, default=SOURCE, sample=SAMPLE, parse=parse)


def judge(example: WikiExample, answer: "Answered", config: WikiQAConfig) -> dict[str, Any]:
    """The fields of a record that are about its question."""
    asked = example.question
    return {
        "question": asked.question,
        "ground_truth_answers": [asked.answer],
        "article_title": asked.title,
        "article_row": asked.article_row,
        "article_source": example.article_source,
        "section_title": asked.section_title,
        "section": asked.section,
        "section_num_tokens": asked.section_num_tokens,
        "difficulty": asked.difficulty,
        "question_model": example.question_model,
        "question_prompts_sha256": example.prompts_sha256,
    }


def _can_estimate(config: WikiQAConfig) -> bool:
    """Not before the stage `questions`, which the same command runs."""
    return "questions" not in config.stages or read_questions(answers_layout(config, TASK.name)) is not None


TASK = Task(
    name="wiki_qa",
    title="Questions that a model wrote about sections of encyclopedia articles, answered without them.",
    category="question-answering",
    config=WikiQAConfig,
    record=WikiQARecord,
    examples=examples,
    ask=lambda example, config: example.question.question,
    judge=judge,
    stages={
        "questions": lazy("builders.wiki_qa.stages:questions"),
        "evaluate": lazy("builders.wiki_qa.stages:judge_answers"),
    },
    can_estimate=_can_estimate,
    card="wiki_qa.md.j2",
    outcome=answered(
        asked="question",
        gold="ground_truth_answers",
        same=["question", "ground_truth_answers"],
        made_from=["article_source", "question_model"],
    ),
)
