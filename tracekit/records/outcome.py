"""Outcome: which fields of a task's records say what. It is stored in plan and manifest, so that a dataset is read
without its task's code: by `show`, `diff`, cards, figures and whatever comes later."""

from collections.abc import Iterator, Sequence
from typing import Any, Self

import msgspec
from msgspec import UNSET, UnsetType

from tracekit.declared import told_plainly
from tracekit.errors import ConfigError
from tracekit.records.schema import Field, Node, RecordSchema

__all__ = ["LARGE_SHARE", "About", "Mean", "Number", "Outcome", "accuracy", "answered", "outcome_fault"]

LARGE_SHARE = 0.2
"""Above this share of answers that were cut, labels say more of the limit than of the model."""


class Number(msgspec.Struct, frozen=True, kw_only=True):
    """A number of a sample."""

    name: str
    """What it is called."""
    field: str
    """Its field; of a field with a list, the mean of the list."""
    unit: str = ""
    """Its unit, as `nats`."""


class Mean(msgspec.Struct, frozen=True, kw_only=True):
    """A mean of one field over a configuration. Records in which the field is null do not count."""

    name: str
    """What it is called."""
    field: str
    """A number, or true and false as 1 and 0."""
    unit: str = ""
    """Its unit."""
    definition: str = ""
    """What it says, in a sentence."""
    of_null: bool = False
    """True for the share of records in which the field is null."""
    over: str | UnsetType = UNSET
    """Field with the number of things that a record's value is a mean over, as its scored tokens: the mean is then over
    all of them. Of a list the last so many values count. Left out: each record counts once."""
    is_exp: bool | UnsetType = UNSET
    """True where exp of the mean is told in its place, as perplexity is of a loss."""
    warn_above: float | None = None
    """A person is warned where the mean is larger; null where it is never worrying."""
    warning: str = ""
    """What they are told, after the share in percent."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Names of a record's fields, by what they say. What a task does not have stays at its default."""

    asked: str | None = None
    """What the model was asked, as text; the prompt by default."""
    answer: str | None = None
    """The answer."""
    output: str | UnsetType = UNSET
    """The text that the answer was read from, where that is more than the answer."""
    gold: str | None = None
    """The right answer, or a list of accepted ones."""
    correct: str | None = None
    """Whether the answer is right; null where nothing was judged."""
    has_letters: bool = False
    """True where answers are letters, of which there are few."""
    options: str | None = None
    """List of `{label, text}`: what each letter stands for."""
    numbers: list[Number] = []
    """Numbers to compare and to average."""
    rule: str | None = None
    """Setting of the run that says by which rule an answer is right."""
    means: list[Mean] = []
    """Metrics of a configuration that are a plain mean of a field."""
    entropies: str | None = None
    """Entropy of each generated token, nats: for the figure of right against wrong answers."""
    probs: str | None = None
    """Distribution over the options; its largest value is the confidence."""
    most_probable: str | None = None
    """The option with the largest probability; null where that is the answer."""
    most_probable_correct: str | None = None
    """Whether the option with the largest probability is right."""
    confidences: list[str] = []
    """Stated confidence in percent, a field a pass; null in the other passes."""
    about_others: list[str] = []
    """Those of `confidences` that are in somebody else; they are held against this model's own answers."""
    bins: str | None = None
    """List of `{label, low, high, midpoint}`: what each letter of a confidence pass stands for."""
    kind: str | None = None
    """Name of the pass that a record is of; configurations are named after their pass."""
    judged_in: str | None = None
    """The pass whose answers say whether a stated confidence was justified."""
    failure: str | None = None
    """Why no answer could be read; null where one was."""
    group: str | None = None
    """What accuracy is also told by, as a subject; null where the source has none."""
    same: list[str] = []
    """What has to be equal where two samples are of the same question, beside `input_sha256`."""
    occasions: list[str] = []
    """Dotted paths of what tells answers to the same question apart, beside `sample_index`."""
    conditions: list[str] = []
    """Dotted paths of what samples were made under, beside the model's arithmetic and the settings of generation."""
    made_from: list[str] = []
    """Text fields that say what the questions were made from; manifest and card list their values."""
    shard: str | None = None
    """Number of the sample's shard, which changes when runs are merged."""
    drawn_are_extra: bool = True
    """Whether an answer with a `sample_index` above 0 stands beside a deterministic one to the same question."""

    def but(self, **others: Any) -> Self:
        """The same with other fields in the place of some."""
        return msgspec.structs.replace(self, **others)

    def paths(self) -> Iterator[tuple[str, str]]:
        """Every path to a field, after the name of what it says."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if name in ("judged_in", "rule", "has_letters", "drawn_are_extra") or value is None or value is UNSET:
                continue
            for one in [value] if isinstance(value, str) else value:
                if isinstance(one, Mean):
                    yield "shares" if one.of_null else "numbers" if one.over else name, one.field
                    yield from [("over", one.over)] if one.over else []
                else:
                    yield name, one if isinstance(one, str) else one.field


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What reading needs to know of a task."""

    title: str = ""
    """What a sample is, in a sentence."""
    category: str | None = None
    """The Hub's name for tasks of this kind, as `question-answering`."""
    outcome: Outcome = Outcome()
    """Which fields say what."""
    are_values_finite: bool = True
    """False where the model may give values that are not finite: they are counted in the records."""


