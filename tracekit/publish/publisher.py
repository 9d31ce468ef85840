"""Publishing: a finished folder becomes a version on the Hub.

    stage     shards and record tables go, in groups, to the branch staging/v1.0.0; the journal notes what arrived
    release   one commit on main: copies of what was staged, and card, manifests, schemas, script, figures
    tag       v1.0.0 on that commit; it is never moved. The staging branch goes

Nobody reads a staging branch, so a reader at a tag or on main never sees half a release. Every step looks at the Hub
first and does what is missing, so the same command again goes on wherever it stopped. More than `MAX_COPIES` new
shards are copied to main in several commits, before the one with the card: a card names exactly the shards of its own
release, so `datasets` and TraceStore do not see the others yet; where there is no card yet, one that opens nothing
stands in.

tracekit.publish.stager stages shards while a run still makes them.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from tracekit.card.readme import CardSettings
from tracekit.console import say
from tracekit.errors import CorruptShardError, DatasetError, VersionError
from tracekit.format.journal import Sent, can_write_journal, is_sent, read_journal, write_journal
from tracekit.format.layout import Layout, config_names, inside, sweep
from tracekit.format.manifest import read_manifest
from tracekit.format.release import Change, Version, VersionStep, change_between, check_version
from tracekit.format.shards import size_fault
from tracekit.hub import HubRepo, RemoteFile, StaleParentError, Upload, quiet_client
from tracekit.publish.contents import Contents, note_card, small_files
from tracekit.publish.snapshot import EMPTY, Large, OnHub, has_file, merged, read_local, read_remote, state_at

__all__ = ["Published", "branch_of", "free_shards", "publish", "send_group"]

GROUP_FILES, GROUP_BYTES = 50, 10 * 10**9
"""Files and bytes of a commit on the staging branch: the Hub gives it 60 seconds, and advises 50 to 100 files."""
MAX_COPIES = 500
"""Copies in one commit, for the same reason."""
_CLOSED_CARD = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: not-released-yet/*.tar
---
The first version of this dataset is being published.
"""
"""Card of a repository whose first release is under way: without one, `datasets` would open whatever is there."""
MAX_RACES = 5
"""Times that somebody else may commit to main between our reading it and our commit."""


class Published(NamedTuple):
    """What publishing did, or with `dry_run` would do."""

    repo_id: str
    version: Version
    commit: str | None
    """Commit of the version; None after a dry run."""
    was_there: bool
    """True where this content stands under this version already: nothing is sent."""
    change: Change
    """What is new since the latest version."""
    num_files: int
    """Large files sent."""
    num_bytes: int
    """Their bytes."""
    notes: list[str]
    """What its author should know."""


class _Plan(NamedTuple):
    """What there is to do, all of it checked."""

    remote: OnHub
    change: Change
    missing: dict[str, Large]
    """Large files that main does not have."""
    elsewhere: dict[str, str]
    """Those of them that are on another staging branch, by the journal, and its commit."""
    to_send: dict[str, Large]
    """Those that no branch has."""
    contents: Contents


def publish(
    root: Path,
    repo_id: str,
    version: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    settings: dict[str, Any] | None = None,
) -> Published:
    """Publish a folder under a version.

    `settings` are fields of tracekit.card.readme.CardSettings; those not given are what the published card says.
    Everything is checked before anything is created or sent.

    Raises:
        DatasetError: the folder is not finished, a shard is neither here nor on the Hub, or the repository holds
            something else.
        VersionError: the version is taken by other content, not higher than the latest, or too small a step.
        HubError: the Hub refuses or cannot be reached, or `private` is asked for and the repository is public; the same
            command goes on.
        CorruptShardError: a shard here is not what its manifest says; it was not published.
    """
    with quiet_client():
        return _Publication(root, repo_id, Version.parse(version), private, settings or {}).run(dry_run)


