"""Merging joins slices of one source, and refuses everything else."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tracekit.run.merge as merge_module
from tests.runs_for_tests import hashes, run_trivia
from tracekit import TraceStore, verify
from tracekit.errors import CorruptShardError, DatasetError, PlanMismatchError
from tracekit.format.manifest import Manifest, read_struct
from tracekit.run.merge import merge


@pytest.fixture(scope="module")
def slices(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("slices")
    for offset in (0, 6):
        run_trivia(root / str(offset), model, source={"offset": offset, "limit": 6})
    return [root / "0", root / "6"]


def test_two_slices_become_what_one_run_would_have_been(slices: list[Path], model: Path, tmp_path: Path):
    manifest = merge(list(reversed(slices)), tmp_path / "joined")
    run_trivia(tmp_path / "whole", model)
    joined, whole = TraceStore(str(tmp_path / "joined")), TraceStore(str(tmp_path / "whole"))
    assert verify(tmp_path / "joined").problems == []
    assert manifest.run["source"]["offset"] == 0
    assert manifest.run["source"]["limit"] == 12
    assert joined.keys == whole.keys
    for key in joined.keys:
        assert joined.record(key).generated_text == whole.record(key).generated_text
        np.testing.assert_allclose(joined.hidden_states(key), whole.hidden_states(key), atol=1e-4)
    shards = {joined.record(key).shard for key in joined.keys}
    assert shards == set(range(len(manifest.shards)))


def test_slices_that_overlap_are_refused(slices: list[Path], tmp_path: Path):
    with pytest.raises(DatasetError, match="row 0 of the source is in"):
        merge([slices[0], slices[0]], tmp_path / "joined")


def test_runs_that_differ_are_refused_with_the_difference(slices: list[Path], model: Path, tmp_path: Path):
    run_trivia(tmp_path / "other", model, source={"offset": 6, "limit": 6}, generation={"max_new_tokens": 3})
    with pytest.raises(PlanMismatchError, match=r"run\.generation: .*max_new_tokens': 6"):
        merge([slices[0], tmp_path / "other"], tmp_path / "joined")


def test_a_folder_that_exists_is_not_overwritten(slices: list[Path], tmp_path: Path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(DatasetError, match="exists already"):
        merge(slices, tmp_path)


def test_a_merge_that_was_killed_resumes_and_gives_the_same_bytes(
    slices: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Killed(BaseException):
        pass

    def dying(number: int) -> Any:
        left = iter(range(number))

        def change(*args: Any, **kwargs: Any) -> Any:
            if next(left, None) is None:
                raise Killed
            return fsync(*args, **kwargs)

        return change

    fsync, sources = os.fsync, [hashes(folder) for folder in slices]
    monkeypatch.setattr(merge_module, "_SAMPLES_AT_ONCE", 2)
    merge(slices, tmp_path / "whole")
    whole = hashes(tmp_path / "whole")
    num_killed, step = 0, 0
    for step in (0, 1, 2, 5, 9, 15, 21, 27, 33, 100):
        out = tmp_path / f"{step}"
        for further in (step, step // 3 + 1, 100):
            monkeypatch.setattr(os, "fsync", dying(further))
            try:
                merge(slices, out)
                break
            except Killed:
                num_killed += 1
        assert hashes(out) == whole
    monkeypatch.setattr(os, "fsync", dying(0))
    merge(slices, tmp_path / "whole")
    assert hashes(tmp_path / "whole") == whole, "a second time there is nothing to do"
    assert [hashes(folder) for folder in slices] == sources
    assert num_killed >= 12


def test_another_merge_is_not_continued(slices: list[Path], model: Path, tmp_path: Path):
    merge(slices, tmp_path / "joined")
    run_trivia(tmp_path / "more", model, source={"offset": 12, "limit": 2})
    before = hashes(tmp_path / "joined")
    for folders in ([*slices, tmp_path / "more"], slices[:1]):
        with pytest.raises(DatasetError, match="not by a merge of these folders"):
            merge(folders, tmp_path / "joined")
    assert hashes(tmp_path / "joined") == before


def test_a_run_that_is_not_finished_is_refused(slices: list[Path], tmp_path: Path):
    open_run = shutil.copytree(slices[1], tmp_path / "open")
    (open_run / "manifests/trivia_qa.json").unlink()
    with pytest.raises(DatasetError, match="is not finished"):
        merge([slices[0], open_run], tmp_path / "joined")


def test_a_part_whose_shards_are_on_the_hub_only_is_refused(slices: list[Path], tmp_path: Path):
    freed = Path(shutil.copytree(slices[1], tmp_path / "freed"))
    shard = sorted(freed.glob("data/*/*.tar"))[1]
    shard.unlink()
    with pytest.raises(DatasetError) as caught:
        merge([slices[0], freed], tmp_path / "joined")
    assert str(caught.value) == (
        f"{shard} is not here; merging needs the shards. Fetch a published dataset first "
        "(huggingface_hub.snapshot_download)"
    )


def test_a_shard_that_was_altered_is_not_given_a_new_hash(slices: list[Path], tmp_path: Path):
    damaged = Path(shutil.copytree(slices[1], tmp_path / "damaged"))
    shard = next(damaged.glob("data/*/*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptShardError, match="is not what its sidecar says"):
        merge([slices[0], damaged], tmp_path / "joined")


def test_replays_of_a_shard_are_counted_once(slices: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(merge_module, "_SAMPLES_AT_ONCE", 2)
    merged = merge(slices, tmp_path / "joined").verification
    parts = [read_struct(folder / "manifests" / "trivia_qa.json", Manifest).verification for folder in slices]
    assert merged.num_replayed == sum(part.num_replayed for part in parts)
    assert merged.num_positions == sum(part.num_positions for part in parts)
