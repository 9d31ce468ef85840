"""Folders from strangers: every file damaged in every way, every command. The outcome is right data or one `error:`.

Nothing hangs, no traceback is shown, and no byte from outside the folder is read, printed or changed.
"""

import contextlib
import io
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from builders.trivia_qa.task import TASK as TRIVIA_QA
from tests.datasets_for_tests import make_sample, write_dataset
from tracekit import TraceStore, load_dataset
from tracekit.cli import main
from tracekit.errors import DatasetError, TracekitError
from tracekit.format.labels import Label, LabelSummary, write_labels, write_summary
from tracekit.format.layout import append_line, inside, write_atomic
from tracekit.format.manifest import read_plan, to_bytes
from tracekit.format.shards import sha256_file
from tracekit.run.finish import finish

pytestmark = pytest.mark.attack

SECRET = "hf_TheVictimsToken"
RUN = {
    "model": {"model": "test/model", "device": "cpu"},
    "source": {"source": "test.jsonl", "split": "train", "offset": 0, "limit": 4, "on_bad_row": "error"},
    "prompt": {"num_shots": 0},
    "generation": {"num_beams": 1, "max_new_tokens": 8, "num_samples": 1},
    "capture": {"sites": ["hidden_states"], "layers": ["all"], "tokens": "all"},
    "output": {"samples_per_shard": 2},
    "correctness": "exact_match",
}
FILES = (
    "README.md",
    "load_traces.py",
    "manifest.json",
    "plans/trivia_qa.json",
    "manifests/trivia_qa.json",
    "schemas/trivia_qa.json",
    "sidecars/trivia_qa/train-00000.json",
    "data/trivia_qa/train-00000.tar",
    "records/trivia_qa/train.parquet",
    "records/trivia_qa/train.tar",
    "labels/trivia_qa/rules.jsonl",
    "labels/trivia_qa/rules.json",
    "questions/trivia_qa.jsonl",
    "questions/trivia_qa.json",
    "hub/tester--traces.jsonl",
    "logs/trivia_qa.jsonl",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished folder with every kind of file."""
    root = tmp_path_factory.mktemp("whole") / "data set"
    made = [make_sample(f"{number:06d}") for number in range(4)]
    layout = write_dataset(root, {"train-00000": made[:2], "train-00001": made[2:]}, is_finished=False)
    plan = read_plan(layout)
    shards = [
        msgspec.structs.replace(shard, batches=[[2 * number, 2 * number + 1]])
        for number, shard in enumerate(plan.shards)
    ]
    plan = msgspec.structs.replace(plan, run=RUN, shards=shards)
    write_atomic(layout.plan, to_bytes(plan))
    finish(layout, plan, TRIVIA_QA)
    label = Label(
        key="000000",
        judged_sha256="0" * 64,
        is_abstention=False,
        verdict="correct",
        judge="rules",
        prompt_sha256="0" * 64,
        raw_outputs=[],
        failure=None,
    )
    write_labels(layout.labels("rules"), [label])
    summary = LabelSummary(
        name="rules",
        config="trivia_qa",
        judge="rules",
        prompt_sha256="0" * 64,
        settings={},
        labels_sha256=sha256_file(layout.labels("rules")),
        num_samples=1,
        num_failures=0,
        is_open=False,
        rates=[],
        definitions={},
    )
    write_summary(layout, summary)
    write_atomic(layout.questions, b'{"question": "?"}\n')
    write_atomic(layout.question_set, b"{}\n")
    append_line(inside(root, "hub/tester--traces.jsonl"), "{}")
    append_line(layout.log, "{}")
    return root


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "folder"))


def replaced(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def linked(path: Path, target: Path | str) -> None:
    path.unlink()
    path.symlink_to(target)


def outside(path: Path) -> Path:
    """A file or folder that belongs to the victim."""
    victim = next(parent for parent in path.parents if parent.name == "folder").parent / "victim"
    victim.mkdir(exist_ok=True)
    (victim / path.name).write_bytes(path.read_bytes() + SECRET.encode())
    return victim


def link_parent(path: Path) -> None:
    """Its folder becomes a link to one outside with the same files."""
    victim = outside(path)
    if path.parent.name == "folder":
        linked(path, victim / path.name)
        return
    for file in path.parent.iterdir():
        if file.is_file() and file.name != path.name:
            shutil.copy(file, victim)
    shutil.rmtree(path.parent)
    path.parent.symlink_to(victim)


def listen(path: Path) -> None:
    path.unlink()
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a link to a file outside": lambda path: linked(path, outside(path) / path.name),
    "a link to a file outside, relative": lambda path: linked(
        path, os.path.relpath(outside(path) / path.name, path.parent)
    ),
    "a folder that is a link": link_parent,
    "a dangling link": lambda path: linked(path, "nowhere"),
    "a link to itself": lambda path: linked(path, path.name),
    "a link to a device": lambda path: linked(path, "/dev/zero"),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a socket": listen,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "empty": lambda path: replaced(path, b""),
    "truncated": lambda path: replaced(path, path.read_bytes()[: path.stat().st_size * 2 // 3]),
    "too large": lambda path: os.truncate(path, 3 << 30),
    "deep": lambda path: replaced(path, b"[" * 100_000),
    "deep objects": lambda path: replaced(path, b'{"a":' * 100_000),
    "null": lambda path: replaced(path, b"null\n"),
    "a list": lambda path: replaced(path, b"[1]\n"),
    "a huge integer": lambda path: replaced(path, b'{"schema_version":' + b"9" * 5000 + b"}"),
    "no number": lambda path: replaced(path, b'{"schema_version":NaN}'),
    "a page": lambda path: replaced(path, b"<html><title>Log in to the network</title></html>\n"),
    "no UTF-8": lambda path: replaced(path, b'{"config":"\xff\xfe"}'),
    "a mark": lambda path: replaced(path, b"\xef\xbb\xbf" + path.read_bytes()),
    "noise": lambda path: replaced(path, b"PAR1" + bytes(range(256)) * 9 + b"\xff\xff\x00\x00PAR1"),
    "missing": lambda path: path.unlink(),
}


def commands(folder: Path) -> dict[str, Callable[[], object]]:
    """Every command and reader of a folder."""

    def run(*words: object) -> Callable[[], object]:
        return lambda: main([str(word) for word in words])

    def read() -> None:
        with TraceStore(folder) as store:
            for key in store.keys:
                store[key].tensors()
                store.record(key)
            store.stack("hidden_states", layer=1, tokens="last_prompt")
            with contextlib.suppress(KeyError):
                store.labels()

    def load() -> None:
        for row in load_dataset(str(folder), streaming=True)["train"]:
            assert row["hidden_states"] is not None

    return {
        "show": run("show", folder),
        "show --stats": run("show", folder, "--stats"),
        "verify": run("verify", folder),
        "publish": run("publish", folder, "tester/traces", "--version", "v1.0.0", "--dry-run"),
        "export": run("export", folder),
        "diff": run("diff", folder, folder),
        "merge": run("merge", folder, folder, "--out", folder.parent / "merged"),
        "TraceStore": read,
        "load_dataset": load,
    }


class Outcome:
    """What a command did."""

    def __init__(self, command: Callable[[], object]) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                self.code: object = command()
            except (TracekitError, OSError) as error:  # what `main` shows as one line
                self.code = f"{type(error).__name__}: {error}"
        self.said = out.getvalue() + err.getvalue() + str(self.code)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishing reads the folder, and no Hub."""
    from tracekit.publish import publisher

    def planned(self: Any, dry_run: bool) -> Any:
        from tracekit.format.release import Version
        from tracekit.publish.contents import small_files
        from tracekit.publish.snapshot import EMPTY, OnHub, merged

        local = self._local
        remote = OnHub("", {}, EMPTY, None)
        contents = small_files("tester/traces", local, Version(1, 0, 0), remote, None, merged(EMPTY, local), {})
        self._check_here(local.large)
        assert all(SECRET.encode() not in data for data in contents.files.values())
        raise DatasetError("nobody is asked")

    monkeypatch.setattr(publisher._Publication, "run", planned)


def victims(folder: Path) -> dict[str, str]:
    """Hashes of what lies outside."""
    victim = folder.parent / "victim"
    return {path.name: sha256_file(path) for path in sorted(victim.glob("*"))}


def cells() -> Iterator[Any]:
    """Every file with every damage; one in seven of them is tried by default, each file and each damage among them."""
    for row, file in enumerate(FILES):
        for column, damage in enumerate(DAMAGE):
            yield pytest.param(file, damage, marks=[] if (3 * row + column) % 7 == 0 else pytest.mark.slow)


@pytest.mark.parametrize(("file", "damage"), cells())
def test_a_damaged_file_is_refused_or_does_no_harm(folder: Path, file: str, damage: str):
    DAMAGE[damage](folder / file)
    before = victims(folder)
    for name, command in commands(folder).items():
        outcome = Outcome(command)
        assert SECRET not in outcome.said, name
        assert outcome.said.count("error:") <= 1, (name, outcome.said)
    assert victims(folder) == before
