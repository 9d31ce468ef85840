"""What a new version may be called, on hand-made states: no files, no Hub."""

import copy
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.tasks_for_tests import SCHEMAS
from tracekit.errors import VersionError
from tracekit.format.layout import Layout
from tracekit.format.manifest import Manifest, index_entry, read_struct, to_bytes
from tracekit.format.release import Change, State, Version, VersionStep, change_between, check_version
from tracekit.records import Record, RecordSchema

WHOLE = SCHEMAS["trivia_qa"]


@pytest.fixture(scope="module")
def manifest(finished: Path) -> Manifest:
    """The manifest of a real run with 3 shards."""
    return read_struct(Layout(finished, "trivia_qa").manifest, Manifest)


def schema(**fields: dict[str, Any]) -> RecordSchema:
    """Records with what every record has, and these fields."""
    document = copy.deepcopy(WHOLE.document)
    struct = document["$defs"]["TriviaQARecord"]
    kept = ("task", *Record.__struct_fields__)
    struct["properties"] = {name: one for name, one in struct["properties"].items() if name in kept} | fields
    return RecordSchema(document)


TEXT, NUMBER = {"type": "string"}, {"type": "integer"}


def state(*manifests: Manifest, schemas: dict[str, RecordSchema] | None = None) -> State:
    """A dataset of these configurations."""
    return State(
        {one.config: index_entry(one, to_bytes(one)) for one in manifests},
        {one.config: one for one in manifests},
        {one.config: schema(text=TEXT) for one in manifests} | (schemas or {}),
    )


def with_shards(manifest: Manifest, *hashes: str) -> Manifest:
    """The same configuration with shards of these hashes."""
    shards = [
        replace(manifest.shards[0], name=f"validation-{i:05d}", number=i, sha256=sha256)
        for i, sha256 in enumerate(hashes)
    ]
    return replace(manifest, shards=shards)


# ---------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("text", "expected"),
    [("v1.2.3", (1, 2, 3)), ("1.2.3", (1, 2, 3)), ("v0.0.0", (0, 0, 0)), ("v10.0.99", (10, 0, 99))],
)
def test_a_version_is_read_with_or_without_v_and_written_with_it(text: str, expected: tuple[int, int, int]):
    version = Version.parse(text)
    assert tuple(version) == expected
    assert str(version) == "v" + text.removeprefix("v")


@pytest.mark.parametrize(
    "text",
    ["", "v1", "v1.0", "1.0.0.0", "v01.0.0", "V1.0.0", "v1.0.0-rc1", "v1.0.0\n", " v1.0.0", "v-1.0.0", "v1.0.٣"],
)
def test_anything_else_is_no_version(text: str):
    with pytest.raises(VersionError) as caught:
        Version.parse(text)
    assert str(caught.value) == f"--version {text!r} is no semantic version; expected one like v1.0.0"


def test_versions_are_ordered_by_number_and_not_by_letter():
    assert Version.parse("v1.10.0") > Version.parse("v1.9.9") > Version.parse("v1.9.0") > Version.parse("v0.99.99")


def test_the_latest_version_leaves_out_tags_that_are_none():
    assert Version.latest([]) is None
    assert Version.latest(["main", "v1", "2.0.0", "v1.0.0-rc1", "verified"]) is None
    assert Version.latest(["v1.9.0", "v1.10.0", "v2", "3.0.0", "v1.2.0"]) == Version(1, 10, 0)


@pytest.mark.parametrize(
    ("before", "step", "expected"),
    [
        ("v1.2.3", VersionStep.NONE, "v1.2.4"),
        ("v1.2.3", VersionStep.PATCH, "v1.2.4"),
        ("v1.2.3", VersionStep.MINOR, "v1.3.0"),
        ("v1.2.3", VersionStep.MAJOR, "v2.0.0"),
        ("v0.2.3", VersionStep.PATCH, "v0.2.4"),
        ("v0.2.3", VersionStep.MINOR, "v0.3.0"),
        ("v0.2.3", VersionStep.MAJOR, "v0.3.0"),
    ],
)
def test_the_next_version(before: str, step: VersionStep, expected: str):
    assert str(Version.parse(before).after(step)) == expected


