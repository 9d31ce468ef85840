"""Nonsense entities: does a model take things for real that do not exist?

    questions   names are invented and asked about: questions/<config>.jsonl, and how in .json. No model is needed
    answers     the model answers, traced
    evaluate    a judge says whether each answer takes the thing for real: labels/, output/

Names are made in builders/nonsense_entities/names.py of real ones: small lists packaged here, or `--species`,
`--plants`, `--medicines`. One line of the questions:

    {"question_id": "animals-000", "domain": "animals", "name": "Turdus chrysaetos", "name_group": "Aves",
     "made_of": ["Turdus merula", "Aquila chrysaetos"], "wording_id": "diet", "is_invented": true,
     "question": "What does Turdus chrysaetos mostly eat?"}

    python -m builders.nonsense_entities --model Qwen/Qwen3-4B-Instruct-2507 --out traces/nonsense

Each stage reads what the one before wrote, and can be run alone: `--stages evaluate --judge MODEL`.
"""

import shlex
from typing import TYPE_CHECKING, Any

from builders.judging.config import answers_layout
from builders.kit.sources import HubSource, read_examples
from builders.nonsense_entities.config import NamesConfig, NonsenseConfig
from builders.nonsense_entities.prompts import SYSTEM
from builders.nonsense_entities.record import NonsenseEntitiesRecord
from builders.nonsense_entities.stages import NonsenseExample, judge_answers, make_questions, parse_row, write_questions
from tracekit.config import FileSource
from tracekit.errors import ConfigError, SourceError
from tracekit.format.manifest import SourceInfo
from tracekit.records import answered
from tracekit.task import Examples, Task

if TYPE_CHECKING:
    from tracekit.answering import Answered

__all__ = ["TASK", "NamesConfig", "NonsenseConfig"]

_FIELDS = ("question", "domain", "name", "made_of", "name_group", "wording_id", "is_invented")


def examples(config: NonsenseConfig) -> Examples[NonsenseExample]:
    """The questions that the first stage wrote; of a dry run that begins with it, those that it would write."""
    if config.output.out is None:
        raise ConfigError("stages need a folder - at `$.output.out`; give --out")
    layout, asked = answers_layout(config, TASK.name), config.source
    if layout.questions.exists():
        source = FileSource(
            source=str(layout.questions),
            split=asked.split,
            limit=asked.limit,
            offset=asked.offset,
            on_bad_row=asked.on_bad_row,
        )
        return read_examples(source, default=HubSource("", None), sample=layout.questions, parse=parse_row)
    if config.output.dry_run and "questions" in config.stages:
        made, _ = make_questions(config)
        chosen = made[asked.offset :][: asked.limit]
        info = SourceInfo(
            id=layout.questions.name,
            revision="not written yet",
            subset=None,
            split=asked.split,
            num_rows=len(made),
            num_used=len(chosen),
            skipped=[],
        )
        return Examples(chosen, info)
    raise SourceError(
        f"there are no questions to answer: no {layout.questions}; write them first: {TASK.command} --stages questions "
        f"--out {shlex.quote(str(layout.root))}"
    )


def judge(example: NonsenseExample, answer: "Answered", config: NonsenseConfig) -> dict[str, Any]:
    """The fields of a record that are about its question."""
    return {name: getattr(example, name) for name in _FIELDS}


TASK = Task(
    name="nonsense_entities",
    title="Questions about things that do not exist, and the model's answers.",
    category="question-answering",
    config=NonsenseConfig,
    record=NonsenseEntitiesRecord,
    examples=examples,
    ask=lambda example, config: example.question,
    judge=judge,
    system=SYSTEM,
    stages={"questions": write_questions, "evaluate": judge_answers},
    card="nonsense_entities.md.j2",
    outcome=answered(asked="question", same=["question"]),
)
