"""Small files against shards: any changed value of a column, a sidecar's field or a tar's member is found and named."""

import contextlib
import json
import random
import re
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.datasets_for_tests import make_sample, write_dataset
from tests.tasks_for_tests import SCHEMAS
from tracekit import verify
from tracekit.errors import CorruptShardError, DatasetError, SampleNotFoundError
from tracekit.format.layout import Layout
from tracekit.format.manifest import FileInfo, SampleIndex, Sidecar, read_manifest, read_struct, to_bytes
from tracekit.format.shards import sha256_file
from tracekit.read.store import TraceStore
from tracekit.read.tables import INDEX_COLUMNS, index_schema, write_records_tar

pytestmark = pytest.mark.attack

COLUMNS = index_schema(SCHEMAS["trivia_qa"]).names
SITES = ("hidden_states", "attentions", "topk_ids")


def two_samples(folder: Path, *, is_finished: bool = True) -> Layout:
    """A dataset of one shard of two samples, its manifest without hashes of files: only comparing finds anything."""
    samples = [make_sample(key, sites=SITES) for key in ("000000", "000001")]
    layout = write_dataset(folder, {"train-00000": samples}, is_finished=is_finished)
    if is_finished:
        write_records_tar(layout.records_tar("train"), [read_struct(layout.sidecar("train-00000"), Sidecar)])
    return layout


def problems_of(folder: Path) -> list[str]:
    """What is wrong, but for the index, which these folders have not."""
    return [problem for problem in verify(folder).problems if "manifest.json cannot be read" not in problem]


def plain(kind: pa.DataType) -> Any:
    """Some value of a kind."""
    if pa.types.is_struct(kind):
        return {field.name: plain(field.type) for field in kind}
    return {pa.string(): "", pa.int64(): 0, pa.float64(): 0.0, pa.bool_(): False}.get(kind, [])


def changed(value: Any, kind: pa.DataType) -> Iterator[Any]:
    """Other values of the same kind: numbers near and far, texts turned round, lists cut, structs changed inside."""
    if value is None:
        value = plain(kind)
        yield value
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + step for step in (1, -1, 64, -64, 512, 1 << 40))
    elif isinstance(value, float):
        yield value + 0.5
    elif isinstance(value, str | bytes):
        end = "x" if isinstance(value, str) else b"\1\0\0\0"
        yield from (one for one in (value[::-1], value + end, value[:-4]) if one != value)
    elif isinstance(value, dict):
        for field in kind:
            yield from (value | {field.name: one} for one in changed(value[field.name], field.type))
    elif isinstance(value, list):
        yield from (one for one in (value[:-1], value[::-1], value + value[-1:]) if one != value)
        if not value:
            yield [plain(kind.value_type)]
        else:
            yield from ([one, *value[1:]] for one in changed(value[0], kind.value_type))


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    layout = two_samples(tmp_path_factory.mktemp("right"))
    assert problems_of(layout.root) == []
    return layout


@pytest.mark.parametrize("column", COLUMNS)
def test_a_changed_value_of_the_record_table_is_found(right: Layout, column: str):
    path = right.records_table("train")
    table = pq.read_table(path)
    before = path.read_bytes()
    rows = table[column].to_pylist()
    values = list(changed(rows[1], table.schema.field(column).type))
    assert values
    try:
        for value in values:
            array = pa.array([rows[0], value], table.schema.field(column).type)
            number = table.column_names.index(column)
            pq.write_table(table.set_column(number, table.schema.field(column), array), path)
            problems = problems_of(right.root)
            said = f"records/trivia_qa/train.parquet: {column} of sample '000001' is not what its shard says"
            assert said in problems, (value, problems)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("column", [*INDEX_COLUMNS, "_tensor_index"])
