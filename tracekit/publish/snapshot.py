"""Two states of a dataset: the folder here, and the repository as it is. Read and compared, never changed."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tracekit.errors import UNREADABLE, DatasetError
from tracekit.format.journal import Sent
from tracekit.format.labels import LabelSummary, read_summaries, summary_path
from tracekit.format.layout import MAX_SHARDS, Layout, inside, read_text, read_whole
from tracekit.format.manifest import ConfigEntry, Index, Manifest, index_entry, read_manifest, read_schema
from tracekit.format.release import State
from tracekit.hub import HubRepo, Refs, RemoteFile
from tracekit.records import RecordSchema, check_schema
from tracekit.run.finish import is_finished, ordered_names

__all__ = [
    "EMPTY",
    "Large",
    "Local",
    "OnHub",
    "has_file",
    "lost_files",
    "merged",
    "read_local",
    "read_remote",
    "state_at",
]

EMPTY = State({}, {}, {})
"""Nothing published."""


class Large(NamedTuple):
    """A file that goes to the Hub's storage of large files."""

    num_bytes: int
    sha256: str


class Local(NamedTuple):
    """A finished folder."""

    root: Path
    state: State
    large: dict[str, Large]
    """Shards and record tables, by path."""
    beside: list[str]
    """Paths of questions, label sets and their summaries. The Hub's client decides how it stores them."""
    card: str | None
    """Text of README.md."""


class OnHub(NamedTuple):
    """The repository, as it is at a commit."""

    head: str
    files: dict[str, RemoteFile]
    state: State
    card: str | None


def read_local(root: Path) -> Local:
    """Everything that publishing needs to know of the folder, the shards themselves left alone."""
    entries: dict[str, ConfigEntry] = {}
    manifests: dict[str, Manifest] = {}
    schemas: dict[str, RecordSchema] = {}
    labels: dict[str, LabelSummary] = {}
    beside: list[str] = []
    large: dict[str, Large] = {}
    for name in ordered_names(root):
        layout = Layout(root, name)
        if not is_finished(layout):
            raise DatasetError(f"{root}: {name} is not finished; run its command again, then publish")
        manifest = manifests[name] = read_manifest(layout)
        for split in manifest.splits:
            if not re.fullmatch(r"\w+(\.\w+)*", split.name, re.ASCII) or split.name == "all":
                raise DatasetError(
                    f"{root}: `datasets` takes no split named {split.name!r}; make it under another name"
                )
        if len(manifest.shards) > MAX_SHARDS:
            raise DatasetError(
                f"{root}: {name} has {len(manifest.shards)} shards; the Hub takes {MAX_SHARDS} files in a folder. Make "
                "it again with more --samples-per-shard"
            )
        entries[name] = index_entry(manifest, read_whole(layout.manifest))
        schemas[name] = read_schema(layout)
        for shard in manifest.shards:
            large[layout.shard(shard.name).relative_to(root).as_posix()] = Large(shard.num_bytes, shard.sha256)
        beside += _beside(layout, labels)
        for file in manifest.files:
            if file.path.startswith("records/"):
                large[file.path] = Large(file.num_bytes, file.sha256)
    card = inside(root, "README.md")
    state = State(entries, manifests, schemas, labels)
    return Local(root, state, large, beside, read_text(card) if card.exists() else None)


def _beside(layout: Layout, labels: dict[str, LabelSummary]) -> list[str]:
    """Paths of the questions and label sets of a configuration; summaries of the sets are added to `labels`.

    A set without a summary is not judged to the end, and stays here.

    Raises:
        DatasetError: labels are not those of their summary.
    """
    questions = [layout.questions, layout.question_set]
    paths = [path for path in questions if path.exists()]
    for summary in read_summaries(layout):
        path = layout.labels(summary.name)
        if not path.exists():
            raise DatasetError(f"{path} is gone, its summary is there; run the stage evaluate again")
        if hashlib.sha256(read_whole(path)).hexdigest() != summary.labels_sha256:
            raise DatasetError(f"{path}: its labels are not those of its summary; run the stage evaluate again")
        paths += [path, summary_path(layout, summary.name)]
        labels[summary_path(layout, summary.name).relative_to(layout.root).as_posix()] = summary
    return [path.relative_to(layout.root).as_posix() for path in paths]


