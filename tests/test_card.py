"""The card: `datasets` reads the folder through it, with the types that the records declare."""

from pathlib import Path

import datasets
import pytest
import safetensors.numpy
import yaml

from tests.runs_for_tests import run_trivia
from tests.tiny_checkpoint import save_tiny_checkpoint
from tracekit import TraceStore
from tracekit.card import card_features, render_card
from tracekit.manifest import Manifest, read_struct
from tracekit.records import RECORD_TYPES, arrow_schema


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
    folder = tmp_path_factory.mktemp("card") / "run"
    run_trivia(folder, model)
    run_trivia(folder, model, source={"limit": 2}, output={"dataset_config": "trivia_qa_two"})
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_the_default_is_the_records_alone(folder: Path):
    dataset = datasets.load_dataset(str(folder))["validation"]
    assert dataset.num_rows == 12
    assert "safetensors" not in dataset.column_names
    assert dataset[0]["json"]["question"] == TraceStore(str(folder), config="trivia_qa")[0].record.question


def test_features_are_those_of_the_records(folder: Path):
    for task, record_type in RECORD_TYPES.items():
        dataset = datasets.load_dataset(str(folder), f"{task}_records")["validation"]
        assert dataset.features["json"] == datasets.Features.from_arrow_schema(arrow_schema(record_type))


@pytest.mark.parametrize("streaming", [False, True])
def test_tensors_come_as_bytes_that_safetensors_reads(folder: Path, streaming: bool):
    dataset = datasets.load_dataset(str(folder), "trivia_qa", streaming=streaming)["validation"]
    store = TraceStore(str(folder), config="trivia_qa")
    rows = list(dataset)
    assert sorted(row["__key__"] for row in rows) == store.keys
    for row in rows:
        hidden = safetensors.numpy.load(row["safetensors"])["hidden_states"]
        assert (hidden == store.hidden_states(row["__key__"])).all()
        assert row["json"]["f1"] == store.record(row["__key__"]).f1


def test_configurations_do_not_mix(folder: Path):
    assert datasets.load_dataset(str(folder), "trivia_qa_two")["validation"].num_rows == 2


def test_the_flat_table_is_read_by_name(folder: Path):
    table = datasets.load_dataset(str(folder), data_files="records/trivia_qa/validation.parquet")["train"]
    assert table.num_rows == 12
    assert "is_correct" in table.column_names


def test_the_head_is_yaml_and_counts_are_exact(folder: Path):
    text = (folder / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["configs"][0]["config_name"] == "trivia_qa_records"
    for info in head["dataset_info"]:
        assert info["splits"][0]["num_examples"] == (2 if info["config_name"].startswith("trivia_qa_two") else 12)


def test_the_body_says_how_it_was_made_and_verified(folder: Path):
    text = (folder / "README.md").read_text()
    for expected in (
        "| `hidden_states` | float32 | (L, T, D) |",
        "exact_match",
        "run again alone",
        "`prompt_sha256`",
        "greedy",
    ):
        assert expected in text, expected
    assert "{{" not in text
    assert "{%" not in text


def test_rendering_is_pure(folder: Path):
    manifests = [read_struct(path, Manifest) for path in sorted((folder / "manifests").glob("*.json"))]
    assert render_card(manifests) == render_card(manifests) == (folder / "README.md").read_text()


def test_every_task_has_a_template_and_features():
    for task in RECORD_TYPES:
        assert (Path(__file__).parent.parent / "cards" / f"{task}.md.j2").exists()
        assert card_features(task, with_tensors=True)[1]["name"] == "safetensors"