def test_a_shifted_place_is_never_read(right: Layout, column: str):
    path = right.records_table("train")
    table = pq.read_table(path)
    before = path.read_bytes()
    rows = table[column].to_pylist()
    kind = table.schema.field(column).type
    shifts = [sign * step for sign in (1, -1) for step in (*range(1, 10), 37, 64, 512, 1 << 40)]
    values = [rows[1] + shift for shift in shifts] if isinstance(rows[1], int) else list(changed(rows[1], kind))
    try:
        for value in values:
            number = table.column_names.index(column)
            array = pa.array([rows[0], value], kind)
            pq.write_table(table.set_column(number, table.schema.field(column), array), path)
            store = TraceStore(right.root)
            if column == "_tensor_index" and sorted(map(str, value)) == sorted(map(str, rows[1])):
                continue  # the same places in another order
            if column.startswith("_json"):
                with pytest.raises((CorruptShardError, DatasetError)):
                    store.record("000001")
                continue
            with pytest.raises(DatasetError, match="sample '000001'"):
                store.hidden_states("000001")
    finally:
        path.write_bytes(before)


def sidecar_values(layout: Layout) -> Iterator[tuple[str, Any]]:
    """Name of a field, and a sidecar in which only it is changed."""
    sidecar = read_struct(layout.sidecar("train-00000"), Sidecar)
    for field in ("number", "num_bytes"):
        yield field, msgspec.structs.replace(sidecar, **{field: getattr(sidecar, field) + 1})
    for field in ("name", "sha256"):
        yield field, msgspec.structs.replace(sidecar, **{field: getattr(sidecar, field)[::-1]})
    kinds = {field.name: field.type for field in index_schema(SCHEMAS["trivia_qa"])}
    for field in SampleIndex.__struct_fields__:
        value = msgspec.to_builtins(getattr(sidecar.samples[1], field), builtin_types=(bytes,))
        for one in changed(
            value, kinds["_tensor_index" if field == "tensors" else field if field in kinds else f"_{field}"]
        ):
            index = msgspec.convert(
                msgspec.structs.asdict(sidecar.samples[1]) | {field: one}, SampleIndex, builtin_types=(bytes,)
            )
            yield field, msgspec.structs.replace(sidecar, samples=[sidecar.samples[0], index])
    record = json.loads(bytes(sidecar.records[1]))
    for field in record:
        for one in islice(changed(record[field], kinds[field]), 1):
            raw = msgspec.Raw(json.dumps(record | {field: one}).encode())
            yield "the record", msgspec.structs.replace(sidecar, records=[sidecar.records[0], raw])
    yield "samples", msgspec.structs.replace(sidecar, samples=sidecar.samples[:1], records=sidecar.records[:1])
    yield "records", msgspec.structs.replace(sidecar, records=sidecar.records[:1])


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_changed_sidecar_is_found(tmp_path: Path, is_finished: bool):
    layout = two_samples(tmp_path, is_finished=is_finished)
    assert problems_of(tmp_path) == []
    path = layout.sidecar("train-00000")
    for field, sidecar in sidecar_values(layout):
        path.write_bytes(to_bytes(sidecar.with_checksum(), compact=True))  # the shard alone says that it is wrong
        problems = problems_of(tmp_path)
        said = {"num_bytes": "bytes|num_bytes", "sha256": "SHA-256|sha256"}.get(field, field)
        assert any(re.search(rf"train-00000.*({said})", problem) for problem in problems), (field, problems)


def test_what_no_shard_tells_is_under_the_checksum_of_the_sidecar(tmp_path: Path):
    layout = two_samples(tmp_path, is_finished=False)
    path = layout.sidecar("train-00000")
    content = json.loads(path.read_bytes())
    for field in content.keys() - {"samples", "records", "name", "number", "num_bytes", "sha256"}:
        for value in ({"verification": content["verification"] | {"num_replayed": 9}}.get(field), 7, None):
            if value != content[field]:
                path.write_text(json.dumps(content | {field: value}))
                problems = problems_of(tmp_path)
                assert any("is not a tracekit sidecar" in one or "altered" in one for one in problems), (
                    field,
                    problems,
                )


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "{}", '{"name": 1}', "\x00", "[" * 5000])
def test_a_sidecar_that_is_none_is_named(tmp_path: Path, damage: str):
    layout = two_samples(tmp_path, is_finished=False)
    layout.sidecar("train-00000").write_text(damage)
    assert any("train-00000.json is not a tracekit sidecar" in problem for problem in problems_of(tmp_path))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.slice(0, 1), "1 rows of shard train-00000, which has 2 samples"),
        (lambda t: pa.concat_tables([t, t]), "4 rows of shard train-00000"),
        (lambda t: t.take([1, 0]), "key of sample '000000' is not what its shard says"),
        (lambda t: t.drop_columns("question"), "column 'question' is missing"),
        (lambda t: t.drop_columns("_checksums"), "column '_checksums' is missing"),
        (lambda t: t.append_column("more", pa.array([1, 2])), "column 'more' is unknown"),
        (lambda t: t.set_column(0, "task", t["task"].cast(pa.large_string())), "column 'task' is large_string"),
        (lambda t: t.slice(0, 0), "0 rows of shard train-00000"),
    ],
)
def test_a_table_of_another_shape_is_found(tmp_path: Path, change: Any, text: str):
    path = two_samples(tmp_path).records_table("train")
    pq.write_table(change(pq.read_table(path)), path)
    assert any(text in problem for problem in problems_of(tmp_path)), problems_of(tmp_path)


