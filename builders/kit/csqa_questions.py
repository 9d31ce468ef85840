"""CommonsenseQA's questions: rows in, questions out; and a question with an option as an encoder reads them.

Address   https://huggingface.co/datasets/tau/commonsense_qa
Paper     Talmor et al. 2019, CommonsenseQA: A Question Answering Challenge Targeting Commonsense Knowledge
Licence   MIT
One row   {"id": "1afa02df...", "question": "A revolving door is convenient for two direction travel, but ...",
           "question_concept": "revolving door", "choices": {"label": ["A", ...], "text": ["bank", ...]},
           "answerKey": "A"}

The original files have the same nested: {"id", "answerKey", "question": {"stem", "question_concept", "choices":
[{"label", "text"}, ...]}}. In a flat file each option has a column of its own, or `choices` is a text that holds
a list (builders/kit/options.py). The answers of the test split are not public: its `answerKey` is empty.
"""

import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from builders.kit.cells import Cells, Columns
from builders.kit.choices import Choice
from builders.kit.columns import ChoiceSource
from builders.kit.options import Options, label_index, option_text, options_of, tell_unlabelled
from builders.kit.sources import HubSource, SourceRow, read_examples
from tracekit.errors import ConfigError, SourceError
from tracekit.format.manifest import TOO_LONG
from tracekit.model.prompts import sha256_text
from tracekit.task import Example, Examples

__all__ = [
    "COLUMNS",
    "SAMPLE",
    "SOURCE",
    "CsqaQuestion",
    "EncodedChoice",
    "choice_fields",
    "cut_to_fit",
    "encode_choices",
    "parse_row",
    "read_questions",
    "with_options",
]

SOURCE = HubSource("tau/commonsense_qa", None)
SAMPLE = Path(__file__).with_name("csqa.jsonl")
COLUMNS: Columns = {
    "question": ("question", "stem", "question.stem"),
    "choices": ("choices", "options", "question.choices"),
    "label": ("answerKey", "answer"),
    "id": ("id",),
}
"""The columns that are read."""

_LETTERS = string.ascii_uppercase
_MAX_CHARACTERS = 10**6
"""Longest question: it is tokenised whole, to know how many tokens do not fit."""
_NESTED = re.compile(r"\s*\{\s*['\"](?:stem|choices|question_concept)['\"]")


class CsqaQuestion(Example, frozen=True, kw_only=True):
    """One question with its options."""

    question: str
    """The question."""
    concept: str | None
    """Its concept in ConceptNet; None where the source has none."""
    choices: list[Choice]
    """The options, in order."""
    label_idx: int | None
    """Number of the right option; None where the source does not say."""

    @property
    def text(self) -> str:
        """The options: the question is cut where it is too long."""
        return "\n".join(choice.text for choice in self.choices)

    @property
    def gold_label(self) -> str | None:
        """Letter of the right option; None where the source does not say."""
        return None if self.label_idx is None else self.choices[self.label_idx].label


class EncodedChoice(NamedTuple):
    """One option together with its question, as an encoder reads them."""

    input_ids: list[int]
    """Question, then option, with the special tokens that the tokenizer puts around them."""
    token_type_ids: list[int] | None
    """Which of the two each token belongs to; None where the model does not take them."""
    num_cut: int
    """Tokens of the question that were cut off to make it fit."""
    text: str
    """What is left of the question, a space, and the option."""
    offsets: list[tuple[int, int]]
    """`[start, stop)` characters of each token in `text`; (0, 0) for a special token."""


def choice_fields(example: CsqaQuestion, probs: np.ndarray) -> dict[str, Any]:
    """The fields of a record that follow from a question and a distribution over its options, float64 (C,)."""
    best, label = int(np.argmax(probs)), example.label_idx
    second, first = np.sort(probs)[-2:]
    return {
        "key": example.key,
        "example_id": example.example_id,
        "question_id": example.question_id,
        "input_sha256": sha256_text(example.question),
        "question": example.question,
        "concept": example.concept,
        "choices": example.choices,
        "label_idx": label,
        "gold_label": example.gold_label,
        "pred_idx": best,
        "pred_label": example.choices[best].label,
        "is_correct": None if label is None else best == label,
        "entropy": float(-(probs * np.log(np.maximum(probs, np.finfo(float).tiny))).sum()),
        "margin": float(first - second),
    }


