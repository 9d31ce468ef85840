"""A dataset that grows: samples as they come, into shards that are closed by and by, under keys given away once.

    data/serve/keys.partial    00000000000000001000     locked while a server has the folder; the first number that no
                                                        server has given away as a key

Numbers are given away in the order of admission and noted a thousand ahead, so that a server that was killed leaves a
gap and never a second sample under a key that some client was told.
"""

import fcntl
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tracekit.config import CaptureConfig
from tracekit.console import say
from tracekit.errors import DatasetError, NoSpaceError, ShardLockedError
from tracekit.format.layout import (
    Layout,
    files_inside,
    is_no_space,
    is_same_file,
    may_become_dataset,
    shard_name,
    write_atomic,
)
from tracekit.format.manifest import (
    Manifest,
    Plan,
    Sidecar,
    Verification,
    read_plan,
    read_struct,
    shard_names,
    shard_number,
    to_bytes,
)
from tracekit.format.shards import ShardWriter, iter_samples
from tracekit.records import RecordSchema
from tracekit.run.encode import batch_of
from tracekit.run.finish import finish, reopen
from tracekit.run.plan import differences, mismatch
from tracekit.task import Place, Task, TracedSample

__all__ = ["GrowingDataset", "full_for_now", "told_of_space"]

_RESERVED = 1000
_RETRY_SECONDS = 5.0
"""Pause after which a shard that a full disk kept open is closed."""
_MAX_DIGITS = 18
"""Digits of a number that keys are made of; more of them were not written by a server."""


def told_of_space(error: OSError, path: Path) -> OSError:
    """An error of the disk; one about its room says what to do."""
    if not is_no_space(error) or isinstance(error, NoSpaceError):
        return error
    return NoSpaceError(
        error.errno,
        f"the disk is full, or a file may grow no further ({os.strerror(error.errno or 0)}), while writing {path}. "
        "Every answer that came to its end is safe; free some space and run the same command again",
    )


def full_for_now(error: OSError, root: Path) -> str:
    """What is said of a full disk while a server goes on."""
    return (
        f"the disk is full, or a file may grow no further ({os.strerror(error.errno or 0)}), while writing {root}; "
        "requests that are logged are answered 503 until there is room. No answer that came to its end is lost"
    )


