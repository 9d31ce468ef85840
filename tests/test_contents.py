"""What a card says after it was edited here, on the Hub, or on both sides: every kind of entry, every editor."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tracekit.card.readme import render_card, split_card
from tracekit.format.release import State
from tracekit.publish.contents import _settings, note_card
from tracekit.publish.snapshot import Local, OnHub, read_local

REPO = "owner/name"
VALUES: dict[str, tuple[Any, Any]] = {
    "license": ("mit", ["apache-2.0", "cc-by-4.0"]),
    "language": (["de"], ...),
    "pretty_name": ("Ours: 'quoted' # no comment", "Mu\u00dfe \u2013 \u984c"),
    "tags": (["tracekit", "probing", "x: y"], ["no", "1.0"]),
    "task_categories": (["question-answering", "text-generation"], ...),
    "base_model": (["a/b"], ["c/d", "e/f"]),
    "extra_gated_fields": ({"I agree": {"type": "checkbox", "n": [1, None, 0.5]}}, {"D\u00e1tum": "2024-01-01"}),
    "annotations_creators": (["no-annotation"], []),
    "arxiv": ("2601.00001", ...),
    "nothing_said": (None, "~"),
}


class Sides:
    """A folder and a repository with a card each, released again and again."""

    def __init__(self, folder: Path, journal_folder: Path) -> None:
        local = read_local(folder)
        self.state: State = local.state
        made = render_card([*local.state.manifests.values()], local.state.schemas)
        self.local = local._replace(root=journal_folder, card=made)
        self.remote = self.released = OnHub("", {}, local.state, made)

    def release(self) -> tuple[dict[str, Any], list[str]]:
        settings, notes = _settings(REPO, self.local, self.remote, self.released, {})
        note_card(REPO, self.local, settings)
        card = render_card([*self.state.manifests.values()], self.state.schemas, settings=settings)
        self.remote = self.released = self.remote._replace(card=card)
        return split_card(card)[0], notes

    def edit(self, side: str, values: dict[str, Any]) -> None:
        one: Local | OnHub = getattr(self, side)
        assert one.card is not None
        head, body = split_card(one.card)
        head = {key: value for key, value in (head | values).items() if value is not ...}
        card = f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---{body}"
        setattr(self, side, one._replace(card=card))


@pytest.fixture
def sides(finished: Path, tmp_path: Path) -> Sides:
    made = Sides(finished, tmp_path)
    made.release()
    return made


def expected(key: str, value: Any, usual: Any) -> Any:
    """What a card says once a person wrote this; an empty list of a key that tracekit writes is no line of the head."""
    return usual if value is ... and key in ("license", "pretty_name") else value


@pytest.mark.parametrize("editor", ["remote", "local"])
def test_an_edit_stays_whoever_made_it(sides: Sides, editor: str):
    usual = sides.release()[0]
    kinds: list[dict[str, Any]] = [
        {key: one for key, (one, _) in VALUES.items()},
        {key: two for key, (_, two) in VALUES.items()},
        {key: one for key, (one, _) in VALUES.items()},
        {key: usual.get(key, ...) for key in VALUES},
    ]
    for values in kinds:
        sides.edit(editor, values)
        for _ in range(2):
            head, _ = sides.release()
            assert {key: head.get(key, ...) for key in VALUES} == {
                key: expected(key, value, usual.get(key, ...)) for key, value in values.items()
            }


def test_an_edit_on_both_sides_keeps_the_hubs_and_says_so(sides: Sides):
    theirs = {key: ["other"] if isinstance(one, list) else "other" for key, (one, _) in VALUES.items()}
    sides.edit("local", {key: one for key, (one, _) in VALUES.items()})
    sides.edit("remote", theirs)
    head, notes = sides.release()
    assert {key: head[key] for key in VALUES} == theirs
    assert [key for key in VALUES if not any(key in note for note in notes)] == []
    assert {key: value for key, value in sides.release()[0].items() if key in VALUES} == theirs


def test_what_follows_from_the_manifests_alone_is_written_anew_and_that_is_said(sides: Sides):
    keys = ("size_categories", "configs", "dataset_info")
    usual = sides.release()[0]
    sides.edit("remote", {key: ["other"] for key in keys})
    head, notes = sides.release()
    assert [head[key] for key in keys] == [usual[key] for key in keys]
    assert "size_categories, configs, dataset_info of the published card" in " ".join(notes)


def test_a_flag_wins(sides: Sides):
    sides.edit("remote", {"license": "mit"})
    settings, _ = _settings(REPO, sides.local, sides.remote, sides.released, {"license": "cc0-1.0"})
    assert settings.license == "cc0-1.0"