class _Publication:
    """One folder on its way to one version."""

    def __init__(self, root: Path, repo_id: str, version: Version, private: bool, settings: dict[str, Any]) -> None:
        self._local, self._repo, self._version = read_local(root), HubRepo(repo_id), version
        self._private, self._settings = private, settings
        self._has_journal = can_write_journal(root)
        if not self._has_journal:
            say(f"no journal can be kept in {root}; the Hub is asked about every file instead")

    def run(self, dry_run: bool) -> Published:
        """Publish, or with `dry_run` say what that would be."""
        repo_id = self._repo.repo_id
        if self._has_journal and not dry_run:
            sweep(self._local.root)
        exists = self._repo.check_access(private=self._private, to_write=not dry_run)
        for _ in range(MAX_RACES):
            tags = self._repo.refs().tags if exists else {}
            if str(self._version) in tags:
                return self._already(tags)
            plan = self._plan(tags, exists)
            total = len(plan.to_send), sum(info.num_bytes for info in plan.to_send.values())
            if dry_run:
                return Published(repo_id, self._version, None, False, plan.change, *total, plan.contents.notes)
            if not exists:
                say(f"creating {repo_id}{' (private)' if self._private else ''}")
                self._repo.create(private=self._private)
                exists = True
                plan = plan._replace(remote=read_remote(self._repo))
            self._stage(plan)
            try:
                commit = self._release(plan)
            except StaleParentError:
                say(f"somebody else has committed to {repo_id}; reading it again")
                continue
            self._check(commit)
            self._repo.tag(str(self._version), commit)
            self._note(plan.contents.settings)
            self._clean_up(commit)
            return Published(repo_id, self._version, commit, False, plan.change, *total, plan.contents.notes)
        raise StaleParentError(
            f"{repo_id}: others committed to main {MAX_RACES} times meanwhile; run the command again"
        )

    def _plan(self, tags: dict[str, str], exists: bool) -> _Plan:
        """Look at the Hub, and check everything that can be checked before something is sent."""
        latest = Version.latest(tags)
        released = read_remote(self._repo, tags[str(latest)]) if latest else None
        remote = read_remote(self._repo) if exists else OnHub("", {}, EMPTY, None)
        after = merged(remote.state, self._local)
        change = change_between(released.state if released else EMPTY, after)
        check_version(self._version, list(tags), change)
        large = self._local.large
        missing = {path: info for path, info in large.items() if not has_file(remote.files, path, info.sha256)}
        elsewhere = self._staged_at(missing) if missing and exists else {}
        to_send = {path: info for path, info in missing.items() if path not in elsewhere}
        self._check_here(to_send)
        contents = small_files(self._repo.repo_id, self._local, self._version, remote, released, after, self._settings)
        self._repo.check_card(contents.files["README.md"].decode())
        return _Plan(remote, change, missing, elsewhere, to_send, contents)

    def _check_here(self, to_send: dict[str, Large]) -> None:
        """See that what is to be sent is here.

        Raises:
            DatasetError: it is not; the message says where it went.
            CorruptShardError: it has another size than its manifest says.
        """
        root, repo_id = self._local.root, self._repo.repo_id
        for path, info in to_send.items():
            here = inside(root, path)
            if here.exists() and (fault := size_fault(here, info.num_bytes)):
                raise CorruptShardError(f"{here} has {fault}; run `tracekit verify` on the dataset")
        gone = [path for path in to_send if not inside(root, path).exists()]
        if not gone:
            return
        sent = is_sent(read_journal(root), gone[0], to_send[gone[0]].sha256)
        again = "delete the journal in hub/ and run the builder's command again, which makes them anew"
        if sent is None or (sent.repo, sent.branch) == (repo_id, branch_of(self._version)):
            advice = again
        else:
            advice = f"they were sent to {sent.repo} as {sent.version}: publish there, or {again}"
        raise DatasetError(f"{len(gone)} files are neither in {root} nor on the Hub, {gone[0]} first; {advice}")

    def _already(self, tags: dict[str, str]) -> Published:
        """The version exists: fine if it has this content, an error if not."""
        newest = Version.latest(tags)
        assert newest is not None, tags
        repo_id, local, commit = self._repo.repo_id, self._local, tags[str(self._version)]
        there = state_at(self._repo, commit)
        ours = local.state
        is_same = all(there.manifests.get(name) == manifest for name, manifest in ours.manifests.items())
        if is_same and all(there.labels.get(path) == summary for path, summary in ours.labels.items()):
            notes = self._card_notes(commit, newest) if self._version == newest else []
            self._clean_up(commit)
            return Published(repo_id, self._version, commit, True, Change(VersionStep.NONE, []), 0, 0, notes)
        latest = there if self._version == newest else state_at(self._repo, tags[str(newest)])
        change = change_between(latest, merged(latest, local))
        raise VersionError(
            f"{repo_id} has {self._version} already, with other content, and a version is never changed. The next free "
            f"version for this content is {newest.after(change.step)} "
            f"({'; '.join(change.reasons[:3]) or 'nothing but words changed'})"
        )

    def _card_notes(self, commit: str, newest: Version) -> list[str]:
        """Whether the card would say something else by now."""
        remote = read_remote(self._repo)
        if remote.head != commit:
            return []
        after = merged(remote.state, self._local)
        contents = small_files(self._repo.repo_id, self._local, self._version, remote, remote, after, self._settings)
        if contents.files["README.md"].decode() == remote.card:
            self._note(contents.settings)
            return []
        return [
            "the card would differ from the published one; to publish it, give --version "
            f"{newest.after(VersionStep.PATCH)}"
        ]

    def _staged_at(self, wanted: dict[str, Large]) -> dict[str, str]:
        """Commit at which each of these files can be had: of this version's staging branch, or another in the journal.

        A file that was staged for another version, and deleted here, is copied from there.
        """
        journal, branches = read_journal(self._local.root), self._repo.refs().branches
        noted = {entry.branch for path in wanted for entry in journal.get(path, []) if entry.repo == self._repo.repo_id}
        found: dict[str, str] = {}
        for branch in [branch_of(self._version), *sorted(noted - {branch_of(self._version)})]:
            files = self._repo.files(branches[branch]) if branch in branches else {}
            for path, info in wanted.items():
                if path not in found and has_file(files, path, info.sha256):
                    found[path] = branches[branch]
        return found

    def _stage(self, plan: _Plan) -> None:
        """Send what is neither on main nor on the staging branch."""
        if not plan.to_send:
            return
        self._repo.create_branch(branch_of(self._version), at="main")
        root = self._local.root
        uploads = [Upload(path, inside(root, path), info.num_bytes, info.sha256) for path, info in plan.to_send.items()]
        total = sum(info.num_bytes for info in plan.missing.values())
        done = total - sum(upload.num_bytes for upload in uploads)
        with tqdm(total=total, initial=done, unit="B", unit_scale=True, desc="publish") as bar:
            for group in _groups(uploads):
                send_group(self._repo, root, self._version, group, bar.update, has_journal=self._has_journal)

    def _release(self, plan: _Plan) -> str:
        """Bring main to the new state, in one commit; returns it. Where it is there already, nothing is done."""
        remote, files, large = plan.remote, plan.contents.files, self._local.large
        changed = {path: data for path, data in files.items() if not _is_same(remote.files.get(path), data)}
        ours = [path for path in remote.files if self._is_ours(path)]
        deleted = [path for path in ours if path not in large and path not in files]
        if not (changed or plan.missing or deleted):
            return remote.head
        replaced = [path for path in plan.missing if path in remote.files]
        if len(replaced) > MAX_COPIES:
            raise DatasetError(
                f"{len(replaced)} published shards would be replaced; at most {MAX_COPIES} can be in one commit. "
                "Publish this data under another --dataset-config, or in another repository"
            )
        new = [path for path in plan.missing if path not in remote.files]
        sources = self._staged_at(plan.missing)
        lost = [path for path in plan.missing if path not in sources]
        if lost:
            raise DatasetError(
                f"{self._repo.repo_id}: {lost[0]} is not on {branch_of(self._version)} as it was sent; somebody else "
                "stages other content for this version. Run the command again, or choose another version"
            )
        parent = remote.head
        while new and len(replaced) + len(new) > MAX_COPIES:
            part, new = new[:MAX_COPIES], new[MAX_COPIES:]
            say(f"copying {len(part)} shards of {len(plan.missing)}")
            title = f"Gather shards for {self._version}, {part[0]} first"
            closed = {} if "README.md" in remote.files else {"README.md": _CLOSED_CARD}
            copies = {path: sources[path] for path in part}
            parent = self._repo.release(parent=parent, title=title, copies=copies, contents=closed, deleted=())
        say(f"releasing {self._version}")
        copies = {path: sources[path] for path in replaced + new}
        title = f"Release {self._version}"
        return self._repo.release(parent=parent, title=title, copies=copies, contents=changed, deleted=deleted)

    def _check(self, commit: str) -> None:
        """See that the version holds every large file with its hash.

        Raises:
            DatasetError: it does not.
        """
        files = self._repo.files(commit)
        wrong = [path for path, info in self._local.large.items() if not has_file(files, path, info.sha256)]
        if wrong:
            raise DatasetError(
                f"{self._repo.repo_id}: {len(wrong)} files at {commit} are not what was published, {wrong[0]} first; "
                "somebody else published at the same moment. It was not tagged; run the command again"
            )

    def _note(self, settings: CardSettings) -> None:
        """Note in the journal whatever the Hub has now, and what the card says, to know who edits it next."""
        if not self._has_journal:
            return
        journal, repo_id = read_journal(self._local.root), self._repo.repo_id
        entries = [
            Sent(repo=repo_id, branch=branch_of(self._version), path=path, num_bytes=info.num_bytes, sha256=info.sha256)
            for path, info in self._local.large.items()
            if is_sent(journal, path, info.sha256, repo=repo_id) is None
        ]
        write_journal(self._local.root, entries)
        note_card(repo_id, self._local, settings)

    def _clean_up(self, commit: str) -> None:
        """Delete staging branches all of whose large files are released; what others stage there stays."""
        journal, refs = read_journal(self._local.root), self._repo.refs()
        versions = [refs.tags[tag] for tag in refs.tags if Version.latest([tag]) and refs.tags[tag] != commit]
        noted = {entry.branch for entries in journal.values() for entry in entries if entry.repo == self._repo.repo_id}
        released = self._repo.files(commit)
        for branch in sorted({branch_of(self._version), *noted} & refs.branches.keys()):
            staged = self._repo.files(refs.branches[branch])
            left = _others(staged, released)
            while left and versions:  # a branch begins as a copy of main: it holds files of earlier versions too
                left = _others(left, self._repo.files(versions.pop()))
            if left:
                say(f"{branch} stays: {len(left)} files on it are not in {self._version}, {next(iter(left))} first")
            elif branch.startswith("staging/"):
                self._repo.delete_branch(branch)

    def _is_ours(self, path: str) -> bool:
        """Whether a published file belongs to one of the configurations that are here."""
        return any(
            path.startswith((f"data/{name}/", f"records/{name}/")) or re.fullmatch(rf"figures/{name}-[a-z]+\.png", path)
            for name in self._local.state.manifests
        )


