"""The tasks of this repository, and their record types, by name."""

from typing import Any

from tracekit.records import Record, RecordSchema
from tracekit.task import Task, find_task, known_tasks


def _task(name: str) -> Task[Any, Any]:
    task = find_task(name)
    assert task is not None, f"{name} is not installed"
    return task


TASKS = {name: _task(name) for name in known_tasks()}
RECORD_TYPES: dict[str, type[Record]] = {name: task.record for name, task in TASKS.items()}
SCHEMAS = {name: RecordSchema.of(record_type) for name, record_type in RECORD_TYPES.items()}
