"""The loading script: what it loads is what TraceStore reads, and a damaged dataset is never loaded in silence."""

import ast
import hashlib
import shutil
import sys
import tarfile
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import fsspec
import ml_dtypes
import msgspec
import numpy as np
import pytest

from tests.datasets_for_tests import Made, MadeChoices, make_choices, make_sample, write_dataset
from tests.tasks_for_tests import SCHEMAS
from tracekit import TraceStore
from tracekit.card.script import render_script
from tracekit.errors import DatasetError
from tracekit.format.manifest import FileInfo, Manifest, Sidecar, read_struct, to_bytes
from tracekit.format.shards import sha256_file
from tracekit.read.tables import write_records_tar
from tracekit.sites import SITES
from tracekit.tensors import encode, pack_indices

Import = Callable[[Path], Any]


def rendered(manifests: Sequence[Manifest]) -> str:
    """The loading script of configurations."""
    return render_script(manifests, {manifest.config: SCHEMAS[manifest.task] for manifest in manifests})


def add_script(folder: Path) -> Path:
    """Write the loading script of a dataset folder."""
    script = folder / "load_traces.py"
    script.write_text(rendered([read_struct(path, Manifest) for path in (folder / "manifests").glob("*.json")]))
    return folder


def write(
    folder: Path, made: list[Made] | list[MadeChoices], *, config: str = "trivia_qa", **shards: list[Made]
) -> Path:
    """A finished dataset folder of made-up samples, loading script included."""
    layout = write_dataset(folder, {"train-00000": made, **shards}, config=config)
    tar = layout.records_tar("train")
    write_records_tar(tar, (read_struct(path, Sidecar) for path in sorted(layout.sidecar("").parent.glob("*.json"))))
    info = FileInfo(path=tar.relative_to(folder).as_posix(), num_bytes=tar.stat().st_size, sha256=sha256_file(tar))
    manifest = msgspec.structs.replace(read_struct(layout.manifest, Manifest), files=[info])
    layout.manifest.write_bytes(to_bytes(manifest))
    return add_script(folder)


def rewrite(shard: Path, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> None:
    """Change the members of a tar."""
    with tarfile.open(shard) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # pyright: ignore
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))