def _others(files: Mapping[str, RemoteFile], released: Mapping[str, RemoteFile]) -> dict[str, RemoteFile]:
    """The large files that are not among those that are released."""
    return {path: file for path, file in files.items() if file.sha256 and not has_file(released, path, file.sha256)}


def branch_of(version: Version) -> str:
    """The branch on which a version is staged."""
    return f"staging/{version}"


def send_group(
    repo: HubRepo,
    root: Path,
    version: Version,
    group: Sequence[Upload],
    progress: Callable[[int], object],
    *,
    has_journal: bool = True,
) -> None:
    """Stage a group of files, and note in the journal that the Hub has them; those that it has are only noted."""
    there = repo.files_at([upload.path for upload in group], branch_of(version))
    missing = [upload for upload in group if not has_file(there, upload.path, upload.sha256)]
    if missing:
        repo.stage(branch_of(version), missing, progress=progress)
    entries = [
        Sent(repo=repo.repo_id, branch=branch_of(version), path=u.path, num_bytes=u.num_bytes, sha256=u.sha256)
        for u in group
    ]
    if has_journal:
        write_journal(root, entries)


def _groups(uploads: Sequence[Upload]) -> Iterator[list[Upload]]:
    """Uploads in groups of limited number and size."""
    group: list[Upload] = []
    for upload in uploads:
        if group and (len(group) == GROUP_FILES or sum(u.num_bytes for u in group) + upload.num_bytes > GROUP_BYTES):
            yield group
            group = []
        group.append(upload)
    if group:
        yield group


def _is_same(file: RemoteFile | None, data: bytes) -> bool:
    """Whether a published file has this content; git's own hash where git keeps it."""
    if file is None or file.size != len(data):
        return False
    if file.sha256 is not None:
        return file.sha256 == hashlib.sha256(data).hexdigest()
    return file.git_sha1 == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def free_shards(root: Path, repo_id: str) -> int:
    """Delete the shards here that the repository has, by the journal, as the manifests say; returns their bytes."""
    journal = read_journal(root)
    num_bytes = 0
    for name in config_names(root):
        layout = Layout(root, name)
        for shard in read_manifest(layout).shards:
            path = layout.shard(shard.name)
            sent = is_sent(journal, path.relative_to(root).as_posix(), shard.sha256, repo=repo_id)
            if path.exists() and layout.sidecar(shard.name).exists() and sent is not None:
                num_bytes += path.stat().st_size
                path.unlink()
    return num_bytes
