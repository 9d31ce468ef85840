"""The small files of a release: card, index, loading script, figures, and each configuration's plan, manifest, schema.

What the card says besides the manifests is chosen here: what was asked for, else what the published card says, else
what README.md here says; and the person's own section, whoever edited it last.
"""

import hashlib
import re
from typing import Any, NamedTuple

import msgspec
import yaml
from msgspec import UNSET

from tracekit.card.figures import draw
from tracekit.card.readme import MADE_KEYS, CardSettings, render_card, settings_of, split_card
from tracekit.card.script import render_script
from tracekit.errors import DatasetError
from tracekit.format.journal import Sent, is_last, read_journal, write_journal
from tracekit.format.layout import Layout, inside, read_whole
from tracekit.format.manifest import Index, newest_schema, to_bytes
from tracekit.format.release import State, Version
from tracekit.publish.snapshot import Local, OnHub

__all__ = ["Contents", "note_card", "small_files"]

_NESTED = ("extra", "added", "removed")
_PUBLISHED, _HERE = "README.md#published", "README.md#here"
"""Paths under which the journal keeps the hashes of the card's own section, on the Hub and here."""


class Contents(NamedTuple):
    """Files of a release other than shards and record tables."""

    files: dict[str, bytes]
    """Bytes by path."""
    settings: CardSettings
    """What the card says that no manifest knows."""
    notes: list[str]
    """What its author should know."""


def small_files(
    repo_id: str,
    local: Local,
    version: Version,
    remote: OnHub,
    released: OnHub | None,
    after: State,
    asked: dict[str, Any],
) -> Contents:
    """Everything small that a release of `after` holds of ours. `asked` are fields of CardSettings.

    `remote` is main, `released` the latest version: what differs in their cards was edited on the Hub.

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
    files["load_traces.py"] = render_script(manifests, after.schemas).encode()
    schema_version = newest_schema(manifests)
    files["manifest.json"] = to_bytes(Index(schema_version=schema_version, configs=list(after.entries.values())))
    settings, notes = _settings(repo_id, local, remote, released, asked)
    card = render_card(
        manifests,
        after.schemas,
        here=repo_id,
        version=str(version),
        settings=settings,
        has_figures=True,
        labels=list(after.labels.values()),
    )
    files["README.md"] = card.encode()
    if settings.license == "unknown":
        notes.append("the card says license: unknown; give one with --license, as --license cc-by-4.0")
    return Contents(files, settings, notes)


def note_card(repo_id: str, local: Local, published: CardSettings) -> None:
    """Remember what the card says here and on the Hub, so that a later run can tell who edited it since."""
    here = _local_settings(local)
    texts = {_PUBLISHED: published.section or "", _HERE: here.section or ""}
    ours = _flat(here)
    noted = {
        path.removeprefix(_noted_path("")) for path in read_journal(local.root) if path.startswith(_noted_path(""))
    }
    texts |= {_noted_path(name): _text(ours.get(name, UNSET)) for name in sorted(noted | {*_flat(published), *ours})}
    entries = [
        Sent(repo=repo_id, branch="main", path=path, num_bytes=len(text), sha256=_sha256(text))
        for path, text in texts.items()
    ]
    write_journal(local.root, entries)


def _settings(
    repo_id: str, local: Local, remote: OnHub, released: OnHub | None, asked: dict[str, Any]
) -> tuple[CardSettings, list[str]]:
    """What the card is to say, and what its author should know.

    Of every entry of the head the value stays that the Hub has, unless it was edited here alone since this folder was
    last published there.
    """
    here, there, before = _local_settings(local), _remote_settings(remote), _remote_settings(released)
    ours, theirs, old, default = (_flat(one) for one in (here, there, before, CardSettings()))
    journal = read_journal(local.root)
    chosen: dict[str, Any] = {}
    notes: list[str] = []
    for name in {**default, **theirs, **ours}:
        mine, published, usual = (one.get(name, UNSET) for one in (ours, theirs, default))
        was_noted = any(entry.repo == repo_id for entry in journal.get(_noted_path(name), []))
        is_mine_new = was_noted and not is_last(journal, _noted_path(name), _sha256(_text(mine)), repo_id)
        is_edited_there = released is not None and published != old.get(name, UNSET)
        is_unsaid = published == usual and not was_noted
        chosen[name] = mine if not is_edited_there and (is_mine_new or is_unsaid) else published
        if name in asked:
            chosen[name] = asked[name]
        elif mine != chosen[name] and (is_mine_new or mine != usual):
            here_says = f"README.md here says {name.removeprefix('extra.')} {_said(mine)}"
            notes.append(f"{here_says}, the published card {_said(published)}, which stays")
    notes += _not_kept(local, here, remote, released)
    chosen["section"] = _section(repo_id, local, here.section, there.section)
    try:
        return msgspec.convert(_unflat(chosen), CardSettings), notes
    except msgspec.ValidationError as error:
        raise DatasetError(f"the card cannot say that: {error}") from error


def _not_kept(local: Local, here: CardSettings, remote: OnHub, released: OnHub | None) -> list[str]:
    """What of the cards, here and on the Hub, the new one will not say."""
    notes: list[str] = []
    theirs, old = (split_card(one.card)[0] if one and one.card else {} for one in (remote, released))
    edited = [key for key in MADE_KEYS if released is not None and theirs.get(key) != old.get(key)]
    if edited:
        notes.append(f"{', '.join(edited)} of the published card was edited there; tracekit writes it anew")
    if remote.card and re.match(r"---\s*\n(?:(?!---).*\n)*?#", remote.card):
        notes.append("the head of the published card holds comments, which are not kept")
    manifests = list(local.state.manifests.values())
    if local.card and split_card(local.card) != split_card(render_card(manifests, local.state.schemas, settings=here)):
        notes.append(
            "README.md here holds text that tracekit did not write, outside the part between the two comment markers; "
            "only that part is published"
        )
    return notes


def _local_settings(local: Local) -> CardSettings:
    return settings_of(local.card, list(local.state.manifests.values())) if local.card else CardSettings()


def _remote_settings(remote: OnHub | None) -> CardSettings:
    if remote is None or remote.card is None:
        return CardSettings()
    return settings_of(remote.card, list(remote.state.manifests.values()))


def _flat(settings: CardSettings) -> dict[str, Any]:
    """Settings as one dictionary, a name for everything that can be edited alone; without the section."""
    fields = msgspec.structs.asdict(settings)
    del fields["section"]
    nested = {name: fields.pop(name) for name in _NESTED}
    return fields | {f"{name}.{key}": value for name, values in nested.items() for key, value in values.items()}


def _unflat(flat: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {name: {} for name in _NESTED}
    for path, value in flat.items():
        name, dot, key = path.partition(".")
        if name in _NESTED and dot:
            fields[name] |= {} if value is UNSET else {key: value}
        else:
            fields[path] = value
    return fields


def _noted_path(name: str) -> str:
    return f"README.md#here#{name}"


def _text(value: Any) -> str:
    """A value of the head as text, the same for the same value."""
    return "" if value is UNSET else yaml.safe_dump(value)


def _said(value: Any) -> str:
    return "nothing" if value is UNSET else repr(value)


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