_NUMBERS = ("boolean", "integer", "number")
_SCALARS = ("string", *_NUMBERS)
_LISTS = tuple(f"list of {kind}" for kind in _NUMBERS)
_TYPES = {
    "answer": _SCALARS,
    "correct": ("boolean",),
    "options": ("list of {label, text}",),
    "numbers": (*_NUMBERS, *_LISTS),
    "means": _NUMBERS,
    "output": ("string",),
    "over": ("integer",),
    "entropies": _LISTS,
    "probs": _LISTS,
    "most_probable": _SCALARS,
    "most_probable_correct": ("boolean",),
    "confidences": _NUMBERS,
    "bins": ("list of {label, low, high, midpoint}",),
    "kind": ("string",),
    "failure": ("string",),
    "group": ("string",),
    "occasions": _SCALARS,
    "made_from": ("string",),
    "shard": ("integer",),
}
"""Types that a field may have, by what it says; any where it stands not here."""
_OF_LETTERS = ("answer", "gold", "most_probable")
_DOTTED = ("occasions", "conditions")


def outcome_fault(outcome: Outcome, schema: RecordSchema) -> str | None:
    """What is wrong with an outcome of records of a schema: a field that they do not have, or one of another type."""
    for name, path in outcome.paths():
        node = _node_at(schema, path.split(".") if name in _DOTTED else [path])
        if node is None:
            return f"names {path!r} ({name}), which is no field of {schema.name}; fields: {', '.join(schema.names)}"
        allowed = ("string",) if outcome.has_letters and name in _OF_LETTERS else _TYPES.get(name, ())
        if allowed and not any(_is_of(node, one) for one in allowed):
            return f"names {path!r} ({name}), which is of another type than {' or '.join(allowed)}"
    return None


def _node_at(schema: RecordSchema, path: Sequence[str]) -> Node | None:
    """The type of what lies at a path."""
    fields, node = schema.fields, None
    for name in path:
        node = next((one.node for one in fields if one.name == name), None)
        fields = () if node is None else node.fields
    return node


def _is_of(node: Node, kind: str) -> bool:
    """Whether a type is what is asked for; null besides, and objects may have other fields too."""
    if kind.startswith("list of "):
        return node.items is not None and _is_of(node.items, kind.removeprefix("list of "))
    if kind.startswith("{"):
        return {*kind.strip("{}").split(", ")} <= {one.name for one in node.fields if _is_part(one)}
    return node.kind == kind


def _is_part(one: Field) -> bool:
    """Whether a field of an option or a bin is of use: the edges of a bin are reckoned with."""
    is_edge = one.name in ("low", "high", "midpoint")
    return one.node.kind in (_NUMBERS if is_edge else _SCALARS) and not (is_edge and one.node.is_nullable)


def accuracy(field: str, *, name: str = "accuracy") -> Mean:
    """The share of right answers."""
    return Mean(name=name, field=field, definition=f"Share of the judged answers that are right (`{field}`).")


def answered(**others: Any) -> Outcome:
    """The outcome of a task whose records are ResponseRecords; `others` are fields of `Outcome` in the place of some.
    With `correct`, accuracy is among the metrics.

    Raises:
        ConfigError: `Outcome` has no such field.
    """
    if wrong := others.keys() - {*Outcome.__struct_fields__}:
        fault = f"answered({wrong.pop()}=...): an outcome says {', '.join(Outcome.__struct_fields__)}"
        raise told_plainly(ConfigError(fault))
    outcome = Outcome(
        answer="generated_answer",
        numbers=[
            Number(name="entropy", field="token_entropies", unit="nats"),
            Number(name="logprob", field="token_logprobs", unit="nats"),
        ],
        means=[
            Mean(
                name="truncated_share",
                field="is_truncated",
                definition="Share of the answers that were cut before they ended.",
                warn_above=LARGE_SHARE,
                warning="of the answers were cut before they ended; raise --max-new-tokens",
            ),
            *([] if others.get("correct") is None else [accuracy(others["correct"])]),
        ],
        entropies="token_entropies",
    )
    return outcome.but(**others)