# ---------------------------------------------------------------- what changed


def test_the_same_state_is_no_change(manifest: Manifest):
    assert change_between(state(manifest), state(manifest)) == Change(VersionStep.NONE, [])


def test_words_are_a_patch(manifest: Manifest):
    changed = replace(manifest, invariants=[*manifest.invariants, "and another"])
    assert change_between(state(manifest), state(changed)) == Change(
        VersionStep.PATCH, ["what is said about trivia_qa changed, no shard did"]
    )


def test_a_first_state_is_a_new_configuration(manifest: Manifest):
    assert change_between(state(), state(manifest)) == Change(VersionStep.MINOR, ["configuration trivia_qa is new"])


def test_added_shards_are_minor(manifest: Manifest):
    before, after = with_shards(manifest, "a", "b"), with_shards(manifest, "a", "b", "c", "d")
    assert change_between(state(before), state(after)) == Change(VersionStep.MINOR, ["2 shards of trivia_qa are new"])


@pytest.mark.parametrize(
    ("hashes", "expected"),
    [
        (("a", "x"), "1 published shards of trivia_qa changed or went, validation-00001 first"),
        (("a",), "1 published shards of trivia_qa changed or went, validation-00001 first"),
        (("b", "a"), "2 published shards of trivia_qa changed or went, validation-00000 first"),
        (("x", "b", "c"), "1 published shards of trivia_qa changed or went, validation-00000 first"),
    ],
    ids=["changed", "gone", "in another order", "changed and added"],
)
def test_changed_shards_are_major(manifest: Manifest, hashes: tuple[str, ...], expected: str):
    before, after = with_shards(manifest, "a", "b"), with_shards(manifest, *hashes)
    assert change_between(state(before), state(after)) == Change(VersionStep.MAJOR, [expected])


def test_a_configuration_that_went_is_major_and_comes_first(manifest: Manifest):
    other = replace(manifest, config="other")
    assert change_between(state(manifest), state(other)) == Change(
        VersionStep.MAJOR, ["configuration trivia_qa is gone", "configuration other is new"]
    )


def test_another_task_or_contract_is_major(manifest: Manifest):
    for changed in (replace(manifest, task="hotpot"), replace(manifest, schema_version="99.0")):
        assert change_between(state(manifest), state(changed)) == Change(
            VersionStep.MAJOR, ["records of trivia_qa have another schema"]
        )


@pytest.mark.parametrize(
    ("fields", "step", "reason"),
    [
        ({"text": TEXT, "extra": NUMBER}, VersionStep.MINOR, "record.extra of trivia_qa is new"),
        ({}, VersionStep.MAJOR, "record.text of trivia_qa changed or went"),
        ({"text": NUMBER}, VersionStep.MAJOR, "record.text of trivia_qa changed or went"),
        ({"text": NUMBER, "extra": TEXT}, VersionStep.MAJOR, "record.text of trivia_qa changed or went"),
        ({"text": {"type": "string", "description": "other words"}}, VersionStep.PATCH, None),
    ],
    ids=["added", "gone", "another type", "both", "described otherwise"],
)
def test_record_fields(manifest: Manifest, fields: dict[str, Any], step: VersionStep, reason: str | None):
    changed = replace(manifest, invariants=[])
    after = state(changed, schemas={"trivia_qa": schema(**fields)})
    words = "what is said about trivia_qa changed, no shard did"
    assert change_between(state(manifest), after) == Change(step, [reason, words] if reason else [words])