def test_a_table_with_more_row_groups_than_shards_is_found(tmp_path: Path):
    path = two_samples(tmp_path).records_table("train")
    table = pq.read_table(path)
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.write_table(table)
    assert "records/trivia_qa/train.parquet: 2 row groups of 1 shards" in problems_of(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"PAR1" + bytes(500) + b"PAR1", b"<html></html>" * 99])
def test_a_table_that_is_none_is_named_once(tmp_path: Path, damage: bytes):
    two_samples(tmp_path).records_table("train").write_bytes(damage)
    (problem,) = problems_of(tmp_path)
    assert problem.startswith("records/trivia_qa/train.parquet: cannot be read: ")


@pytest.mark.parametrize("record", ["1", "[]", "null", '{"key":"000001"}', '{"key":[1]}', '{"key":"000001","seed":{}}'])
def test_records_of_a_sidecar_that_fit_no_table_are_refused(tmp_path: Path, record: str):
    layout = two_samples(tmp_path, is_finished=False)
    sidecar = read_struct(layout.sidecar("train-00000"), Sidecar)
    sidecar = msgspec.structs.replace(sidecar, records=[sidecar.records[0], msgspec.Raw(record.encode())])
    layout.sidecar("train-00000").write_bytes(to_bytes(sidecar.with_checksum(), compact=True))
    assert any("the record of sample '000001' is not what its shard says" in one for one in problems_of(tmp_path))
    with pytest.raises(DatasetError):
        TraceStore(tmp_path).hidden_states("000001")
    layout.shard("train-00000").unlink()
    assert any("train-00000.tar: missing" in one for one in problems_of(tmp_path))


