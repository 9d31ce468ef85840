"""Publishing: a finished folder becomes a version on the Hub.

    stage     shards and record tables go, in groups, to the branch staging/v1.0.0; the journal notes what arrived
    release   one commit on main: copies of what was staged, and card, manifests, schemas, script, figures
    tag       v1.0.0 on that commit; it is never moved. The staging branch goes

Nobody reads a staging branch, so a reader at a tag or on main never sees half a release. Every step looks at the Hub
first and does what is missing, so the same command again goes on wherever it stopped. More than `MAX_COPIES` new
shards are copied to main in several commits, before the one with the card: a card names exactly the shards of its own
release, so `datasets` and TraceStore do not see the others yet.

tracekit.stager stages shards while a run still makes them.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import yaml
from tqdm import tqdm

from tracekit.card import MADE_TITLE, CardSettings, own_section, render_card
from tracekit.errors import DatasetError, VersionError
from tracekit.figures import draw
from tracekit.hub import HubRepo, RemoteFile, StaleParentError, Upload, quiet_client
from tracekit.journal import Sent, is_sent, read_journal, write_journal
from tracekit.layout import Layout, config_names
from tracekit.manifest import Index, Manifest, read_struct, to_bytes
from tracekit.release import Change, State, Step, Version, change_between, check_version
from tracekit.script import render_script
from tracekit.snapshot import EMPTY, Local, Remote, has_file, merged, read_local, read_remote, state_at
from tracekit.talk import say

__all__ = ["Published", "branch_of", "free_shards", "publish", "send_group"]

GROUP_FILES, GROUP_BYTES = 50, 10 * 10**9
"""Files and bytes of a commit on the staging branch: the Hub gives it 60 seconds, and advises 50 to 100 files."""
MAX_COPIES = 500
"""Copies in one commit, for the same reason."""
MAX_RACES = 5
"""Times that somebody else may commit to main between our reading it and our commit."""
_SECTION = "README.md#yours"
"""Path under which the journal keeps the hash of the card's own section."""


