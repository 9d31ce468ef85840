"""Loading as `datasets` objects and through webdataset: rows are what TraceStore reads, and nothing is left out."""

import gzip
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import msgspec
import numpy as np
import pytest
import torch
import webdataset as wds
from datasets_for_tests import NUM_LAYERS, Made, MadeChoices, make_choices, make_sample, write_dataset
from torch.utils.data import DataLoader
from webdataset.autodecode import DecodingError

import tracekit
from tests.tasks_for_tests import RECORD_TYPES
from tracekit.errors import ConfigError, CorruptShardError, DatasetError, SampleNotFoundError
from tracekit.format.layout import Layout, write_atomic
from tracekit.format.manifest import Manifest, read_struct, to_bytes
from tracekit.hub import HubPath
from tracekit.read.loading import load_dataset, wds_decoder
from tracekit.read.remote import RemoteConfig
from tracekit.read.store import TraceStore
from tracekit.records import RecordSchema
from tracekit.sites import SITES
from tracekit.tensors import encode, positions_of, unpack_causal

TRAIN = {"train-00000": (1, 0), "train-00001": (2, 3), "train-00002": (5, 4)}
"""Shards of the split, and their samples in the order of the tar."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def made() -> list[Made]:
    """Six samples of different lengths, every site, bfloat16, and a seventh for another split."""
    every = [make_sample(f"{i:06d}", sites=tuple(SITES), num_tokens=7 + i, dtype="bfloat16") for i in range(6)]
    return [*every, make_sample("000006", sites=tuple(SITES), dtype="bfloat16", split="test")]


@pytest.fixture
def folder(tmp_path: Path, made: list[Made]) -> Path:
    """Those samples as a dataset of two splits."""
    shards = {name: [made[i] for i in numbers] for name, numbers in TRAIN.items()}
    write_dataset(tmp_path / "run", {**shards, "test-00000": [made[6]]})
    return tmp_path / "run"


def _mapped(folder: Path, **options: Any) -> datasets.Dataset:
    dataset = load_dataset(folder, split="train", **options)
    assert isinstance(dataset, datasets.Dataset)
    return dataset


def _streamed(folder: Path, **options: Any) -> datasets.IterableDataset:
    dataset = load_dataset(folder, split="train", streaming=True, **options)
    assert isinstance(dataset, datasets.IterableDataset)
    return dataset


def _check_row(row: Mapping[str, Any], made: Made) -> None:
    """That a row is this sample, whole."""
    plain = msgspec.to_builtins(made.record)
    assert {name for name in row if name not in made.expected} == {*plain}
    assert {name: row[name] for name in plain if name != "tensors"} == {
        k: v for k, v in plain.items() if k != "tensors"
    }
    for site, expected in made.expected.items():
        assert row[site].dtype == expected.dtype, site
        np.testing.assert_array_equal(row[site], expected)
    _check_specs(row)


def _check_specs(row: Mapping[str, Any]) -> None:
    """That `tensors` describes the arrays of the row, and only those."""
    specs = {spec["name"]: spec for spec in row["tensors"]}
    assert {*specs} == {name for name in row if name in SITES}
    for name, spec in specs.items():
        assert spec["shape"] == list(row[name].shape), name
        assert spec["dtype"] == str(row[name].dtype).removeprefix("torch."), name
        assert len(spec["axes"]) == row[name].ndim, name
        assert len(spec["layers"]) == (row[name].shape[0] if "L" in spec["axes"] else 0), name
        assert spec["layout"] == ("full" if name == "attentions" else "dense"), name


# ---------------------------------------------------------------- rows


def test_no_site_has_the_name_of_a_field() -> None:
    for record_type in RECORD_TYPES.values():
        assert not {*SITES} & {*RecordSchema.of(record_type).arrow.names}


def test_every_row_is_the_sample_by_row_slice_list_and_iteration(folder: Path, made: list[Made]) -> None:
    dataset = _mapped(folder)
    assert len(dataset) == 6
    assert dataset.split == "train"
    assert dataset.column_names[-len(SITES) :] == list(made[0].stored)
    for number, one in enumerate(made[:6]):
        _check_row(dataset[number], one)
    for row, one in zip(dataset, made, strict=False):
        _check_row(row, one)
    for which, numbers in ((slice(1, 3), [1, 2]), ([5, 0], [5, 0]), (-1, [5])):
        batch = dataset[which]
        rows = [batch] if isinstance(which, int) else [{k: v[i] for k, v in batch.items()} for i in range(2)]
        for row, number in zip(rows, numbers, strict=True):
            _check_row(row, made[number])


def test_rows_stay_right_when_rows_are_chosen_or_moved(folder: Path, made: list[Made]) -> None:
    dataset = _mapped(folder)
    for other in (dataset.select([4, 1]), dataset.shuffle(seed=3), *dataset.train_test_split(2, seed=0).values()):
        assert len(other) >= 2
        for row in other:
            _check_row(row, made[int(row["key"])])


def test_map_and_filter_see_arrays_and_keep_them(folder: Path, made: list[Made]) -> None:
    def norm(row: dict[str, Any]) -> dict[str, Any]:
        return {"norm": float(np.abs(row["hidden_states"].astype(np.float32)).sum()), "keys": [1, 2]}

    dataset = _mapped(folder).map(norm).filter(lambda row: row["attentions"].shape[-1] > 8)
    assert dataset["key"] == ["000002", "000003", "000004", "000005"]
    expected = float(np.abs(made[2].expected["hidden_states"].astype(np.float32)).sum())
    assert dataset[0]["norm"] == pytest.approx(expected)
    assert dataset[0]["keys"] == [1, 2]  # not taken for keys of samples
    np.testing.assert_array_equal(dataset[0]["hidden_states"], made[2].expected["hidden_states"])


def test_streaming_gives_the_same_rows_in_the_order_of_the_tars(folder: Path, made: list[Made]) -> None:
    dataset = _streamed(folder)
    assert dataset.num_shards == 3
    for _ in range(2):  # a second pass starts again
        rows = list(dataset)
        assert [int(row["key"]) for row in rows] == [i for numbers in TRAIN.values() for i in numbers]
        for row in rows:
            _check_row(row, made[int(row["key"])])
    mapped = _mapped(folder)
    assert list(rows[0]) == mapped.column_names


def test_streaming_shuffles_skips_takes_and_maps(folder: Path) -> None:
    dataset = _streamed(folder, sites=["hidden_states"])
    shuffled = [row["key"] for row in dataset.shuffle(seed=0, buffer_size=4)]
    assert sorted(shuffled) == [f"{i:06d}" for i in range(6)]
    assert shuffled != [row["key"] for row in dataset]
    assert [row["key"] for row in dataset.skip(2).take(2)] == ["000002", "000003"]
    lengths = dataset.map(lambda row: {"length": row["hidden_states"].shape[1]})
    assert [row["length"] for row in lengths] == [8, 7, 9, 10, 12, 11]


def test_nodes_get_shards_of_their_own(folder: Path) -> None:
    from datasets.distributed import split_dataset_by_node

    parts = [[row["key"] for row in split_dataset_by_node(_streamed(folder), rank=i, world_size=3)] for i in range(3)]
    assert parts == [["000001", "000000"], ["000002", "000003"], ["000005", "000004"]]


def test_without_a_split_all_of_them(folder: Path, made: list[Made]) -> None:
    mapped, streamed = load_dataset(folder), load_dataset(folder, streaming=True)
    assert isinstance(mapped, datasets.DatasetDict)
    assert isinstance(streamed, datasets.IterableDatasetDict)
    assert {name: len(dataset) for name, dataset in mapped.items()} == {"train": 6, "test": 1}
    _check_row(mapped["test"][0], made[6])
    (row,) = streamed["test"]
    _check_row(row, made[6])
    assert {*streamed} == {"train", "test"}


def test_the_records_are_mapped_and_the_tensors_are_not_in_them(folder: Path) -> None:
    dataset = _mapped(folder)
    assert dataset.cache_files
    assert dataset.with_format(None)[3]["hidden_states"] == "000003"


def test_a_dataset_made_anew_in_the_same_place_is_read_anew(tmp_path: Path) -> None:
    for text in ("first", "second"):
        one = make_sample("000000")
        record = msgspec.structs.replace(one.record, question=text)
        write_dataset(tmp_path / "run", {f"train-0000{int(text == 'second')}": [one._replace(record=record)]})
        assert _mapped(tmp_path / "run")[0]["question"] == text


# ---------------------------------------------------------------- selection


@pytest.mark.parametrize("load", [_mapped, _streamed])
def test_layers_are_taken_in_their_order_and_described(load: Any, folder: Path, made: list[Made]) -> None:
    for row in load(folder, layers=[-1, 0]):
        one = made[int(row["key"])].expected
        np.testing.assert_array_equal(row["hidden_states"], one["hidden_states"][[NUM_LAYERS, 0]])
        np.testing.assert_array_equal(row["attentions"], one["attentions"][[NUM_LAYERS - 1, 0]])
        np.testing.assert_array_equal(row["resid_embed"], one["resid_embed"])
        assert row["tensors"][0]["layers"] == [NUM_LAYERS, 0]
        assert row["attentions"].dtype == one["attentions"].dtype
        _check_specs(row)


def test_one_layer_keeps_its_axis(folder: Path, made: list[Made]) -> None:
    row = _mapped(folder, sites=["attentions", "values"], layers=[1])[2]
    np.testing.assert_array_equal(row["attentions"], made[2].expected["attentions"][[1]])
    assert [spec["name"] for spec in row["tensors"]] == ["attentions", "values"]
    _check_specs(row)


@pytest.mark.parametrize("load", [_mapped, _streamed])
def test_columns_are_what_a_row_has_and_all_that_is_read(
    load: Any, folder: Path, made: list[Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int | None]] = []
    tensor = TraceStore.tensor

    def noted(self: TraceStore, key: str, site: str, **options: Any) -> Any:
        read.append((site, options.get("layer")))
        return tensor(self, key, site, **options)

    dataset = load(folder, columns=["hidden_states", "question", "tensors"], layers=[0, 2])
    monkeypatch.setattr(TraceStore, "tensor", noted)
    (row,) = dataset.take(1)
    assert list(row) == ["hidden_states", "question", "tensors"]
    np.testing.assert_array_equal(
        row["hidden_states"], made[int(row["question"][-2])].expected["hidden_states"][[0, 2]]
    )
    _check_specs(row)
    assert {*read} == {("hidden_states", 0), ("hidden_states", 2)}  # streaming, of a row ahead too
    (row,) = load(folder, columns=["values"]).take(1)
    assert list(row) == ["values"]
    (row,) = load(folder, sites=[]).take(1)
    assert not {*row} & {*SITES}
    assert row["tensors"] == []


def test_columns_that_are_not_selected_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = _mapped(folder).select_columns(["question", "is_correct"])
    monkeypatch.setattr(TraceStore, "tensor", lambda *_, **__: pytest.fail("a tensor was read"))
    assert list(dataset["question"]) == [f"What is {i:06d}?" for i in range(6)]


def test_sites_whose_shapes_differ_by_layer_are_lists(tmp_path: Path) -> None:
    sites, heads = ("hidden_states", "keys"), {"keys": [2, 4, 1]}
    one = make_sample("000000", sites=sites, heads_by_layer=heads)
    write_dataset(tmp_path / "run", {"train-00000": [one]})
    whole, chosen = _mapped(tmp_path / "run")[0], _mapped(tmp_path / "run", layers=[-1, 1])[0]
    for row, layers in ((whole, [0, 1, 2]), (chosen, [2, 1])):
        assert [spec["name"] for spec in row["tensors"]] == ["hidden_states", *(f"keys.{layer}" for layer in layers)]
        for array, layer in zip(row["keys"], layers, strict=True):
            np.testing.assert_array_equal(array, one.expected[f"keys.{layer}"][0])


@pytest.fixture
def choices(tmp_path: Path) -> list[MadeChoices]:
    """Two samples of three and of two choices, in a dataset in `tmp_path / "choices"`."""
    made = [
        make_choices(f"{i:06d}", lengths=lengths, dtype="bfloat16") for i, lengths in enumerate([(3, 2, 4), (5, 1)])
    ]
    write_dataset(tmp_path / "choices", {"train-00000": made}, config="csqa_mcq")
    return made


@pytest.mark.parametrize("load", [_mapped, _streamed])
@pytest.mark.parametrize("layers", [None, [1], [2, 0]])
def test_choices_stand_one_after_the_other_and_their_attention_is_a_list(
    load: Any, layers: list[int] | None, tmp_path: Path, choices: list[MadeChoices]
) -> None:
    rows = list(load(tmp_path / "choices", layers=layers))
    taken: Any = slice(None) if layers is None else layers
    for row, one in zip(rows, choices, strict=True):
        np.testing.assert_array_equal(row["hidden_states"], one.stored["hidden_states"][taken])
        np.testing.assert_array_equal(row["queries"], one.stored["queries"][taken])
        np.testing.assert_array_equal(row["resid_embed"], one.stored["resid_embed"])
        assert isinstance(row["attentions"], list)
        for array, expected in zip(row["attentions"], one.expected["attentions"], strict=True):
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected[taken])
        specs = {spec["name"]: spec for spec in row["tensors"]}
        assert specs["hidden_states"]["shape"] == list(row["hidden_states"].shape)
        sizes = [array[0, 0].size for array in row["attentions"]]
        assert specs["attentions"]["shape"] == [*row["attentions"][0].shape[:2], sum(sizes)]
        assert specs["attentions"]["choice_offsets"] == row["choice_offsets"] == one.record.choice_offsets
        assert row["choices"] == msgspec.to_builtins(one.record.choices)


@pytest.mark.parametrize("layers", [None, [2, 0]])
def test_choices_as_torch_tensors(tmp_path: Path, choices: list[MadeChoices], layers: list[int] | None) -> None:
    row = _mapped(tmp_path / "choices", torch=True, sites=["attentions"], layers=layers)[1]
    for tensor, expected in zip(row["attentions"], choices[1].expected["attentions"], strict=True):
        assert tensor.dtype == torch.bfloat16
        expected = expected if layers is None else expected[layers]
        assert torch.equal(tensor.float(), torch.from_numpy(expected.astype(np.float32)))


def test_few_positions_are_described_as_they_are(tmp_path: Path) -> None:
    one = make_sample("000000", kept=[[1, 3], [5, 9]])
    write_dataset(tmp_path / "run", {"train-00000": [one]})
    row = _mapped(tmp_path / "run")[0]
    np.testing.assert_array_equal(row["attentions"], one.expected["attentions"])
    assert row["tensors"][1]["shape"] == list(one.expected["attentions"].shape)
    assert row["tensors"][1]["positions"] == [[1, 3], [5, 9]]


@pytest.mark.parametrize("layers", [None, [0], [2, 0]])
def test_torch_tensors_keep_their_dtype(folder: Path, made: list[Made], layers: list[int] | None) -> None:
    for row in (_mapped(folder, torch=True, layers=layers)[1], next(iter(_streamed(folder, torch=True)))):
        assert row["key"] == "000001"
        expected = made[1].expected["attentions"]
        expected = expected if layers is None or len(row["attentions"]) == NUM_LAYERS else expected[layers]
        assert row["attentions"].dtype == torch.bfloat16
        assert row["topk_ids"].dtype == torch.int64
        assert torch.equal(row["attentions"].float(), torch.from_numpy(expected.astype(np.float32)))
        row["hidden_states"].zero_()  # its own memory
        _check_specs(row)


def test_what_is_not_there_is_named_with_what_is(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no column 'hidden', 'q' in configuration 'trivia_qa'; .*: task, .*hidden_st"
    ):
        load_dataset(folder, columns=["key", "hidden", "q"])
    with pytest.raises(ConfigError, match=r"no column 'hidden' in .*expected a list of: task, schema_version"):
        load_dataset(folder, columns="hidden")
    with pytest.raises(ConfigError, match=r"no site 'key' in .*expected a list of: hidden_states, attentions, "):
        load_dataset(folder, sites=["key"])
    with pytest.raises(ConfigError, match="leaves nothing of a row"):
        load_dataset(folder, columns=[])
    with pytest.raises(ConfigError, match="`layers` is empty"):
        load_dataset(folder, layers=[])
    with pytest.raises(ConfigError, match="`layers` of no site"):
        load_dataset(folder, layers=[1], columns=["key"])
    with pytest.raises(ConfigError, match=r"no split 'train\[:2\]' in .*; splits: train, test. .*select\(range"):
        load_dataset(folder, split="train[:2]")
    with pytest.raises(ConfigError, match=r"revision is 'v1', but .* is a folder"):
        load_dataset(folder, revision="v1")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layer", [3, -4, -99])
def test_a_layer_that_is_not_stored_is_refused_at_once(folder: Path, streaming: bool, layer: int) -> None:
    with pytest.raises(SampleNotFoundError, match=f"no layer {layer} of '[a-z_]+' is stored; there are 0, 1, 2"):
        load_dataset(folder, layers=[layer], streaming=streaming)


def test_one_of_a_kind_needs_no_list_and_groups_are_their_stored_sites(folder: Path, made: list[Made]) -> None:
    row = _mapped(folder, columns="key", sites="hidden", layers=1)[2]
    assert list(row) == ["key", "hidden_states"]
    np.testing.assert_array_equal(row["hidden_states"], made[2].expected["hidden_states"][[1]])
    assert list(_mapped(folder, columns="hidden_states")[0]) == ["hidden_states"]
    groups = {
        "qkv": ["queries", "keys", "values"],
        "attn": ["attentions"],
        "resid": ["resid_embed", "resid_pre_attn", "resid_post_attn", "resid_post_mlp"],
        "topk": ["topk_ids", "topk_logprobs"],
        "none": [],
    }
    for group, sites in groups.items():
        assert _mapped(folder, columns=["key"], sites=group).column_names == ["key", *sites]
    assert _mapped(folder, columns=["key", "values"], sites=["qkv", "keys"]).column_names == [
        "key",
        "values",
        "keys",
        "queries",
    ]


def test_the_records_alone_are_read_by_the_name_that_the_card_gives_them(folder: Path, made: list[Made]) -> None:
    for load in (_mapped, _streamed):
        rows = list(load(folder, name="trivia_qa_records"))
        assert sorted(row["key"] for row in rows) == [f"{i:06d}" for i in range(6)]
        assert {*rows[0]} == {*msgspec.to_builtins(made[0].record)}
    write_dataset(folder, {"train-00000": [made[0]]}, config="other_records")  # a configuration of that very name
    assert "hidden_states" in _mapped(folder, name="other_records").column_names
    with pytest.raises(DatasetError, match="holds no configuration 'nothing'"):
        load_dataset(folder, "nothing_records")


def test_odd_names_of_folders(folder: Path, made: list[Made], tmp_path: Path) -> None:
    for name in ("run[1]", "run*", "a b", "traces?x#y"):
        folder = folder.rename(tmp_path / name)
        _check_row(_mapped(folder)[1], made[1])
        assert len(list(_streamed(folder, sites="none"))) == 6
    folder = folder.rename(tmp_path / "a::b")
    with pytest.raises(ConfigError, match=r"'.*a::b.*': `datasets` takes '::' in a path for an address; rename"):
        load_dataset(folder)


def test_two_datasets_at_one_path_and_time_do_not_mix(tmp_path: Path) -> None:
    for text in ("first", "other"):
        one = make_sample("000000")
        record = msgspec.structs.replace(one.record, question=text)
        layout = write_dataset(tmp_path / "run", {"train-00000": [one._replace(record=record)]})
        os.utime(layout.records_table("train"), (1_000_000_000, 1_000_000_000))
        assert _mapped(tmp_path / "run", sites="none")[0]["question"] == text
        shutil.rmtree(tmp_path / "run")


# ---------------------------------------------------------------- datasets that cannot be loaded


def test_no_dataset_and_no_configuration(folder: Path, tmp_path: Path, made: list[Made]) -> None:
    with pytest.raises(DatasetError, match=r"no such folder: .*nowhere"):
        load_dataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="holds no configuration 'x'; it holds: trivia_qa"):
        load_dataset(folder, "x")
    write_dataset(folder, {"train-00000": [made[0]]}, config="another")
    with pytest.raises(DatasetError, match=r"several configurations \(another, trivia_qa\)"):
        load_dataset(folder)
    another = load_dataset(folder, "another", split="train")
    assert [row["key"] for row in another] == ["000000"]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_open_dataset_is_refused_with_the_command_that_finishes_it(
    tmp_path: Path, made: list[Made], streaming: bool
) -> None:
    write_dataset(tmp_path, {"train-00000": made[:2]}, planned=["train-00001"], is_finished=False)
    with pytest.raises(
        DatasetError,
        match=r"'trivia_qa' is not finished: 2 samples .*`python -m builders.trivia_qa --out .* same flags",
    ):
        load_dataset(tmp_path, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_that_are_missing_or_cut_are_named_at_once(folder: Path, streaming: bool) -> None:
    shard = Layout(folder, "trivia_qa").shard("train-00001")
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptShardError, match=rf"train-00001.tar has {len(data) // 2} bytes, .* says {len(data)}"):
        load_dataset(folder, split="train", streaming=streaming)
    shard.unlink()
    with pytest.raises(DatasetError, match=r"train-00001.tar is missing, which by the manifest holds 2 samples"):
        load_dataset(folder, split="train", streaming=streaming)
    assert load_dataset(folder, split="test", streaming=streaming)


def test_records_alone_need_no_shards(folder: Path) -> None:
    for shard in (folder / "data" / "trivia_qa").iterdir():
        shard.unlink()
    assert [row["key"] for row in _mapped(folder, sites=[])] == [f"{i:06d}" for i in range(6)]


@pytest.mark.parametrize("is_cut", [True, False])
def test_shards_that_go_bad_later_end_the_stream(folder: Path, is_cut: bool) -> None:
    dataset, shard = _streamed(folder), Layout(folder, "trivia_qa").shard("train-00001")
    if is_cut:
        shard.write_bytes(shard.read_bytes()[:-1024])
    else:
        shard.unlink()
    with pytest.raises(CorruptShardError if is_cut else DatasetError, match=r"train-00001.tar"):
        list(dataset)


def test_a_shard_of_other_counts_than_the_manifest_ends_the_stream(folder: Path) -> None:
    layout = Layout(folder, "trivia_qa")
    manifest = read_struct(layout.manifest, Manifest)
    shards = [msgspec.structs.replace(one, num_samples=one.num_samples + (one.number == 2)) for one in manifest.shards]
    write_atomic(layout.manifest, to_bytes(msgspec.structs.replace(manifest, shards=shards)))
    with pytest.raises(CorruptShardError, match=r"shard train-00002 of .*: 2 samples are indexed, the manifest says 3"):
        list(_streamed(folder))


def test_a_shard_with_other_samples_in_it_ends_the_stream(folder: Path) -> None:
    shard = Layout(folder, "trivia_qa").shard("train-00002")
    shard.write_bytes(shard.read_bytes().replace(b'"key":"000004"', b'"key":"999999"'))
    with pytest.raises(CorruptShardError, match="found the record of '999999', the index says it is '000004'"):
        list(_streamed(folder))


# ---------------------------------------------------------------- on the Hub


@pytest.mark.parametrize(
    ("path", "revision", "expected"),
    [
        ("owner/name", None, "main"),
        ("owner/name@v1.0.0", None, "v1.0.0"),
        ("hf://datasets/owner/name", "v2.0.0", "v2.0.0"),
        ("hf://datasets/owner/name@v1.0.0", "a/branch", "a/branch"),
    ],
)
def test_a_name_is_one_on_the_hub_and_only_its_split_is_fetched(
    path: str, revision: str | None, expected: str, folder: Path, made: list[Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = HubPath("owner/name", "0" * 40)
    opened: list[tuple[HubPath, str | None]] = []
    fetched: list[tuple[HubPath, list[str]]] = []
    monkeypatch.setattr(
        "tracekit.read.loading.open_remote",
        lambda hub, name: opened.append((hub, name)) or RemoteConfig(folder, "trivia_qa", pinned),
    )
    monkeypatch.setattr("tracekit.read.loading.fetch", lambda hub, patterns: fetched.append((hub, patterns)))
    dataset = load_dataset(path, "trivia_qa", split="train", revision=revision)
    assert opened == [(HubPath("owner/name", expected), "trivia_qa")]
    assert fetched == [(pinned, [f"data/trivia_qa/{name}.tar" for name in TRAIN])]
    for row, one in zip(dataset, made, strict=False):
        _check_row(row, one)
    load_dataset(path, split="train", sites=[])
    assert len(fetched) == 1


def test_a_folder_comes_before_a_name_on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracekit.read.loading.open_remote", lambda *_: pytest.fail("the Hub was asked"))
    monkeypatch.chdir(folder.parents[1])
    assert len(_mapped(folder.relative_to(folder.parents[1]))) == 6
    assert load_dataset(f"{folder.parent.name}/run", split="test")
    with pytest.raises(DatasetError, match="no such folder"):
        load_dataset("./owner/name")


# ---------------------------------------------------------------- processes


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.parametrize("load", [_mapped, _streamed])
def test_workers_of_a_data_loader_read_every_row_once(
    start_method: str, load: Any, folder: Path, made: list[Made]
) -> None:
    dataset = load(folder)
    loader = DataLoader(
        dataset,
        batch_size=2,
        num_workers=2,
        collate_fn=list,
        multiprocessing_context=start_method,
        shuffle=True if load is _mapped else None,
    )
    rows = [row for batch in loader for row in batch]
    assert sorted(row["key"] for row in rows) == [f"{i:06d}" for i in range(6)]
    for row in rows:
        _check_row(row, made[int(row["key"])])


def test_a_worker_that_meets_a_bad_shard_ends_the_loader(folder: Path) -> None:
    dataset = _streamed(folder, torch=True)
    Layout(folder, "trivia_qa").shard("train-00001").unlink()
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
    with pytest.raises(DatasetError, match="train-00001"):
        list(loader)


def test_map_style_loading_imports_no_torch(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys, tracekit; assert 'datasets' not in sys.modules; tracekit.wds_decoder()\n"
        f"dataset = tracekit.load_dataset({str(folder)!r}, split='train')\n"
        "dataset[0]['hidden_states']; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(tracekit.__file__).parents[1],
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


# ---------------------------------------------------------------- webdataset


def _tar(path: Path, members: Mapping[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return str(path)


def _decoded(url: str, **options: Any) -> list[dict[str, Any]]:
    return list(wds.WebDataset(url, shardshuffle=False, empty_check=False).decode(wds_decoder(), **options))


class _Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def test_webdataset_reads_shards(folder: Path, made: list[Made]) -> None:
    samples = _decoded(str(folder / "data" / "trivia_qa" / "train-{00000..00002}.tar"))
    assert [sample["__key__"] for sample in samples] == [f"{i:06d}" for numbers in TRAIN.values() for i in numbers]
    for sample in samples:
        one = made[int(sample["__key__"])]
        assert sample["json"] == msgspec.to_builtins(one.record)
        assert {*sample["safetensors"]} == {*one.stored}
        for name, array in sample["safetensors"].items():
            assert array.dtype == one.stored[name].dtype
            np.testing.assert_array_equal(array, one.stored[name])
        spec = next(spec for spec in sample["json"]["tensors"] if spec["name"] == "attentions")
        rows = positions_of(spec["positions"])
        unpacked = unpack_causal(sample["safetensors"]["attentions"], rows, spec["num_keys"])
        np.testing.assert_array_equal(unpacked, one.expected["attentions"])


def test_webdataset_in_workers_gives_torch_tensors(folder: Path, made: list[Made]) -> None:
    url = str(folder / "data" / "trivia_qa" / "train-{00000..00002}.tar")
    dataset = wds.WebDataset(url, shardshuffle=False).decode(wds_decoder(torch=True))
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    samples = {sample["__key__"]: sample["safetensors"] for sample in loader}
    assert len(samples) == 6
    for key, tensors in samples.items():
        expected = made[int(key)].stored["hidden_states"]
        assert tensors["hidden_states"].dtype == torch.bfloat16
        assert torch.equal(tensors["hidden_states"].float(), torch.from_numpy(expected.astype(np.float32)))


@pytest.mark.parametrize("ending", ["pyd", "pickle", "pkl", "pth", "x.pyd", "json.pyd"])
@pytest.mark.parametrize("is_compressed", [False, True])
def test_no_planted_member_is_unpickled(tmp_path: Path, ending: str, is_compressed: bool) -> None:
    data = pickle.dumps(_Touch(tmp_path / "planted"))
    name = f"000000.{ending}{'.gz' if is_compressed else ''}"
    url = _tar(tmp_path / "shard.tar", {"000000.json": b"{}", name: gzip.compress(data) if is_compressed else data})
    with pytest.raises(DecodingError) as caught:
        _decoded(url)
    assert isinstance(caught.value.__cause__, CorruptShardError)
    assert f"a member <key>.{ending}; expected <key>.json and <key>.safetensors" in str(caught.value.__cause__)
    assert not (tmp_path / "planted").exists()
    pickle.loads(data)  # noqa: S301 our own: it would have
    assert (tmp_path / "planted").exists()


@pytest.mark.parametrize("ending", ["npy", "txt", "jsn", "tar", "safetensors.json", "index"])
def test_other_members_are_refused(tmp_path: Path, ending: str) -> None:
    with pytest.raises(DecodingError) as caught:
        _decoded(_tar(tmp_path / "shard.tar", {f"000000.{ending}": b"1"}))
    assert isinstance(caught.value.__cause__, CorruptShardError)


def test_compressed_members_are_refused_where_they_are_not_unpacked_first(tmp_path: Path) -> None:
    url = _tar(tmp_path / "shard.tar", {"000000.json.gz": gzip.compress(b'{"a": 1}')})
    with pytest.raises(DecodingError) as caught:
        _decoded(url, pre=[])
    assert isinstance(caught.value.__cause__, CorruptShardError)
    assert _decoded(url)[0]["json.gz"] == {"a": 1}  # webdataset has unpacked it before any decoder is asked


def test_members_that_are_not_what_they_are_named_are_refused() -> None:
    decoder = wds_decoder()
    payload = encode({"x": np.arange(3)}).tobytes()
    np.testing.assert_array_equal(decoder(".safetensors", payload)["x"], np.arange(3))
    for name, data, text in [
        (".json", b"null", "is not a record: Expected `object`, got `null`"),
        (".json", b"{", "is not a record"),
        (".json", b'{"a": "\xff"}', "is not a record"),
        (".safetensors", payload[:-1], "member <key>.safetensors: tensors end at byte"),
    ]:
        with pytest.raises(CorruptShardError, match=text):
            decoder(name, data)
