"""Alignment: which samples of two configurations are of the same question, and whether they may be compared at all."""

import json
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from tracekit.errors import DatasetError
from tracekit.outcomes import Outcomes

__all__ = ["Alignment", "align"]


class Alignment(NamedTuple):
    """Samples of two sides, pair by pair."""

    by: str
    """`question` (question_id and sample_index) or `key`."""
    rows_a: list[int]
    """Row of a's sample of each pair."""
    rows_b: list[int]
    """Row of b's, likewise."""
    num_only_a: int
    """Samples of a that b does not have."""
    num_only_b: int
    """Samples of b that a does not have."""


def align(a: Outcomes, b: Outcomes, *, where: str) -> Alignment:
    """Pair samples by question_id and sample_index where these are unique on both sides, else by key.

    Args:
        a: One side.
        b: The other.
        where: What is compared, for messages.

    Raises:
        DatasetError: nothing in common, or a pair that was not asked the same.
    """
    is_unique = all(len(set(side.questions)) == len(side.questions) for side in (a, b))
    names_a: Sequence[Hashable] = a.questions if is_unique else a.keys
    names_b: Sequence[Hashable] = b.questions if is_unique else b.keys
    row_of = {name: row for row, name in enumerate(names_b)}
    rows_a = [row for row, name in enumerate(names_a) if name in row_of]
    rows_b = [row_of[names_a[row]] for row in rows_a]
    if not rows_a:
        raise DatasetError(f"{where}: no sample in common. {_why_nothing(a, b, is_unique)}")
    for row_a, row_b in zip(rows_a, rows_b, strict=True):
        difference = _differs(a, row_a, b, row_b)
        if difference:
            raise DatasetError(
                f"{where}: sample {a.keys[row_a]!r} of a and {b.keys[row_b]!r} of b are of question "
                f"{a.questions[row_a][0]!r}, but were not asked the same: {difference}. Compare runs over the same "
                "source with the same order of options, or choose samples with --where-a and --where-b"
            )
    return Alignment(
        by="question" if is_unique else "key",
        rows_a=rows_a,
        rows_b=rows_b,
        num_only_a=len(names_a) - len(rows_a),
        num_only_b=len(names_b) - len(rows_b),
    )


def _why_nothing(a: Outcomes, b: Outcomes, is_unique: bool) -> str:
    if not a.keys or not b.keys:
        return f"a has {len(a.keys)} samples, b {len(b.keys)}"
    if is_unique:
        examples = f"{a.questions[0][0]!r} and {b.questions[0][0]!r}"
        return f"Aligned by question_id and sample_index, as {examples}: were both made of the same source?"
    return (
        "Aligned by key, because several samples have the same question_id and sample_index: choose one of each "
        f"question with --where-a and --where-b. Keys are as {a.keys[0]!r} and {b.keys[0]!r}"
    )


def _differs(a: Outcomes, row_a: int, b: Outcomes, row_b: int) -> str:
    """What was not the same in two questions; empty where all was."""
    for name, value in a.same[row_a].items():
        other = b.same[row_b].get(name)
        if value != other:
            return f"{name} is {_text(value)} in a and {_text(other)} in b"
    if a.inputs[row_a] != b.inputs[row_b]:
        return f"input_sha256 is {a.inputs[row_a][:12]}... in a and {b.inputs[row_b][:12]}... in b"
    return ""


def _text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."
