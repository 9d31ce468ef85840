"""Datasets of other versions and tasks: what a reader does not know is passed over, what is missing is filled in, and
nothing continues what it does not know. Each is made of a finished run by the library's own writer."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest

from builders.trivia_qa.record import TriviaQARecord
from tests.hub_for_tests import TestHub
from tests.publishing_for_tests import tell
from tests.runs_for_tests import hashes, run_trivia
from tests.test_evaluation import judge_by
from tracekit import TraceStore, load_dataset, verify
from tracekit.analysis.diff import diff
from tracekit.analysis.stats import stats
from tracekit.cli import main
from tracekit.errors import DatasetError, PlanMismatchError
from tracekit.format.layout import Layout, write_atomic
from tracekit.format.manifest import (
    Manifest,
    Sidecar,
    index_entry,
    read_plan,
    read_struct,
    sidecar_checksum,
    to_bytes,
)
from tracekit.format.shards import ShardWriter, iter_samples, read_sample, sha256_file
from tracekit.records import GenerationSettings, ModelInfo, Record, RecordSchema, Span, encode_record
from tracekit.run.finish import finish
from tracekit.run.merge import merge
from tracekit.task import record_type_of
from tracekit.tensors import TensorSpec, decode, encode

LATER = {"later_field": [{"a": 1}, None]}
MAPS = ("run", "versions", "made_from", "settings", "definitions")
"""Fields of stored files that are maps: an entry is no field."""


class LaterModel(ModelInfo, frozen=True, kw_only=True):
    """A model of which more is known."""

    maker: str = "someone"


class LaterSpan(Span, frozen=True, kw_only=True):
    """A span of which more is known."""

    weight: float | None = None


class LaterSpec(TensorSpec, frozen=True, kw_only=True):
    """A tensor of which more is known."""

    codec: str = "plain"


class LaterGeneration(GenerationSettings, frozen=True, kw_only=True):
    """More settings."""

    min_p: float = 0.0


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """A new Struct."""

    text: str


class GrownRecord(TriviaQARecord, frozen=True, kw_only=True, tag="trivia_qa"):
    """The record of a later version: a field more in every Struct."""

    model: LaterModel  # pyright: ignore[reportGeneralTypeIssues]
    spans: list[LaterSpan]  # pyright: ignore[reportIncompatibleVariableOverride]
    tensors: list[LaterSpec]  # pyright: ignore[reportIncompatibleVariableOverride]
    generation: LaterGeneration  # pyright: ignore[reportGeneralTypeIssues]
    mood: str = "calm"
    """A new field."""
    note: Note = Note(text="new")
    """A new one with a Struct of its own."""


class ElsewhereRecord(TriviaQARecord, frozen=True, kw_only=True, tag="elsewhere"):
    """The record of a task that is not installed."""

    mood: str = "calm"
    """A field of its own."""


def without(record_type: type[Record], *names: str) -> type[Record]:
    """The record type before these fields were added."""
    document = json.loads(json.dumps(RecordSchema.of(record_type).document))
    for name in names:
        del document["$defs"][record_type.__name__]["properties"][name]
    return RecordSchema(document).record_type


def later(value: Any) -> Any:
    """Plain values of a stored file with an unknown field in every object."""
    if isinstance(value, list):
        return [later(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {name: one if name in MAPS else later(one) for name, one in value.items()} | LATER


def edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrite a JSON file; a sidecar keeps a right checksum."""
    content = change(json.loads(path.read_bytes()))
    data = msgspec.json.encode(content)
    if "checksum" in content:
        data = msgspec.json.encode(content | {"checksum": sidecar_checksum(data)})
    path.write_bytes(data)


