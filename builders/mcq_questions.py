"""Multiple-choice questions with four options: rows of the usual sets in, questions out.

    MMLU         cais/mmlu              {"question", "subject", "choices": [...], "answer": 2}
    ARC          allenai/ai2_arc        {"id", "question", "choices": {"text": [...], "label": [...]}, "answerKey": "C"}
    OpenBookQA   allenai/openbookqa     {"id", "question_stem", "choices": {"text", "label"}, "answerKey": "C"}
    llm-foundry  its copies of these    {"query", "choices": [...], "gold": 1}
    your own     JSONL, CSV, Parquet    {"question", "options": {"A": ...} or [...], "answer": "C" or 2, "id"},
                                        or columns A, B, C, D in place of options

Options are lettered A to D in the order in which they are shown. An answer is a letter (or the source's own label), or
a number counted from 0 (also 2.0, which a table with gaps makes of 2). Columns that are null or empty, as sets put
together have them, are passed over. Rows with another number of options (a few of ARC's) are malformed.
"""

import random
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import msgspec

from builders.sources import Examples, HubSource, Row, read_examples
from tracekit.config import SourceConfig
from tracekit.errors import UNREADABLE, SourceError
from tracekit.records import Choice
from tracekit.run.plan import Example

__all__ = ["SAMPLE", "SOURCE", "McqQuestion", "parse_row", "read_questions", "shuffled"]

SOURCE = HubSource("cais/mmlu", "all")
SAMPLE = Path(__file__).parent / "samples" / "introspection.jsonl"

_LETTERS = "ABCD"
_QUESTION_COLUMNS = ("question", "question_stem", "query")
_OPTION_COLUMNS = ("options", "choices")
_ANSWER_COLUMNS = ("answer", "answerKey", "gold")


class McqQuestion(Example, frozen=True, kw_only=True):
    """One question with its four options."""

    example_id: str
    """The source's id, else the row."""
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
    def correct_letter(self) -> str | None:
        """Letter of the right option as shown; None where the source does not say."""
        return None if self.label_idx is None else self.choices[self.label_idx].label


def read_questions(config: SourceConfig) -> Examples[McqQuestion]:
    """The questions of a source, each id once.

    Raises:
        SourceError: as `builders.sources.read_examples`; or an id stands twice, and `on_bad_row` is `error`.
    """
    found = read_examples(config, default=SOURCE, sample=SAMPLE, parse=parse_row)
    first: dict[str, int] = {}
    repeated: list[str] = []
    for example in found.examples:
        if first.setdefault(example.example_id, example.index) != example.index:
            repeated.append(
                f"{found.info.id} row {example.index} (counted from 0): id {example.example_id!r} is that of row "
                f"{first[example.example_id]} too; the samples of a question are found by its id"
            )
    if repeated and config.on_bad_row == "error":
        raise SourceError(f"{repeated[0]}; give each its own, or pass --on-bad-row skip")
    examples = [example for example in found.examples if first[example.example_id] == example.index]
    info = msgspec.structs.replace(found.info, num_used=len(examples), skipped=[*found.info.skipped, *repeated])
    return Examples(examples, info)


def parse_row(row: Row) -> McqQuestion:
    """A row of any of the forms above as a question.

    Raises:
        SourceError: no question, not four options, an option without text, a label twice, or an answer that is none of
            them.
    """
    data = row.data
    question = _first(data, _QUESTION_COLUMNS)
    if not isinstance(question, str) or not question.strip():
        raise SourceError(
            f"no question; expected a text in one of {', '.join(_QUESTION_COLUMNS)}, found {question!r}; columns: "
            f"{', '.join(data)}"
        )
    labels, texts = _options(data)
    identity = data.get("id")
    subject = data.get("subject")
    return McqQuestion(
        index=row.index,
        example_id=str(row.index if identity in (None, "") else identity),
        question=question.strip().removeprefix("Question:").strip(),
        subject=subject.strip() or None if isinstance(subject, str) else None,
        choices=[Choice(label=letter, text=text) for letter, text in zip(_LETTERS, texts, strict=True)],
        order=list(range(len(texts))),
        label_idx=_label_idx(_first(data, _ANSWER_COLUMNS), labels),
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


def _first(data: dict[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of these columns that holds one; None where none does."""
    return next((data[name] for name in names if data.get(name) not in (None, "", [], {})), None)


def _options(data: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The source's own labels and the texts of the options, wherever a row keeps them."""
    value = _first(data, _OPTION_COLUMNS)
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except UNREADABLE as error:
            raise SourceError(f"the options are no JSON: {error}; expected a list, or an object A to D") from error
    if value is None:
        # a fifth column must not get lost
        value = {letter: data[letter] for letter in _LETTERS + "E" if data.get(letter) not in (None, "")}
    if isinstance(value, dict) and {"text", "label"} <= set(value):
        pairs = list(zip_longest(_listed(value["label"]), _listed(value["text"])))
    elif isinstance(value, dict):
        pairs = sorted(value.items())
    else:
        pairs = [
            (one.get("label"), one.get("text")) if isinstance(one, dict) else (None, one) for one in _listed(value)
        ]
    if len(pairs) != len(_LETTERS):
        raise SourceError(
            f"{len(pairs)} options; expected four in 'options' or 'choices' (a list, or an object A to D), or in "
            f"columns A, B, C, D; columns: {', '.join(data)}"
        )
    labels = [letter if label is None else str(label) for letter, (label, _) in zip(_LETTERS, pairs, strict=True)]
    if len(set(labels)) < len(labels):
        raise SourceError(f"options labelled {' '.join(labels)}; expected each label once")
    return labels, [_text(text) for _, text in pairs]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _text(value: Any) -> str:
    """A text, or a number as text."""
    is_known = isinstance(value, str | int | float) and not isinstance(value, bool)
    if not is_known or not str(value).strip():
        raise SourceError(f"an option is {value!r}; expected a text")
    return str(value).strip()


def _label_idx(answer: Any, labels: list[str]) -> int | None:
    """Number of the right option; None for the empty answer of an unlabelled split."""
    if answer is None:
        return None
    text = str(int(answer) if isinstance(answer, float) and answer.is_integer() else answer).strip()
    upper = [label.upper() for label in labels]
    is_lettered = bool(set(upper) & set(_LETTERS))
    is_numbered = any(label.isdecimal() for label in labels)
    if not isinstance(answer, bool):
        if text in labels:
            return labels.index(text)
        if text.upper() in upper:
            return upper.index(text.upper())
        if len(text) == 1 and text.upper() in _LETTERS and not is_lettered:
            return _LETTERS.index(text.upper())
        if text.isdecimal() and int(text) < len(labels) and not is_numbered:
            return int(text)
    accepted = [f"one of {' '.join(labels)}"]
    accepted += [] if is_lettered else ["a letter A to D"]
    accepted += [] if is_numbered else [f"a number 0 to {len(labels) - 1}, counted from 0"]
    raise SourceError(
        f"the answer is {answer!r}; expected {', or '.join(accepted)}; nothing where unlabelled; an option's text is "
        "not accepted"
    )
