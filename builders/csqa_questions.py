"""CommonsenseQA's questions: rows in, questions out; and a question with an option as an encoder reads them.

Address   https://huggingface.co/datasets/tau/commonsense_qa
Paper     Talmor et al. 2019, CommonsenseQA: A Question Answering Challenge Targeting Commonsense Knowledge
Licence   MIT
One row   {"id": "1afa02df...", "question": "A revolving door is convenient for two direction travel, but ...",
           "question_concept": "revolving door", "choices": {"label": ["A", ...], "text": ["bank", ...]},
           "answerKey": "A"}

The original files have the same nested: {"id", "answerKey", "question": {"stem", "question_concept", "choices":
[{"label", "text"}, ...]}}. In a flat file (CSV) `choices` is a JSON text, or each option has a column named by its
letter. The answers of the test split are not public: its `answerKey` is empty.
"""

import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from builders.sources import HubSource, Row
from tracekit.errors import UNREADABLE, ConfigError, SourceError
from tracekit.records import Choice
from tracekit.run.plan import Example

__all__ = [
    "SAMPLE",
    "SOURCE",
    "CsqaQuestion",
    "EncodedChoice",
    "cut_to_fit",
    "encode_choices",
    "parse_row",
]

SOURCE = HubSource("tau/commonsense_qa", None)
SAMPLE = Path(__file__).parent / "samples" / "csqa.jsonl"

_LETTERS = string.ascii_uppercase


class CsqaQuestion(Example, frozen=True, kw_only=True):
    """One question with its options."""

    example_id: str
    """The source's id, else the row."""
    question: str
    """The question."""
    concept: str | None
    """Its concept in ConceptNet; None where the source has none."""
    choices: list[Choice]
    """The options, in order."""
    label_idx: int | None
    """Number of the right option; None where the source does not say."""

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


def parse_row(row: Row) -> CsqaQuestion:
    """A row of the Hub's form, of the original files' nested form or of a flat one, as a question.

    Raises:
        SourceError: no question, not two options at least, an option without text, letters that are not distinct, or
            an answer that is none of them.
    """
    data = row.data
    nested = data["question"] if isinstance(data.get("question"), dict) else {}
    question = nested.get("stem") if nested else data.get("question", data.get("stem"))
    if not isinstance(question, str) or not question.strip():
        raise SourceError(
            "no question; expected a text in 'question', 'stem' or 'question.stem', found "
            f"{question!r}; columns: {', '.join(data)}"
        )
    choices = _choices(nested.get("choices", data.get("choices")), data)
    concept = nested.get("question_concept", data.get("question_concept"))
    identity = data.get("id")
    return CsqaQuestion(
        index=row.index,
        example_id=str(row.index if identity in (None, "") else identity),
        question=question.strip(),
        concept=concept.strip() or None if isinstance(concept, str) else None,
        choices=choices,
        label_idx=_label_idx(data.get("answerKey"), [choice.label for choice in choices]),
    )


def _choices(value: Any, data: dict[str, Any]) -> list[Choice]:
    """The options wherever a row keeps them."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except UNREADABLE as error:
            raise SourceError(f"'choices' is no JSON: {error}; expected a list of {{label, text}}") from error
    if value is None:
        pairs = [(letter, data[letter]) for letter in _LETTERS if data.get(letter) not in (None, "")]
    elif isinstance(value, dict):
        labels, texts = _listed(value.get("label")), _listed(value.get("text"))
        if len(labels) != len(texts):
            raise SourceError(f"'choices' has {len(labels)} labels and {len(texts)} texts; expected one each")
        pairs = list(zip(labels, texts, strict=True))
    else:
        items = _listed(value)
        pairs = [
            (item.get("label"), item.get("text")) if isinstance(item, dict) else (letter, item)
            for letter, item in zip(_LETTERS, items, strict=False)
        ]
        pairs = pairs if len(items) <= len(_LETTERS) else []
    if len(pairs) < 2:
        raise SourceError(
            f"{len(pairs)} options; expected 2 to {len(_LETTERS)} in 'choices' (a list of {{label, text}}, or "
            f"{{label: [...], text: [...]}}) or in columns A, B, ...; columns: {', '.join(data)}"
        )
    choices = [Choice(label=_text(label, "label"), text=_text(text, "text")) for label, text in pairs]
    labels = [choice.label for choice in choices]
    if len(set(labels)) < len(labels):
        raise SourceError(f"options are labelled {' '.join(labels)}; expected each label once")
    return choices


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _text(value: Any, what: str) -> str:
    """A text, or a number as text."""
    is_known = isinstance(value, str | int | float) and not isinstance(value, bool)
    if not is_known or not str(value).strip():
        raise SourceError(f"an option whose {what} is {value!r}; expected a text")
    return str(value).strip()


def _label_idx(answer: Any, labels: list[str]) -> int | None:
    """Number of the right option; None for the empty answer of an unlabelled split."""
    if answer is None or answer == "":
        return None
    if answer not in labels:
        raise SourceError(f"answerKey is {answer!r}; expected one of {' '.join(labels)}, or empty where unlabelled")
    return labels.index(answer)


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