def remade(
    source: Path, target: Path, record_type: type[Record], version: str = "2.0", *, is_later: bool = False
) -> Path:
    """The dataset as a tracekit with another record would have written it; `is_later`: with unknown fields in its files
    too."""
    old, layout = Layout(source, "trivia_qa"), Layout(target, "trivia_qa")
    task = str(record_type.__struct_config__.tag)
    plan = msgspec.structs.replace(read_plan(old), task=task, schema_version=version)
    write_atomic(layout.plan, to_bytes(plan))
    for shard in plan.shards:
        layout.sidecar(shard.name).parent.mkdir(parents=True, exist_ok=True)
        verification = read_struct(old.sidecar(shard.name), Sidecar).verification
        with ShardWriter(layout, shard.name, shard.number) as writer, old.shard(shard.name).open("rb") as file:
            for sample in iter_samples(file, where=shard.name):
                raw, payload = read_sample(file, sample)
                fields = json.loads(raw) | {"task": task, "schema_version": version}
                record = msgspec.convert(fields, record_type)
                writer.append([(sample.key, encode_record(record), encode(decode(payload)))], verification)
            writer.finish()
        if is_later:
            edit(layout.sidecar(shard.name), lambda one: later(one | {"records": []}) | {"records": one["records"]})
    if is_later:
        edit(layout.plan, later)
    write_atomic(layout.schema, RecordSchema.of(record_type).to_bytes())
    finish(layout, plan, None)
    if is_later:
        edit(layout.manifest, later)
        entry = index_entry(read_struct(layout.manifest, Manifest), layout.manifest.read_bytes())
        edit(target / "manifest.json", lambda one: later(one | {"configs": [msgspec.to_builtins(entry)]}))
    return target


class Other(NamedTuple):
    """A dataset that the installed task did not write."""

    folder: Path
    task: str
    mood: str | None
    """What its records have in the field `mood`, which is unknown here; None without it."""


@pytest.fixture(scope="module")
def others(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Other]:
    """Datasets of a later version, of an earlier one, and of a task that is not installed. Not to be changed."""
    out = tmp_path_factory.mktemp("others")
    earlier = without(TriviaQARecord, "beam_score", "samples")
    return {
        "later": Other(remade(finished, out / "later", GrownRecord, "2.2", is_later=True), "trivia_qa", "calm"),
        "earlier": Other(remade(finished, out / "earlier", earlier), "trivia_qa", None),
        "elsewhere": Other(remade(finished, out / "elsewhere", ElsewhereRecord), "elsewhere", "calm"),
    }


@pytest.fixture(params=["later", "earlier", "elsewhere"])
def other(request: pytest.FixtureRequest, others: dict[str, Other]) -> Other:
    """One of them after the other."""
    return others[request.param]


