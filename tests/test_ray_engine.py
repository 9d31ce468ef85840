"""The Ray engine on a real Ray: bytes of one process; workers and nodes that are killed; errors, Ctrl-C, the Hub."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

import tracekit.cluster.pool as pool_module
import tracekit.errors as errors
from builders.trivia_qa.task import TASK as TRIVIA_QA
from builders.trivia_qa.task import TriviaQAConfig
from tests.hub_for_tests import TestHub
from tests.publishing_for_tests import REPO, large_files
from tests.ray_for_tests import BROKEN, DYING, workers
from tests.runs_for_tests import hashes, log_lines, run_trivia, trivia_config
from tests.test_stager import BUILD, check_released, computed_once, tars
from tracekit.cluster.session import connected, share
from tracekit.cluster.worker import Begin, NodeJob, NodeWorker
from tracekit.config import ClusterConfig, PublishConfig, check
from tracekit.errors import CaptureError, ClusterError, ConfigError, TracekitError
from tracekit.format.layout import Layout
from tracekit.format.manifest import read_plan
from tracekit.ranks import Rank
from tracekit.run.runner import execute
from tracekit.task import TaskRef

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'tracekit-llm[ray]'")
pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(280)]

SHARDS = ("data/", "records/")
HEAD = {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Environment of a cluster behind a token, on loopback, and of who connects to it."""
NUM_BATCHES = 7
"""Of the run of `finished`: 5, 5 and 2 questions, two a batch."""


class Nodes:
    """Two nodes of one CPU, an engine on them, and its settings."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        from tracekit.cluster import RayEngine

        node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=node)
        del node["include_dashboard"]
        self.second = self.cluster.add_node(**node)
        self.settings = ClusterConfig(engine="ray", num_workers=2, ray_address=self.cluster.address)
        self.engine = RayEngine(self.settings)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    started = Nodes()
    with started.engine:
        yield started
    started.cluster.shutdown()


def run_on(nodes: Nodes, out: Path, model: Path, task: Any = TRIVIA_QA, **sections: dict[str, Any]) -> Any:
    """A run on the nodes."""
    config = msgspec.structs.replace(trivia_config(model, **sections), cluster=nodes.settings)
    return execute(task, config, out, engine=nodes.engine)


def made(folder: Path) -> dict[str, str]:
    """SHA-256 of shards and records; the replays' last digit depends on the threads of numpy, which differ here."""
    return {path: sha256 for path, sha256 in hashes(folder).items() if path.startswith(SHARDS)}


@contextlib.contextmanager
def after_batches(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> Iterator[None]:
    """Act in the driver once it has heard of so many batches."""
    own, heard = pool_module.log_step, []

    def log_step(layout: Layout, step: Any) -> None:
        own(layout, step)
        heard.extend([step] * (step.line is not None))
        if len(heard) == number and step.line is not None:
            act()

    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "log_step", log_step)
        yield
    assert len(heard) >= number