def _state(repo: HubRepo, revision: str, files: Mapping[str, RemoteFile]) -> State:
    """What is published at a commit; nothing where the repository is still empty.

    Raises:
        DatasetError: the repository holds something that tracekit did not write.
    """
    if "manifest.json" not in files:
        others = sorted(files.keys() - {".gitattributes", "README.md"})
        if others:
            raise DatasetError(
                f"{repo.repo_id} holds files that no tracekit dataset has ({', '.join(others[:3])}); choose another "
                "repository"
            )
        return EMPTY
    index = _decode(repo, "manifest.json", revision, Index)
    manifests = {e.name: _decode(repo, f"manifests/{e.name}.json", revision, Manifest) for e in index.configs}
    for name, manifest in manifests.items():
        check_schema(manifest.schema_version, where=f"{repo.repo_id}, configuration {name}")
    paths = {name: f"schemas/{name}.json" for name in manifests}
    schemas = {
        name: RecordSchema.read(repo.read(path, revision), where=f"{path} of {repo.repo_id}")
        for name, path in paths.items()
    }
    summaries = [path for path in files if re.fullmatch(r"labels/[^/]+/[^/]+\.json", path)]
    labels = {path: _decode(repo, path, revision, LabelSummary) for path in summaries}
    return State({entry.name: entry for entry in index.configs}, manifests, schemas, labels)


def state_at(repo: HubRepo, revision: str) -> State:
    """What is published at a commit.

    Raises: as `read_remote`.
    """
    return _state(repo, revision, repo.files(revision))


def _decode(repo: HubRepo, path: str, revision: str, struct: Any) -> Any:
    try:
        return msgspec.json.decode(repo.read(path, revision), type=struct)
    except UNREADABLE as error:
        raise DatasetError(
            f"{path} of {repo.repo_id} cannot be read by this tracekit ({error}); upgrade tracekit, or publish to "
            "another repository"
        ) from error


def read_remote(repo: HubRepo, at: str | None = None) -> OnHub:
    """The repository at a commit; main as it is now by default.

    Raises:
        DatasetError: the repository holds something that this tracekit did not write, or cannot read.
        HubError: the Hub cannot be reached.
    """
    head = at or repo.refs().branches["main"]
    files = repo.files(head)
    try:
        card = repo.read("README.md", head).decode() if "README.md" in files else None
    except UnicodeDecodeError as error:
        raise DatasetError(f"README.md of {repo.repo_id} is not UTF-8; mend it on the Hub") from error
    return OnHub(head, files, _state(repo, head, files), card)


def merged(published: State, local: Local) -> State:
    """What the dataset will be: what is published, and ours in its place or beside it.

    Raises:
        DatasetError: names of configurations clash.
    """
    manifests = _both(published.manifests, local.state.manifests)
    for name in manifests:
        if f"{name}_records" in manifests:
            raise DatasetError(
                f"configurations {name!r} and {name + '_records'!r} cannot be in one repository: `datasets` reads the "
                f"records of {name!r} by the second name. Choose another --dataset-config"
            )
    return State(
        _both(published.entries, local.state.entries),
        manifests,
        _both(published.schemas, local.state.schemas),
        _both(published.labels, local.state.labels),
    )


def _both(published: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Ours in place of what is published, or after it: the first configuration, the default, stays the first."""
    return dict(published) | dict(ours)


def lost_files(entries: Sequence[Sent]) -> list[Sent]:
    """Those of these files that the Hub does not have, at their version or still on its staging branch.

    Raises:
        HubError: the Hub cannot be reached.
    """
    lost: list[Sent] = []
    places = {(entry.repo, entry.branch, entry.version) for entry in entries}
    for repo_id, branch, version in sorted(places):
        mine = [entry for entry in entries if (entry.repo, entry.branch) == (repo_id, branch)]
        repo = HubRepo(repo_id)
        refs = repo.refs() if repo.exists() else Refs({}, {})
        revision = refs.tags.get(version) or refs.branches.get(branch)
        files = repo.files(revision) if revision else {}
        lost += [entry for entry in mine if not has_file(files, entry.path, entry.sha256)]
    return lost


def has_file(files: Mapping[str, RemoteFile], path: str, sha256: str) -> bool:
    """Whether a large file is among these with this content."""
    return path in files and files[path].sha256 == sha256
