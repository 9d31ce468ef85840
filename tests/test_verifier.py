"""Verification notices every kind of damage, names the file, and never changes anything."""

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.datasets_for_tests import MadeChoices, choice_spans, make_choices, make_sample, write_dataset
from tests.runs_for_tests import hashes
from tests.tiny_checkpoint import save_tiny_checkpoint
from tracekit import verify
from tracekit.errors import CaptureError, DatasetError, ModelError
from tracekit.format.layout import Layout
from tracekit.run.recheck import replay_stored

SHARD = "data/trivia_qa/validation-00001.tar"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def cut(path: Path, num_bytes: int) -> None:
    os.truncate(path, path.stat().st_size - num_bytes)


def rewrite_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def leave_a_pointer(path: Path) -> None:
    """What `git clone` leaves of a large file where Git LFS is not installed."""
    size = path.stat().st_size
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {size}\n")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit in a tensor": (lambda d: flip(d / SHARD, 9000), "SHA-256 is not the manifest's"),
    "a bit in a tar header": (lambda d: flip(d / SHARD, 3), "SHA-256|no tar header"),
    "a shard cut inside": (lambda d: cut(d / SHARD, 3000), "bytes, the manifest says"),
    "a shard cut at a member boundary": (lambda d: cut(d / SHARD, 1024), "bytes, the manifest says"),
    "a pointer of Git LFS": (lambda d: leave_a_pointer(d / SHARD), "run `git lfs pull`"),
    "a table's pointer of Git LFS": (
        lambda d: leave_a_pointer(d / "records/trivia_qa/validation.parquet"),
        "run `git lfs pull`",
    ),
    "a missing shard": (lambda d: (d / SHARD).unlink(), "missing"),
    "a stranger in data": (
        lambda d: shutil.copy(d / SHARD, d / "data/trivia_qa/validation-00099.tar"),
        "belongs to no",
    ),
    "a link": (
        lambda d: (d / "data/trivia_qa/x.tar").symlink_to("/etc/passwd"),
        r"x\.tar is a symbolic link that leads out",
    ),
    "a link to a folder": (
        lambda d: (d / "data/more").symlink_to("/etc"),
        "data/more is a symbolic link that leads out",
    ),
    "a link to nothing": (lambda d: (d / "figures").symlink_to(d / "nowhere"), "figures is a symbolic link to nothing"),
    "an altered table": (lambda d: flip(d / "records/trivia_qa/validation.parquet", 50), "SHA-256"),
    "a missing table": (lambda d: (d / "records/trivia_qa/validation.tar").unlink(), "missing"),
    "an altered schema": (lambda d: flip(d / "schemas/trivia_qa.json", 5), "schemas/trivia_qa.json: "),
    "an altered description": (
        lambda d: rewrite_json(d / "schemas/trivia_qa.json", lambda s: s["$defs"]["Span"].update(description="x")),
        "schemas/trivia_qa.json: ",
    ),
    "a missing index": (lambda d: (d / "manifest.json").unlink(), "manifest.json cannot be read"),
    "an altered manifest": (
        lambda d: rewrite_json(d / "manifests/trivia_qa.json", lambda m: m["metrics"].clear()),
        "its entry of trivia_qa is not",
    ),
    "a manifest that lies about counts": (
        lambda d: rewrite_json(d / "manifests/trivia_qa.json", lambda m: m["shards"][1].update(num_samples=3)),
        "5 samples, the manifest says 3",
    ),
    "a plan that is no plan": (lambda d: (d / "plans/trivia_qa.json").write_text("{}"), "is not a tracekit plan"),
    "a plan of the future": (
        lambda d: rewrite_json(d / "plans/trivia_qa.json", lambda p: p.update(schema_version="9.0")),
        "written by tracekit schema 9.0; this one reads 1.0 to 2.x",
    ),
}


def test_an_untouched_dataset_is_right_and_stays_as_it_is(finished: Path):
    before = hashes(finished)
    report = verify(str(finished))
    assert report.problems == []
    assert report.num_samples == 12
    assert report.num_bytes == sum(path.stat().st_size for path in finished.glob("data/*/*.tar"))
    assert hashes(finished) == before


