"""Ranks: what launchers say, shares that hold every shard, and processes that finish one dataset together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from builders.nonsense_entities.task import TASK as NONSENSE
from builders.trivia_qa.task import TASK as TRIVIA_QA
from tests.processes_for_tests import Process, start
from tests.runs_for_tests import hashes, log_lines, trivia_config
from tests.tiny_checkpoint import save_tiny_checkpoint
from tracekit import verify
from tracekit.cli import run_task
from tracekit.config import OutputConfig, PublishConfig
from tracekit.errors import ConfigError
from tracekit.ranks import Rank, this_rank
from tracekit.run.runner import execute

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, Rank(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Rank(3, 8, 1)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}, Rank(2, 4, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, Rank(0, 1, 0)),  # the batch script
        ({"RANK": "x", "WORLD_SIZE": "8"}, Rank(0, 1, 0)),
        ({"RANK": "8", "WORLD_SIZE": "8"}, Rank(0, 1, 0)),
    ],
)
def test_a_launcher_says_who_this_process_is(environment: dict[str, str], rank: Rank):
    assert this_rank(environment) == rank


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_rank_takes_its_share_first_and_leaves_nothing_out(world_size: int):
    shards = list(range(10))
    orders = [Rank(number, world_size, 0).own_first(shards) for number in range(world_size)]
    assert all(sorted(order) == shards for order in orders)
    assert len({order[0] for order in orders}) == world_size


def flags(model: Path, out: Path) -> list[str]:
    asked = "--source sample --limit 24 --num-beams 1 --max-new-tokens 6 --samples-per-shard 3 --batch-size 1"
    return [
        *asked.split(),
        "--sites",
        "hidden",
        "--model",
        str(model),
        "--device",
        "cpu",
        "--out",
        str(out),
        "--num-replays",
        "1",
    ]


def launched(model: Path, out: Path, world_size: int) -> list[Process]:
    """Ranks, started as a launcher starts them."""
    ranks = [{"WORLD_SIZE": str(world_size), "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    command = ["-m", "builders.trivia_qa", *flags(model, out)]
    return [start(*command, env=rank, stderr=subprocess.STDOUT) for rank in ranks]


def data_of(folder: Path) -> dict[str, str]:
    made = ("data/", "manifests/", "records/")
    return {name: digest for name, digest in hashes(folder).items() if name.startswith(made)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset that one process makes."""
    out = tmp_path_factory.mktemp("alone") / "run"
    (process,) = launched(tiny, out, 1)
    said, _ = process.communicate(timeout=250)
    assert process.returncode == 0, said
    return out


def test_torchrun_makes_the_bytes_of_one_process_and_the_log_says_who_made_what(
    tiny: Path, alone: Path, tmp_path: Path
):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "builders.trivia_qa"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *flags(tiny, out)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert data_of(out) == data_of(alone)
    assert verify(out).problems == []
    lines = log_lines(out)
    assert {line["world_size"] for line in lines} == {2}
    assert len(lines) == 24
    makers = {line["shard"]: set() for line in lines}
    for line in lines:
        makers[line["shard"]].add(line["rank"])
    assert all(len(ranks) == 1 for ranks in makers.values())


def test_a_rank_that_is_killed_leaves_its_shard_to_others_and_to_the_next_run(tiny: Path, alone: Path, tmp_path: Path):
    out = tmp_path / "run"
    victim, other = launched(tiny, out, 2)
    while victim.poll() is None and not list((out / "data/trivia_qa").glob("*.partial")):
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    said, _ = other.communicate(timeout=250)
    assert other.returncode == 0, said
    victim.communicate(timeout=60)
    again = launched(tiny, out, 3)
    for process in again:
        said, _ = process.communicate(timeout=250)
        assert process.returncode == 0, said
    assert verify(out).problems == []
    assert data_of(out) == data_of(alone)


@pytest.mark.parametrize(
    ("part", "setting"),
    [("output", OutputConfig(force_run=True)), ("publish", PublishConfig(publish="a/b", version="v1.0.0"))],
)
def test_what_several_processes_would_undo_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, setting: OutputConfig | PublishConfig
):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = msgspec.structs.replace(trivia_config(Path("demo")), **{part: setting})
    with pytest.raises(ConfigError, match="2 processes at once cannot"):
        execute(TRIVIA_QA, config, tmp_path / "run")


def test_stages_that_ask_models_are_for_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        run_task(NONSENSE, ["--out", str(tmp_path / "run")])
    assert "--stages questions evaluate: run in one process" in capsys.readouterr().err
