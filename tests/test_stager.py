"""Staging while a run goes on: the builder's own command line in fresh processes, killed, refused and gone on with."""

import json
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.hub_for_tests import TestHub
from tests.publishing_for_tests import COMMAND, REPO, large_files, tell
from tests.runs_for_tests import hashes, log_lines, run_trivia
from tracekit.format.layout import IGNORED_FOLDERS

NUM_SHARDS = 6
TRACES = f"--publish {REPO} --version v1.0.0".split()

# `python -m builders.trivia_qa`, with short waits; several command lines one after another, as JSON
BUILD = """
import json, sys, torch
torch.set_num_threads(1)
import tracekit.hub
tracekit.hub.FIRST_WAIT_SECONDS = 0.02
from builders.trivia_qa.task import TASK
from tracekit.cli import run_task
command_lines = json.loads(sys.argv[1])
for command_line in command_lines:
    try:
        run_task(TASK, command_line)
    except SystemExit as end:
        print("exit", end.code, file=sys.stderr) if len(command_lines) > 1 else sys.exit(end.code)
"""


def command(model: Path, out: Path, *flags: str) -> list[str]:
    """The command line of the run: 12 questions in 6 shards."""
    run = "--source sample --limit 12 --samples-per-shard 2 --batch-size 2 --num-beams 1 --max-new-tokens 6"
    return ["--model", str(model), *run.split(), "--device", "cpu", "--num-replays", "1", "--out", str(out), *flags]


