"""Staging shards while they are made, so that a long run is on the Hub when it ends and needs no more disk than a few.

    run ── add("train-00003") ──> queue ──> thread: send, commit to staging/v1.0.0, note it, delete it here

What the release needs later (records, hashes, figures' data) is in the sidecars, which stay.
"""

import queue
import threading
from types import TracebackType
from typing import Self

from tracekit.config import PublishConfig
from tracekit.errors import DatasetError, VersionError
from tracekit.finish import is_finished
from tracekit.hub import HubRepo, Upload, quiet_client
from tracekit.journal import is_sent, read_journal
from tracekit.layout import Layout
from tracekit.manifest import Sidecar, read_struct
from tracekit.publish import branch_of, send_group
from tracekit.release import Step, Version

__all__ = ["Stager"]

_QUEUED_SHARDS = 2


class Stager:
    """Stages shards while they are made. Use as a context manager; give it each shard with `add`.

    A thread sends, so the model does not wait; `add` waits only while more than a few shards are unsent, and raises
    what went wrong in the thread. Leaving the context waits until everything is sent.

    Raises:
        VersionError: the version is there already.
        HubError: no access; so a long run does not begin in vain.
    """

    def __init__(self, layout: Layout, settings: PublishConfig) -> None:
        assert settings.publish is not None, settings
        assert settings.version is not None, settings
        self._layout, self._settings = layout, settings
        self._version = Version.parse(settings.version)
        self._repo = HubRepo(settings.publish)
        self._waiting: queue.Queue[str | None] = queue.Queue(maxsize=_QUEUED_SHARDS)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name="tracekit-stager")

    def __enter__(self) -> Self:
        if is_finished(self._layout):  # nothing is made any more; publishing sends what is missing
            return self
        self._repo.check_access()
        self._repo.create(private=self._settings.private)
        refs = self._repo.refs()
        if str(self._version) in refs.tags:
            latest = Version.latest(refs.tags)
            assert latest is not None, refs
            raise VersionError(
                f"{self._repo.repo_id} has {self._version} already, and this run is not finished; the next free "
                f"versions are {latest.after(Step.MINOR)} and {latest.after(Step.MAJOR)}"
            )
        if branch_of(self._version) not in refs.branches:
            self._repo.create_branch(branch_of(self._version), at="main")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._thread.is_alive():
            try:
                self._waiting.put(None, timeout=0.2)
                break
            except queue.Full:
                continue
        if self._thread.ident is not None:
            self._thread.join()
        if error is None:
            self._raise()

    def add(self, name: str) -> None:
        """Have a finished shard staged; one that was staged before is only freed."""
        while self._thread.is_alive() or self._failure is not None:
            self._raise()
            try:
                self._waiting.put(name, timeout=0.2)
                return
            except queue.Full:
                continue

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            with quiet_client():
                while (name := self._waiting.get()) is not None:
                    self._stage(name)
        except BaseException as failure:  # noqa: BLE001 - handed to the thread that makes the shards
            self._failure = failure

    def _stage(self, name: str) -> None:
        shard, sidecar = self._layout.shard(name), read_struct(self._layout.sidecar(name), Sidecar)
        path = shard.relative_to(self._layout.root).as_posix()
        sent = is_sent(read_journal(self._layout.root), path, sidecar.sha256)
        if sent is None or sent.repo != self._repo.repo_id or sent.branch != branch_of(self._version):
            if not shard.exists():
                where = f"{sent.repo} as {sent.branch.removeprefix('staging/')}" if sent else "nowhere"
                raise DatasetError(
                    f"{shard} is not here: it was staged to {where}, not to {self._repo.repo_id} as {self._version}. "
                    "Go on with that --publish and --version"
                )
            upload = Upload(path, shard, sidecar.num_bytes, sidecar.sha256)
            send_group(self._repo, self._layout.root, self._version, [upload], lambda num_bytes: None)
        if self._settings.free_local:
            shard.unlink(missing_ok=True)
