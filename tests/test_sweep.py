"""Temporary files: what a killed run left goes, what a process or a later run needs stays."""

import fcntl
import threading
from pathlib import Path

import pytest

from tests.runs_for_tests import hashes, run_trivia
from tracekit import verify
from tracekit.format.layout import create_once, sweep, write_atomic

LEFT = [
    "README.md.partial",
    "manifest.json.partial",
    "load_traces.py.partial",
    "plans/trivia_qa.json.partial",
    "plans/trivia_qa.json.4711.partial",
    "plans/trivia_qa.growth.partial.partial",
    "manifests/trivia_qa.json.partial",
    "schemas/trivia_qa.json.partial",
    "sidecars/trivia_qa/validation-00000.json.partial",
    "records/trivia_qa/validation.parquet.partial",
    "records/trivia_qa/validation.tar.partial",
    "labels/trivia_qa/judge.json.partial",
    "exports/outputs.json.partial",
    "output/trivia_qa/model/eval_results.json.partial",
    "hub/writable.partial",
    "data/trivia_qa/driver-0123.partial",
    "data/trivia_qa/validation-00000.journal.partial",
]
RESUMED = [
    "plans/trivia_qa.growth.partial",
    "data/trivia_qa/keys.partial",
    "data/trivia_qa/validation-00009.tar.partial",
    "data/trivia_qa/validation-00009.journal.partial",
]


def lay(root: Path, paths: list[str]) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"{")


def test_the_next_run_deletes_what_a_killed_one_left(model: Path, tmp_path: Path):
    run_trivia(tmp_path, model, source={"limit": 2})
    before = hashes(tmp_path)
    lay(tmp_path, LEFT)
    assert run_trivia(tmp_path, model, source={"limit": 2}).was_complete
    assert hashes(tmp_path) == before
    assert verify(tmp_path).problems == []


def test_what_is_resumed_stays(tmp_path: Path):
    lay(tmp_path, ["sidecars/trivia_qa/validation-00000.json", *LEFT, *RESUMED])
    sweep(tmp_path)
    assert {*hashes(tmp_path)} == {"sidecars/trivia_qa/validation-00000.json", *RESUMED}


@pytest.mark.parametrize("path", LEFT)
def test_what_a_process_holds_stays(tmp_path: Path, path: str):
    lay(tmp_path, ["sidecars/trivia_qa/validation-00000.json", path])
    with (tmp_path / path).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        sweep(tmp_path)
        assert (tmp_path / path).exists()
    sweep(tmp_path)
    assert not (tmp_path / path).exists()


@pytest.mark.attack
def test_links_and_folders_are_left_alone(tmp_path: Path):
    (tmp_path / "outside").write_text("mine")
    root = tmp_path / "run"
    (root / "plans/folder.partial").mkdir(parents=True)
    (root / "plans/link.partial").symlink_to(tmp_path / "outside")
    (root / "records").symlink_to(tmp_path)
    (tmp_path / "mine.partial").write_text("mine")
    sweep(root)
    assert (tmp_path / "outside").read_text() == (tmp_path / "mine.partial").read_text() == "mine"
    assert (root / "plans/folder.partial").is_dir()


def test_writers_at_once_write_whole_files_and_a_sweep_takes_none_away(tmp_path: Path):
    path, once = tmp_path / "plans/a.json", tmp_path / "plans/once.json"
    texts, first = [bytes([65 + number]) * 100_000 for number in range(8)], []

    def write(text: bytes) -> None:
        for _ in range(5):
            write_atomic(path, text)
            sweep(tmp_path)
        first.append(create_once(once, text))

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(first) == 8
    assert sum(first) == 1
    assert path.read_bytes() in texts
    assert once.read_bytes() in texts
    assert {one.name for one in (tmp_path / "plans").iterdir()} == {"a.json", "once.json"}