@pytest.mark.parametrize("has_sidecar", [True, False])
def test_a_missing_shard_is_passed_over(tmp_path: Path, has_sidecar: bool):
    shards = {f"train-{n:05d}": [make_sample(f"{n:06d}", sites=SITES)] for n in range(3)}
    layout = write_dataset(tmp_path, shards)
    sidecars = [read_struct(layout.sidecar(name), Sidecar) for name in shards]
    write_records_tar(layout.records_tar("train"), sidecars)
    assert problems_of(tmp_path) == []
    layout.shard("train-00001").unlink()
    if not has_sidecar:
        layout.sidecar("train-00001").unlink()
    assert problems_of(tmp_path) == ["data/trivia_qa/train-00001.tar: missing"]
    table = pq.read_table(layout.records_table("train"))
    questions = pa.array([*table["question"].to_pylist()[:2], "another?"])
    table = table.set_column(table.column_names.index("question"), "question", questions)
    with pq.ParquetWriter(layout.records_table("train"), table.schema) as writer:
        for row in range(3):
            writer.write_table(table.slice(row, 1))
    said = "records/trivia_qa/train.parquet: question of sample '000002' is not what its shard says"
    assert said in problems_of(tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda data: data.replace(b"What is 000001", b"What is 100000"), "the record of sample '000001' is not what"),
        (lambda data: data.replace(b"000001.json", b"000002.json", 1), "no tar header"),
        (lambda data: data[: len(data) // 2 // 512 * 512], "cut short"),
        (lambda data: data[:-1024] + data, "'000000.json' is of no sample"),
        (lambda data: data[(len(data) - 1024) // 2 :], "'000001.json' where '000000.json' should be"),
        (lambda data: bytes(1024), "nothing where '000000.json' should be"),
    ],
)
def test_a_changed_records_tar_is_found(tmp_path: Path, change: Any, text: str):
    path = two_samples(tmp_path).records_tar("train")
    path.write_bytes(change(path.read_bytes()))
    problems = problems_of(tmp_path)
    assert any("records/trivia_qa/train.tar" in problem and text in problem for problem in problems), problems


@pytest.mark.parametrize("field", ["num_samples", "num_bytes", "first_key", "last_key", "number", "sha256"])
def test_a_manifest_that_lies_about_a_shard_is_found(tmp_path: Path, field: str):
    layout = two_samples(tmp_path)
    content = json.loads(layout.manifest.read_text())
    value = content["shards"][0][field]
    content["shards"][0][field] = value + 1 if isinstance(value, int) else value[::-1].replace("000000", "000009")
    layout.manifest.write_text(json.dumps(content))
    problems = problems_of(tmp_path)
    assert any("train-00000" in problem or "split counts" in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("field", "value"), [("num_samples", 3), ("num_bytes", 5), ("task", "csqa"), ("name", "other")]
)
def test_an_entry_of_the_index_that_lies_is_found(finished: Path, tmp_path: Path, field: str, value: object):
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    index = json.loads((folder / "manifest.json").read_text())
    index["configs"][0][field] = value
    (folder / "manifest.json").write_text(json.dumps(index))
    assert any("manifest.json" in problem for problem in verify(folder).problems)
    index = json.loads((finished / "manifest.json").read_text()) | {"schema_version": "1.7"}
    (folder / "manifest.json").write_text(json.dumps(index))
    assert any("manifest.json: schema 1.7" in problem for problem in verify(folder).problems)


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_table_is_refused_by_readers_or_changes_nothing_that_is_read_of_a_shard(tmp_path: Path, seed: int):
    made = [make_sample(f"{number:06d}", sites=SITES) for number in range(2)]
    layout = write_dataset(tmp_path, {"train-00000": made})
    path = layout.records_table("train")
    whole, draw = path.read_bytes(), random.Random(seed)
    file = FileInfo(path="records/trivia_qa/train.parquet", num_bytes=len(whole), sha256=sha256_file(path))
    layout.manifest.write_bytes(to_bytes(msgspec.structs.replace(read_manifest(layout), files=[file])))
    for _ in range(12):
        start, size = draw.randrange(len(whole)), draw.choice([1, 2, 40])
        broken = bytearray(whole)
        broken[start : start + size] = bytes(byte ^ draw.randrange(1, 256) for byte in whole[start : start + size])
        path.write_bytes(broken)
        with pytest.raises(CorruptShardError, match=r"train\.parquet is damaged"):
            TraceStore(tmp_path, check=True)
        with contextlib.suppress(DatasetError, SampleNotFoundError), TraceStore(tmp_path) as store:
            for one in made:
                assert store.record(one.record.key) == one.record
                for name, array in store.tensors(one.record.key).items():
                    assert np.array_equal(array, one.stored[name])
        with contextlib.suppress(DatasetError), TraceStore(tmp_path) as store:
            assert len(store.records) == len(made)
        away = layout.shard("train-00000").rename(tmp_path / "away.tar")  # the records are then read from the table
        with contextlib.suppress(DatasetError, SampleNotFoundError), TraceStore(tmp_path) as store:
            for one in made:
                store.record(one.record.key)
        away.rename(layout.shard("train-00000"))
    path.write_bytes(whole)
    TraceStore(tmp_path, check=True).close()


@pytest.mark.parametrize("column", ["key", "_shard", "_json_offset", "_data_offset", "_tensor_index", "token_ids"])
@pytest.mark.parametrize("change", ["null", "another type"])
def test_a_column_that_readers_need_is_checked(tmp_path: Path, column: str, change: str):
    path = two_samples(tmp_path).records_table("train")
    table = pq.read_table(path)
    place = table.column_names.index(column)
    kind = table.schema.field(column).type if change == "null" else pa.list_(pa.bool_())
    table = table.set_column(place, pa.field(column, kind), pa.array([None, None], kind))
    pq.write_table(table, path)
    with pytest.raises(DatasetError, match=r"train\.parquet|record table|row cannot be read"):
        TraceStore(tmp_path).tensors("000000")
