"""Staging shards while they are made, so that a long run is on the Hub when it ends and needs no more disk than a few.

    run ── add("train-00003") ──> queue ──> thread: send, commit to staging/v1.0.0, note it, delete it here

What the release needs later (records, hashes, figures' data) is in the sidecars, which stay.
"""

import queue
import threading
from collections.abc import Callable
from typing import Self

from tracekit.config import PublishConfig
from tracekit.errors import DatasetError, VersionError
from tracekit.format.journal import Sent, is_sent, read_journal, sent_shards, write_journal
from tracekit.format.layout import Layout
from tracekit.format.manifest import Manifest, Sidecar, read_struct
from tracekit.format.release import Version, VersionStep
from tracekit.hub import HubRepo, Refs, Upload, quiet_client
from tracekit.publish.publisher import branch_of, send_group
from tracekit.run.finish import is_finished

__all__ = ["Stager"]

_QUEUED_SHARDS = 2


class Stager:
    """Stages shards while they are made. Use as a context manager; give it each shard with `add`.

    A thread sends, so the model does not wait; `add` waits only while more than a few shards are unsent, and raises
    what went wrong in the thread. Leaving the context waits until everything is sent. `num_shards` and `num_bytes`
    count what was sent; `on_sent` is given the name of each shard once the Hub has it, in that thread.

    Raises:
        VersionError: the version is there already.
        HubError: no access; so a long run does not begin in vain.
    """

    def __init__(
        self, layout: Layout, settings: PublishConfig, on_sent: Callable[[str], object] = lambda name: None
    ) -> None:
        assert settings.publish is not None, settings
        assert settings.version is not None, settings
        self._layout, self._settings, self._on_sent = layout, settings, on_sent
        self._version = Version.parse(settings.version)
        self._repo = HubRepo(settings.publish)
        self._waiting: queue.Queue[str | None] = queue.Queue(maxsize=_QUEUED_SHARDS)
        self._failure: BaseException | None = None
        self._there: dict[tuple[str, str], str] = {}  # path and SHA-256 of what the Hub has: its staging branch
        is_done = is_finished(layout)
        self._finished = {shard.name for shard in read_struct(layout.manifest, Manifest).shards} if is_done else set()
        self.num_shards = self.num_bytes = 0
        self._thread = threading.Thread(target=self._work, daemon=True, name="tracekit-stager")

    def check(self) -> bool:
        """See that this run may be published so; returns whether the repository is there. Sends nothing.

        Raises: as the class.
        """
        exists = self._repo.check_access(private=self._settings.private)
        if self._finished and not self._layout.growth.exists():
            return exists
        self._check_version(exists)
        return exists

    def _check_version(self, exists: bool) -> None:
        """See what the Hub has, and that the version is free.

        Raises: as the class.
        """
        refs = self._repo.refs() if exists else Refs({}, {})
        self._look(refs)
        if str(self._version) in refs.tags:
            latest = Version.latest(refs.tags)
            assert latest is not None, refs
            raise VersionError(
                f"{self._repo.repo_id} has {self._version} already, and this run is not finished; the next free "
                f"versions are {latest.after(VersionStep.MINOR)} and {latest.after(VersionStep.MAJOR)}"
            )

    def __enter__(self) -> Self:
        self._exists = self.check()
        if not self._finished:
            self._begin()
        return self

    def _begin(self) -> None:
        """Start to stage."""
        if not self._exists:
            self._repo.create(private=self._settings.private)
        self._repo.create_branch(branch_of(self._version), at="main")
        self._thread.start()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
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
        """Have a finished shard staged; one that was staged before is only freed.

        The shards of a finished dataset are left to publishing; a shard that it grows by is staged.
        """
        if name not in self._finished and self._thread.ident is None:
            self._check_version(self._exists)
            self._begin()
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
        root, repo_id = self._layout.root, self._repo.repo_id
        branch = self._there.get((path, sidecar.sha256))
        if branch is None:
            upload = Upload(path, shard, sidecar.num_bytes, sidecar.sha256)
            send_group(self._repo, root, self._version, [upload], lambda num_bytes: None)
            self.num_shards, self.num_bytes = self.num_shards + 1, self.num_bytes + sidecar.num_bytes
        elif is_sent(read_journal(root), path, sidecar.sha256, repo=repo_id) is None:  # killed before it was noted
            num_bytes, sha256 = sidecar.num_bytes, sidecar.sha256
            write_journal(root, [Sent(repo=repo_id, branch=branch, path=path, num_bytes=num_bytes, sha256=sha256)])
        if self._settings.free_local:
            shard.unlink(missing_ok=True)
        self._on_sent(name)

    def _look(self, refs: Refs) -> None:
        """Find out which files the Hub has, on main or on a staging branch that the journal names.

        Raises:
            DatasetError: a shard was deleted here, and the Hub does not have it any more.
        """
        journal = read_journal(self._layout.root)
        mine = [entry for entries in journal.values() for entry in entries if entry.repo == self._repo.repo_id]
        places = {entry.branch for entry in mine} | {entry.version for entry in mine} | {branch_of(self._version)}
        known = {**refs.branches, **refs.tags}
        for place in sorted(places & known.keys()):
            branch = place if place.startswith("staging/") else f"staging/{place}"
            for path, file in self._repo.files(known[place]).items():
                if file.sha256 is not None:
                    self._there.setdefault((path, file.sha256), branch)
        for name in sorted(sent_shards(self._layout)):
            path = self._layout.shard(name).relative_to(self._layout.root).as_posix()
            sidecar = read_struct(self._layout.sidecar(name), Sidecar)
            if (path, sidecar.sha256) not in self._there:
                where = is_sent(journal, path, sidecar.sha256)
                sent = f"it was sent to {where.repo} as {where.version}, and " if where else ""
                raise DatasetError(
                    f"{path} is not here: {sent}{self._repo.repo_id} does not have it. Publish to where it was sent, "
                    "or delete the journal in hub/ and run this command again, which makes it anew"
                )
