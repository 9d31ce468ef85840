"""The endpoint client: the official client against a server of our own on the loopback."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.endpoint_for_tests import KEY, TestEndpoint
from tests.processes_for_tests import Process
from tests.processes_for_tests import start as start_python
from tracekit.clients.client import ChatMessage, ClientConfig, Reply, Request
from tracekit.clients.endpoint import EndpointClient
from tracekit.errors import ClientError, ConfigError

ROOT = Path(__file__).parent.parent
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string"}},
    "required": ["answer"],
    "additionalProperties": False,
}
Started = Callable[..., TestEndpoint]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    """Starts servers, and points the environment at the last one."""
    running: list[TestEndpoint] = []

    def make(**settings: object) -> TestEndpoint:
        running.append(TestEndpoint(**settings))  # pyright: ignore[reportArgumentType]
        monkeypatch.setenv("OPENAI_BASE_URL", running[-1].url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        return running[-1]

    yield make
    for endpoint in running:
        endpoint.close()


def asking(text: str, **fields: object) -> Request:
    return Request(messages=[ChatMessage(role="user", content=text)], **fields)  # pyright: ignore[reportArgumentType]


def replies_to(*texts: str, client: EndpointClient | None = None, **settings: object) -> list[Reply]:
    client = client or EndpointClient("tiny", ClientConfig(**settings))  # pyright: ignore[reportArgumentType]
    try:
        return client.ask([asking(text) for text in texts])
    finally:
        client.close()


def failure_of(*texts: str, **settings: object) -> str:
    with pytest.raises(ClientError) as caught:
        replies_to(*texts, **settings)
    whole = "".join(traceback.format_exception(caught.value))
    assert KEY not in whole
    return str(caught.value)


# ---------------------------------------------------------------- answers


def test_replies_come_in_the_order_of_the_requests_with_their_tokens(start: Started):
    endpoint = start()
    replies = replies_to(*[f"echo {number}" for number in range(20)])
    assert [reply.text for reply in replies] == [str(number) for number in range(20)]
    assert {(r.finish_reason, r.num_input_tokens, r.num_output_tokens, r.error) for r in replies} == {
        ("stop", 7, 3, None)
    }
    assert sorted(endpoint.asked) == sorted(f"echo {number}" for number in range(20))


def test_the_request_says_what_was_asked_for(start: Started):
    endpoint = start()
    client = EndpointClient("tiny")
    client.ask([asking("echo a", max_new_tokens=11, temperature=0.5, seed=3, json_schema=SCHEMA)])
    client.close()
    (request,) = endpoint.requests
    assert request["model"] == "tiny"
    assert (request["max_tokens"], request["temperature"], request["seed"]) == (11, 0.5, 3)
    assert request["response_format"]["json_schema"] == {"name": "reply", "schema": SCHEMA, "strict": True}


def test_no_more_requests_are_open_than_asked_for(start: Started):
    endpoint = start()
    endpoint.pause_seconds = 0.05
    replies_to(*[f"echo {number}" for number in range(12)], concurrency=3)
    assert endpoint.max_open == 3


def test_replies_are_handed_over_as_they_come(start: Started):
    endpoint = start()
    endpoint.pause_seconds = 0.01
    known: list[int] = []
    client = EndpointClient("tiny", ClientConfig(concurrency=1))
    client.ask([asking("echo a"), asking("echo b")], lambda place, reply: known.append(len(endpoint.asked)))
    client.close()
    assert known == [1, 2]


def test_a_client_is_asked_again_and_again(start: Started):
    start()
    client = EndpointClient("tiny")
    assert [client.ask([asking(f"echo {text}")])[0].text for text in "abc"] == ["a", "b", "c"]
    assert client.ask([]) == []
    client.close()


def test_reasoning_is_left_out_also_where_only_its_end_is_seen(start: Started):
    start(says=lambda text: f"<think>hm</think>\n\n{text}" if text == "a" else f"hm</think>{text}")
    assert [reply.text for reply in replies_to("echo a", "echo b")] == ["a", "b"]


def test_a_refusal_is_a_reply(start: Started):
    start()
    assert replies_to("refused")[0].text == "I will not."


def test_tokens_that_are_not_counted_are_0_and_that_is_said_once(start: Started, capsys: pytest.CaptureFixture[str]):
    start()
    replies = replies_to("uncounted", "uncounted")
    assert [(reply.num_input_tokens, reply.num_output_tokens) for reply in replies] == [(0, 0), (0, 0)]
    assert capsys.readouterr().err.count("does not say how many tokens") == 1


# ---------------------------------------------------------------- what fails once, or one request


def test_a_limit_is_waited_for_as_long_as_the_server_says(start: Started):
    endpoint = start()
    assert replies_to("limited once", max_retries=1)[0].text == "limited once"
    assert endpoint.times[1] - endpoint.times[0] >= 1


def test_an_error_of_the_server_is_asked_again(start: Started):
    endpoint = start()
    assert replies_to("fails once", max_retries=1)[0].text == "fails once"
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("too long", "HTTP 400: This model's maximum context length is 8 tokens"),
        ("fails", "HTTP 500: oh, sent 1 times"),
        ("torn", "the endpoint's response is no chat completion: Input data was truncated"),
        ("page", "the endpoint's response is no chat completion: JSON is malformed"),
        ("empty", "the endpoint's response holds no choices"),
        ("filtered", "the endpoint's content filter held the reply back"),
        ("hangs", "no reply within 0.5 s, sent 1 times"),
    ],
)
def test_one_request_may_fail_and_the_others_go_on(start: Started, text: str, why: str):
    start()
    replies = replies_to("echo a", text, "echo b", max_retries=0, timeout=0.5)
    assert [reply.text for reply in replies] == ["a", "", "b"]
    assert replies[1].error is not None
    assert replies[1].error.startswith(why)


# ---------------------------------------------------------------- what a server does not know


@pytest.mark.parametrize("name", ["response_format", "seed", "temperature"])
def test_what_the_server_refuses_is_left_out_once_for_all(
    start: Started, name: str, capsys: pytest.CaptureFixture[str]
):
    endpoint = start(refuses=(name,))
    client = EndpointClient("tiny", ClientConfig(concurrency=1))
    replies = client.ask([asking(f"echo {number}", json_schema=SCHEMA) for number in range(4)])
    client.close()
    assert [reply.text for reply in replies] == ["0", "1", "2", "3"]
    assert [name in request for request in endpoint.requests] == [True, False, False, False, False]
    assert f"going on without ({name})" in capsys.readouterr().err


def test_the_newer_name_of_the_length_is_used_once_the_server_wants_it(start: Started):
    endpoint = start(refuses=("max_tokens",))
    assert [reply.text for reply in replies_to("echo a", "echo b", concurrency=1)] == ["a", "b"]
    assert ["max_completion_tokens" in request for request in endpoint.requests] == [False, True, True]


def test_a_server_that_knows_nothing_but_the_question_is_asked_that(start: Started):
    start(refuses=("max_tokens", "temperature", "seed", "response_format"))
    client = EndpointClient("tiny")
    assert client.ask([asking("echo a", json_schema=SCHEMA)])[0].text == "a"
    client.close()


def test_a_schema_that_is_refused_without_a_word_is_left_out(start: Started):
    endpoint = start()
    client = EndpointClient("tiny")
    assert client.ask([asking("mute", json_schema=SCHEMA)])[0].text == "mute"
    assert client.ask([asking("echo a", json_schema=SCHEMA)])[0].text == "a"
    client.close()
    assert ["response_format" in request for request in endpoint.requests] == [True, False, False]


# ---------------------------------------------------------------- what ends it


def test_a_wrong_key_ends_it_at_once_and_is_not_repeated(start: Started, monkeypatch: pytest.MonkeyPatch):
    endpoint = start()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-secret-word")
    message = failure_of(*[f"echo {number}" for number in range(50)], concurrency=1)
    assert "HTTP 401: Incorrect API key provided: ***" in message
    assert "Check OPENAI_API_KEY" in message
    assert "sk-wrong" not in message
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("forbidden", "HTTP 403: No access with ***. Check that the key may use this model"),
        ("echo no model", "HTTP 404: The model `tiny` does not exist. Check the model's name"),
        ("limited", "HTTP 429: You exceeded your current quota. It was asked 1 times"),
    ],
)
def test_what_would_fail_again_ends_it(start: Started, text: str, words: str):
    start()
    assert words in failure_of(text, "echo a", max_retries=0)


def test_a_server_that_is_not_there_is_said_at_once(start: Started):
    start().close()
    started = time.monotonic()
    assert "no connection" in failure_of("echo a")
    assert time.monotonic() - started < 5


def test_a_connection_that_breaks_ends_it_after_the_retries(start: Started):
    endpoint = start()
    assert "the connection is lost" in failure_of("hangs up", max_retries=1)
    assert endpoint.asked == ["hangs up"] * 2


def test_nothing_but_failures_ends_it(start: Started):
    endpoint = start()
    message = failure_of(*["page"] * 50, max_retries=0, concurrency=2)
    assert "3 requests in a row failed, the last with: the endpoint's response is no chat completion" in message
    assert len(endpoint.requests) <= 4


# ---------------------------------------------------------------- where, and with what key


def test_the_name_is_the_model_and_the_place_without_credentials(start: Started, monkeypatch: pytest.MonkeyPatch):
    endpoint = start(wants_key=False)
    with_password = endpoint.url.replace("http://", "http://user:pass%20word@") + "/?token=hidden-token"
    monkeypatch.setenv("OPENAI_BASE_URL", with_password)
    monkeypatch.delenv("OPENAI_API_KEY")
    client = EndpointClient("org/tiny")
    assert client.name == f"org/tiny@{endpoint.url}"
    assert client.ask([asking("echo a")])[0].text == "a"
    client.close()
    assert endpoint.headers[0]["authorization"] == "Basic dXNlcjpwYXNzIHdvcmQ="


def test_a_server_on_this_machine_needs_no_key(start: Started, monkeypatch: pytest.MonkeyPatch):
    start(wants_key=False)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert replies_to("echo a")[0].text == "a"


def test_an_endpoint_elsewhere_needs_a_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ClientError, match=r"OPENAI_API_KEY is not set .* https://api\.openai\.com/v1 is not on this"):
        EndpointClient("tiny")


@pytest.mark.parametrize("address", ["localhost:8080", "ftp://host/v1", "http://", "http://host:port/v1"])
def test_what_is_no_address_is_refused_without_repeating_it(monkeypatch: pytest.MonkeyPatch, address: str):
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    with pytest.raises(ConfigError, match="OPENAI_BASE_URL in the environment is no address") as caught:
        EndpointClient("tiny")
    assert caught.value.__cause__ is None


def test_without_the_package_the_pip_line_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ClientError, match=r"pip install 'tracekit-llm\[endpoint\]'"):
        EndpointClient("tiny")


# ---------------------------------------------------------------- a process of its own

_SCRIPT = """
import sys
from pathlib import Path
from tracekit.clients.client import ClientConfig, ChatMessage, Request
from tracekit.clients.by_name import open_client
from tracekit.config import ModelConfig