def build(hub: TestHub, model: Path, out: Path, *flags: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The builder in a fresh process."""
    return hub.python(BUILD, json.dumps([command(model, out, *flags)]), check=False, **options)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, not published. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_trivia(folder, model, output={"samples_per_shard": 2})
    return folder


def same_bytes(hub: TestHub, whole: Path) -> bool:
    """Whether v1.0.0 is the run that nobody disturbed."""
    return large_files(whole).items() <= hub.hub.files(REPO, "v1.0.0").items()


def staged(hub: TestHub) -> list[list[str]]:
    """The files that each staging commit brought, oldest first, those of branches that are gone too."""
    commits = hub.hub.repos[REPO].commits
    return [
        sorted(path for path, entry in commit.tree.items() if commits[commit.parent].tree.get(path) != entry)
        for commit in commits.values()
        if commit.title.startswith("Stage") and commit.parent is not None
    ]


def tars(folder: Path) -> list[str]:
    """Names of the shards that are here."""
    return sorted(path.stem for path in folder.glob("data/*/*.tar"))


def titles(hub: TestHub) -> list[str]:
    """Titles of the commits on main, oldest first, the initial one left out."""
    return [commit.title for commit in reversed(hub.hub.history(REPO, "main"))][1:]


def check_released(hub: TestHub, whole: Path) -> None:
    """Fails unless the version is complete, made once, and nothing else is left on the Hub."""
    assert same_bytes(hub, whole)
    assert titles(hub) == ["Release v1.0.0"]
    assert list(hub.hub.repos[REPO].branches) == ["main"]
    groups = staged(hub)
    assert all(groups), "what was staged was staged again"
    assert sorted(path for group in groups for path in group) == sorted(large_files(whole))


def computed_once(out: Path) -> bool:
    """Whether no batch was computed again."""
    return set(Counter((line["shard"], line["batch"]) for line in log_lines(out)).values()) == {1}


class Watcher:
    """Looks at a folder at every staging commit."""

    def __init__(self, hub: TestHub, folder: Path) -> None:
        self._hub, self._folder = hub, folder
        self.seen: list[int] = []
        self._watch()

    def _watch(self) -> None:
        self._hub.hub.on("/commit/staging", self._look, method="POST")

    def _look(self) -> None:
        self.seen.append(len(tars(self._folder)))
        self._watch()


def test_a_run_is_published_while_it_is_made_and_leaves_no_shard(
    xet_hub: TestHub, model: Path, whole: Path, tmp_path: Path
):
    out, home = tmp_path / "run", xet_hub.new_home()
    flags = [*TRACES, "--free-local", "--private"]
    watcher = Watcher(xet_hub, out)
    done = build(xet_hub, model, out, *flags, home=home)
    assert done.returncode == 0, done.stderr
    assert f"released        {REPO} v1.0.0" in done.stdout
    assert "hf_test" not in done.stdout + done.stderr
    check_released(xet_hub, whole)
    assert xet_hub.hub.repos[REPO].private
    assert len(watcher.seen) >= NUM_SHARDS
    assert max(watcher.seen) <= 5, "made, waiting, being sent: no more shards than that are here"
    assert tars(out) == []
    kept, here = (
        {
            path: sha256
            for path, sha256 in hashes(folder).items()
            if path.split("/")[0] not in (*IGNORED_FOLDERS, "data")
        }
        for folder in (whole, out)
    )
    assert here.keys() == kept.keys()
    # the last digit of the replays' cosines depends on the threads of numpy, which are others in this process
    differing = {path.split("/")[0] for path in kept if here[path] != kept[path]}
    assert differing <= {"sidecars", "manifests", "manifest.json", "load_traces.py"}
    (verified,) = tell(xet_hub, ["verify", out, "--hub"])
    assert verified.code == 0
    assert f"not here: {NUM_SHARDS} shards, " in verified.out
    assert f"they were sent to {REPO} v1.0.0" in verified.out
    assert f"on the Hub: all {NUM_SHARDS} shards" in verified.out
    xet_hub.log()
    again = build(xet_hub, model, out, *flags, home=home)
    assert again.returncode == 0, again.stderr
    assert "nothing to do: trivia_qa is complete" in again.stderr
    assert f"nothing to do: {REPO} has this content as v1.0.0" in again.stdout
    assert not [r for r in xet_hub.log() if "/commit/" in r.path or "/preupload/" in r.path]
    assert titles(xet_hub) == ["Release v1.0.0"]


@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_without_free_local_the_shards_stay(hub: TestHub, model: Path, whole: Path, tmp_path: Path):
    out = tmp_path / "run"
    done = build(hub, model, out, *TRACES)
    assert done.returncode == 0, done.stderr
    check_released(hub, whole)
    assert large_files(out) == large_files(whole)
    assert "hub" not in {path.split("/")[0] for path in hub.hub.files(REPO, "v1.0.0")}


MOMENTS = [  # requests, and how many of their kind pass before
    ("/preupload/", 0),
    ("/commit/staging", 0),
    ("/commit/staging", 1),
    ("/paths-info/", 2),
    ("/xorbs/", 0),
    ("/commit/main", 0),
    ("/tag/", 0),
]


def kill_at(hub: TestHub, process: subprocess.Popen[str], match: str, skip: int, number: int) -> None:
    """Send a signal before a request is handled."""
    if skip:
        hub.hub.on(match, lambda: kill_at(hub, process, match, skip - 1, number))
    else:
        hub.hub.on(match, lambda: process.send_signal(number))


def test_kill_9_at_many_moments(xet_hub: TestHub, model: Path, whole: Path, tmp_path: Path):
    out, home = tmp_path / "run", xet_hub.new_home()
    flags = [*TRACES, "--free-local"]
    kills = 0
    for match, skip in MOMENTS:
        process = xet_hub.start(BUILD, json.dumps([command(model, out, *flags)]), home=home)
        kill_at(xet_hub, process, match, skip, signal.SIGKILL)
        _, said = process.communicate(timeout=60)
        # where Xet has the chunks already, a moment may not come: then the run goes through
        assert process.returncode in (-signal.SIGKILL, 0), (match, said)
        kills += process.returncode == -signal.SIGKILL
        xet_hub.hub.watches.clear()
    assert kills >= 4
    done = build(xet_hub, model, out, *flags, home=home)
    assert done.returncode == 0, done.stderr
    check_released(xet_hub, whole)
    assert computed_once(out)
    assert tars(out) == []


def test_ctrl_c_and_a_refusal_in_the_middle_lose_nothing(xet_hub: TestHub, model: Path, whole: Path, tmp_path: Path):
    out, home = tmp_path / "run", xet_hub.new_home()
    flags = [*TRACES, "--free-local"]

    def interrupted(match: str) -> None:
        process = xet_hub.start(BUILD, json.dumps([command(model, out, *flags)]), home=home)
        kill_at(xet_hub, process, match, 0, signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
        assert "Run the same command again to go on" in said.splitlines()[-1]
        assert "Traceback" not in said

    interrupted("/commit/staging")  # while shards are made: what is made is sent
    shards = sorted(path.stem for path in (out / "sidecars" / "trivia_qa").iterdir())
    assert 1 <= len(shards) < NUM_SHARDS
    assert staged(xet_hub) == [[f"data/trivia_qa/{name}.tar"] for name in shards]
    assert tars(out) == []
    xet_hub.faults({"match": "/commit/staging", "action": "status", "status": 403, "times": 100})
    done = build(xet_hub, model, out, *flags, home=home)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"error: committing to staging/v1.0.0 of {REPO}: you may not do this (403)")
    assert "Traceback" not in done.stderr
    made = {path.stem for path in (out / "sidecars" / "trivia_qa").iterdir()}
    assert {*tars(out)} == made - {*shards} != set(), "a shard that the Hub does not have was deleted"
    (verified,) = tell(xet_hub, ["verify", out, "--hub"])  # on the staging branch still
    assert f"not here: {len(shards)} shards, " in verified.out
    assert f"on the Hub: all {len(shards)} shards" in verified.out
    is_finished = (out / "manifests" / "trivia_qa.json").exists()  # where the last shard was made before the refusal
    assert ("open: trivia_qa is not finished" in verified.out) != is_finished
    xet_hub.faults()
    interrupted("/commit/main")  # while it is released
    done = build(xet_hub, model, out, *flags, home=home)
    assert done.returncode == 0, done.stderr
    check_released(xet_hub, whole)
    assert computed_once(out)
    assert tars(out) == []


def test_what_is_refused_is_refused_before_anything_is_computed(
    xet_hub: TestHub, model: Path, whole: Path, tmp_path: Path
):
    out, copied = tmp_path / "run", Path(shutil.copytree(whole, tmp_path / "copy"))
    xet_hub.python(COMMAND, "", "publish", copied, REPO, "--version", "v1.0.0")
    commits = len(xet_hub.hub.repos[REPO].commits)
    lines = [
        command(model, out, *flags)
        for flags in (
            TRACES,
            ["--publish", REPO],
            ["--free-local"],
            ["--publish", REPO, "--version", "1.0"],
            ["--publish", "name", "--version", "v1.1.0"],
            ["--publish", REPO, "--version", "v1.1.0", "--private"],
            ["--publish", "other/traces", "--version", "v1.0.0"],
            ["--publish", "other/traces", "--version", "v1.0.0", "--dry-run"],
            ["--publish", REPO, "--version", "v1.1.0", "--dry-run"],
        )
    ]
    done = xet_hub.python(BUILD, json.dumps(lines))
    assert "Traceback" not in done.stderr
    ends = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "exit "))]
    assert ends[1::2] == ["exit 1"] * 8, ends
    assert ends[-1] == "exit 0"
    assert ends[0] == (
        f"error: {REPO} has v1.0.0 already, and this run is not finished; the next free versions are v1.1.0 and v2.0.0"
    )
    expected = (
        "--version",
        "--publish",
        "v1.0.0",
        "owner/name",
        f"{REPO} is public",
        *["tester may not create it"] * 2,
    )
    for error, words in zip(ends[2:16:2], expected, strict=True):
        assert words in error
    assert "(nothing was written)" in done.stdout
    assert not out.exists()
    assert len(xet_hub.hub.repos[REPO].commits) == commits
    assert list(xet_hub.hub.repos[REPO].branches) == ["main"]
    nobody = build(xet_hub, model, out, "--publish", REPO, "--version", "v1.1.0", token=None)
    assert nobody.returncode == 1
    assert "hf auth login" in nobody.stderr.splitlines()[-1]
    assert not out.exists()


def test_a_branch_that_the_hub_has_lost_is_noticed_before_anything_is_computed(
    xet_hub: TestHub, model: Path, whole: Path, tmp_path: Path
):
    kept, freed, home = tmp_path / "kept", tmp_path / "freed", xet_hub.new_home()
    there = Path(shutil.copytree(model, tmp_path / model.name))

    def interrupted(out: Path, version: str, *flags: str) -> list[str]:
        """The shards that were sent before the run was interrupted; the Hub loses them."""
        line = command(there, out, "--publish", REPO, "--version", version, *flags)
        process = xet_hub.start(BUILD, json.dumps([line]), home=home)
        kill_at(xet_hub, process, "/commit/staging", 0, signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
        lost = xet_hub.hub.repos[REPO].branches.pop(f"staging/{version}")
        return sorted(Path(path).stem for path in xet_hub.hub.files(REPO, lost) if path.startswith("data/"))

    sent = interrupted(kept, "v1.0.0")
    assert 1 <= len(sent) < NUM_SHARDS
    done = build(xet_hub, there, kept, *TRACES, home=home)  # they are here still
    assert done.returncode == 0, done.stderr
    assert same_bytes(xet_hub, whole)
    assert computed_once(kept)
    assert [*xet_hub.hub.repos[REPO].branches] == ["main"]

    del xet_hub.hub.repos[REPO]
    sent = interrupted(freed, "v1.0.0", "--free-local")
    assert tars(freed) == []
    there.rename(tmp_path / "away")  # if the model were looked for first, the error would name it
    done = build(xet_hub, there, freed, *TRACES, "--free-local", home=home)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"error: data/trivia_qa/{sent[0]}.tar is not here: it was sent to {REPO} as v1.0.0, and {REPO} does not have it"
        ". Publish to where it was sent, or delete the journal in hub/ and run this command again, which makes it anew"
    )
    assert "staging/v1.0.0" not in xet_hub.hub.repos[REPO].branches
    (tmp_path / "away").rename(there)
    shutil.rmtree(freed / "hub")
    done = build(xet_hub, there, freed, *TRACES, "--free-local", home=home)
    assert done.returncode == 0, done.stderr
    assert same_bytes(xet_hub, whole)
    assert tars(freed) == []
