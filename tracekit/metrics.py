"""The numbers over a whole configuration: accuracy, F1, cut answers, lengths. Streamed, record by record."""

from typing import Any

from tracekit.manifest import Metric
from tracekit.records import Record

__all__ = ["Tally"]

_MEANS = {
    "is_correct": "accuracy",
    "exact_match": "exact_match",
    "f1": "f1",
    "is_truncated": "truncated_share",
}


class Tally:
    """Means over records, for the fields that a task has."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, record: Record) -> None:
        """Take in one record; fields that are null do not count."""
        values: dict[str, Any] = {name: getattr(record, field, None) for field, name in _MEANS.items()}
        values["mean_tokens"] = len(record.token_ids)
        values["mean_answer_tokens"] = len(record.token_ids) - record.prompt_length
        for name, value in values.items():
            if value is not None:
                self._sums[name] = self._sums.get(name, 0.0) + float(value)
                self._counts[name] = self._counts.get(name, 0) + 1

    def metrics(self) -> list[Metric]:
        """The means, by name."""
        return [Metric(name=name, value=self._sums[name] / self._counts[name]) for name in sorted(self._sums)]