settings = ClientConfig(concurrency=2, max_retries=0, timeout=60)
texts = sys.argv[2:]
cache = Path(sys.argv[1])
with open_client("openai:tiny", model=ModelConfig(), settings=settings, cache=cache, desc="asking") as client:
    requests = [Request(messages=[ChatMessage(role="user", content=text)]) for text in texts]
    print(client.name, [reply.text or reply.error for reply in client.ask(requests)], client.summary)
"""


def process(cache: Path, *texts: str) -> Process:
    return start_python("-c", _SCRIPT, cache, *texts)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ctrl_c_ends_it_promptly_and_keeps_what_was_answered(start: Started, tmp_path: Path):
    endpoint = start()
    cache = tmp_path / "cache.jsonl"
    running = process(cache, "echo a", "echo b", "hangs", "echo c", "echo d")
    wait_for(lambda: "hangs" in endpoint.asked and cache.exists() and cache.read_bytes().count(b"\n") >= 2)
    stopped = time.monotonic()
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=30)
    assert running.returncode != 0
    assert time.monotonic() - stopped < 5
    assert "KeyboardInterrupt" in said
    assert {json.loads(line)["text"] for line in cache.read_text().splitlines()} >= {"a", "b"}


def test_the_key_is_in_no_output_and_no_file(start: Started, tmp_path: Path):
    start()
    said = []
    for texts in (["echo a", "too long"], ["forbidden"], ["torn", "fails", "empty"]):
        running = process(tmp_path / "cache.jsonl", *texts)
        said += running.communicate(timeout=60)
    assert "Check that the key may use this model" in "".join(said)
    assert "asked 2 (0 from the cache, 1 failed), 7 tokens in, 3 out" in "".join(said)
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "tiny@" in written
    assert KEY not in "".join(said) + written
    assert os.environ["OPENAI_API_KEY"] == KEY
