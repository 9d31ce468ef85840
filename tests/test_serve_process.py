"""The server as a process: SIGTERM, kill -9, restarts, and the command line."""

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest

from tests.serving_for_tests import ServerProcess, ask
from tests.tiny_checkpoint import save_tiny_checkpoint
from tracekit import TraceStore, verify
from tracekit.cli import main


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint with a chat template."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("chat") / "tiny", chat=True)


@pytest.fixture
def started() -> Iterator[list[ServerProcess]]:
    """Servers that a test started; none outlives it."""
    servers: list[ServerProcess] = []
    yield servers
    for server in servers:
        server.process.kill()
        server.process.wait()


def streamed(url: str, text: str, admitted: threading.Semaphore) -> tuple[int, str]:
    """Status and last line of a streamed answer; its head comes once the request is admitted."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 300, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
        admitted.release()
        return reply.status_code, [line for line in reply.iter_lines() if line][-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_is_in_hand_and_the_dataset(
    number: int, chat_model: Path, tmp_path: Path, started: list[ServerProcess]
):
    out = tmp_path / "out"
    server = ServerProcess(out, chat_model, "--max-batch", "2")
    started.append(server)
    assert "folder          " in server.said
    admitted = threading.Semaphore(0)
    with ThreadPoolExecutor(12) as pool:
        replies = [pool.submit(streamed, server.url, f"Number {n}?", admitted) for n in range(12)]
        assert all(admitted.acquire(timeout=60) for _ in replies)
        server.process.send_signal(number)
        answers = [one.result() for one in replies]
    assert server.process.wait(timeout=60) == 0
    assert [status for status, _ in answers] == [200] * 12
    assert [last for _, last in answers] == ["data: [DONE]"] * 12, "an admitted request was not answered"
    assert "12 samples in" in (server.process.stdout.read() if server.process.stdout else "")
    report = verify(out)
    assert (report.problems, report.num_samples, report.open_configs) == ([], 12, [])


def test_while_stopping_requests_are_answered_503(chat_model: Path, tmp_path: Path, started: list[ServerProcess]):
    server = ServerProcess(tmp_path / "out", chat_model, "--max-batch", "1")
    started.append(server)
    with ThreadPoolExecutor(8) as pool, httpx.Client() as client:
        replies = [pool.submit(ask, server.url, max_tokens=200) for _ in range(8)]
        while not any(one.done() for one in replies):
            pass
        server.process.send_signal(signal.SIGTERM)
        health = client.get(f"{server.url}/health")
        while health.status_code == 200:
            health = client.get(f"{server.url}/health")
        late = ask(server.url)
        statuses = {one.result().status_code for one in replies}
    assert (health.status_code, late.status_code, late.json()["error"]["code"]) == (503, 503, "stopping")
    assert statuses == {200}
    assert server.process.wait(timeout=60) == 0


def test_kill_9_loses_no_answer_that_came_to_its_end_and_no_key_comes_twice(
    chat_model: Path, tmp_path: Path, started: list[ServerProcess]
):
    out = tmp_path / "out"
    told: list[str] = []
    for attempt in range(2):
        server = ServerProcess(out, chat_model, "--max-batch", "4", "--samples-per-shard", "7")
        started.append(server)
        answered = threading.Semaphore(0)

        def keep_asking(url: str = server.url, answered: threading.Semaphore = answered) -> None:
            while True:
                try:
                    told.append(ask(url, max_tokens=12).headers["x-tracekit-key"])
                except httpx.TransportError:
                    return
                answered.release()

        with ThreadPoolExecutor(4) as pool:
            askers = [pool.submit(keep_asking) for _ in range(4)]
            assert all(answered.acquire(timeout=60) for _ in range(10 + attempt)), "in the middle of a shard"
            server.process.kill()
            for asker in askers:
                asker.result()
        assert verify(out).problems == []
    server = ServerProcess(out, chat_model)
    started.append(server)
    told.append(ask(server.url).headers["x-tracekit-key"])
    assert server.end(signal.SIGTERM) == 0
    assert len(told) == len(set(told)), "a key was told twice"
    report = verify(out)
    assert (report.problems, report.open_configs) == ([], [])
    with TraceStore(out) as store:
        assert set(told) <= set(store.keys), "an answer came in full whose sample is lost"
        assert len(store) > 20


def test_the_command_says_what_is_wrong(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    serve = ["serve", "--model", str(chat_model), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*serve, "--port", "70000"]) == 1
    assert "<= 65535" in capsys.readouterr().err
    assert main([*serve, "--limit-tokens", "9999", "--port", "0"]) == 1
    assert "the model has 512 positions" in capsys.readouterr().err
    monkeypatch.setattr("tracekit.serve.settings.find_spec", lambda name: None)
    assert main(serve) == 1
    assert "pip install 'tracekit-llm[run,serve]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_finished_dataset_is_replayed_by_verify(
    chat_model: Path, tmp_path: Path, started: list[ServerProcess], capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    server = ServerProcess(out, chat_model, "--sites", "hidden", "attn")
    started.append(server)
    for number in range(3):
        ask(server.url, f"Number {number}?")
    assert server.end(signal.SIGTERM) == 0
    assert main(["verify", str(out), "--replay", "3", "--model", str(chat_model), "--device", "cpu"]) == 0
    assert "3 samples" in capsys.readouterr().out
    assert main(["diff", str(out), str(out)]) == 0
    assert main(["show", str(out), "--stats"]) == 0
    assert main(["merge", str(out), str(out), "--out", str(tmp_path / "merged")]) == 1
    assert "grows with what is asked" in capsys.readouterr().err
