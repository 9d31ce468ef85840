"""The cache of replies: nothing is asked twice, whatever ended the run before."""

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.processes_for_tests import Process, start
from tracekit.clients.client import ChatMessage, ClientConfig, OnReply, Reply, Request, failed_reply, ignore_reply
from tracekit.clients.responses import CachedClient, Usage
from tracekit.errors import ClientError, ConfigError

ROOT = Path(__file__).parent.parent


class Echo:
    """Says everything twice, fails at `bad`, and breaks at `broken`."""

    def __init__(self, name: str = "echo@1") -> None:
        self.name = name
        self.asked: list[str] = []
        self.is_closed = False

    def ask(self, requests: Sequence[Request], on_reply: OnReply = ignore_reply) -> list[Reply]:
        replies = []
        for index, request in enumerate(requests):
            text = request.messages[-1].content
            self.asked.append(text)
            if text == "broken":
                raise ClientError("gone")
            good = Reply(text=text * 2, finish_reason="stop", num_input_tokens=5, num_output_tokens=2)
            replies.append(failed_reply("bad") if text == "bad" else good)
            on_reply(index, replies[-1])
        return replies

    def close(self) -> None:
        self.is_closed = True


def asking(text: str, seed: int = 0) -> Request:
    return Request(messages=[ChatMessage(role="user", content=text)], seed=seed)


def texts_of(client: CachedClient, *texts: str) -> list[str]:
    return [reply.text for reply in client.ask([asking(text) for text in texts])]


def test_a_second_run_asks_nothing_and_says_the_same(tmp_path: Path):
    path = tmp_path / "new" / "cache.jsonl"
    first, second = Echo(), Echo()
    with CachedClient(first, path) as client:
        assert texts_of(client, "a", "ü\n", "c") == ["aa", "ü\nü\n", "cc"]
    with CachedClient(second, path) as client:
        replies = client.ask([asking("c"), asking("a"), asking("ü\n"), asking("d")])
    assert [reply.text for reply in replies] == ["cc", "aa", "ü\nü\n", "dd"]
    assert [reply.is_cached for reply in replies] == [True, True, True, False]
    assert second.asked == ["d"]
    assert first.is_closed
    assert len(path.read_bytes().splitlines()) == 4


def test_equal_requests_are_asked_once_and_another_seed_anew():
    echo = Echo()
    client = CachedClient(echo, None)
    replies = client.ask([asking("a"), asking("a"), asking("a", seed=1), asking("a")])
    assert echo.asked == ["a", "a"]
    assert [reply.is_cached for reply in replies] == [False, True, False, True]


def test_every_request_is_handed_over_once_with_its_place():
    client = CachedClient(Echo(), None)
    client.ask([asking("b")])
    seen: list[tuple[int, str]] = []
    client.ask([asking("a"), asking("b"), asking("a")], lambda place, reply: seen.append((place, reply.text)))
    assert seen == [(1, "bb"), (0, "aa"), (2, "aa")]


def test_another_model_has_replies_of_its_own(tmp_path: Path):
    for name in ("one", "two"):
        echo = Echo(name)
        with CachedClient(echo, tmp_path / "cache.jsonl") as client:
            texts_of(client, "a")
        assert echo.asked == ["a"]


def test_errors_are_asked_again(tmp_path: Path):
    for _ in range(2):
        echo = Echo()
        with CachedClient(echo, tmp_path / "cache.jsonl") as client:
            replies = client.ask([asking("bad"), asking("a"), asking("bad")])
        assert [reply.error for reply in replies] == ["bad", None, "bad"]
        assert "bad" in echo.asked


def test_what_was_answered_before_the_end_is_kept(tmp_path: Path):
    with CachedClient(Echo(), tmp_path / "cache.jsonl") as client, pytest.raises(ClientError, match="gone"):
        texts_of(client, "a", "b", "broken", "c")
    echo = Echo()
    with CachedClient(echo, tmp_path / "cache.jsonl") as client:
        assert texts_of(client, "a", "b", "c") == ["aa", "bb", "cc"]
    assert echo.asked == ["c"]


def test_what_is_no_unicode_fails_alone():
    echo = Echo()
    replies = CachedClient(echo, None).ask([asking("a"), asking("x\ud800")])
    assert replies[1].error == "the user message is no valid Unicode at character 1; mend the source"
    assert echo.asked == ["a"]


# ---------------------------------------------------------------- counts


