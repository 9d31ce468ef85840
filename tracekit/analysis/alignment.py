"""Alignment: which samples of two configurations are of the same question, and whether they may be compared at all."""

import json
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from tracekit.analysis.outcomes import Outcomes
from tracekit.errors import DatasetError

__all__ = ["Alignment", "align", "differing_conditions"]


class Alignment(NamedTuple):
    """Samples of two sides, pair by pair."""

    by: str
    """`question` (question_id and sample_index), with what tells its samples apart (`question, repeat`), or `key`."""
    rows_a: list[int]
    """Row of a's sample of each pair."""
    rows_b: list[int]
    """Row of b's, likewise."""
    num_only_a: int
    """Samples of a that b does not have."""
    num_only_b: int
    """Samples of b that a does not have."""


def align(a: Outcomes, b: Outcomes, *, where: str, is_filtered: bool = False) -> Alignment:
    """Pair samples by question_id and sample_index where these are unique on both sides, else by key.

    Where a question was answered on several occasions (levels, groups of weights, repeats), samples of the same
    occasion are paired. An occasion that is another on each side, as one group here and one there, does not count. A
    pass that asks for one confidence and one that asks for another align where their bins are equal.

    Args:
        a: One side.
        b: The other.
        where: What is compared, for messages.
        is_filtered: Whether filters chose the samples, for messages.

    Raises:
        DatasetError: nothing in common, or a pair that was not asked the same.
    """
    by, names_a, names_b = _names(a, b)
    is_unique = by != "key"
    row_of = {name: row for row, name in enumerate(names_b)}
    rows_a = [row for row, name in enumerate(names_a) if name in row_of]
    rows_b = [row_of[names_a[row]] for row in rows_a]
    if not rows_a:
        raise DatasetError(f"{where}: no sample in common. {_why_nothing(a, b, is_unique, is_filtered)}")
    for row_a, row_b in zip(rows_a, rows_b, strict=True):
        difference = _differs(a, row_a, b, row_b)
        if difference:
            raise DatasetError(
                f"{where}: sample {a.keys[row_a]!r} of a and {b.keys[row_b]!r} of b are of question "
                f"{a.questions[row_a][0]!r}, but were not asked the same: {difference}. {_advice(a, b)}"
            )
    return Alignment(
        by=by,
        rows_a=rows_a,
        rows_b=rows_b,
        num_only_a=len(names_a) - len(rows_a),
        num_only_b=len(names_b) - len(rows_b),
    )


def _names(a: Outcomes, b: Outcomes) -> tuple[str, Sequence[Hashable], Sequence[Hashable]]:
    """By what samples are paired, and what each is called by that."""
    occasions = [path for path, values in a.occasions.items() if set(values) & set(b.occasions.get(path, []))]
    names_a, names_b = (
        list(zip(side.questions, *[side.occasions[path] for path in occasions], strict=True)) for side in (a, b)
    )
    if all(len(set(names)) == len(names) for names in (names_a, names_b)):
        return ", ".join(["question", *occasions]), names_a, names_b
    return "key", a.keys, b.keys


def differing_conditions(a: Outcomes, b: Outcomes) -> list[str]:
    """What the samples of two sides were made under that is not the same on both, in words; none where all is."""
    notes = []
    if a.asked_for != b.asked_for:
        notes.append(f"asked for {a.asked_for} in a and {b.asked_for} in b: their prompts differ by design")
    for name in a.conditions:
        values = [_distinct(side.conditions.get(name, [])) for side in (a, b)]
        if values[0] != values[1] and (name not in a.differ_by_pass or a.asked_for == b.asked_for):
            notes.append(f"{name} is {' and '.join(values[0])} in a, {' and '.join(values[1])} in b")
    return notes


def _distinct(values: Sequence[Any]) -> list[str]:
    """The different values, in order, long hashes shortened."""
    texts = sorted({json.dumps(value) for value in values})
    return [f"{text[1:13]}..." if len(text) > 60 else text.strip('"') for text in texts]


def _advice(a: Outcomes, b: Outcomes) -> str:
    if a.asked_for != b.asked_for:
        return (
            "Passes that ask for confidence can be compared with each other where their bins are equal; a pass that "
            "asks for the answer only with its like"
        )
    return (
        "Compare runs over the same source with the same order of options, or choose samples with --where-a and "
        "--where-b"
    )


def _why_nothing(a: Outcomes, b: Outcomes, is_unique: bool, is_filtered: bool) -> str:
    if not a.keys or not b.keys:
        return f"a has {len(a.keys)} samples, b {len(b.keys)}"
    if is_unique and is_filtered:
        return (
            f"No question is in both selections, of {len(a.keys)} samples of a and {len(b.keys)} of b. Filters are for "
            "slices of the same questions, such as two levels of damage: --where-a damage.level=0 --where-b "
            "damage.level=0.2"
        )
    if is_unique:
        examples = f"{a.questions[0][0]!r} and {b.questions[0][0]!r}"
        return f"Aligned by question_id and sample_index, as {examples}: were both made of the same source?"
    return (
        "Aligned by key, because several samples have the same question_id and sample_index: choose one of each "
        f"question with --where-a and --where-b. Keys are as {a.keys[0]!r} and {b.keys[0]!r}"
    )


def _differs(a: Outcomes, row_a: int, b: Outcomes, row_b: int) -> str:
    """What was not the same in two questions; empty where all was."""
    is_other_confidence = None not in (a.asked_for, b.asked_for) and a.asked_for != b.asked_for
    for name, value in a.same[row_a].items():
        other = b.same[row_b].get(name)
        if value != other and not (is_other_confidence and name in a.differ_by_pass):
            return f"{name} is {_text(value)} in a and {_text(other)} in b"
    if a.inputs[row_a] != b.inputs[row_b]:
        return f"input_sha256 is {a.inputs[row_a][:12]}... in a and {b.inputs[row_b][:12]}... in b"
    return ""


def _text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."