def assert_same(row: dict[str, Any], store: TraceStore, *, has_tensors: bool = True) -> None:
    """A row with arrays or lists is the sample of that key."""
    record = msgspec.to_builtins(store.record(row["key"]))
    assert {name: row[name] for name in record} == record
    names = {spec["name"] for spec in record["tensors"]} if has_tensors else set()
    assert {*row} == {*record, *names}
    for name in names:
        expected = store.tensor(row["key"], name).astype(np.float64)
        np.testing.assert_array_equal(np.asarray(row[name]), expected)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache/downloads")


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, with its loading script."""
    return add_script(Path(shutil.copytree(finished, tmp_path / "run")))


def load(builder: Any) -> datasets.Dataset:
    builder.download_and_prepare()
    (split,) = builder.as_dataset().values()
    return split


def stream(builder: Any) -> list[dict[str, Any]]:
    (split,) = builder.as_streaming_dataset().values()
    return list(split)


# ---------------------------------------------------------------- values


def test_a_run_comes_back_row_by_row(folder: Path, imported: Import):
    store = TraceStore(folder)
    dataset = load(imported(folder)(config_name="trivia_qa"))
    assert sorted(dataset["key"]) == store.keys
    for row in dataset:
        assert_same(row, store)
    arrays = dataset.with_format("numpy")[0]["hidden_states"]
    assert arrays.dtype == np.float32
    np.testing.assert_array_equal(arrays, store.hidden_states(dataset[0]["key"]))


def test_a_run_streams_row_by_row(folder: Path, imported: Import):
    store = TraceStore(folder)
    rows = stream(imported(folder)(config_name="trivia_qa"))
    assert sorted(row["key"] for row in rows) == store.keys
    for row in rows:
        assert_same(row, store)


@pytest.mark.parametrize("arguments", [{}, {"config_name": "trivia_qa_records"}])
def test_the_records_alone_are_the_default(folder: Path, imported: Import, arguments: dict[str, str]):
    shutil.rmtree(folder / "data/trivia_qa")
    builder = imported(folder)(**arguments)
    dataset = load(builder)
    assert dataset.column_names == [field.name for field in SCHEMAS["trivia_qa"].arrow]
    assert [row["key"] for row in stream(builder)] == dataset["key"] == sorted(dataset["key"])


def test_records_have_the_types_that_they_declare(folder: Path, imported: Import):
    features = imported(folder)(config_name="trivia_qa_records").info.features
    assert features == datasets.Features.from_arrow_schema(SCHEMAS["trivia_qa"].arrow)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("layout", ["causal", "full"])
def test_every_site_dtype_and_layout(tmp_path: Path, imported: Import, dtype: str, layout: str):
    made = [make_sample(f"{i:06d}", sites=tuple(SITES), num_tokens=7 + i, dtype=dtype, layout=layout) for i in range(3)]
    builder = imported(write(tmp_path / "run", made))(config_name="trivia_qa")
    dataset = load(builder)
    with TraceStore(tmp_path / "run") as store:
        for row in [*dataset, *stream(builder)]:
            assert_same(row, store)
    arrow = dataset.with_format("arrow")[:]
    stored = "float32" if dtype in ("bfloat16", "float8_e4m3fn") else dtype
    types = {"float32": "float", "float16": "halffloat"}
    assert str(arrow["hidden_states"].type) == f"list<item: list<item: list<item: {types[stored]}>>>"
    exact = dataset.with_format("numpy", columns=["keys", "attentions"], dtype=np.dtype(stored))[2]
    assert exact["keys"].dtype == exact["attentions"].dtype == stored
    np.testing.assert_array_equal(exact["keys"], made[2].expected["keys"].astype(stored))
    np.testing.assert_array_equal(exact["attentions"], made[2].expected["attentions"].astype(stored))
    about = builder.info.description
    assert (f"widened from {dtype}" in about) == (stored != dtype)
    assert ("attentions: (L, H, rows, T)" in about) == (layout == "causal")


@pytest.mark.parametrize("kept", [[[5, 9]], [[0, 2], [4, 5]], [[8, 9]], []])
@pytest.mark.parametrize("layout", ["causal", "full"])
def test_tokens_that_were_kept(tmp_path: Path, imported: Import, kept: list[list[int]], layout: str):
    made = [make_sample("000000", kept=kept, layout=layout), make_sample("000001", kept=kept, layout=layout)]
    row = load(imported(write(tmp_path / "run", made))(config_name="trivia_qa"))[0]
    expected = made[0].expected
    num_rows = sum(stop - start for start, stop in kept)
    assert np.shape(row["hidden_states"])[:2] == (4, num_rows)
    if num_rows:
        np.testing.assert_array_equal(row["hidden_states"], expected["hidden_states"])
        np.testing.assert_array_equal(row["attentions"], expected["attentions"])


def test_layers_that_were_kept_and_shapes_that_differ_by_layer(tmp_path: Path, imported: Import):
    heads = {"attentions": [4, 2, 4]}
    made = [make_sample("000000", layers=[0, 2], heads_by_layer=heads)]
    row = load(imported(write(tmp_path / "run", made))(config_name="trivia_qa"))[0]
    for name in ("hidden_states", "attentions.0", "attentions.2"):
        np.testing.assert_array_equal(row[name], made[0].expected[name])


def test_a_tensor_that_a_sample_does_not_have_is_null(tmp_path: Path, imported: Import):
    made = [make_sample("000000"), make_sample("000001", sites=("hidden_states",))]
    rows = load(imported(write(tmp_path / "run", made))(config_name="trivia_qa"))
    assert rows[1]["attentions"] is None
    np.testing.assert_array_equal(rows[0]["attentions"], made[0].expected["attentions"])


def test_every_float8_and_bfloat16_is_widened_as_ml_dtypes_does(folder: Path, imported: Import):
    decode = sys.modules[imported(folder).__module__].decode_tensors
    bits8, bits16 = np.arange(256, dtype=np.uint8), np.arange(65536, dtype=np.uint16)
    values = {"a": bits8.view(ml_dtypes.float8_e4m3fn), "b": bits16.view(ml_dtypes.bfloat16)}
    decoded = decode(encode(values).tobytes())
    for name, array in values.items():
        np.testing.assert_array_equal(decoded[name], array.astype(np.float32))
        assert decoded[name].dtype == np.float32


def test_packed_attention_is_unpacked_for_any_rows(folder: Path, imported: Import):
    unpack = sys.modules[imported(folder).__module__].unpack_causal
    square = np.tril(np.arange(1, 26).reshape(5, 5))
    for rows in ([0, 1, 2, 3, 4], [3], [1, 4], []):
        index = np.array(rows, int)
        packed = square.reshape(-1)[pack_indices(index, 5)]
        np.testing.assert_array_equal(unpack(packed, index, 5), square[index])
        with pytest.raises(ValueError, match=f"{len(packed) + 1} packed values, expected {len(packed)} for"):
            unpack(np.append(packed, 1), index, 5)


def test_several_processes_load_the_same_rows(tmp_path: Path, imported: Import):
    made = [make_sample(f"{i:06d}") for i in range(4)]
    shards = {"train-00001": made[2:3], "train-00002": made[3:]}
    builder = imported(write(tmp_path / "run", made[:2], **shards))(config_name="trivia_qa")
    builder.download_and_prepare(num_proc=2)
    dataset = builder.as_dataset(split="train")
    assert dataset["key"] == ["000000", "000001", "000002", "000003"]
    np.testing.assert_array_equal(dataset[3]["hidden_states"], made[3].expected["hidden_states"])
    shuffled = builder.as_streaming_dataset(split="train").shuffle(seed=1, buffer_size=1)
    assert sorted(row["key"] for row in shuffled) == dataset["key"]


# ---------------------------------------------------------------- where the data is


def test_two_datasets_in_one_cache_do_not_mix(tmp_path: Path, imported: Import):
    for name in ("a", "b"):
        write(tmp_path / name, [make_sample(f"{name}{i}") for i in range(2)])
    for name in ("a", "b", "a"):
        dataset = load(imported(tmp_path / name)(str(tmp_path / "one-cache"), config_name="trivia_qa"))
        assert dataset["key"] == [f"{name}0", f"{name}1"]
    cached = (tmp_path / "one-cache/load_traces/trivia_qa/1.0.0").iterdir()
    assert sum(path.is_dir() for path in cached) == 2


def test_a_folder_that_changed_is_loaded_anew(tmp_path: Path, imported: Import):
    for answers in ("old", "new"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        write(tmp_path / "run", [make_sample("000000", question_id=answers)])
        assert load(imported(tmp_path / "run")(config_name="trivia_qa"))["question_id"] == [answers]


def test_the_script_may_be_a_link_and_the_folder_anywhere(
    folder: Path, imported: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    blob = (folder / "load_traces.py").rename(tmp_path / "blob")  # as the Hub's cache stores files
    (folder / "load_traces.py").symlink_to(blob)
    assert len(stream(imported(folder)(config_name="trivia_qa"))) == 12
    away = tmp_path / "away"
    away.mkdir()
    (away / "load_traces.py").write_bytes(blob.read_bytes())
    monkeypatch.chdir(tmp_path)
    builder = imported(away)(config_name="trivia_qa", base_path="run")
    monkeypatch.chdir(away)
    assert load(builder).num_rows == len(stream(builder)) == 12


def test_data_may_be_at_an_address(folder: Path, imported: Import):
    fsspec.filesystem("memory").put(str(folder / "data"), "/bucket/run/data", recursive=True)
    shutil.rmtree(folder / "data")
    rows = stream(imported(folder)(config_name="trivia_qa", base_path="memory://bucket/run"))
    assert {row["key"] for row in rows} == {f"{i:06d}" for i in range(12)}


def test_datasets_reads_the_folder_as_before(folder: Path):
    assert datasets.load_dataset(str(folder))["validation"].num_rows == 12
    rows = list(datasets.load_dataset(str(folder), "trivia_qa", streaming=True)["validation"])
    assert len(rows) == 12
    assert {*rows[0]} == {"json", "safetensors", "__key__", "__url__"}


# ---------------------------------------------------------------- damage


def drop_last(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return members[:-2]


def drop_tensors(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return members[:-1]


def add_alien(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return [*members, ("000099.pyd", b"x")]


def add_second_tensors(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return [*members, members[-1]]


def swap_tensors(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return [members[0], members[3], members[2], members[1]]


def cut_tensors(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return [*members[:-1], (members[-1][0], members[-1][1][:-8])]


def other_tensors(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return [*members[:-1], (members[-1][0], encode({"x": np.zeros(1, np.float32)}).tobytes())]


def wider_tensors(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    tensors = {"hidden_states": np.zeros((4, 9, 8), np.float64), "attentions": np.zeros((3, 4, 45), np.float32)}
    return [*members[:-1], (members[-1][0], encode(tensors).tobytes())]


def other_field(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return [(members[0][0], members[0][1].replace(b'"question":', b'"query":')), *members[1:]]


def other_rows(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return [(members[0][0], members[0][1].replace(b'"num_keys":9', b'"num_keys":8')), *members[1:]]


def huge_rows(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return other_positions(members, b"[[4294967296,4294967305]]")


def hidden_rows(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return other_positions(members, b"[[-4294967296,4294967295],[0,9]]")  # these pack to 45 values too


def other_positions(members: list[tuple[str, bytes]], positions: bytes) -> list[tuple[str, bytes]]:
    before, mark, after = members[0][1].partition(b'"name":"attentions"')
    return [(members[0][0], before + mark + after.replace(b"[[0,9]]", positions, 1)), *members[1:]]


def other_key(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return [(name.replace("000001", "000007"), data) for name, data in members]


def no_json(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return [(members[0][0], members[0][1][:-9]), *members[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_last, "holds 1 samples, expected 2"),
        (drop_tensors, "found 'the end' after '000001.json', expected '000001.safetensors'"),
        (add_alien, "found member '000099.pyd', expected the record of a sample"),
        (add_second_tensors, "found member '000001.safetensors'"),
        (swap_tensors, "found '000001.safetensors' after '000000.json', expected '000000.safetensors'"),
        (cut_tensors, "sample '000001': the tensors cannot be read"),
        (
            other_tensors,
            r"sample '000001': the payload holds \['x'\], the record names \['attentions', 'hidden_states'\]",
        ),
        (wider_tensors, r"hidden_states is float64 \(4, 9, 8\), expected float32 with axes \(L, T, D\)"),
        (other_field, "sample '000000': the fields query, question are only in the record or only in DATASET"),
        (other_rows, r"sample '000000': attentions has positions \[\[0, 9\]\] of 8 keys, in a text of 9 tokens"),
        (huge_rows, r"sample '000000': attentions has positions \[\[4294967296, 4294967305\]\] of 9 keys"),
        (hidden_rows, r"attentions has positions \[\[-4294967296, 4294967295\], \[0, 9\]\] of 9 keys"),
        (other_key, "sample '000007': the record's key is '000001'"),
        (no_json, "sample '000000': the record is not JSON"),
    ],
)
def test_a_shard_that_is_not_what_it_should_be_is_named(
    tmp_path: Path, imported: Import, change: Callable[[Any], Any], message: str
):
    folder = write(tmp_path / "run", [make_sample("000000"), make_sample("000001")])
    rewrite(folder / "data/trivia_qa/train-00000.tar", change)
    builder = imported(folder)(config_name="trivia_qa")
    with pytest.raises(ValueError, match=rf"^data/trivia_qa/train-00000\.tar.*{message}.*Get the file again"):
        stream(builder)
    with pytest.raises(
        ValueError, match=r"^data/trivia_qa/train-00000\.tar has \d+ bytes, expected \d+\. Get the file"
    ):
        load(builder)


def test_a_shard_cut_anywhere_is_named(tmp_path: Path, imported: Import):
    folder = write(tmp_path / "run", [make_sample("000000"), make_sample("000001")])
    shard = folder / "data/trivia_qa/train-00000.tar"
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        starts = [member.offset for member in tar]
    builder = imported(folder)(config_name="trivia_qa")
    for size in {0, 100, *starts, *(start + 700 for start in starts)}:
        shard.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"^data/trivia_qa/train-00000\.tar"):
            stream(builder)


def test_a_bad_sample_of_the_right_size_stops_the_load_and_leaves_no_rows(tmp_path: Path, imported: Import):
    folder = write(tmp_path / "run", [make_sample("000000"), make_sample("000001")])
    shard = folder / "data/trivia_qa/train-00000.tar"
    shard.write_bytes(shard.read_bytes().replace(b'"question":', b'"quastion":'))
    builder = imported(folder)(config_name="trivia_qa")
    with pytest.raises(datasets.exceptions.DatasetGenerationError) as caught:
        load(builder)
    assert "the fields quastion, question are only in" in str(caught.value.__cause__)
    with pytest.raises(FileNotFoundError):
        builder.as_dataset()


def test_a_short_records_tar_is_named(folder: Path, imported: Import):
    rewrite(folder / "records/trivia_qa/validation.tar", lambda members: members[:-1])
    with pytest.raises(ValueError, match=r"records/trivia_qa/validation\.tar holds 11 samples, expected 12"):
        stream(imported(folder)(config_name="trivia_qa_records"))


def test_a_shard_that_is_not_there_is_named(folder: Path, imported: Import):
    (folder / "data/trivia_qa/validation-00001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"validation-00001\.tar"):
        load(imported(folder)(config_name="trivia_qa"))


# ---------------------------------------------------------------- choices


@pytest.fixture
def choices(tmp_path: Path) -> list[MadeChoices]:
    """Samples of three and of two choices, with their loading script, in `tmp_path / "choices"`."""
    made = [
        make_choices(f"{i:06d}", lengths=lengths, dtype="bfloat16") for i, lengths in enumerate([(3, 2, 4), (5, 1)])
    ]
    write(tmp_path / "choices", made, config="csqa_mcq")
    return made


@pytest.mark.parametrize("read", [load, stream])
def test_attention_of_choices_is_a_list_of_them(
    tmp_path: Path, imported: Import, choices: list[MadeChoices], read: Callable[[Any], Any]
):
    builder = imported(tmp_path / "choices")(config_name="csqa_mcq")
    assert "attentions: (C, L, H, T, T), widened from bfloat16, a list of choices" in builder.info.description
    for row, one in zip(read(builder), choices, strict=True):
        assert row["choice_offsets"] == one.record.choice_offsets
        for name, stored in one.stored.items():
            if name != "attentions":
                np.testing.assert_array_equal(np.asarray(row[name]), stored.astype(np.float64))
        for array, expected in zip(row["attentions"], one.expected["attentions"], strict=True):
            np.testing.assert_array_equal(np.asarray(array), expected.astype(np.float64))


def test_choices_that_do_not_go_with_their_attention_are_named(
    tmp_path: Path, imported: Import, choices: list[MadeChoices]
):
    def other_choices(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        changed = members[0][1].replace(b'"choice_offsets":[0,3,5,9]', b'"choice_offsets":[0,4,5,9]')
        return [(members[0][0], changed), *members[1:]]

    rewrite(tmp_path / "choices/data/csqa_mcq/train-00000.tar", other_choices)
    with pytest.raises(ValueError, match=r"attentions has 29 packed values, expected 33 for choices at \[0, 4, 5, 9\]"):
        stream(imported(tmp_path / "choices")(config_name="csqa_mcq"))


# ---------------------------------------------------------------- rendering


def manifests_of(folder: Path) -> list[Manifest]:
    return [read_struct(path, Manifest) for path in sorted((folder / "manifests").glob("*.json"))]


def test_rendering_is_pure_and_the_first_configuration_is_the_default(finished: Path):
    (manifest,) = manifests_of(finished)
    other = msgspec.structs.replace(manifest, config="also")
    paths = [f"records/also/{split.name}.tar" for split in manifest.splits]
    files = [msgspec.structs.replace(manifest.files[-1], path=path) for path in paths]
    other = msgspec.structs.replace(other, files=files)
    assert rendered([manifest, other]) == rendered([manifest, other])

    def run(*manifests: Manifest) -> dict[str, Any]:
        namespace: dict[str, Any] = {"__file__": "load_traces.py", "__name__": "load_traces"}
        exec(compile(rendered(manifests), "load_traces.py", "exec"), namespace)  # noqa: S102
        return namespace

    one, two = run(manifest, other), run(other, manifest)
    names = [[config.name for config in made["LoadTraces"].BUILDER_CONFIGS] for made in (one, two)]
    assert names[0] == ["trivia_qa_records", "trivia_qa", "also_records", "also"]
    assert names[1] == ["also_records", "also", "trivia_qa_records", "trivia_qa"]
    assert [made["LoadTraces"].DEFAULT_CONFIG_NAME for made in (one, two)] == [name[0] for name in names]
    assert one["FINGERPRINT"] == two["FINGERPRINT"], "the same data is cached once"
    splits = one["DATASET"]["trivia_qa"]["splits"]
    assert [shard["num_samples"] for shard in splits["validation"]] == [5, 5, 2]
    assert splits["validation"][2]["path"] == "data/trivia_qa/validation-00002.tar"


def test_the_fingerprint_is_over_the_bytes_of_the_manifests(finished: Path):
    digest = hashlib.sha256((finished / "manifests/trivia_qa.json").read_bytes()).hexdigest()
    assert f'\nFINGERPRINT = "{digest}"\n' in rendered(manifests_of(finished))


def test_the_script_stands_alone_with_one_import_a_line(finished: Path):
    """datasets 3 finds imports line by line, and checks that each can be imported."""
    tree = ast.parse(rendered(manifests_of(finished)))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert all(node.lineno == node.end_lineno and node.col_offset == 0 for node in imports)
    found = {(node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name) for node in imports}
    assert {name.split(".")[0] for name in found} - sys.stdlib_module_names == {"datasets", "numpy", "safetensors"}


def test_two_configurations_of_one_name_are_refused(finished: Path):
    (manifest,) = manifests_of(finished)
    with pytest.raises(DatasetError, match=r"two configurations of load_traces\.py would be named 'trivia_qa_records'"):
        rendered([manifest, msgspec.structs.replace(manifest, config="trivia_qa_records")])


def test_tracekits_own_copy_loads_nothing():
    from tracekit.load_traces import LoadTraces

    with pytest.raises(ValueError, match=r"describes no dataset; use the load_traces\.py in the folder of a dataset"):
        LoadTraces(config_name="trivia_qa")


def test_an_unknown_configuration_is_refused_with_those_there_are(folder: Path, imported: Import):
    with pytest.raises(ValueError, match="trivia_qa_records"):
        imported(folder)(config_name="nothing")