def parse_row(row: SourceRow) -> CsqaQuestion:
    """A row of the Hub's form, of the original files' nested form or of a flat one, as a question.

    Raises:
        SourceError: no question, not two options at least, an option without text, letters that are not distinct, or
            an answer that is none of them.
    """
    cells = Cells(row, COLUMNS)
    name, asked = cells.first("question")
    nested = cells.structure(name, asked) if isinstance(asked, str) and _NESTED.match(asked) else asked
    if isinstance(nested, dict):
        cells = Cells(row._replace(data={**row.data, **nested}), {**COLUMNS, "question": ("stem",)})
    question = cells.text("question", what="question")
    if len(question) > _MAX_CHARACTERS:
        raise SourceError(
            f"{TOO_LONG}: a question of {len(question)} characters; at most {_MAX_CHARACTERS} are cut to fit"
        )
    concept = cells.data.get("question_concept")
    options = options_of(cells)
    choices = _choices(cells, options)
    return CsqaQuestion(
        index=row.index,
        example_id=cells.identity(),
        question=question.strip(),
        concept=concept.strip() or None if isinstance(concept, str) else None,
        choices=choices,
        label_idx=label_index(
            cells,
            options,
            [choice.label for choice in choices],
            start=None,
            nothing=", or empty where unlabelled",
        ),
    )


def read_questions(config: ChoiceSource) -> Examples[CsqaQuestion]:
    """The questions of a source.

    Raises:
        SourceError: as builders.kit.sources.read_examples.
    """
    found = read_examples(config, default=SOURCE, sample=SAMPLE, columns=COLUMNS, parse=parse_row)
    tell_unlabelled([one.label_idx for one in found.examples], COLUMNS)
    return found


def with_options(question: str, choices: Sequence[Choice]) -> str:
    """A question and its options, a line each, as a language model is asked."""
    return "\n".join([question, *(f"{choice.label}. {choice.text}" for choice in choices)])


def _choices(cells: Cells, options: Options) -> list[Choice]:
    """The options, each with its label: letters where the row has none at all."""
    pairs = options.pairs
    if not 2 <= len(pairs) <= len(_LETTERS):
        raise SourceError(
            f"{len(pairs)} options; expected 2 to {len(_LETTERS)} in {cells.names('choices')[0]!r} (a list, one of "
            f"{{label, text}}, or {{label: [...], text: [...]}}) or in columns A, B, ...; columns: "
            f"{cells.listed_for('choices')}"
        )
    if all(label is None for label, _ in pairs):
        pairs = [(letter, text) for letter, (_, text) in zip(_LETTERS, pairs, strict=False)]
    choices = [
        Choice(
            label=option_text(cells, label, "an option whose label is"),
            text=option_text(cells, text, "an option whose text is"),
        )
        for label, text in pairs
    ]
    labels = [choice.label for choice in choices]
    if len(set(labels)) < len(labels):
        raise SourceError(f"options are labelled {' '.join(labels)}; expected each label once")
    return choices


def encode_choices(
    tokenizer: Any, question: str, choices: Sequence[Choice], max_seq_len: int | None
) -> list[EncodedChoice]:
    """Every option as the second of a pair with its question, cut to `max_seq_len` tokens (None: no limit).

    Special tokens and token types are the tokenizer's own. Only the beginning of the question is ever cut: what is
    asked usually stands at its end.

    Raises:
        ConfigError: an option alone leaves no room for a token of the question.
    """
    return [_encode(tokenizer, question, choice, max_seq_len) for choice in choices]


def _encode(tokenizer: Any, question: str, choice: Choice, max_seq_len: int | None) -> EncodedChoice:
    def pair(text: str) -> Any:
        return tokenizer(text, choice.text, return_offsets_mapping=True, verbose=False)

    whole = pair(question)
    kept = cut_to_fit(tokenizer, question, lambda text: len(pair(text).input_ids) - (max_seq_len or 10**9))
    if kept is None:
        needed = len(pair("").input_ids) + 1
        raise ConfigError(
            f"--max-seq-len {max_seq_len} leaves no room for the question {question[:60]!r} beside its option "
            f"{choice.text[:60]!r}; only the question may be cut; give {needed} at least"
        )
    encoded = whole if kept == question else pair(kept)
    ids: list[int] = list(encoded.input_ids)
    types = encoded.get("token_type_ids")
    shifts = {None: 0, 0: 0, 1: len(kept) + 1}
    return EncodedChoice(
        input_ids=ids,
        token_type_ids=None if types is None else list(types),
        num_cut=len(whole.input_ids) - len(ids),
        text=f"{kept} {choice.text}",
        offsets=[
            (start + shifts[part], stop + shifts[part])
            for part, (start, stop) in zip(encoded.sequence_ids(), encoded.offset_mapping, strict=True)
        ],
    )


def cut_to_fit(tokenizer: Any, question: str, num_excess: Callable[[str], int]) -> str | None:
    """The question without as much of its beginning as it takes to fit; None where its last token is too much.

    `num_excess` says how many tokens too many there are with a given question. The text is cut where a token starts
    and read anew, so that ids are always those of a text.
    """
    while (excess := num_excess(question)) > 0:
        offsets = tokenizer(
            question, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        ).offset_mapping
        # the bytes of one character share its offsets: it goes whole
        starts = [start for start, _ in offsets[excess:] if start >= offsets[excess - 1][1]]
        shorter = question[starts[0] :].lstrip() if starts else ""
        if not shorter:
            return None
        question = shorter
    return question