class Published(NamedTuple):
    """What publishing did, or with `dry_run` would do."""

    repo_id: str
    version: Version
    commit: str | None
    """Commit of the version; None after a dry run."""
    was_there: bool
    """True where this content stood under this version already: nothing was sent."""
    change: Change
    """What is new since the latest version."""
    num_files: int
    """Large files sent."""
    num_bytes: int
    """Their bytes."""


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

    `settings` are fields of tracekit.card.CardSettings; those not given are what the published card says.

    Raises:
        DatasetError: the folder is not finished, a shard is neither here nor on the Hub, or the repository holds
            something else.
        VersionError: the version is taken by other content, not higher than the latest, or too small a step.
        HubError: the Hub refuses or cannot be reached; the same command goes on.
        CorruptShardError: a shard here is not what its manifest says; it was not published.
    """
    with quiet_client():
        return _publish(root, HubRepo(repo_id), Version.parse(version), private, dry_run, settings or {})


def _publish(
    root: Path, repo: HubRepo, wanted: Version, private: bool, dry_run: bool, settings: dict[str, Any]
) -> Published:
    repo_id = repo.repo_id
    local = read_local(root)
    repo.check_access()
    if not repo.exists():
        if dry_run:
            return Published(
                repo_id, wanted, None, False, Change(Step.NONE, ["the repository is new"]), *_total(local.large)
            )
        say(f"creating {repo_id}{' (private)' if private else ''}")
        repo.create(private=private)
    for _ in range(MAX_RACES):
        tags = repo.refs().tags
        latest = Version.latest(tags)
        before = state_at(repo, tags[str(latest)]) if latest else EMPTY
        if str(wanted) in tags:
            there = before if wanted == latest else state_at(repo, tags[str(wanted)])
            return _already(repo, local, wanted, there, tags, before)
        remote = read_remote(repo)
        after = merged(remote.state, local)
        change = change_between(before, after)
        check_version(wanted, list(tags), change)
        missing = {path: info for path, info in local.large.items() if not has_file(remote.files, path, info[1])}
        if dry_run:
            staged = _staged(repo, wanted) if missing else {}
            to_send = {path: info for path, info in missing.items() if not has_file(staged, path, info[1])}
            return Published(repo_id, wanted, None, False, change, *_total(to_send))
        sent = _stage(repo, local, wanted, missing)
        try:
            commit = _release(repo, local, wanted, remote, after, missing, settings)
        except StaleParentError:
            say(f"somebody else has committed to {repo_id}; reading it again")
            continue
        _check(repo, commit, local)
        repo.tag(str(wanted), commit)
        _note(repo, local, commit)
        if branch_of(wanted) in repo.refs().branches:
            repo.delete_branch(branch_of(wanted))
        return Published(repo_id, wanted, commit, False, change, *_total(sent))
    raise StaleParentError(f"{repo_id}: others committed to main {MAX_RACES} times meanwhile; run the command again")


def _already(
    repo: HubRepo, local: Local, wanted: Version, there: State, tags: dict[str, str], latest: State
) -> Published:
    """The version exists: fine if it has this content, an error if not."""
    if all(there.manifests.get(name) == manifest for name, manifest in local.state.manifests.items()):
        if branch_of(wanted) in repo.refs().branches:
            repo.delete_branch(branch_of(wanted))
        return Published(repo.repo_id, wanted, tags[str(wanted)], True, Change(Step.NONE, []), 0, 0)
    change = change_between(latest, merged(latest, local))
    newest = Version.latest(tags)
    assert newest is not None, tags
    raise VersionError(
        f"{repo.repo_id} has {wanted} already, with other content, and a version is never changed. The next free "
        f"version for this content is {newest.after(change.step)} "
        f"({'; '.join(change.reasons[:3]) or 'nothing but words changed'})"
    )


def branch_of(version: Version) -> str:
    """The branch on which a version is staged."""
    return f"staging/{version}"


def _staged(repo: HubRepo, version: Version) -> dict[str, RemoteFile]:
    """Files on the staging branch of a version; none where there is no such branch."""
    return repo.files(branch_of(version)) if branch_of(version) in repo.refs().branches else {}


def _stage(
    repo: HubRepo, local: Local, version: Version, missing: dict[str, tuple[int, str]]
) -> dict[str, tuple[int, str]]:
    """Send what is neither on main nor on the staging branch; returns what was sent."""
    if not missing:
        return {}
    staged = _staged(repo, version)
    if not staged:
        repo.create_branch(branch_of(version), at="main")
    to_send = {path: info for path, info in missing.items() if not has_file(staged, path, info[1])}
    gone = [path for path in to_send if not (local.root / path).exists()]
    if gone:
        sent = is_sent(read_journal(local.root), gone[0], to_send[gone[0]][1])
        where = (
            f"; it was staged to {sent.repo} as {sent.branch.removeprefix('staging/')}: publish there" if sent else ""
        )
        raise DatasetError(
            f"{len(gone)} files are neither in {local.root} nor on {branch_of(version)} of {repo.repo_id}, {gone[0]} "
            f"first{where or '; delete the journal in hub/, and run the command of the builder again to make them'}"
        )
    uploads = [Upload(path, local.root / path, size, sha256) for path, (size, sha256) in to_send.items()]
    num_bytes = sum(upload.num_bytes for upload in uploads)
    done = sum(size for size, _ in missing.values()) - num_bytes
    with tqdm(total=num_bytes + done, initial=done, unit="B", unit_scale=True, desc="publish") as bar:
        for group in _groups(uploads):
            send_group(repo, local.root, version, group, bar.update)
    return to_send


def send_group(
    repo: HubRepo, root: Path, version: Version, group: Sequence[Upload], progress: Callable[[int], object]
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


def _release(
    repo: HubRepo,
    local: Local,
    version: Version,
    remote: Remote,
    after: State,
    missing: dict[str, tuple[int, str]],
    settings: dict[str, Any],
) -> str:
    """Bring main to the new state, in one commit; returns it. Where it is there already, nothing is done."""
    contents = _small_files(repo, local, version, remote, after, settings)
    changed = {p: data for p, data in contents.items() if not _is_same(remote.files.get(p), data)}
    deleted = [
        path for path in remote.files if _is_ours(path, local) and path not in local.large and path not in contents
    ]
    if not (changed or missing or deleted):
        return remote.head
    repo.check_card(contents["README.md"].decode())
    copies = list(missing)
    parent = remote.head
    replaced = [path for path in copies if path in remote.files]
    if len(copies) > MAX_COPIES and len(replaced) > MAX_COPIES:
        raise DatasetError(
            f"{len(replaced)} published shards would be replaced; at most {MAX_COPIES} can be in one commit. Publish "
            "this data under another --dataset-config, or in another repository"
        )
    new = [path for path in copies if path not in remote.files]
    while len(copies) > MAX_COPIES:
        part, new = new[:MAX_COPIES], new[MAX_COPIES:]
        say(f"copying {len(part)} shards of {len(missing)}")
        parent = repo.release(
            parent=parent,
            title=f"Gather shards for {version}, {part[0]} first",
            copies=part,
            copy_from=branch_of(version),
            contents={},
            deleted=[],
        )
        copies = replaced + new
    say(f"releasing {version}")
    return repo.release(
        parent=parent,
        title=f"Release {version}",
        copies=copies,
        copy_from=branch_of(version),
        contents=changed,
        deleted=deleted,
    )


def _small_files(
    repo: HubRepo, local: Local, version: Version, remote: Remote, after: State, settings: dict[str, Any]
) -> dict[str, bytes]:
    """Card, index, script, and each of our configurations' own files."""
    manifests = list(after.manifests.values())
    contents: dict[str, bytes] = {}
    for name, manifest in local.state.manifests.items():
        layout = Layout(local.root, name)
        for path in (layout.plan, layout.manifest, layout.schema):
            contents[path.relative_to(local.root).as_posix()] = path.read_bytes()
        contents |= draw(manifest)
    contents["load_traces.py"] = render_script(manifests).encode()
    contents["manifest.json"] = to_bytes(
        Index(schema_version=max(m.schema_version for m in manifests), configs=list(after.entries.values()))
    )
    text = render_card(
        manifests,
        here=repo.repo_id,
        version=str(version),
        settings=_card_settings(local, remote, settings),
        has_figures=True,
    )
    contents["README.md"] = text.encode()
    return contents


