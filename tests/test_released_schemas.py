"""Datasets of every released schema, as tracekit of that time wrote them: opened, read, verified, loaded, merged."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from builders.trivia_qa.record import TriviaQARecord
from tests.runs_for_tests import hashes
from tests.tasks_for_tests import RECORD_TYPES
from tracekit import TraceStore, load_dataset, verify
from tracekit.analysis.stats import stats
from tracekit.cli import main
from tracekit.errors import CorruptShardError
from tracekit.format.layout import Layout, config_names
from tracekit.format.manifest import Manifest, read_plan, read_struct
from tracekit.read import index
from tracekit.records import SCHEMA_VERSION, decode_record
from tracekit.run.merge import merge
from tracekit.tensors import decode

DATA = Path(__file__).parent / "data"
VERSIONS = ["1.0", "1.1", "2.0"]
CONFIGS = [("1.0", "trivia_qa"), *((version, name) for version in VERSIONS[1:] for name in ("trivia_qa", "small"))]


@pytest.mark.parametrize(("version", "config"), CONFIGS)
def test_they_are_read(version: str, config: str):
    with TraceStore(DATA / f"schema-{version}", config) as store:
        assert store.meta["schema_version"] == version  # type: ignore[call-overload]
        questions = ["Capital of France?", "Who wrote Hamlet?", "2 + 2?"]
        assert store.columns(["question"])["question"].to_pylist() == questions[: len(store)]
        for sample in store:
            num_tokens, kept = len(sample.record.token_ids), len(sample.record.token_ids) - sample.record.prompt_length
            assert sample.hidden_states(layer=2).shape == (kept, 32)
            attention = sample.attention().astype(np.float32)
            assert attention.shape == (2, 4, kept, num_tokens)
            sums = attention.sum(-1)
            assert (np.abs(sums - 1) < 1e-5).all() if config != "small" else (sums >= 0.9 - 1e-5).all()
        assert store.stack("hidden_states", layer=1, tokens="first_answer").values.shape == (len(store), 32)


@pytest.mark.parametrize(("version", "config"), CONFIGS)
def test_what_is_read_is_what_the_shards_hold(version: str, config: str):
    root = DATA / f"schema-{version}"
    layout = Layout(root, config)
    with TraceStore(root, config) as store:
        for path in sorted(layout.shard("x").parent.glob("*.tar")):
            data = path.read_bytes()
            for key in store.keys:
                row = store._row(key)
                if row.shard != path:
                    continue
                raw = data[row.json_offset :][: row.json_size]
                assert decode_record(raw, TriviaQARecord) == store.record(key)
                found = store.tensors(key)
                start = data.index(f"{key}.safetensors".encode()) + 512
                size = int(data[start + 124 - 512 : start + 135 - 512], 8)
                stored = decode(data[start : start + size])
                assert stored.keys() == found.keys()
                assert all(np.array_equal(stored[name], found[name], equal_nan=True) for name in stored)


@pytest.mark.parametrize("version", VERSIONS)
def test_they_are_right_and_stay_as_they_are(version: str):
    before = hashes(DATA / f"schema-{version}")
    assert verify(DATA / f"schema-{version}").problems == []
    assert hashes(DATA / f"schema-{version}") == before


@pytest.mark.parametrize("config", config_names(DATA / "schema-2.0"))
def test_every_task_is_read_as_its_records(config: str, capsys: pytest.CaptureFixture[str]):
    root = DATA / "schema-2.0"
    with TraceStore(root, config, check=True) as store:
        assert len(store) > 0
        for sample in store:
            assert type(sample.record) is RECORD_TYPES[sample.record.task_name()]
            assert sample.tensors().keys() == {spec.name for spec in sample.record.tensors}
        rows = load_dataset(root, config, split=store.info().splits[0].name)
        assert len(rows) == len(store)  # type: ignore[arg-type]
    (found,) = stats(str(root), config=config)
    assert found.metrics
    assert main(["show", str(root), "--dataset-config", config, "--examples", "1"]) == 0
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("version", "config"), CONFIGS)
def test_their_damage_is_noticed(version: str, config: str, tmp_path: Path):
    folder = Path(shutil.copytree(DATA / f"schema-{version}", tmp_path / "copy"))
    shard = next(iter(sorted((folder / "data" / config).glob("*.tar"))))
    data = bytearray(shard.read_bytes())
    data[-3000] ^= 1
    shard.write_bytes(data)
    assert any("SHA-256" in problem for problem in verify(folder).problems)


@pytest.mark.parametrize(("version", "config"), CONFIGS)
@pytest.mark.parametrize("is_streaming", [False, True])
def test_they_are_loaded(version: str, config: str, is_streaming: bool):
    rows = load_dataset(DATA / f"schema-{version}", config, split="validation", streaming=is_streaming)
    with TraceStore(DATA / f"schema-{version}", config) as store:
        for row, sample in zip(rows, store, strict=True):
            assert (row["key"], row["question"]) == (sample.key, sample.record.question)  # type: ignore[index]
            np.testing.assert_array_equal(row["hidden_states"], sample.hidden_states())  # type: ignore[index]
            np.testing.assert_array_equal(row["attentions"], sample.attention())  # type: ignore[index]


def test_a_reader_says_once_that_their_bytes_are_unchecked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, finished: Path
):
    monkeypatch.setattr(index, "_told", set())
    for _ in range(3):
        for config in ("trivia_qa", "small"):
            TraceStore(DATA / "schema-1.1", config, check=True).hidden_states("000001", layer=0)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("schema 1.1, without checksums: what is read is unchecked") == 1
    TraceStore(finished)
    assert "unchecked" not in capsys.readouterr().err


def test_merging_them_gives_a_dataset_of_today(tmp_path: Path):
    root = DATA / "schema-1.1"
    manifest = merge([root], tmp_path / "merged", config="trivia_qa")
    assert manifest.schema_version == SCHEMA_VERSION
    assert verify(tmp_path / "merged").problems == []
    with TraceStore(tmp_path / "merged", check=True) as new, TraceStore(root, "trivia_qa") as old:
        assert {sample.record.schema_version for sample in new} == {SCHEMA_VERSION}
        for key in new.keys:
            np.testing.assert_array_equal(new.hidden_states(key), old.hidden_states(key))
        row = new._row(new.keys[0])
    data = bytearray(row.shard.read_bytes())
    data[row.tensors["hidden_states"].start] ^= 1
    row.shard.write_bytes(data)
    with TraceStore(tmp_path / "merged", check=True) as store, pytest.raises(CorruptShardError, match="is damaged"):
        store.hidden_states(store.keys[0])


@pytest.mark.parametrize(("version", "config"), CONFIGS)
def test_the_files_are_those_that_were_released(version: str, config: str):
    layout = Layout(DATA / f"schema-{version}", config)
    assert read_plan(layout).schema_version == version
    for shard in read_struct(layout.manifest, Manifest).shards:
        assert hashlib.sha256(layout.shard(shard.name).read_bytes()).hexdigest() == shard.sha256


@pytest.mark.parametrize(("version", "config"), CONFIGS)
def test_a_run_of_an_earlier_version_that_is_not_finished_is_read(version: str, config: str, tmp_path: Path):
    folder = Path(shutil.copytree(DATA / f"schema-{version}", tmp_path / "run"))
    for path in ("manifest.json", "README.md", "load_traces.py"):
        (folder / path).unlink()
    for path in ("manifests", "records", *(["schemas"] if version < "2" else [])):  # 1.x wrote the schema last
        shutil.rmtree(folder / path)
    with TraceStore(folder, config) as store, TraceStore(DATA / f"schema-{version}", config) as whole:
        assert store.is_open
        for key in whole.keys:
            assert store.record(key) == whole.record(key)
            np.testing.assert_array_equal(store.hidden_states(key), whole.hidden_states(key))
        assert store.records.to_pylist() == whole.records.to_pylist()
    assert verify(folder, config=config).problems == []