def test_a_killed_worker_costs_no_finished_batch_and_the_bytes_are_those_of_one_process(
    nodes: Nodes, model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "run"
    with after_batches(monkeypatch, 2, lambda: workers(os.getpid())[0].kill()):
        outcome = run_on(nodes, out, model)
    assert outcome.manifest is not None
    assert made(out) == made(finished)
    assert computed_once(out)
    assert {line["world_size"] for line in log_lines(out)} == {2}
    run_trivia(out, model)  # nothing to do, and nothing of the engine is in the plan
    assert "cluster" not in read_plan(Layout(out, "trivia_qa")).run
    assert not list(out.rglob("*.partial"))


def test_ctrl_c_stops_between_batches_and_any_engine_goes_on(
    nodes: Nodes, model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "run"
    with after_batches(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGINT)):
        assert run_on(nodes, out, model).interrupted
    assert 1 <= len(log_lines(out)) < NUM_BATCHES
    run_trivia(out, model)  # without Ray
    assert made(out) == made(finished)
    assert computed_once(out)
    grown = run_on(nodes, out, model, source={"limit": 14})
    assert grown.manifest.splits[0].num_samples == 14


def test_an_error_of_a_worker_ends_the_run_as_in_one_process(nodes: Nodes, model: Path, finished: Path, tmp_path: Path):
    out = tmp_path / "run"
    with pytest.raises(CaptureError, match=r"^question 7 cannot be traced$"):
        run_on(nodes, out, model, BROKEN)
    run_on(nodes, out, model)
    assert made(out) == made(finished)
    assert computed_once(out)


def test_a_shard_that_kills_its_workers_ends_the_run(
    nodes: Nodes, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pool_module, "_MAX_DEATHS", 0)
    with pytest.raises(ClusterError, match=r"validation-00001 brought down 1 workers.*--batch-size goes on"):
        run_on(nodes, tmp_path / "run", model, DYING)


def test_a_dry_run_writes_nothing(nodes: Nodes, model: Path, tmp_path: Path):
    outcome = run_on(nodes, tmp_path / "run", model, output={"dry_run": True})
    assert (outcome.estimate.num_examples, outcome.estimate.num_shards) == (12, 3)
    assert not (tmp_path / "run").exists()


def test_a_dead_node_leaves_its_shard_to_the_others(
    nodes: Nodes, model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "run"
    with after_batches(
        monkeypatch, 1, lambda: nodes.cluster.remove_node(nodes.second, allow_graceful=False)
    ):  # there is no room for its worker elsewhere
        run_on(nodes, out, model)
    assert made(out) == made(finished)
    assert computed_once(out)


@pytest.mark.slow  # a Ray of its own beside that of the module
@pytest.mark.parametrize("num_workers", [1, 2])
def test_without_a_shared_folder_shards_go_to_the_hub_as_they_are_made(
    num_workers: int, xet_hub: TestHub, model: Path, tmp_path: Path
):
    out, elsewhere, whole = tmp_path / "run", tmp_path / "elsewhere", tmp_path / "whole"
    run_trivia(whole, model, output={"samples_per_shard": 2, "batch_size": 1})
    run = f"--model {model} --source sample --limit 12 --samples-per-shard 2 --batch-size 1 --num-beams 1 --device cpu"
    run += f" --max-new-tokens 6 --num-replays 1 --out {out} --publish {REPO} --version v1.0.0 --free-local"
    asked = [*run.split(), "--engine", "ray", "--num-workers", str(num_workers), "--worker-folder", str(elsewhere)]
    process = xet_hub.start(BUILD, json.dumps([asked]))
    killed: list[psutil.Process] = []

    def kill_one() -> None:
        killed.append(workers(process.pid)[0])
        killed[0].kill()

    xet_hub.hub.on("/commit/staging", kill_one)
    done = xet_hub.finished(process, timeout=250)
    assert done.returncode == 0, done.stderr
    assert len(killed) == 1
    assert "died; its shard goes on from its journal" in done.stderr
    assert "raylet" not in done.stdout + done.stderr
    check_released(xet_hub, whole)
    assert large_files(whole).keys() - large_files(out).keys() == {p for p in large_files(whole) if "/data/" in f"/{p}"}
    assert tars(out) == []
    assert computed_once(out)
    assert not [path for path in elsewhere.rglob("*") if path.is_file()]
    assert "hf_test" not in "".join(
        path.read_text(errors="replace") for path in [*out.rglob("*.json"), *(out / "logs").iterdir()]
    )


def begin(model: Path, finished: Path, tmp_path: Path, publish: PublishConfig, **versions: str) -> None:
    """A worker that begins, in this process, and does not see the folder."""
    plan = read_plan(Layout(finished, "trivia_qa"))
    plan = msgspec.structs.replace(plan, shards=[], versions={**plan.versions, **versions})
    config = msgspec.structs.replace(trivia_config(model), publish=publish)
    job = NodeJob.of("1", TaskRef.of(TRIVIA_QA), config, [], plan.model)
    run = Begin(plan, finished, "not-there.partial", tmp_path / "own", False)
    NodeWorker(Rank(0, 1, 0), str(tmp_path / "away")).begin(job, run)


def test_a_worker_that_sees_no_folder_and_has_no_hub_is_refused(model: Path, finished: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"does not see .*--publish owner/name --version v1.0.0 --free-local"):
        begin(model, finished, tmp_path, PublishConfig(publish="a/b", version="v1.0.0"))


def test_a_node_with_other_versions_is_refused(model: Path, finished: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"has torch .*, the plan was made with 0.1; every node needs the same"):
        begin(model, finished, tmp_path, PublishConfig(), torch="0.1")


def node(**resources: float) -> dict[str, Any]:
    return {"Alive": True, "Resources": resources}


@pytest.mark.parametrize(
    ("nodes", "asked", "expected"),
    [
        ([node(CPU=2)], {"num_workers": 2, "on_gpus": False}, (2, 1, 0)),
        ([node(CPU=2)], {"num_workers": 4, "on_gpus": False}, (4, 0.5, 0)),
        ([node(CPU=8), node(CPU=16)], {"num_workers": None, "on_gpus": False}, (2, 8, 0)),
        ([node(CPU=64), node(CPU=16, GPU=8.0)], {"num_workers": None, "on_gpus": True}, (8, 2, 1)),
        ([node(CPU=16, GPU=8)], {"num_workers": 2, "on_gpus": True}, (2, 8, 1)),
        ([node(CPU=16, GPU=8)], {"num_workers": None, "on_gpus": True, "gpus_per_worker": 4}, (2, 8, 4)),
        ([node(CPU=16), {"Alive": False, "Resources": {"CPU": 4}}], {"num_workers": 1, "on_gpus": False}, (1, 16, 0)),
    ],
)
def test_workers_share_what_a_node_has(nodes: list[Any], asked: dict[str, Any], expected: tuple[int, float, int]):
    assert tuple(share(nodes, **{"gpus_per_worker": 1, **asked})) == expected


def test_a_cluster_without_room_is_refused():
    with pytest.raises(ClusterError, match="each needs 4 GPUs and a CPU"):
        share([node(CPU=8, GPU=2)], num_workers=None, gpus_per_worker=4, on_gpus=True)


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name not in ("NoSpaceError", "UNREADABLE")])
def test_errors_travel_whole(name: str):
    error = getattr(errors, name)("what was wrong")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - as Ray does
    assert (type(again), str(again)) == (type(error), "what was wrong")
    assert isinstance(again, TracekitError)


