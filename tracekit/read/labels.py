"""A label set as a table in the order of a store's rows: what judges said of its samples, read from JSON lines."""

from collections.abc import Sequence

import pyarrow as pa

from tracekit.errors import SampleNotFoundError
from tracekit.format.labels import Label, label_sets, read_labels
from tracekit.format.layout import Layout

__all__ = ["LABEL_SCHEMA", "labels_table"]

LABEL_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("judged_sha256", pa.string()),
        pa.field("is_abstention", pa.bool_()),
        pa.field("verdict", pa.string()),
        pa.field("judge", pa.string()),
        pa.field("prompt_sha256", pa.string()),
        pa.field("raw_outputs", pa.list_(pa.string())),
        pa.field("failure", pa.string()),
        pa.field("is_final", pa.bool_()),
    ]
)
"""Columns of the table: the fields of tracekit.format.labels.Label."""


def labels_table(layouts: Sequence[Layout], keys: Sequence[str], name: str | None) -> pa.Table:
    """Labels of these samples from the label set of this name, or the only one.

    Args:
        layouts: The configurations that hold the samples; a set of one name may be in several.
        keys: Keys of the rows.
        name: Name of the set, or the beginning of one name alone (`rules`).

    Raises:
        SampleNotFoundError: no such set, or several and none named.
        DatasetError: a set cannot be read.
    """
    chosen = _choose(sorted({one for layout in layouts for one in label_sets(layout)}), name)
    paths = [layout.labels(chosen) for layout in layouts if layout.labels(chosen).exists()]
    labels = {label.key: label for path in paths for label in read_labels(path)}
    rows = [_row(key, labels.get(key)) for key in keys]
    return pa.Table.from_pylist(rows, schema=LABEL_SCHEMA)


def _choose(names: Sequence[str], name: str | None) -> str:
    """The set that is meant."""
    if not names:
        raise SampleNotFoundError("nobody has labelled these samples: there is no labels/<config>/<set>.jsonl")
    matching = [one for one in names if one == name] or [one for one in names if one.startswith(name or "")]
    if len(matching) == 1:
        return matching[0]
    which = "there are several label sets" if name is None else f"no label set, or more than one, begins with {name!r}"
    raise SampleNotFoundError(f"{which}; name one of: {', '.join(names)}")


def _row(key: str, label: Label | None) -> dict[str, object]:
    return {"key": key} if label is None else {field: getattr(label, field) for field in LABEL_SCHEMA.names}
