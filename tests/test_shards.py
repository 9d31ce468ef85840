"""Shards: the golden bytes, reproducible headers, and tars that other tools read."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tracekit.errors import CorruptShardError, DatasetError
from tracekit.format.layout import Layout
from tracekit.format.shards import ShardWriter, iter_members, iter_samples, tar_header
from tracekit.tensors import encode

GOLDEN = "390f80d2017597670525738ad8a0c215d223e3899f3957c2b75ce47f93c9b334"


def sample(key: str) -> tuple[str, bytes, object]:
    tensors = {"hidden_states": np.arange(12, dtype=np.float32).reshape(2, 3, 2), "topk_ids": np.arange(3)}
    return key, b'{"key":"%s"}' % key.encode(), encode(tensors)


def written(tmp_path: Path, batches: list[list[str]]) -> Path:
    layout = Layout(tmp_path, "c")
    with ShardWriter(layout, "train-00000", 0) as writer:
        for batch in batches:
            writer.append([sample(key) for key in batch])
        writer.finish()
    return layout.shard("train-00000")


def test_the_golden_shard_has_not_changed(tmp_path: Path):
    """If this fails the wire format has changed: raise SCHEMA_VERSION on purpose, or undo the change."""
    path = written(tmp_path, [["000000", "000001"], ["000002"]])
    assert hashlib.sha256(path.read_bytes()).hexdigest() == GOLDEN


def test_batches_leave_no_trace_in_the_bytes(tmp_path: Path):
    one = written(tmp_path / "one", [["a", "b", "c"]]).read_bytes()
    three = written(tmp_path / "three", [["a"], ["b"], ["c"]]).read_bytes()
    assert one == three


def test_headers_hold_no_clock_and_no_user():
    info = tarfile.TarInfo.frombuf(tar_header("000000.json", 7), "utf-8", "strict")
    assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (0, 0, 0, "", "", 0o644)


def test_tarfile_and_webdataset_read_a_shard(tmp_path: Path):
    path = written(tmp_path, [["000000"], ["000001"]])
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["000000.json", "000000.safetensors", "000001.json", "000001.safetensors"]
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [s["__key__"] for s in samples] == ["000000", "000001"]
    assert samples[0]["safetensors"] == sample("000000")[2].tobytes()


def test_the_sidecar_points_at_the_bytes(tmp_path: Path):
    layout = Layout(tmp_path, "c")
    with ShardWriter(layout, "train-00000", 0) as writer:
        writer.append([sample("a"), sample("b")])
        sidecar = writer.finish()
    data = layout.shard("train-00000").read_bytes()
    assert hashlib.sha256(data).hexdigest() == sidecar.sha256
    assert len(data) == sidecar.num_bytes
    for index in sidecar.samples:
        assert data[index.json_offset :][: index.json_size] == b'{"key":"%s"}' % index.key.encode()
        (hidden,) = [entry for entry in index.tensors if entry.name == "hidden_states"]
        raw = data[index.data_offset + hidden.offset :][: hidden.size]
        assert np.frombuffer(raw, np.float32).tolist() == list(range(12))


def test_a_large_member_gets_a_header_that_tarfile_understands():
    info = tarfile.TarInfo.frombuf(tar_header("x.safetensors", 20_000_000_000), "ascii", "strict")
    assert info.size == 20_000_000_000


@pytest.mark.parametrize("cut", [1, 512, 600, 1024, 2000])
def test_a_shard_that_is_cut_is_noticed(tmp_path: Path, cut: int):
    data = written(tmp_path, [["a"], ["b"]]).read_bytes()
    with pytest.raises(CorruptShardError, match=r"cut short|end mark|expected <key>|no tar header"):
        list(iter_samples(io.BytesIO(data[:-cut]), where="x"))


def test_bytes_after_the_end_are_noticed(tmp_path: Path):
    data = written(tmp_path, [["a"]]).read_bytes()
    with pytest.raises(CorruptShardError, match="after the end mark"):
        list(iter_members(io.BytesIO(data + bytes(512)), where="x"))


@pytest.mark.parametrize("name", ["../a.json", "/a.json", "d/a.json", ".hidden", "a\\b.json"])
def test_a_member_that_would_leave_the_archive_is_refused(name: str):
    tar = tar_header(name, 0) + bytes(1024)
    with pytest.raises(CorruptShardError, match="not a plain file"):
        list(iter_members(io.BytesIO(tar), where="x"))


def test_a_link_is_refused():
    info = tarfile.TarInfo("a.json")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with pytest.raises(CorruptShardError, match="not a plain file"):
        list(iter_members(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)), where="x"))


@pytest.mark.parametrize(
    "names",
    [
        ["a.json"],
        ["a.json", "b.safetensors"],
        ["a.safetensors", "a.json"],
        ["a.json", "a.pyd"],
        ["a.b.json", "a.b.safetensors"],
    ],
)
def test_members_that_are_no_pair_are_refused(names: list[str]):
    tar = b"".join(tar_header(name, 0) for name in names) + bytes(1024)
    with pytest.raises(CorruptShardError, match="expected <key>"):
        list(iter_samples(io.BytesIO(tar), where="x"))


def test_a_tar_nobody_noted_is_not_overwritten(tmp_path: Path):
    layout = Layout(tmp_path, "c")
    layout.shard("train-00000").parent.mkdir(parents=True)
    layout.shard("train-00000").write_bytes(b"someone's")
    with pytest.raises(DatasetError, match="without its sidecar"), ShardWriter(layout, "train-00000", 0):
        pass
    assert layout.shard("train-00000").read_bytes() == b"someone's"


@pytest.mark.parametrize(
    "line",
    ['{"batch": 1, "end": 99999}', '{"batch": 7, "end": 99999}', '{"batch": 2, "end": 1}', '{"batch": 2, "end": -1}'],
)
def test_a_journal_that_skips_a_batch_is_not_followed(tmp_path: Path, line: str):
    """A shard that is taken for whole would hold fewer samples than its plan."""
    layout = Layout(tmp_path, "c")
    layout.sidecar("train-00000").parent.mkdir(parents=True)
    with ShardWriter(layout, "train-00000", 0) as writer:
        writer.append([sample("a")])
        writer.append([sample("b")])
    with layout.journal("train-00000").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(CorruptShardError, match="batch"), ShardWriter(layout, "train-00000", 0):
        pass