def test_what_does_not_go_together_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    on_ray = msgspec.structs.replace(trivia_config(model), cluster=ClusterConfig(engine="ray"))
    with pytest.raises(ConfigError, match="from code give execute"):
        execute(TRIVIA_QA, on_ray, tmp_path / "run")
    with pytest.raises(ConfigError, match="they go with --engine ray"):
        check(TriviaQAConfig(cluster=ClusterConfig(num_workers=2)))
    with pytest.raises(ConfigError, match=r"--worker-folder '/scratch'.*--free-local"):
        check(TriviaQAConfig(cluster=ClusterConfig(engine="ray", worker_folder="/scratch")))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="starts workers itself, and 2 processes were started"):
        execute(TRIVIA_QA, on_ray, tmp_path / "run", engine=object())  # type: ignore[arg-type]


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_no_cluster_at_the_address_is_said_at_once(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at '{address}': .*refused"), connected(address):
        pytest.fail("connected")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A cluster of its own, as `ray start` makes it, behind a token; its addresses by their kind."""
    port, client = free_port(), free_port()
    flags = {"--node-ip-address": "127.0.0.1", "--port": str(port), "--ray-client-server-port": str(client)}
    flags |= {"--num-cpus": "2", "--include-dashboard": "false", "--min-worker-port": "0", "--max-worker-port": "0"}
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # paths of sockets are short
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--temp-dir", temporary, *(part for pair in flags.items() for part in pair)]
    environment = os.environ | HEAD
    with (tmp_path / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for number in (port, client):
            for _ in range(600):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", number), timeout=1):
                    break
                time.sleep(0.1)
        yield {"gcs": f"127.0.0.1:{port}", "client": f"ray://127.0.0.1:{client}"}
    finally:
        below = psutil.Process(process.pid).children(recursive=True)
        for one in [*below, psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(timeout=30)
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.mark.slow
def test_clusters_at_addresses_give_the_bytes_of_one_process(
    head: dict[str, str], model: Path, finished: Path, tmp_path: Path
):
    for kind, address in head.items():
        out = tmp_path / kind
        code = f"""
from pathlib import Path
import msgspec
from builders.trivia_qa.task import TASK as TRIVIA_QA
from tests.runs_for_tests import trivia_config
from tracekit.cluster import RayEngine
from tracekit.config import ClusterConfig
from tracekit.run.runner import execute
settings = ClusterConfig(engine="ray", num_workers=2, ray_address={address!r})
config = msgspec.structs.replace(trivia_config(Path({str(model)!r})), cluster=settings)
with RayEngine(settings) as engine:
    execute(TRIVIA_QA, config, Path({str(out)!r}), engine=engine)
"""
        environment = os.environ | HEAD | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert made(out) == made(finished)
        assert {line["world_size"] for line in log_lines(out)} == {2}