def test_links_to_files_that_the_manifests_know_are_fine(copy: Path, tmp_path: Path):
    blobs = tmp_path / "datasets--o--n" / "blobs"  # as the Hub's client keeps what it downloads
    blobs.mkdir(parents=True)
    copy = copy.rename((blobs.parent / "snapshots").mkdir() or blobs.parent / "snapshots" / "0abc")
    for number, path in enumerate(sorted(path for path in copy.rglob("*") if path.is_file())):
        path.rename(blobs / f"{number:040x}")
        path.symlink_to(os.path.relpath(blobs / f"{number:040x}", path.parent))
    report = verify(copy)
    assert report.problems == []
    assert report.num_samples == 12
    flip((copy / SHARD).resolve(), 9000)
    assert verify(copy).problems == [f"{SHARD}: SHA-256 is not the manifest's; its bytes were altered"]


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_noticed_and_named(copy: Path, name: str):
    damage, message = DAMAGE[name]
    damage(copy)
    problems = verify(copy).problems
    assert problems
    import re

    assert any(re.search(message, problem) for problem in problems), problems


def rewrite_shard(folder: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Rewrite a shard and make size and hash in the manifest agree, as one who wants to deceive would."""
    import hashlib

    from tracekit.format.shards import tar_header

    path = folder / SHARD
    with tarfile.open(path) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    parts = []
    for name, data in members:
        changed = change(name, data)
        parts += [tar_header(name, len(changed)), changed, bytes(-len(changed) % 512)]
    path.write_bytes(b"".join([*parts, bytes(1024)]))
    facts = {"num_bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    rewrite_json(folder / "manifests/trivia_qa.json", lambda m: m["shards"][1].update(facts))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b'"schema_version"', b'"schema_versiom"', "missing required field|unknown field"),
        (b'"shape":[3,', b'"shape":[4,', "declared float32"),
        (b'"layers":[0,1,2]', b'"layers":[0,1]', "axis L is 3, its layers and positions say 2"),
        (b'"dtype":"float32","shape"', b'"dtype":"float16","shape"', "declared float16"),
        (b'"config":"trivia_qa"', b'"config":"another"', "configuration 'another'"),
        (
            b'"positions":[[0,',
            b'"positions":[[-1,',
            r"tensor 'hidden_states': positions \[\[-1, \d+\]\] of a text of \d+",
        ),
        (b'"positions":[[0,', b'"positions":[[4294967296,4294967299],[0,', "tensor 'attentions': positions "),
        (b'"name":"attentions"', b'"name":"attentionz"', "tensor 'attentions' is not declared"),
        (b'"seed":', b'"seed":1000000000000000000', r"past 64 bits - at `\$\.seed`"),
    ],
)
def test_records_and_tensors_are_held_against_each_other(copy: Path, before: bytes, after: bytes, message: str):
    rewrite_shard(copy, lambda name, data: data.replace(before, after) if name.endswith(".json") else data)
    import re

    assert any(re.search(message, problem) for problem in verify(copy).problems)


def test_a_folder_that_is_no_dataset_is_an_error(tmp_path: Path):
    with pytest.raises(DatasetError, match="no such folder"):
        verify(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"is not a tracekit dataset: it holds no plans/<config>\.json$"):
        verify(tmp_path)


def test_a_place_beside_the_dataset_is_an_error_that_says_where_the_dataset_is(copy: Path):
    with pytest.raises(DatasetError, match="it is a file: give the folder of the dataset"):
        verify(copy / "manifest.json")
    with pytest.raises(DatasetError, match=f"give one of the datasets in it: .*'{copy.name}'"):
        verify(copy.parent)


def test_an_unknown_configuration_is_an_error(finished: Path):
    with pytest.raises(DatasetError, match="has no configuration 'x'; it has trivia_qa"):
        verify(finished, config="x")


def test_a_replay_loads_the_model_and_agrees(finished: Path, model: Path):
    result = replay_stored(Layout(finished, "trivia_qa"), 3, model=str(model), adapter=None, device="cpu")
    assert result.num_replayed == 3
    assert result.num_agreeing == result.num_positions
    assert all(error.max_rel_error < 1e-4 for error in result.sites)


def test_a_replay_with_another_model_is_refused(finished: Path, tmp_path: Path):
    other = save_tiny_checkpoint(tmp_path / "tiny", seed=5)
    with pytest.raises(ModelError, match=r"was made by tiny at .*Give the right one with --model"):
        replay_stored(Layout(finished, "trivia_qa"), 1, model=str(other), adapter=None, device="cpu")


def test_a_replay_notices_altered_tensors(copy: Path, model: Path):
    def alter(name: str, data: bytes) -> bytes:
        middle = len(data) - 400
        return data[:middle] + bytes(400) if name.endswith(".safetensors") else data

    rewrite_shard(copy, alter)
    with pytest.raises(CaptureError, match="differs from a lone eager run"):
        replay_stored(Layout(copy, "trivia_qa"), 12, model=str(model), adapter=None, device="cpu")


def problems_of(folder: Path, made: Any) -> list[str]:
    """What is wrong with a sample, written as it is."""
    write_dataset(folder, {"train-00000": [made]}, config=made.record.config, is_finished=False)
    return verify(folder).problems


def with_spec(made: MadeChoices, number: int, **changes: Any) -> MadeChoices:
    specs = list(made.record.tensors)
    specs[number] = msgspec.structs.replace(specs[number], **changes)
    return made._replace(record=msgspec.structs.replace(made.record, tensors=specs))


def test_choices_that_are_right_have_no_problem(tmp_path: Path):
    assert problems_of(tmp_path, make_choices("000000")) == []


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        (
            0,
            {"choice_offsets": [0, 2, 5, 9]},
            r"'hidden_states': choices at [0, 2, 5, 9], its record says [0, 3, 5, 9]",
        ),
        (0, {"choice_offsets": []}, "'hidden_states': choices at [], its record says [0, 3, 5, 9]"),
        (0, {"choice_offsets": [0, 5, 3, 9]}, "choice_offsets [0, 5, 3, 9], expected 0 and then larger"),
        (0, {"positions": [[0, 8]]}, "axis T is 9, its layers and positions say 8"),
        (0, {"positions": [[1, 10]]}, "of a text of 9 tokens"),
        (1, {"choice_offsets": [0, 4, 5, 9]}, "'attentions': axis S is 29, its choice_offsets [0, 4, 5, 9] say 33"),
        (1, {"num_keys": 9}, "'attentions': positions [[0, 9]] and num_keys 9, expected [[0, 9]] and 0"),
        (1, {"choice_offsets": []}, "'attentions': 29 keys, declared 0"),
        (2, {"layers": [0, 1]}, "'queries': axis L is 3, its layers and positions say 2"),
    ],
)
def test_choices_are_held_against_the_tensors(tmp_path: Path, number: int, changes: dict[str, Any], message: str):
    problems = problems_of(tmp_path, with_spec(make_choices("000000"), number, **changes))
    assert any(message in problem and "train-00000.tar: 000000: tensor" in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 3, 5, 10], "choices end at token 10 of 9"),
        ([1, 3, 5, 9], "its choices lie at [[1, 3], [3, 5], [5, 9]]"),
        ([0, 5, 5, 9], "its choices lie at [[0, 5], [5, 5], [5, 9]]"),
        ([0, 5, 9], "'hidden_states': choices at [0, 3, 5, 9], its record says [0, 5, 9]"),
        ([], "'hidden_states': holds choices, its record none"),
    ],
)
def test_choices_are_held_against_the_tokens(tmp_path: Path, offsets: list[int], message: str):
    made = make_choices("000000", sites=("hidden_states",))
    made = made._replace(record=msgspec.structs.replace(made.record, spans=choice_spans(offsets)))
    assert [problem for problem in problems_of(tmp_path, made) if message in problem]


def test_choices_in_a_task_without_them_are_noticed(tmp_path: Path):
    made = with_spec(make_sample("000000"), 0, choice_offsets=[0, 4, 9])  # type: ignore[arg-type]
    assert [one for one in problems_of(tmp_path, made) if "'hidden_states': holds choices, its record none" in one]


def test_the_manifest_of_a_named_configuration_is_compared_with_the_index_too(copy: Path):
    assert verify(copy, config="trivia_qa").problems == []
    rewrite_json(copy / "manifests/trivia_qa.json", lambda manifest: manifest["metrics"][0].update(value=0.99))
    assert any(
        one.startswith("manifest.json: its entry of trivia_qa") for one in verify(copy, config="trivia_qa").problems
    )