@pytest.fixture(scope="module")
def grown(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose records alone have more fields. Not to be changed."""
    return remade(finished, tmp_path_factory.mktemp("more") / "grown", GrownRecord)


@pytest.fixture
def begun(finished: Path, tmp_path: Path) -> Path:
    """A run of which the last shard is not made."""
    folder = Path(shutil.copytree(finished, tmp_path / "begun"))
    for path in ("manifests/trivia_qa.json", "manifest.json", "README.md", "load_traces.py"):
        (folder / path).unlink()
    shutil.rmtree(folder / "records")
    for path in ("sidecars/trivia_qa/validation-00002.json", "data/trivia_qa/validation-00002.tar"):
        (folder / path).unlink()
    return folder


# ---------------------------------------------------------------- both directions


def test_it_is_read(other: Other, finished: Path):
    with TraceStore(other.folder, check=True) as store, TraceStore(finished) as right:
        assert store.keys == right.keys
        for sample, expected in zip(store, right, strict=True):
            record = sample.record
            assert record.task_name() == other.task
            for name in TriviaQARecord.__struct_fields__:
                if name not in ("schema_version", "model", "spans", "tensors", "generation", "samples"):
                    assert getattr(record, name) == getattr(expected.record, name), name
            assert getattr(record, "samples", []) == []
            assert record.model.id == expected.record.model.id
            np.testing.assert_array_equal(sample.hidden_states(), expected.hidden_states())
            np.testing.assert_array_equal(sample.attention(layer=1), expected.attention(layer=1))
        assert ("mood" in store.schema.names) == (other.mood is not None)
        if other.mood is not None:
            assert set(store.columns(["mood"])["mood"].to_pylist()) == {other.mood}
        assert store.about.outcome == right.about.outcome
        assert store.stack("hidden_states", layer=1).values.shape == right.stack("hidden_states", layer=1).values.shape


def test_a_field_of_a_task_that_is_not_installed_is_an_attribute(other: Other):
    with TraceStore(other.folder) as store:
        record = store[0].record
    assert getattr(record, "mood", None) == (other.mood if other.task == "elsewhere" else None)


def test_structs_without_a_field_that_the_installed_task_needs_are_read_by_the_schema(
    capsys: pytest.CaptureFixture[str],
):
    document = json.loads(json.dumps(RecordSchema.of(TriviaQARecord).document))
    assert record_type_of("trivia_qa", RecordSchema(document)) is TriviaQARecord
    fields = document["$defs"]["SampledAnswer"]
    removed = fields["required"][0]
    del fields["properties"][removed]
    assert record_type_of("trivia_qa", RecordSchema(document)) is not TriviaQARecord
    assert "another field 'samples'" in capsys.readouterr().err


def test_without_shards_records_come_from_the_table(other: Other, finished: Path, tmp_path: Path):
    folder = Path(shutil.copytree(other.folder, tmp_path / "copy"))
    shutil.rmtree(folder / "data")
    with TraceStore(folder) as store, TraceStore(finished) as right:
        for key in store.keys:
            assert store.record(key).token_ids == right.record(key).token_ids
            assert getattr(store.record(key), "samples", []) == []


def test_it_is_right(other: Other):
    before = hashes(other.folder)
    assert verify(other.folder).problems == []
    assert hashes(other.folder) == before


def test_it_is_shown(other: Other, capsys: pytest.CaptureFixture[str]):
    for flags in ((), ("--examples", "2"), ("--stats",), ("--json",)):
        assert main(["show", str(other.folder), *flags]) == 0
    said = capsys.readouterr()
    assert other.task in said.out
    assert "accuracy" in said.out
    assert "Traceback" not in said.err


def test_its_numbers_are_those_of_the_run(other: Other, finished: Path):
    (found,), (expected,) = stats(str(other.folder)), stats(str(finished))
    for name in ("num_samples", "num_judged", "accuracy", "means", "prompt_tokens"):
        assert getattr(found, name) == getattr(expected, name), name


def test_it_is_compared(other: Other, finished: Path):
    (found,) = diff(str(other.folder), str(other.folder if other.task == "elsewhere" else finished)).configs
    assert found.num_common == found.num_judged_both == 12
    assert found.answers is not None
    assert found.answers.num_changed == 0
    assert found.activations


@pytest.mark.parametrize("is_streaming", [False, True])
def test_it_is_loaded(other: Other, finished: Path, is_streaming: bool):
    rows = list(load_dataset(other.folder, split="validation", streaming=is_streaming))
    with TraceStore(finished) as right:
        assert {row["key"] for row in rows} == {*right.keys}  # type: ignore[index]
        for row in rows:
            sample = right[row["key"]]  # type: ignore[index]
            assert row["question"] == sample.record.question  # type: ignore[index]
            assert row.get("mood") == other.mood  # type: ignore[union-attr]
            np.testing.assert_array_equal(row["hidden_states"], sample.hidden_states())  # type: ignore[index]


def test_they_are_published(others: dict[str, Other], xet_hub: TestHub):
    folders = [one.folder for one in others.values()]
    lines = [["publish", one, f"tester/{one.name}", "--version", "v1.0.0", "--dry-run"] for one in folders]
    for done in tell(xet_hub, *lines):
        assert done.code == 0, done.err
        assert "would release   v1.0.0 (nothing was sent)" in done.out


def test_folders_of_two_versions_are_read_as_one(grown: Path, finished: Path, tmp_path: Path, model: Path):
    run_trivia(tmp_path / "more", model, source={"offset": 12, "limit": 2})
    for folders in ([grown, tmp_path / "more"], [tmp_path / "more", grown]):
        with TraceStore(folders) as store:
            assert len(store) == 14
            assert Counter(store.records["mood"].to_pylist()) == {"calm": 12, None: 2}
            assert len(store.columns(["question", "samples"])) == 14
            assert {type(sample.record) for sample in store} == {TriviaQARecord}


def test_label_sets_of_a_later_version_are_read_and_not_continued(finished: Path, tmp_path: Path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    assert judge_by(folder) == 0
    (labels,), (summary,) = folder.glob("labels/*/*.jsonl"), folder.glob("labels/*/*.json")
    lines = [msgspec.json.encode(later(json.loads(line))) for line in labels.read_bytes().splitlines()]
    labels.write_bytes(b"".join(line + b"\n" for line in lines))
    edit(summary, lambda one: later(one | {"labels_sha256": sha256_file(labels)}))
    assert verify(folder).problems == []
    with TraceStore(folder) as store:
        assert None not in store.labels()["verdict"].to_pylist()
    before = hashes(folder)
    with pytest.raises(DatasetError, match=r"line 1: .*`\$\.later_field`.*pip install -U"):
        judge_by(folder)
    assert hashes(folder) == before


# ---------------------------------------------------------------- nothing continues what it does not know


@pytest.mark.parametrize("where", ["$", "$.source", "$.model", "$.shards[1]", "$.about.outcome"])
def test_a_plan_with_an_unknown_field_is_read_and_not_resumed(begun: Path, model: Path, where: str):
    def change(plan: dict[str, Any]) -> dict[str, Any]:
        inner = {"$": plan, "$.shards[1]": plan["shards"][1], "$.about.outcome": plan["about"]["outcome"]}
        inner |= {"$.source": plan["source"], "$.model": plan["model"]}
        inner[where]["later"] = 1
        return plan

    edit(begun / "plans/trivia_qa.json", change)
    before = hashes(begun)
    for limit in (12, 14):  # resume, growth
        with pytest.raises(DatasetError) as caught:
            run_trivia(begun, model, source={"limit": limit})
        assert f"plans/trivia_qa.json: a later tracekit wrote the field `{where}.later`" in str(caught.value)
        assert "pip install -U" in str(caught.value)
    with pytest.raises(DatasetError, match="later"):
        judge_by(begun)
    assert hashes(begun) == before
    assert verify(begun).problems == []
    with TraceStore(begun) as store:
        assert (len(store), store.is_open) == (10, True)


def test_a_growth_with_an_unknown_field_is_not_continued(finished: Path, model: Path, tmp_path: Path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    plan = json.loads((folder / "plans/trivia_qa.json").read_bytes())
    (folder / "plans/trivia_qa.growth.partial").write_text(json.dumps(plan | {"later": 1}))
    before = hashes(folder)
    for limit in (12, 14):
        with pytest.raises(DatasetError, match=r"growth\.partial: .*`\$\.later`"):
            run_trivia(folder, model, source={"limit": limit})
    with pytest.raises(DatasetError, match=r"growth\.partial: .*`\$\.later`"):
        judge_by(folder)
    assert hashes(folder) == before
    assert verify(folder).problems == []
    assert len(TraceStore(folder)) == 12


@pytest.mark.parametrize("where", ["$", "$.verification"])
def test_a_journal_with_an_unknown_field_is_not_continued(finished: Path, tmp_path: Path, where: str):
    layout, old = Layout(tmp_path, "trivia_qa"), Layout(finished, "trivia_qa")
    verification = read_struct(old.sidecar("validation-00000"), Sidecar).verification
    with ShardWriter(layout, "validation-00000", 0) as writer, old.shard("validation-00000").open("rb") as file:
        for sample in iter_samples(file, where="here"):
            raw, payload = read_sample(file, sample)
            writer.append([(sample.key, raw, encode(decode(payload)))], verification)
    lines = [json.loads(line) for line in layout.journal("validation-00000").read_bytes().splitlines()]
    (lines[1] if where == "$" else lines[1]["verification"])["later"] = 1
    layout.journal("validation-00000").write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = hashes(tmp_path)
    with pytest.raises(DatasetError) as caught, ShardWriter(layout, "validation-00000", 0):
        pass
    assert f"`{where}.later`" in str(caught.value)
    assert "pip install -U" in str(caught.value)
    assert hashes(tmp_path) == before


def test_what_merging_would_lose_is_refused_by_name(finished: Path, grown: Path, tmp_path: Path):
    with pytest.raises(PlanMismatchError, match=r"`record\.generation\.min_p`.*upgrade the package"):
        merge([grown], tmp_path / "merged")
    for path in ("plans/trivia_qa.json", "sidecars/trivia_qa/validation-00001.json"):
        folder = Path(shutil.copytree(finished, tmp_path / Path(path).stem))
        edit(folder / path, lambda one: one | {"later": 1})
        with pytest.raises(DatasetError, match=rf"{path}: .*`\$\.later`.*pip install -U"):
            merge([folder], tmp_path / f"merged {folder.name}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plan: plan | {"schema_version": "2.7"}, ": a later .* schema 2.7, and this one has 2.1"),
        (lambda plan: plan | {"run": plan["run"] | {"later": 1}}, r" \(`run`\): a later .*`\$\.later`"),
        (
            lambda plan: plan | {"run": plan["run"] | {"generation": plan["run"]["generation"] | {"later": 1}}},
            r" \(`run`\): a later .*`\$\.generation\.later`",
        ),
    ],
    ids=["schema", "setting", "inner setting"],
)
def test_a_run_of_a_later_version_is_neither_merged_nor_judged(
    finished: Path, tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], said: str
):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    edit(folder / "plans/trivia_qa.json", change)
    before = hashes(folder)
    for do in (lambda: merge([folder], tmp_path / "merged"), lambda: judge_by(folder)):
        with pytest.raises(DatasetError, match=rf"plans/trivia_qa.json{said}.*pip install"):
            do()
    assert hashes(folder) == before


def test_a_manifest_with_an_unknown_field_does_not_grow(finished: Path, model: Path, tmp_path: Path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    edit(folder / "manifests/trivia_qa.json", lambda one: one | {"later": 1})
    before = hashes(folder)
    with pytest.raises(DatasetError, match=r"manifests/trivia_qa.json: a later .*`\$\.later`.*pip install -U"):
        run_trivia(folder, model, source={"limit": 14})
    assert hashes(folder) == before


def test_merging_an_earlier_version_fills_in_what_is_missing(others: dict[str, Other], tmp_path: Path):
    merge([others["earlier"].folder], tmp_path / "merged")
    assert verify(tmp_path / "merged").problems == []
    with TraceStore(tmp_path / "merged") as store:
        assert store.columns(["samples"])["samples"].to_pylist() == [[]] * 12


@pytest.mark.parametrize("record_type", [GrownRecord, without(TriviaQARecord, "samples")])
def test_a_run_is_not_continued_with_other_records(begun: Path, model: Path, record_type: type[Record]):
    (begun / "schemas/trivia_qa.json").write_bytes(RecordSchema.of(record_type).to_bytes())
    with pytest.raises(
        PlanMismatchError,
        match=r"record\.(mood: 'string' there|samples: '\(absent\)' there).*(?s:.*)version of the task",
    ):
        run_trivia(begun, model)


# ---------------------------------------------------------------- other versions


@pytest.mark.parametrize("version", ["3.0", "0.9", "17.2"])
def test_another_major_version_is_refused(finished: Path, model: Path, tmp_path: Path, version: str):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    for path in ("plans/trivia_qa.json", "manifests/trivia_qa.json", "manifest.json"):
        edit(folder / path, lambda one: one | {"schema_version": version})
    for look in (
        TraceStore,
        load_dataset,
        lambda one: merge([one], tmp_path / "merged"),
        lambda one: run_trivia(one, model),
    ):
        with pytest.raises(DatasetError, match=rf"schema {version}; this one reads 1\.0 to 2\.x"):
            look(folder)
    assert any(f"schema {version}" in problem for problem in verify(folder).problems)


def test_an_earlier_version_is_read_and_not_continued(finished: Path, model: Path, tmp_path: Path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    edit(folder / "plans/trivia_qa.json", lambda one: one | {"schema_version": "1.1"})
    with pytest.raises(PlanMismatchError, match="use the tracekit that began it"):
        run_trivia(folder, model)


# ---------------------------------------------------------------- a task that is not installed


def test_a_task_that_is_not_installed_is_named_where_its_code_is_needed(
    others: dict[str, Other], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = others["elsewhere"].folder
    with pytest.raises(PlanMismatchError, match="task: 'elsewhere' there"):
        run_trivia(folder, model)
    with pytest.raises(DatasetError, match="merging needs the code of the task 'elsewhere', which is not installed"):
        merge([folder], tmp_path / "merged")
    assert main(["verify", str(folder), "--replay", "1", "--model", str(model)]) == 1
    said = capsys.readouterr()
    assert "--replay needs the code of the task 'elsewhere', which is not installed" in said.err
    assert "ok:" not in said.out


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("asked", "nothing", r"'nothing' \(asked\), which is no field"),
        ("correct", "model", r"'model' \(correct\), which is of another type than boolean"),
        ("options", "seed", r"'seed' \(options\), which is of another type than list of {label, text}"),
        ("answer", "model.id", r"'model.id' \(answer\), which is no field"),
    ],
)
def test_an_outcome_that_is_not_of_the_records_is_refused_with_its_field(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, value: str, said: str
):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    path = folder / "manifests/trivia_qa.json"
    manifest = json.loads(path.read_bytes())
    manifest["about"]["outcome"][field] = value
    path.write_text(json.dumps(manifest))
    with TraceStore(folder) as store:
        assert store[0].record.task_name() == "trivia_qa"
    for command in (["show"], ["show", "--stats"], ["diff", str(folder)]):
        assert main([command[0], str(folder), *command[1:]]) == 1
        assert re.search(said, capsys.readouterr().err)


# ---------------------------------------------------------------- verification by the dataset's own schema


def test_verification_goes_by_the_schema_of_the_dataset(finished: Path, tmp_path: Path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    schema = folder / "schemas/trivia_qa.json"
    right = json.loads(schema.read_bytes())
    fields = right["$defs"]["TriviaQARecord"]["properties"]

    def said(changed: dict[str, Any]) -> str:
        names = {name: one for name, one in {**fields, **changed}.items() if one is not None}
        document = {
            **right,
            "$defs": right["$defs"] | {"TriviaQARecord": right["$defs"]["TriviaQARecord"] | {"properties": names}},
        }
        schema.write_text(json.dumps(document))
        return "\n".join(verify(folder).problems)

    assert "question" not in said({"question": fields["question"] | {"description": "Another text."}})
    assert "missing required field `mood`" in said({"mood": {"type": "string", "default": "calm"}})
    assert "unknown field `samples`" in said({"samples": None})
    assert "`$.question`" in said({"question": {"type": "integer"}})


# ---------------------------------------------------------------- schemas from strangers


def document(**fields: Any) -> dict[str, Any]:
    """The schema of a task with these fields more."""
    base = json.loads(json.dumps(RecordSchema.of(TriviaQARecord).document))
    base["$defs"]["TriviaQARecord"]["properties"] |= fields
    return base


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        inner = {"type": "array", "items": inner}
    return inner


def struct(**fields: Any) -> dict[str, Any]:
    return {"type": "object", "title": "Inner", "properties": fields, "required": list(fields)}


REFUSED = {
    "underscore": (document(_shard={"type": "string"}), "'_shard'"),
    "nested underscore": (document(inner=struct(_x={"type": "string"})), r"'_x'.* at `\$\.inner`"),
    "no identifier": (document(**{"a-b": {"type": "string"}}), "'a-b'"),
    "keyword": (document(**{"class": {"type": "string"}}), "'class'"),
    "not ascii": (document(**{"größe": {"type": "string"}}), "größe"),
    "method": (document(task_name={"type": "string"}), "'task_name'"),
    "title": (document(inner={**struct(), "title": "os.system"}), "'os.system'"),
    "keyword of JSON Schema": (document(inner={"type": "string", "pattern": "(a+)+b"}), r"'pattern'.* at `\$\.inner`"),
    "two types": (document(inner={"anyOf": [{"type": "string"}, {"type": "integer"}]}), r"at `\$\.inner`"),
    "map": (document(inner={"type": "object", "additionalProperties": {"type": "string"}}), r"at `\$\.inner`"),
    "map with a docstring": (
        document(inner={"type": "object", "additionalProperties": True, "description": "Inner."}),
        "type 'object' with additionalProperties, which no table",
    ),
    "no type": (document(inner=7), r"at `\$\.inner`"),
    "deep": (document(inner=nested(300)), "inside one another"),
    "elsewhere": (document(inner={"$ref": "http://example.com/#/$defs/A"}), "refers to nothing"),
    "default": (document(inner={"type": "integer", "default": "x"}), r"default 'x'.* at `\$\.inner`"),
    "large default": (document(inner={"type": "integer", "default": 2**63}), r"past 64 bits.* at `\$\.inner`"),
    "large default in a list": (
        document(inner={"type": "array", "items": {"type": "integer"}, "default": [0, 2**80]}),
        r"past 64 bits.* at `\$\.inner\[1\]`",
    ),
    "enum": (document(inner={"enum": [1]}), r"at `\$\.inner`"),
    "keyword at the root": (document() | {"allOf": []}, r"'allOf'.* at `\$`"),
    "unused definition": (
        document() | {"$defs": document()["$defs"] | {"A": {"type": "string", "pattern": "a"}}},
        r"'pattern'.* at `\$defs\.A`",
    ),
    "unused definition that holds itself": (
        document() | {"$defs": document()["$defs"] | {"A": struct(a={"$ref": "#/$defs/A"})}},
        r"'A' holds itself.* at `\$defs\.A\.a`",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_schema_that_no_table_holds_is_refused_with_its_path(case: str):
    refused, message = REFUSED[case]
    with pytest.raises(DatasetError, match=f"^here: .*{message}") as caught:
        RecordSchema.read(json.dumps(refused).encode(), where="here")
    assert "at `$" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_reference_loop_is_refused():
    base = document(inner={"$ref": "#/$defs/A"})
    base["$defs"] |= {
        "A": struct(b={"$ref": "#/$defs/B"}),
        "B": struct(a={"type": "array", "items": {"$ref": "#/$defs/A"}}),
    }
    with pytest.raises(DatasetError, match=r"'A' holds itself - at `\$\.inner\.b\.a\[\]`"):
        RecordSchema(base)


@pytest.mark.parametrize("width", [2, 10])
def test_references_that_multiply_are_refused(width: int):
    base = document(inner={"$ref": "#/$defs/S0"})
    for n in range(30):
        base["$defs"][f"S{n}"] = struct(**{f"f{i}": {"$ref": f"#/$defs/S{n + 1}"} for i in range(width)})
    base["$defs"]["S30"] = struct(text={"type": "string"})
    with pytest.raises(DatasetError, match="types"):
        RecordSchema(base)


def test_a_chain_of_references_has_an_end():
    base = document(inner={"$ref": "#/$defs/S0"})
    base["$defs"] |= {f"S{n}": {"$ref": f"#/$defs/S{n + 1}"} for n in range(3000)} | {"S3000": {"type": "string"}}
    with pytest.raises(DatasetError, match="inside one another"):
        RecordSchema(base)


@pytest.mark.parametrize("name", ["key", "token_ids", "tensors", "seed"])
def test_a_schema_without_a_field_of_every_record_is_refused(name: str):
    base = document()
    del base["$defs"]["TriviaQARecord"]["properties"][name]
    with pytest.raises(DatasetError, match=f"no field '{name}'"):
        RecordSchema(base)


@pytest.mark.parametrize(
    "tag",
    [
        None,
        {"type": "string"},
        *({"enum": names} for names in (["a", "b"], [], [""], ["../a"], ["a\n"])),
        *({"anyOf": [{"type": "string"}, {"type": "null"}], "enum": one} for one in (5, [5])),
    ],
)
def test_a_schema_without_a_task_is_refused(tag: Any):
    base = document(task=tag)
    if tag is None:
        del base["$defs"]["TriviaQARecord"]["properties"]["task"]
    with pytest.raises(DatasetError, match=r"here: .* - at `"):
        RecordSchema.read(json.dumps(base).encode(), where="here")


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b"null", b"\xff", b'{"$ref": 1}', b'{"$ref": "#/$defs/A", "$defs": 3}', b'{"a":' * 9000]
)
def test_what_is_no_schema_is_refused(data: bytes):
    with pytest.raises(DatasetError, match=r"^here"):
        RecordSchema.read(data, where="here")


def test_a_field_of_every_record_with_another_type_is_no_traceback(finished: Path, tmp_path: Path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / "schemas/trivia_qa.json").write_text(json.dumps(document(token_ids={"type": "string"})))
    assert verify(folder).problems
    with TraceStore(folder) as store:  # as the installed task reads them
        assert store[0].record.token_ids


def test_defaults_of_structs_are_structs():
    schema = RecordSchema.read(RecordSchema.of(GrownRecord).to_bytes(), where="here")
    raw = {name: value for name, value in _fields().items() if name not in ("mood", "note")}
    first, second = (msgspec.convert(raw | more, schema.record_type) for more in ({}, {"note": {"text": "new"}}))
    assert (first, first.note.text) == (second, "new")  # type: ignore[attr-defined]
    with pytest.raises(msgspec.ValidationError, match="missing required field"):
        msgspec.convert(raw, schema.strict_type)


def _fields() -> dict[str, Any]:
    from tests.sample_records import trivia_record

    return json.loads(encode_record(trivia_record()))
