"""What a new version may be called: semantic versions, and what changed between two states of a dataset. Pure.

    nothing but words    patch    v1.0.0 -> v1.0.1
    shards, configurations or label sets were added, record fields too   minor    v1.0.0 -> v1.1.0
    published shards changed or went, record fields went or changed      major    v1.0.0 -> v2.0.0

In 0.x a minor step may break, as semantic versioning has it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple

from tracekit.errors import VersionError
from tracekit.format.labels import LabelSummary
from tracekit.format.manifest import ConfigEntry, Manifest
from tracekit.records import RecordSchema, schema_differences

__all__ = ["Change", "State", "Version", "VersionStep", "change_between", "check_version"]


_PATTERN = re.compile(r"v?(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", re.ASCII)


class VersionStep(IntEnum):
    """How much changed; the larger is the worse for readers."""

    NONE = 0
    PATCH = 1
    MINOR = 2
    MAJOR = 3


class Version(NamedTuple):
    """A semantic version, written `v1.2.3`."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"v{self.major}.{self.minor}.{self.patch}"

    @classmethod
    def parse(cls, text: str) -> "Version":
        """Read `v1.2.3` or `1.2.3`.

        Raises:
            VersionError: it is not one.
        """
        found = _PATTERN.fullmatch(text)
        if not found:
            raise VersionError(f"--version {text!r} is no semantic version; expected one like v1.0.0")
        return cls(*(int(part) for part in found.groups()))

    @classmethod
    def latest(cls, tags: Iterable[str]) -> "Version | None":
        """The highest version among tags; other tags do not count."""
        return max((cls.parse(tag) for tag in tags if tag.startswith("v") and _PATTERN.fullmatch(tag)), default=None)

    def after(self, step: VersionStep) -> "Version":
        """The next version for a change of this size."""
        if step == VersionStep.MAJOR and self.major > 0:
            return Version(self.major + 1, 0, 0)
        if step >= VersionStep.MINOR:
            return Version(self.major, self.minor + 1, 0)
        return Version(self.major, self.minor, self.patch + 1)


class State(NamedTuple):
    """A dataset, published or about to be."""

    entries: Mapping[str, ConfigEntry]
    """Entry of every configuration in the index."""
    manifests: Mapping[str, Manifest]
    """Manifest of every configuration."""
    schemas: Mapping[str, RecordSchema]
    """Schema of every configuration's record."""
    labels: Mapping[str, LabelSummary] = MappingProxyType({})
    """Summary of every label set, by its path."""


class Change(NamedTuple):
    """What changed, and how large a step that is."""

    step: VersionStep
    reasons: list[str]
    """The changes, largest first."""


def change_between(before: State, after: State) -> Change:
    """What `after` changes in `before`, configuration by configuration."""
    found: list[tuple[VersionStep, str]] = []
    for name, manifest in after.manifests.items():
        old = before.manifests.get(name)
        if old is None:
            found.append((VersionStep.MINOR, f"configuration {name} is new"))
        elif old != manifest:
            found += _config_changes(name, old, manifest)
            found += _schema_changes(name, before.schemas[name], after.schemas[name])
    found += [(VersionStep.MAJOR, f"configuration {n} is gone") for n in before.manifests if n not in after.manifests]
    found += _label_changes(before.labels, after.labels)
    found.sort(key=lambda pair: -pair[0])
    return Change(found[0][0] if found else VersionStep.NONE, [reason for _, reason in found])


def check_version(version: Version, existing: Sequence[str], change: Change) -> None:
    """See that a version may follow those that are there.

    Raises:
        VersionError: it is not higher than the latest one, or too small a step; the message names the next free one.
    """
    latest = Version.latest(existing)
    if latest is None:
        return
    needed = latest.after(change.step)
    why = f" ({'; '.join(change.reasons[:3])})" if change.reasons else ""
    if version <= latest:
        raise VersionError(
            f"{version} is not higher than the latest version {latest}; the next free one for this content is "
            f"{needed}{why}"
        )
    if version < needed:
        step = {VersionStep.MAJOR: "a major", VersionStep.MINOR: "a minor"}.get(change.step, "a patch")
        raise VersionError(
            f"{version} is too small a step from {latest}: this is {step} change{why}. "
            f"The next free version is {needed}"
        )


def _label_changes(
    before: Mapping[str, LabelSummary], after: Mapping[str, LabelSummary]
) -> list[tuple[VersionStep, str]]:
    """Label sets that are new, or say something else."""
    found: list[tuple[VersionStep, str]] = []
    for path, summary in after.items():
        where = f"label set {summary.name} of {summary.config}"
        if path not in before:
            found.append((VersionStep.MINOR, f"{where} is new"))
        elif before[path] != summary:
            found.append((VersionStep.MINOR, f"{where} has other labels"))
    return found


def _config_changes(name: str, old: Manifest, new: Manifest) -> list[tuple[VersionStep, str]]:
    if old.task != new.task or old.schema_version.split(".")[0] != new.schema_version.split(".")[0]:
        return [(VersionStep.MAJOR, f"records of {name} have another schema")]
    published = {shard.name: shard.sha256 for shard in old.shards}
    now = {shard.name: shard.sha256 for shard in new.shards}
    changed = [shard for shard, sha256 in published.items() if now.get(shard) != sha256]
    if changed:
        return [(VersionStep.MAJOR, f"{len(changed)} published shards of {name} changed or went, {changed[0]} first")]
    added = len(now) - len(published)
    if added:
        return [(VersionStep.MINOR, f"{added} shards of {name} are new")]
    return [(VersionStep.PATCH, f"what is said about {name} changed, no shard did")]


def _schema_changes(name: str, old: RecordSchema, new: RecordSchema) -> list[tuple[VersionStep, str]]:
    found = schema_differences(old, new)
    broken = [field for field, (before, _) in found.items() if before != "(absent)"]
    if broken:
        return [(VersionStep.MAJOR, f"{broken[0]} of {name} changed or went")]
    return [(VersionStep.MINOR, f"{next(iter(found))} of {name} is new")] if found else []