def test_usage_counts_what_was_asked_and_what_it_took():
    client = CachedClient(Echo(), None, ClientConfig(price_in=2.0, price_out=10.0))
    client.ask([asking(text) for text in ("a", "b", "a", "bad", "bad")])
    client.ask([asking("a")])
    assert client.usage == Usage(
        num_requests=6, num_asked=3, num_cached=3, num_failed=1, num_input_tokens=10, num_output_tokens=4
    )
    assert client.summary == "asked 6 (3 from the cache, 1 failed), 10 tokens in, 4 out, $0.0001"


def test_no_price_no_cost():
    usage = Usage(num_requests=120, num_asked=90, num_cached=30, num_input_tokens=41200, num_output_tokens=3100)
    assert usage.summary() == "asked 120 (30 from the cache), 41,200 tokens in, 3,100 out"


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("torn", [b'{"key": "abc", "te', b"\xff\xfe", b'{"key": "' + b"x" * 100_000])
def test_a_torn_last_line_is_cut_off_before_the_next_reply(tmp_path: Path, torn: bytes):
    path = tmp_path / "cache.jsonl"
    with CachedClient(Echo(), path) as client:
        texts_of(client, "a")
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    echo = Echo()
    with CachedClient(echo, path) as client:
        assert texts_of(client, "a", "b") == ["aa", "bb"]
    assert echo.asked == ["b"]
    assert path.read_bytes().startswith(whole)
    assert [json.loads(line)["text"] for line in path.read_bytes().splitlines()] == ["aa", "bb"]


def test_a_file_that_is_nothing_but_a_torn_line_is_begun_anew(tmp_path: Path):
    path = tmp_path / "cache.jsonl"
    path.write_bytes(b'{"key"')
    with CachedClient(Echo(), path) as client:
        texts_of(client, "a")
    assert [json.loads(line)["text"] for line in path.read_bytes().splitlines()] == ["aa"]


def test_a_line_that_is_no_reply_is_left_out(tmp_path: Path):
    path = tmp_path / "cache.jsonl"
    path.write_bytes(b'{"key": 3}\nhello\n')
    with CachedClient(Echo(), path) as client:
        assert texts_of(client, "a") == ["aa"]


def test_replies_of_another_process_are_used_as_they_come(tmp_path: Path):
    one, two = Echo(), Echo()
    path = tmp_path / "cache.jsonl"
    with CachedClient(one, path) as first, CachedClient(two, path) as second:
        texts_of(first, "a")
        texts_of(second, "a", "b")
        texts_of(first, "b", "c")
    assert (one.asked, two.asked) == (["a", "c"], ["b"])


def test_a_file_that_cannot_be_opened_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cache of replies '.*/file/cache\.jsonl' cannot be opened"):
        CachedClient(Echo(), tmp_path / "file" / "cache.jsonl")


_SCRIPT = """
import sys
from pathlib import Path
from tests.test_clients_responses import Echo, asking
from tracekit.clients.responses import CachedClient

first, stop = int(sys.argv[2]), int(sys.argv[3])
with CachedClient(Echo(), Path(sys.argv[1])) as client:
    for number in range(first, stop):
        client.ask([asking(f"{number} " + "x" * (number % 7000))])
"""


def process(path: Path, first: int, stop: int) -> Process:
    return start("-c", _SCRIPT, path, first, stop, env={"TQDM_DISABLE": "1"})


def test_two_processes_append_to_one_file(tmp_path: Path):
    path = tmp_path / "cache.jsonl"
    running = [process(path, 0, 400), process(path, 1000, 1400)]
    for one in running:
        _, said = one.communicate(timeout=120)
        assert one.returncode == 0, said
    texts = [json.loads(line)["text"] for line in path.read_bytes().splitlines()]
    assert {int(text.split()[0]) for text in texts} == {*range(400), *range(1000, 1400)}


def test_after_kill_9_only_the_rest_is_asked(tmp_path: Path):
    path = tmp_path / "cache.jsonl"
    running = process(path, 0, 10_000)
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < 20:
        assert time.monotonic() < deadline
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=30)
    num_kept = path.read_bytes().count(b"\n")
    echo = Echo()
    with CachedClient(echo, path) as client:
        client.ask([asking(f"{number} " + "x" * (number % 7000)) for number in range(num_kept + 5)])
    assert [int(text.split()[0]) for text in echo.asked] == [*range(num_kept, num_kept + 5)]
    assert len([json.loads(line) for line in path.read_bytes().splitlines()]) == num_kept + 5