def test_fields_of_the_real_record_are_seen(manifest: Manifest):
    document = copy.deepcopy(WHOLE.document)
    del document["$defs"]["TriviaQARecord"]["properties"]["question"]
    less = {"trivia_qa": RecordSchema(document)}
    old, new = state(manifest, schemas=less), state(manifest, schemas={"trivia_qa": WHOLE})
    changed = replace(manifest, invariants=[])
    new = new._replace(manifests={"trivia_qa": changed})
    assert change_between(old, new).step == VersionStep.MINOR
    back = old._replace(manifests={"trivia_qa": changed})
    assert "record.question" in change_between(state(manifest, schemas={"trivia_qa": WHOLE}), back).reasons[0]


def test_the_largest_change_counts_and_stands_first(manifest: Manifest):
    second = replace(manifest, config="second")
    before = state(with_shards(manifest, "a", "b"), second)
    after = state(with_shards(manifest, "a", "x"), replace(second, invariants=[]), replace(manifest, config="third"))
    change = change_between(before, after)
    assert change.step == VersionStep.MAJOR
    assert [reason.split(" ")[0] for reason in change.reasons] == ["1", "configuration", "what"]


# ---------------------------------------------------------------- which version may follow


def test_the_first_version_is_free():
    check_version(Version(0, 0, 1), [], Change(VersionStep.MINOR, ["configuration a is new"]))
    check_version(Version(7, 1, 2), ["draft"], Change(VersionStep.MAJOR, []))


@pytest.mark.parametrize(
    ("version", "step"),
    [
        ("v1.2.1", VersionStep.PATCH),
        ("v1.2.1", VersionStep.NONE),
        ("v1.3.0", VersionStep.MINOR),
        ("v2.0.0", VersionStep.MAJOR),
        ("v3.0.0", VersionStep.PATCH),
        ("v1.4.0", VersionStep.MINOR),
        ("v2.5.1", VersionStep.MAJOR),
    ],
)
def test_a_large_enough_step_is_let_pass(version: str, step: VersionStep):
    check_version(Version.parse(version), ["v1.0.0", "v1.2.0"], Change(step, ["why"]))


@pytest.mark.parametrize(
    ("version", "step", "expected"),
    [
        (
            "v1.2.0",
            VersionStep.MINOR,
            "v1.2.0 is not higher than the latest version v1.2.0; the next free one for this ",
        ),
        (
            "v1.1.5",
            VersionStep.MAJOR,
            "v1.1.5 is not higher than the latest version v1.2.0; the next free one for this ",
        ),
        (
            "v1.2.1",
            VersionStep.MINOR,
            "v1.2.1 is too small a step from v1.2.0: this is a minor change (why; and why). The ",
        ),
        (
            "v1.3.0",
            VersionStep.MAJOR,
            "v1.3.0 is too small a step from v1.2.0: this is a major change (why; and why). The ",
        ),
    ],
)
def test_a_refusal_names_the_next_free_version(version: str, step: VersionStep, expected: str):
    with pytest.raises(VersionError) as caught:
        check_version(Version.parse(version), ["v1.2.0", "v1.0.0"], Change(step, ["why", "and why"]))
    assert str(caught.value).startswith(expected)
    assert str(Version(1, 2, 0).after(step)) in str(caught.value)
    assert "why; and why" in str(caught.value)


def test_below_one_a_minor_step_may_break():
    check_version(Version(0, 3, 0), ["v0.2.0"], Change(VersionStep.MAJOR, ["why"]))
    with pytest.raises(VersionError, match=r"next free version is v0\.3\.0"):
        check_version(Version(0, 2, 1), ["v0.2.0"], Change(VersionStep.MAJOR, ["why"]))


def test_a_refusal_without_reasons_has_no_empty_brackets():
    with pytest.raises(VersionError) as caught:
        check_version(Version(1, 0, 0), ["v1.0.0"], Change(VersionStep.NONE, []))
    assert str(caught.value).endswith("the next free one for this content is v1.0.1")