def _card_settings(local: Local, remote: Remote, settings: dict[str, Any]) -> CardSettings:
    """What was asked for, else what the published card says, else the defaults; and the person's own section."""
    kept: dict[str, Any] = {}
    if remote.card is not None and remote.card.startswith("---\n"):
        try:
            head = yaml.safe_load(remote.card.split("---\n")[1]) or {}
        except yaml.YAMLError as error:
            raise DatasetError(f"the head of the published card is not YAML: {error}. Mend it on the Hub") from error
        kept = {key: head[key] for key in ("license", "language", "pretty_name", "tags") if key in head}
        if str(kept.get("pretty_name", "")).startswith(MADE_TITLE):
            del kept["pretty_name"]  # nobody's choice: it is made anew from the models
        for key in ("language", "tags"):  # the Hub takes one alone for a list of one
            kept |= {key: [kept[key]]} if isinstance(kept.get(key), str) else {}
    chosen = kept | settings | {"section": _section(local, own_section(remote.card) if remote.card else None)}
    try:
        return msgspec.convert({key: value for key, value in chosen.items() if value is not None}, CardSettings)
    except msgspec.ValidationError as error:
        raise DatasetError(f"the head of the card: {error}") from error


def _section(local: Local, remote: str | None) -> str | None:
    """The person's own section: the one that was edited since this folder was last published.

    Raises:
        DatasetError: it was edited here and on the Hub, differently.
    """
    if local.section is None or remote is None or local.section == remote:
        return local.section or remote
    sent = read_journal(local.root).get(_SECTION, [])
    before = sent[-1].sha256 if sent else None
    if before == _sha256(remote.encode()):
        return local.section
    if before == _sha256(local.section.encode()):
        return remote
    raise DatasetError(
        "the card's own section was edited here and on the Hub, differently. Make README.md here hold the text that is "
        "to stay; with the Hub's text in it, or without any of its own, publishing goes on"
    )


def _note(repo: HubRepo, local: Local, commit: str) -> None:
    """Note in the journal whatever the Hub has now, and the card's section, so that it is known who edits it next."""
    journal = read_journal(local.root)
    entries = [
        Sent(repo=repo.repo_id, branch="main", path=path, num_bytes=size, sha256=sha256)
        for path, (size, sha256) in local.large.items()
        if (sent := is_sent(journal, path, sha256)) is None or sent.repo != repo.repo_id
    ]
    write_journal(local.root, entries)
    section = own_section(repo.read("README.md", commit).decode())
    if section is not None:
        data = section.encode()
        entry = Sent(repo=repo.repo_id, branch="main", path=_SECTION, num_bytes=len(data), sha256=_sha256(data))
        write_journal(local.root, [entry])


def _check(repo: HubRepo, commit: str, local: Local) -> None:
    """See that the version holds every large file with its hash.

    Raises:
        DatasetError: it does not.
    """
    files = repo.files(commit)
    wrong = [path for path, (_, sha256) in local.large.items() if not has_file(files, path, sha256)]
    if wrong:
        raise DatasetError(
            f"{repo.repo_id}: {len(wrong)} files at {commit} are not what was published, {wrong[0]} first; somebody "
            "else published at the same moment. Publish again under the next version"
        )


def _is_ours(path: str, local: Local) -> bool:
    """Whether a published file belongs to one of the configurations that are here."""
    return any(
        path.startswith((f"data/{name}/", f"records/{name}/")) or re.fullmatch(rf"figures/{name}-[a-z]+\.png", path)
        for name in local.state.manifests
    )


def _is_same(file: RemoteFile | None, data: bytes) -> bool:
    """Whether a published file has this content; git's own hash where git keeps it."""
    if file is None or file.size != len(data):
        return False
    if file.sha256 is not None:
        return file.sha256 == _sha256(data)
    return file.git_sha1 == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def free_shards(root: Path, repo_id: str) -> int:
    """Delete the shards here that the repository has, by the journal, as the manifests say; returns their bytes."""
    journal = read_journal(root)
    num_bytes = 0
    for name in config_names(root):
        layout = Layout(root, name)
        for shard in read_struct(layout.manifest, Manifest).shards:
            path = layout.shard(shard.name)
            sent = is_sent(journal, path.relative_to(root).as_posix(), shard.sha256)
            if path.exists() and layout.sidecar(shard.name).exists() and sent is not None and sent.repo == repo_id:
                num_bytes += path.stat().st_size
                path.unlink()
    return num_bytes


def _total(files: dict[str, tuple[int, str]]) -> tuple[int, int]:
    return len(files), sum(size for size, _ in files.values())