class GrowingDataset:
    """Writes samples of one configuration as they come. Use as a context manager; one process at a time.

    On entering, the folder is locked, and its plan compared with `plan`, or written. `begin` opens a finished
    configuration again and takes up a shard that an earlier process left half-way.

    Raises:
        ShardLockedError: another server has the folder.
        PlanMismatchError: the folder was begun with other settings, and has samples.
        DatasetError: the folder is something else; on `begin`, its sidecars are missing.
    """

    def __init__(
        self,
        layout: Layout,
        plan: Plan,
        capture: CaptureConfig,
        task: Task[Any, Any],
        *,
        samples_per_shard: int,
        close_after: float,
    ) -> None:
        self._layout, self._plan, self._capture, self._task = layout, plan, capture, task
        self._samples_per_shard, self._close_after = samples_per_shard, close_after
        self._stack = ExitStack()
        self._writer: ShardWriter | None = None
        self._opened_at = 0.0
        self._is_set_aside = False
        self._number = 0
        self._next_key = self._reserved = 0

    def __enter__(self) -> Self:
        root = self._layout.root
        if root.exists() and not root.is_dir():
            raise DatasetError(f"{str(root)!r} is a file; give a folder")
        if not may_become_dataset(root):
            raise DatasetError(f"{str(root)!r} exists and is not a tracekit dataset; choose another --out")
        with ExitStack() as stack:
            self._keys = stack.enter_context(_KeysFile(self._layout))
            self._check_plan()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *of: object) -> None:
        if self._writer is not None:
            self._writer.__exit__(*of)
            self._writer = None
        if self._reserved > self._next_key:
            self._note_keys(self._next_key)
        self._stack.close()

    def begin(self) -> None:
        """Have the dataset go on where it stands.

        Raises: as `tracekit.run.finish.reopen` and `ShardWriter`.
        """
        reopen(self._layout)
        self._find_place()

    def check_place(self) -> None:
        """See that the folder is still the one that was opened; from any thread.

        Raises:
            DatasetError: it was deleted, moved or replaced.
        """
        self._check(is_in_place=self._keys.is_in_place)

    def _check(self, *, is_in_place: bool) -> None:
        if not is_in_place:
            raise DatasetError(
                f"{str(self._layout.root)!r} (--out) was deleted, moved or replaced while the server wrote to it; "
                "answers that are not logged are not given. Move it back if you can, and run the same command again"
            )

    def take_key(self) -> str:
        """A key that no sample has, and that is given away once.

        Raises: as `check_place`; OSError where it cannot be noted.
        """
        self.check_place()
        if self._next_key == self._reserved:
            self._note_keys(self._next_key + _RESERVED)
        self._next_key += 1
        return f"{self._next_key - 1:06d}"

    def place(self) -> Place:
        """Where the next sample goes; opens a shard where none is."""
        writer = self._open_shard()
        return Place(self._layout.config, self._number, writer.num_samples)

    @property
    def is_shard_empty(self) -> bool:
        """Whether the next sample is the first of its shard."""
        return self._writer is None or not self._writer.num_samples

    def fills(self, count: int) -> bool:
        """Whether so many samples more fill the open shard."""
        return (0 if self._writer is None else self._writer.num_samples) + count >= self._samples_per_shard

    def add(self, samples: Sequence[TracedSample], verification: Verification | None) -> None:
        """Add samples, made for `place`; on return they survive a crash. `verification` is of those that were replayed.

        Raises:
            NoSpaceError: the disk is full, and none of them is in the dataset; more may be added later.
            DatasetError: as `check_place`.
        """
        writer = self._open_shard()
        if not writer.num_samples:
            self._opened_at = time.monotonic()
        batch = batch_of(samples, self._capture)
        is_last = self.fills(len(samples))
        try:
            writer.append(batch.samples, verification, batch.norms, batch.losses)
        except NoSpaceError:
            self._set_aside()
            raise
        self.check_place()
        self._check(is_in_place=writer.is_in_place)
        if is_last:
            self.try_to_close()

    def _set_aside(self) -> None:
        """Leave the shard as an earlier process would, at its last whole batch: opened again, it goes on from there."""
        if self._writer is not None:
            self._writer.__exit__(None, None, None)
        self._writer, self._is_set_aside = None, True
        self._opened_at = time.monotonic() + _RETRY_SECONDS - self._close_after

    def try_to_close(self, verification: Verification | None = None) -> bool:
        """Close the open shard; where the disk is full, later, and False: its samples are safe."""
        try:
            self.close_shard(verification)
        except OSError as error:
            if not is_no_space(error):
                raise
            say(full_for_now(error, self._layout.root))
            self._set_aside()
            return False
        return True

    def seconds_left(self) -> float | None:
        """Seconds until the open shard is to be closed, 0 where it is due; None where there is nothing to close."""
        if self.is_shard_empty and not self._is_set_aside:
            return None
        return max(0.0, self._opened_at + self._close_after - time.monotonic())

    def close_shard(self, verification: Verification | None = None) -> None:
        """Close the open shard, so that readers see it; nothing where it is empty. `verification` is of samples that
        were replayed since.

        Raises:
            NoSpaceError: the disk is full; its samples are safe.
        """
        if self._is_set_aside:
            self._open_shard()
        if self._writer is None or self.is_shard_empty:
            return
        self.check_place()
        self._check(is_in_place=self._writer.is_in_place)
        if verification is not None:
            self._writer.append([], verification)
        self._writer.finish()
        self._writer.__exit__(None, None, None)
        self._writer = None
        self._number += 1

    def finish(self) -> Manifest | None:
        """Close the shard and complete the dataset; None where it has no sample.

        Raises: as `tracekit.run.finish.finish`.
        """
        self.close_shard()
        if not shard_names(self._layout, self._plan):
            return None
        return finish(self._layout, self._plan, self._task)

    def _open_shard(self) -> ShardWriter:
        if self._writer is None:
            name = shard_name(self._plan.source.split, self._number)
            self.check_place()  # or a folder that is gone would be made again
            self._writer = ShardWriter(self._layout, name, self._number).__enter__()
            self._opened_at, self._is_set_aside = time.monotonic(), False
        return self._writer

    def _check_plan(self) -> None:
        """Write the plan, or go on with what is there; one without any sample gives way to new settings."""
        if not self._layout.plan.exists():
            write_atomic(self._layout.plan, to_bytes(self._plan))
        write_atomic(self._layout.schema, RecordSchema.of(self._task.record).to_bytes())
        there = read_plan(self._layout, to_continue=True)
        begun = files_inside(self._layout.root, f"data/{self._layout.config}", "*.tar*")
        has_samples = bool(shard_names(self._layout, there)) or bool(begun)
        if has_samples or not there.is_growing:
            if found := differences(there, self._plan):
                raise mismatch(self._layout.root, there, found)
            self._plan = there
        elif there != self._plan:
            write_atomic(self._layout.plan, to_bytes(self._plan))

    def _find_place(self) -> None:
        """The number of the next shard, and of the next key."""
        names = shard_names(self._layout, self._plan)
        self._number = max((shard_number(name) + 1 for name in names), default=0)
        name = shard_name(self._plan.source.split, self._number)
        if self._layout.journal(name).exists():  # an earlier process stopped half-way
            self._open_shard()
        self._next_key = self._reserved = max(self._keys.read(), self._first_free(names))

    def _first_free(self, names: Sequence[str]) -> int:
        """The first number after every key there is, whatever is noted."""
        keys = [int(one.key) for name in names for one in read_struct(self._layout.sidecar(name), Sidecar).samples]
        if self._writer is not None and self._writer.num_samples:
            partial = self._layout.partial_shard(shard_name(self._plan.source.split, self._number))
            with partial.open("rb") as file:
                keys += [int(one.key) for one in iter_samples(file, end=partial.stat().st_size, where=str(partial))]
        return max(keys, default=-1) + 1

    def _note_keys(self, number: int) -> None:
        self._keys.write(number)
        self._reserved = number


class _KeysFile:
    """The file with the first number that was not given away, locked while open."""

    def __init__(self, layout: Layout) -> None:
        self._path = layout.keys

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._descriptor)
            root = self._path.parents[2]
            raise ShardLockedError(
                f"another server is writing {str(root)!r}; stop it, or choose another --out (or --dataset-config)"
            ) from error
        return self

    def __exit__(self, *of: object) -> None:
        os.close(self._descriptor)

    @property
    def is_in_place(self) -> bool:
        """Whether the file still has its name."""
        return is_same_file(self._descriptor, self._path)

    def read(self) -> int:
        """The number; 0 where none is noted, or what is noted is no such number."""
        text = os.pread(self._descriptor, 64, 0).strip()
        return int(text) if text.isdigit() and len(text.lstrip(b"0")) <= _MAX_DIGITS else 0

    def write(self, number: int) -> None:
        """Note a number, so that it survives a crash."""
        os.pwrite(self._descriptor, b"%020d\n" % number, 0)
        os.fsync(self._descriptor)
