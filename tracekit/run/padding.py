"""Padding: how much each sample of a batch was padded, and which samples are therefore replayed.

    first and last batch of a shard     `count` samples, from the most padded to the least padded
    any other batch                     its most padded sample, where no replayed one of the shard was padded as much

So the most padded row of every shard is among those that run again alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tracekit.model.choices import Choices
from tracekit.model.traced import TracedModel
from tracekit.task import TracedSample

__all__ = ["Padded", "padded", "to_replay"]


class Padded(NamedTuple):
    """A sample, and the padding of its most padded row."""

    sample: TracedSample
    padding: int
    """Tokens beside the row, up to the longest one that ran with it."""


def padded(traced: TracedModel, samples: Sequence[TracedSample]) -> list[Padded]:
    """Samples that ran together, each with its padding."""
    texts = [sample.text.texts if isinstance(sample.text, Choices) else [sample.text] for sample in samples]
    rows = [(i, len(text.token_ids)) for i, some in enumerate(texts) for text in some]
    found = [0] * len(samples)
    for group in traced.groups([length for _, length in rows]):
        longest = max(rows[row][1] for row in group)
        for i, length in (rows[row] for row in group):
            found[i] = max(found[i], longest - length)
    return [*map(Padded, samples, found)]


def to_replay(batch: Sequence[Padded], count: int, *, is_outer: bool, so_far: int) -> list[Padded]:
    """The samples of a batch to replay, the most padded first.

    Args:
        batch: All its samples.
        count: Samples of an outer batch to replay; with 0 none is replayed of any batch.
        is_outer: Whether the batch is the first or the last of its shard.
        so_far: Most padding of a sample of the shard that was replayed.
    """
    ordered = sorted(batch, key=lambda one: (-one.padding, len(one.sample.text.token_ids), one.sample.record.key))
    if not is_outer:
        return ordered[:1] if count and ordered[0].padding > so_far else []
    count = min(count, len(ordered))
    return [ordered[i * (len(ordered) - 1) // max(count - 1, 1)] for i in range(count)]
