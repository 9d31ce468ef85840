"""Multiple-choice questions with four options: rows of the usual sets in, questions out.

    MMLU         cais/mmlu              {"question", "subject", "choices": [...], "answer": 2}
    ARC          allenai/ai2_arc        {"id", "question", "choices": {"text": [...], "label": [...]}, "answerKey": "C"}
    OpenBookQA   allenai/openbookqa     {"id", "question_stem", "choices": {"text", "label"}, "answerKey": "C"}
    llm-foundry  its copies of these    {"query", "choices": [...], "gold": 1}
    your own     JSONL, CSV, Parquet    {"question", "options": {"A": ...} or [...], "answer": "C" or 2, "id"},
                                        or columns A, B, C, D or choice0 ... choice3 in place of options

Options are lettered A to D in the order in which they are shown; builders/kit/options.py lists their forms. An answer
is a
letter (or the source's own label), or a number counted from 0 (`--label-start 1`: from 1). Columns that are null or
empty, as sets put together have them, are passed over. Rows with another number of options (a few of ARC's) are
malformed.
"""

import random
from pathlib import Path

import msgspec

from builders.kit.cells import Cells, Columns
from builders.kit.choices import Choice
from builders.kit.columns import ChoiceSource
from builders.kit.options import Options, label_index, option_text, options_of, tell_unlabelled
from builders.kit.sources import HubSource, SourceRow, read_examples
from tracekit.errors import SourceError
from tracekit.task import Example, Examples

__all__ = ["COLUMNS", "SAMPLE", "SOURCE", "McqQuestion", "parse_row", "read_questions", "shuffled"]

SOURCE = HubSource("cais/mmlu", "all")
SAMPLE = Path(__file__).with_name("introspection.jsonl")
COLUMNS: Columns = {
    "question": ("question", "question_stem", "query"),
    "choices": ("options", "choices"),
    "label": ("answer", "answerKey", "gold"),
    "id": ("id",),
}
"""The columns that are read."""

_LETTERS = "ABCD"


class McqQuestion(Example, frozen=True, kw_only=True):
    """One question with its four options."""

    question: str
    """The question."""
    subject: str | None
    """Its subject; None where the source has none."""
    choices: list[Choice]
    """The options as shown, lettered A to D."""
    order: list[int]
    """Number in the source of each option shown."""
    label_idx: int | None
    """Number of the right option as shown; None where the source does not say."""

    @property
    def text(self) -> str:
        """Question and options."""
        return "\n".join([self.question, *(choice.text for choice in self.choices)])

    @property
    def correct_letter(self) -> str | None:
        """Letter of the right option as shown; None where the source does not say."""
        return None if self.label_idx is None else self.choices[self.label_idx].label


def read_questions(config: ChoiceSource) -> Examples[McqQuestion]:
    """The questions of a source, each id once.

    Raises:
        SourceError: as `builders.kit.sources.read_examples`; or an id stands twice, and `on_bad_row` is `error`.
    """
    found = read_examples(config, default=SOURCE, sample=SAMPLE, columns=COLUMNS, parse=parse_row)
    tell_unlabelled([one.label_idx for one in found.examples], COLUMNS)
    first: dict[str, int] = {}
    repeated: list[str] = []
    for example in found.examples:
        if first.setdefault(example.example_id, example.index) != example.index:
            repeated.append(
                f"{found.source.id} row {example.index} (counted from 0): id {example.example_id!r} is that of row "
                f"{first[example.example_id]} too; the samples of a question are found by its id"
            )
    if repeated and config.on_bad_row == "error":
        raise SourceError(f"{repeated[0]}; give each its own, or pass --on-bad-row skip")
    examples = [example for example in found.examples if first[example.example_id] == example.index]
    info = msgspec.structs.replace(found.source, num_used=len(examples), skipped=[*found.source.skipped, *repeated])
    return Examples(examples, info)


def parse_row(row: SourceRow) -> McqQuestion:
    """A row of any of the forms above as a question.

    Raises:
        SourceError: no question, not four options, an option without text, a label twice, or an answer that is none of
            them.
    """
    cells = Cells(row, COLUMNS)
    question = cells.text("question", what="question")
    options = options_of(cells, max_columns=len(_LETTERS) + 1)  # a fifth column must not get lost
    labels, texts = _checked(cells, options)
    subject = cells.data.get("subject")
    return McqQuestion(
        index=row.index,
        example_id=cells.identity(),
        question=question.strip().removeprefix("Question:").strip(),
        subject=subject.strip() or None if isinstance(subject, str) else None,
        choices=[Choice(label=letter, text=text) for letter, text in zip(_LETTERS, texts, strict=True)],
        order=list(range(len(texts))),
        label_idx=label_index(
            cells,
            options,
            labels,
            start=0,
            nothing="; nothing where unlabelled; an option's text is not accepted",
        ),
    )


def shuffled(question: McqQuestion, seed: int) -> McqQuestion:
    """The same question with its options in an order drawn by seed and question id."""
    order = list(range(len(question.choices)))
    random.Random(f"{seed} {question.example_id}").shuffle(order)
    choices = [
        Choice(label=letter, text=question.choices[number].text) for letter, number in zip(_LETTERS, order, strict=True)
    ]
    label_idx = None if question.label_idx is None else order.index(question.label_idx)
    return msgspec.structs.replace(
        question, choices=choices, order=[question.order[number] for number in order], label_idx=label_idx
    )


def _checked(cells: Cells, options: Options) -> tuple[list[str], list[str]]:
    """The source's own labels and the texts of four options."""
    if len(options.pairs) != len(_LETTERS):
        raise SourceError(
            f"{len(options.pairs)} options; expected four in {' or '.join(map(repr, cells.names('choices')))} (a list, "
            f"or an object A to D), or in columns A, B, C, D; columns: {cells.listed_for('choices')}"
        )
    labels = [
        letter if label is None else cells.scalar("choices", label) or ""
        for letter, (label, _) in zip(_LETTERS, options.pairs, strict=True)
    ]
    if len(set(labels)) < len(labels):
        raise SourceError(f"options labelled {' '.join(labels)}; expected each label once")
    return labels, [option_text(cells, text, "an option is") for _, text in options.pairs]
