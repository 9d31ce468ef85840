"""Samples on their way into a shard: a task's samples in, what `ShardWriter.append` takes out."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from tracekit.config import CaptureConfig
from tracekit.errors import DatasetError
from tracekit.format.layout import key_fault
from tracekit.format.manifest import LayerNorms
from tracekit.records import encode_record
from tracekit.run.metrics import hidden_norms
from tracekit.storage import StorageForm, StorageLoss, added_up, companion_names, for_storage
from tracekit.task import TracedSample
from tracekit.tensors import Payload, encode

__all__ = ["Batch", "batch_of", "note_of", "stored_form"]


class Batch(NamedTuple):
    """A batch of samples as a shard takes it."""

    samples: list[tuple[str, bytes, Payload]]
    """Key, record and payload of each."""
    norms: LayerNorms | None
    """Norms of the hidden states, as captured."""
    losses: list[StorageLoss]
    """What storing them in smaller forms has cost."""


def stored_form(sample: TracedSample, config: CaptureConfig) -> StorageForm:
    """The tensors of a sample, in the storage forms that the configuration asks for.

    Raises: as `tracekit.storage.for_storage`.
    """
    trace = sample.trace
    return for_storage(trace.specs, trace.tensors, dtype=config.store_dtype, top_p=config.attention_top_p)


def note_of(stored: StorageForm, config: CaptureConfig) -> str | None:
    """What is to be said, before a run, of storage forms that gain nothing for samples like this one."""
    if config.is_quantized:
        scaled = [spec for spec in stored.specs if spec.layout == "scaled"]
        if not scaled:
            return f"--store-dtype {config.store_dtype}: no site that is stored has channels; nothing is made smaller"
        scales = sum(stored.tensors[name].nbytes for spec in scaled for name in companion_names(spec))
        if scales >= sum(stored.tensors[spec.name].nbytes for spec in scaled):
            return (
                f"--store-dtype {config.store_dtype}: the scales of so few tokens take as much room as the values; "
                "bfloat16 is no larger and more exact"
            )
    if config.attention_top_p < 1 and not any(spec.layout == "sparse" for spec in stored.specs):
        return f"--attention-top-p {config.attention_top_p}: no attention is stored; it does nothing"
    return None


def batch_of(samples: Sequence[TracedSample], config: CaptureConfig) -> Batch:
    """Encode samples, in the storage forms that the configuration asks for.

    Raises:
        DatasetError: a record has a key that no sample may have; as `encode_record`.
        CaptureError: as `tracekit.storage.for_storage`.
    """
    encoded: list[tuple[str, bytes, Payload]] = []
    losses: list[StorageLoss] = []
    for sample in samples:
        record = sample.record
        if (fault := key_fault(record.key)) is not None:
            raise DatasetError(f"a record of {record.task_name()} has {fault}")
        stored = stored_form(sample, config)
        if stored.losses:
            record = msgspec.structs.replace(record, tensors=stored.specs)
        encoded.append((record.key, encode_record(record), encode(stored.tensors)))
        losses += stored.losses
    norms = hidden_norms((one.trace.specs, one.trace.tensors) for one in samples)
    return Batch(encoded, norms, added_up(losses))
