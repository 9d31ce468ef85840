"""The small files of a release: card, index, loading script, figures, and each configuration's plan, manifest, schema.

What the card says besides the manifests is chosen here: what was asked for, else what the published card says, else
what README.md here says; and the person's own section, whoever edited it last.
"""

import hashlib
from typing import Any, NamedTuple

import msgspec

from tracekit.card.figures import draw
from tracekit.card.readme import CardSettings, render_card, settings_of, split_card
from tracekit.card.script import render_script
from tracekit.errors import DatasetError
from tracekit.format.journal import Sent, is_last, read_journal, write_journal
from tracekit.format.layout import Layout, inside, read_whole
from tracekit.format.manifest import Index, newest_schema, to_bytes
from tracekit.format.release import State, Version
from tracekit.publish.snapshot import Local, Remote

__all__ = ["Contents", "note_section", "small_files"]

_PUBLISHED, _HERE = "README.md#published", "README.md#here"
"""Paths under which the journal keeps the hashes of the card's own section, on the Hub and here."""


class Contents(NamedTuple):
    """Files of a release other than shards and record tables."""

    files: dict[str, bytes]
    """Bytes by path."""
    section: str | None
    """The person's own section of the card."""
    notes: list[str]
    """What its author should know."""


def small_files(
    repo_id: str, local: Local, version: Version, remote: Remote, after: State, asked: dict[str, Any]
) -> Contents:
    """Everything small that a release of `after` holds of ours. `asked` are fields of CardSettings.

    Raises:
        DatasetError: the card's own section was edited here and on the Hub, or a card's head cannot be read.
    """
    manifests = list(after.manifests.values())
    files: dict[str, bytes] = {}
    for name, manifest in local.state.manifests.items():
        layout = Layout(local.root, name)
        for path in (layout.plan, layout.manifest, layout.schema):
            files[path.relative_to(local.root).as_posix()] = read_whole(path)
        files |= draw(manifest)
    files |= {path: read_whole(inside(local.root, path)) for path in local.beside}
    files["load_traces.py"] = render_script(manifests).encode()
    schema_version = newest_schema(manifests)
    files["manifest.json"] = to_bytes(Index(schema_version=schema_version, configs=list(after.entries.values())))
    settings, notes = _settings(repo_id, local, remote, asked)
    card = render_card(
        manifests,
        here=repo_id,
        version=str(version),
        settings=settings,
        has_figures=True,
        labels=list(after.labels.values()),
    )
    files["README.md"] = card.encode()
    if settings.license == "unknown":
        notes.append("the card says license: unknown; give one with --license, as --license cc-by-4.0")
    return Contents(files, settings.section, notes)


def note_section(repo_id: str, local: Local, published: str | None) -> None:
    """Remember the section as published and as it is here, so that a later run can tell who edited it since."""
    here = settings_of(local.card).section if local.card else None
    entries = [
        Sent(repo=repo_id, branch="main", path=path, num_bytes=len(text or ""), sha256=_sha256(text or ""))
        for path, text in ((_PUBLISHED, published), (_HERE, here))
    ]
    write_journal(local.root, entries)


def _settings(repo_id: str, local: Local, remote: Remote, asked: dict[str, Any]) -> tuple[CardSettings, list[str]]:
    """What the card is to say, and what of README.md here it will not."""
    nobody = CardSettings()
    here = settings_of(local.card) if local.card else nobody
    there = settings_of(remote.card) if remote.card else nobody
    notes: list[str] = []
    chosen: dict[str, Any] = {}
    for name in ("license", "language", "pretty_name", "tags", "extra"):
        ours, theirs, default = (getattr(settings, name) for settings in (here, there, nobody))
        chosen[name] = asked.get(name, theirs if theirs != default else ours)
        if name not in asked and ours != default and ours != chosen[name]:
            notes.append(f"README.md here says {name} {ours!r}, the published card {theirs!r}, which stays")
    chosen["section"] = _section(repo_id, local, here.section, there.section)
    manifests = list(local.state.manifests.values())
    if local.card and split_card(local.card) != split_card(render_card(manifests, settings=here)):
        notes.append(
            "README.md here holds text that tracekit did not write, outside the part between the two comment markers; "
            "only that part is published"
        )
    try:
        return msgspec.convert(chosen, CardSettings), notes
    except msgspec.ValidationError as error:
        raise DatasetError(f"the card cannot say that: {error}") from error


def _section(repo_id: str, local: Local, here: str | None, there: str | None) -> str | None:
    """The person's own section: the one that was edited since this folder was last published there.

    Raises:
        DatasetError: it was edited here and on the Hub, differently.
    """
    if here is None or there is None or here == there:
        return here or there
    journal = read_journal(local.root)
    if is_last(journal, _HERE, _sha256(here), repo_id):
        return there
    if is_last(journal, _PUBLISHED, _sha256(there), repo_id):
        return here
    raise DatasetError(
        "the card's own section was edited here and on the Hub, differently. Make README.md here hold the text that is "
        "to stay; with the Hub's text in it, or without any of its own, publishing goes on"
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
