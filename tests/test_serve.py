"""The logging server, asked by the official client: answers, traces, refusals, and what a reader sees meanwhile."""

import errno
import inspect
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.serving_for_tests import ask, client_of, hold_writing, new_server, post, serving
from tests.tiny_checkpoint import save_tiny_checkpoint
from tracekit import TraceStore, verify
from tracekit.errors import (
    CaptureError,
    ConfigError,
    DatasetError,
    ModelError,
    NoSpaceError,
    PlanMismatchError,
    ShardLockedError,
    TracekitError,
)
from tracekit.format import shards as shards_module
from tracekit.model.decoding import DecodedTraces
from tracekit.serve import batcher as engine_module
from tracekit.serve.forms import RequestError, parse_chat, parse_completion
from tracekit.serve.server import LoggingServer

EVERYWHERE = "0.0.0.0"  # noqa: S104 - bound for a moment


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint with a chat template; its answers are full of characters of several tokens."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("chat") / "tiny", chat=True)


@pytest.fixture(scope="module")
def server(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoggingServer]:
    """A server whose shards stay open: for what needs no dataset."""
    with serving(tmp_path_factory.mktemp("served") / "out", chat_model, limit_body=5000, limit_new_tokens=64) as server:
        yield server


@pytest.fixture(scope="module")
def lone(chat_model: Path) -> Any:
    """The same model in plain transformers, eager."""
    return AutoModelForCausalLM.from_pretrained(chat_model, attn_implementation="eager").eval()


def requests(count: int) -> list[dict[str, Any]]:
    """Requests of every kind: lengths, greedy and sampled, chats and completions, streamed or not."""
    return [
        {
            "is_chat": number % 2 == 0,
            "text": f"Who wrote book {number}? " * (1 + number % 5),
            "max_tokens": 1 + number % 7 * 3,
            "temperature": 0 if number % 3 else 0.5 + number / count,
            "top_p": 1.0 if number % 4 else 0.9,
            "seed": number if number % 6 == 0 else None,
            "stream": number % 5 < 2,
        }
        for number in range(count)
    ]


def answer_to(client: openai.OpenAI, request: dict[str, Any]) -> tuple[str, str, str]:
    """Key, text and finish reason of a request by the official client."""
    settings = {name: request[name] for name in ("max_tokens", "temperature", "top_p", "seed", "stream")}
    if request["is_chat"]:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": request["text"]}]
        raw = client.chat.completions.with_raw_response.create(model="tiny", messages=messages, **settings)
    else:
        raw = client.completions.with_raw_response.create(model="tiny", prompt=request["text"], **settings)
    reply, key = raw.parse(), raw.headers["x-tracekit-key"]
    if not request["stream"]:
        choice = reply.choices[0]
        return key, choice.message.content if request["is_chat"] else choice.text, choice.finish_reason
    chunks = [chunk.choices[0] for chunk in reply]
    texts = [chunk.delta.content if request["is_chat"] else chunk.text for chunk in chunks]
    return key, "".join(text or "" for text in texts), chunks[-1].finish_reason


def test_64_mixed_requests_at_once_each_have_the_trace_and_the_text_of_a_lone_run(
    chat_model: Path, lone: Any, tmp_path: Path
):
    out = tmp_path / "out"
    asked = requests(64)
    with serving(out, chat_model, max_batch=16, batch_wait_ms=100, samples_per_shard=20) as server:
        client = client_of(server.url)
        with ThreadPoolExecutor(64) as pool:
            answers = list(pool.map(lambda request: answer_to(client, request), asked))
        again = {n: answer_to(client, asked[n]) for n in range(0, 64, 6)}  # sampled with a seed, now alone
    assert len({key for key, _, _ in answers}) == 64
    for n, (_, text, _) in again.items():
        assert text == answers[n][1], "a draw depends on its batch"
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    together = [json.loads(line)["num_together"] for line in (out / "logs/serve.jsonl").read_text().splitlines()]
    assert max(together) > 8, "nothing was batched"
    report = verify(out)
    assert (report.problems, report.num_samples, report.open_configs) == ([], 75, [])
    with TraceStore(out) as store:
        assert store.info().verification.num_replayed > len({record.as_py() for record in store.records["shard"]})
        for request, (key, text, reason) in zip(asked, answers, strict=True):
            record = store[key].record
            assert (record.generated_answer, record.finish_reason) == (text, reason)
            assert record.generation.do_sample == (request["temperature"] > 0)
            assert record.is_streamed == request["stream"]
            ids = torch.tensor([record.token_ids])
            with torch.inference_mode():
                output = lone(ids, output_hidden_states=True)
            for layer, expected in enumerate(output.hidden_states):
                mine = store.hidden_states(key, layer=layer)
                np.testing.assert_allclose(mine, expected[0].numpy(), atol=1e-5, rtol=1e-5)
            logprobs = output.logits[0].log_softmax(-1)
            picked = logprobs[record.prompt_length - 1 : -1].gather(1, ids[0, record.prompt_length :, None])[:, 0]
            np.testing.assert_allclose(record.token_logprobs, picked.numpy(), atol=1e-5)
            if request["temperature"] == 0:
                prompt = ids[:, : record.prompt_length]
                with torch.inference_mode():
                    alone = lone.generate(prompt, do_sample=False, max_new_tokens=request["max_tokens"])
                generated = alone[0, record.prompt_length :].tolist()
                assert record.generated_token_ids == generated
                assert text == tokenizer.decode(generated, skip_special_tokens=True)


def test_a_finished_folder_is_loaded_by_datasets(chat_model: Path, tmp_path: Path):
    from datasets import load_dataset

    out = tmp_path / "out"
    with serving(out, chat_model) as server:
        key = ask(server.url, "Who wrote it?").headers["x-tracekit-key"]
    rows = load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows[0]["json"]["messages"] == [{"role": "user", "content": "Who wrote it?"}]
    assert rows[0]["__key__"] == key
    assert "Requests that a logging server" in (out / "README.md").read_text()


def test_a_reader_sees_closed_shards_while_the_server_runs(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from tracekit.cli import main

    out = tmp_path / "out"
    with serving(out, chat_model, samples_per_shard=2) as server:
        assert main(["show", str(out)]) == 0
        assert "not finished" in capsys.readouterr().out
        with TraceStore(out) as store:
            assert (len(store), store.is_open) == (0, True)
        for number in range(5):
            assert ask(server.url, f"Number {number}?").status_code == 200
        wait_for(lambda: verify(out).num_samples == 4)
        assert main(["verify", str(out)]) == 0
        assert "open: serve is not finished" in capsys.readouterr().out
        with TraceStore(out) as store:
            assert (store.keys, store.is_open) == (["000000", "000001", "000002", "000003"], True)
            assert store.by_prompt("Number 1?")[0].key == "000001"
    assert verify(out).num_samples == 5


def test_a_shard_is_closed_some_time_after_its_first_sample(chat_model: Path, tmp_path: Path):
    with serving(tmp_path / "out", chat_model, close_after=0.3) as server:
        ask(server.url)
        wait_for(lambda: verify(tmp_path / "out").num_samples == 1)


def test_a_shard_that_is_just_being_closed_is_no_problem(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, seen = tmp_path / "out", []
    original = shards_module.write_atomic

    def watched(path: Path, data: bytes) -> None:
        if path.parent.parent.name == "sidecars":  # its tar has its name, its sidecar is not there
            seen.append(verify(out))
        original(path, data)

    monkeypatch.setattr(shards_module, "write_atomic", watched)
    with serving(out, chat_model, samples_per_shard=1) as server:
        for _ in range(2):
            ask(server.url)
    assert [(report.problems, report.num_samples) for report in seen] == [([], 0), ([], 1)]


def test_a_restart_goes_on_with_shards_and_keys(chat_model: Path, tmp_path: Path):
    out = tmp_path / "out"
    keys = []
    for _ in range(3):
        with serving(out, chat_model) as server:
            keys += [ask(server.url).headers["x-tracekit-key"] for _ in range(2)]
        assert verify(out).open_configs == []
    assert keys == [f"{number:06d}" for number in range(6)]
    with TraceStore(out) as store:
        assert store.keys == keys
        assert store.records["shard"].to_pylist() == [0, 0, 1, 1, 2, 2]


def test_where_the_note_of_keys_is_lost_no_key_comes_twice(chat_model: Path, tmp_path: Path):
    out = tmp_path / "out"
    with serving(out, chat_model) as server:
        ask(server.url)
    (out / "data/serve/keys.partial").unlink()
    with serving(out, chat_model) as server:
        assert ask(server.url).headers["x-tracekit-key"] == "000001"


@pytest.mark.parametrize("note", [b"0", b"00000000000000000001", b"9" * 30, b"x"])
def test_a_note_of_keys_that_cannot_be_is_not_believed(note: bytes, chat_model: Path, tmp_path: Path):
    out = tmp_path / "out"
    with serving(out, chat_model) as server:
        keys = [ask(server.url).headers["x-tracekit-key"] for _ in range(2)]
    (out / "data/serve/keys.partial").write_bytes(note)
    with serving(out, chat_model) as server:
        keys.append(ask(server.url).headers["x-tracekit-key"])
    assert keys == ["000000", "000001", "000002"]


def test_a_server_that_nobody_asked_leaves_an_open_dataset_and_takes_other_settings(chat_model: Path, tmp_path: Path):
    out = tmp_path / "out"
    with serving(out, chat_model) as server:
        pass
    assert server.manifest is None
    report = verify(out)
    assert (report.problems, report.num_samples, report.open_configs) == ([], 0, ["serve"])
    other = save_tiny_checkpoint(tmp_path / "other", chat=True, seed=1)
    with serving(out, other) as server:
        ask(server.url)
    with TraceStore(out) as store:
        assert store.info().models[0].id == "other"


def test_another_model_in_the_same_folder_is_refused_with_the_difference(chat_model: Path, tmp_path: Path):
    out = tmp_path / "out"
    with serving(out, chat_model) as server:
        ask(server.url)
    other = save_tiny_checkpoint(tmp_path / "other", chat=True, seed=1)
    with pytest.raises(PlanMismatchError, match=r"model\.id: 'tiny' there, 'other' now"):
        new_server(out, other).__enter__()
    assert verify(out).open_configs == [], "a refused start has opened the dataset"


def test_a_start_that_fails_leaves_a_finished_dataset_finished(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    with serving(out, chat_model) as server:
        ask(server.url)

    def fail(*arguments, **named):
        raise ModelError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("tracekit.serve.server.load_model", fail)
        with pytest.raises(ModelError):
            new_server(out, chat_model).__enter__()
    assert verify(out).open_configs == []
    with serving(out, chat_model) as server:
        assert ask(server.url).headers["x-tracekit-key"] == "000001"


def test_a_downloaded_dataset_does_not_grow(chat_model: Path, tmp_path: Path):
    out = tmp_path / "out"
    with serving(out, chat_model) as server:
        ask(server.url)
    shutil.rmtree(out / "sidecars")
    with pytest.raises(DatasetError, match="cannot grow"):
        new_server(out, chat_model).__enter__()
    report = verify(out)
    assert (report.problems, report.num_samples) == ([], 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_of_its_own_ends_the_server_and_is_not_hidden(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def wrong(*arguments, **named):
        raise ZeroDivisionError

    monkeypatch.setattr(engine_module, "make_sample", wrong)

    def ask_until_it_ends() -> None:
        with serving(tmp_path / "out", chat_model) as server:
            assert ask(server.url).status_code == 503
            wait_for(lambda: _is_refused(server.url))

    with pytest.raises(TracekitError, match="stopped by an error of its own"):
        ask_until_it_ends()


def test_two_servers_do_not_write_one_folder(chat_model: Path, tmp_path: Path):
    with (
        serving(tmp_path / "out", chat_model),
        pytest.raises(ShardLockedError, match="another server is writing"),
    ):
        new_server(tmp_path / "out", chat_model).__enter__()


def test_what_opts_out_is_written_nowhere(chat_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    with serving(out, chat_model) as server:
        ask(server.url, "kept words")
        by_field = ask(server.url, "hushed words", store=False)
        by_header = ask(server.url, "hushed words", headers={"X-Tracekit-Log": "off"})
        wrong = ask(server.url, headers={"X-Tracekit-Log": "maybe"})
    for reply in (by_field, by_header):
        assert reply.status_code == 200
        assert "x-tracekit-key" not in reply.headers
    assert wrong.json()["error"]["param"] == "X-Tracekit-Log"
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    said = "".join(capfd.readouterr())
    assert b"hushed words" not in written
    assert b"kept words" in written
    assert "words" not in said
    assert "words" not in (out / "logs/serve.jsonl").read_text() + (out / "logs/serve.log").read_text()
    assert verify(out).num_samples == 1


def test_streams_never_cut_a_character_and_add_up_to_the_whole(server: LoggingServer):
    client = client_of(server.url)
    num_wide = 0
    for number in range(6):
        messages = [{"role": "user", "content": f"Grüße {number} 東京"}]
        settings: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 40, "temperature": 0}
        whole = client.chat.completions.create(**settings)
        stream = client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
        *chunks, last = list(stream)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(pieces) == whole.choices[0].message.content
        assert last.usage == whole.usage
        assert whole.usage is not None
        assert whole.usage.completion_tokens <= 40
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
        num_wide += sum(len(character.encode()) > 1 and character != "\ufffd" for character in "".join(pieces))
    assert num_wide > 0, "no character was wider than a token, so this shows nothing"


def test_a_stream_comes_token_by_token(server: LoggingServer):
    stream = client_of(server.url).completions.create(
        model="tiny", prompt="Why", max_tokens=30, temperature=0, stream=True
    )
    assert sum(bool(chunk.choices[0].text) for chunk in stream) > 8


def test_stop_strings_end_the_answer_and_stay_out_of_it(server: LoggingServer):
    client = client_of(server.url)
    settings: dict[str, Any] = {"model": "tiny", "prompt": "Who wrote", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**settings)
    text = whole.choices[0].text
    stop = text[5:8]
    expected = text[: text.index(stop)]
    cut = client.completions.create(**settings, stop=[stop, "never there"])
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (expected, "stop")
    assert cut.usage is not None
    assert cut.usage.completion_tokens < whole.usage.completion_tokens  # pyright: ignore[reportOptionalMemberAccess]
    chunks = list(client.completions.create(**settings, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_log_probabilities_are_the_raw_models(server: LoggingServer, chat_model: Path, lone: Any):
    client = client_of(server.url)
    messages: Any = [{"role": "user", "content": "Why?"}]
    reply = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=5, temperature=0.7, seed=3, logprobs=True, top_logprobs=3
    )
    content = reply.choices[0].logprobs.content  # pyright: ignore[reportOptionalMemberAccess]
    assert content is not None
    assert [len(one.top_logprobs) for one in content] == [3] * 5
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = lone(ids).logits[0, -1].log_softmax(-1).topk(3).values
    found = [one.logprob for one in content[0].top_logprobs]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    plain = client.completions.create(model="tiny", prompt="Why", max_tokens=3, temperature=0, logprobs=2)
    logprobs = plain.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.tokens or []) == len(logprobs.token_logprobs or []) == len(logprobs.text_offset or []) == 3


def test_tokens_with_log_probabilities_join_to_the_text_up_to_a_stop_string(server: LoggingServer):
    client = client_of(server.url)
    settings: dict[str, Any] = {"model": "tiny", "prompt": "Who wrote", "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**settings).choices[0].text
    for stop in (None, text[5:8]):
        choice = client.completions.create(**settings, logprobs=2, stop=stop).choices[0]
        chunks = list(client.completions.create(**settings, logprobs=2, stop=stop, stream=True))
        parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs is not None]
        assert choice.logprobs is not None
        tokens, offsets = choice.logprobs.tokens or [], choice.logprobs.text_offset or []
        assert "".join(tokens) == choice.text
        assert [choice.text[start:][: len(token)] for token, start in zip(tokens, offsets, strict=True)] == tokens
        assert [token for part in parts for token in part.tokens or []] == tokens
        assert [offset for part in parts for offset in part.text_offset or []] == offsets
        assert len(tokens) == len(choice.logprobs.top_logprobs or [])


def test_several_prompts_and_token_ids_are_samples_of_their_own(chat_model: Path, tmp_path: Path):
    out = tmp_path / "out"
    ids = AutoTokenizer.from_pretrained(chat_model)("Who wrote it?").input_ids
    body = {"max_tokens": 6, "temperature": 0, "logprobs": 1}
    with serving(out, chat_model, max_queue=4) as server:
        by_text = post(server.url, body | {"prompt": ["Who wrote it?", "Why"]}, "completions")
        by_ids = post(server.url, body | {"prompt": [ids, ids[:2]]}, "completions")
        alone = post(server.url, body | {"prompt": ids}, "completions")
        stream = post(
            server.url,
            body | {"prompt": ["Why", "Why"], "stream": True, "stream_options": {"include_usage": True}},
            "completions",
        )
        wrong = {
            "not in the vocabulary": [10**6],
            "mixes texts": ["Why", 3],
            ">= 0": [-1],
            "prompt is empty": [[], [1]],
            "send fewer": ["Why"] * 5,
        }
        for message, prompt in wrong.items():
            reply = post(server.url, body | {"prompt": prompt}, "completions")
            assert (reply.status_code, reply.json()["error"]["param"].partition("[")[0]) == (400, "prompt")
            assert message in reply.json()["error"]["message"]
    keys = [reply.headers["x-tracekit-key"] for reply in (by_text, by_ids, alone, stream)]
    assert keys == ["000000,000001", "000002,000003", "000004", "000005,000006"]
    first, second = by_text.json()["choices"]
    assert (first["index"], second["index"]) == (0, 1)
    assert [reply.json()["choices"][0]["text"] for reply in (by_ids, alone)] == [first["text"]] * 2
    usages = [reply.json()["usage"]["total_tokens"] for reply in (by_text, by_ids, alone)]
    chunks = [json.loads(line[6:]) for line in stream.text.split("\n\n") if line.startswith("data: {")]
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == second["text"]
        assert mine[-1]["finish_reason"] == second["finish_reason"]
    assert chunks[-1]["usage"]["completion_tokens"] == 2 * len(second["logprobs"]["tokens"])
    with TraceStore(out) as store:
        assert len(store) == 7
        assert [len(store[key].record.token_ids) for key in ("000002", "000004")] == [usages[2], usages[2]]
        assert store["000002"].record.token_ids == store["000000"].record.token_ids == store["000004"].record.token_ids
        assert usages[0] == sum(len(store[key].record.token_ids) for key in ("000000", "000001"))


def test_several_prompts_are_admitted_together_or_not_at_all(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    opened, writing = hold_writing(monkeypatch)
    with serving(tmp_path / "out", chat_model, max_queue=3, max_batch=1) as server, ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, server.url)
        wait_for(writing.is_set)
        two = pool.submit(post, server.url, {"prompt": ["a", "b"], "max_tokens": 2}, "completions")
        wait_for(lambda: len(server._engine._waiting) == 2)  # or the next request would be the one that is admitted
        assert post(server.url, {"prompt": ["a", "b"]}, "completions").status_code == 429
        opened.set()
        assert (first.result().status_code, two.result().status_code) == (200, 200)
    assert verify(tmp_path / "out").num_samples == 3


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"n": 2}, "n", "`n` is not supported here but as 1"),
        ({"tools": [{"type": "function"}]}, "tools", "`tools` is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"temperature": 3}, "temperature", "<= 2"),
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"max_tokens": "4"}, "max_tokens", "Expected `int"),
        ({"max_completion_tokens": 65}, "max_completion_tokens", "gives 64 at most"),
        ({"seed": 2**70}, "seed", "Expected `int"),
        ({"seed": 10**30}, "seed", "Expected `int"),
        ({"top_k": 10**30}, "top_k", "Expected `int"),
        ({"top_k": 2**31}, "top_k", "<= 2147483647"),
        ({"max_tokens": 10**30}, "max_tokens", "Expected `int"),
        ({"max_completion_tokens": 2**63}, "max_completion_tokens", "Expected `int"),
        ({"logprobs": True, "top_logprobs": 10**30}, "top_logprobs", "Expected `int"),
        ({"n": 10**30}, "n", "not supported"),
        ({"temperature": 10**400}, "temperature", "out of range"),
        ({"ignore_eos": True}, "ignore_eos", "`ignore_eos` is not supported here but as False"),
        ({"min_tokens": 3}, "min_tokens", "not supported"),
        ({"stop_token_ids": [3]}, "stop_token_ids", "not supported"),
        ({"bad_words": ["a"]}, "bad_words", "not supported"),
        ({"length_penalty": 2.0}, "length_penalty", "not supported"),
        ({"repetition_penalty": 1.1}, "repetition_penalty", "not supported"),
        ({"messages": []}, "messages", "length >= 1"),
        ({"messages": None}, "messages", "Expected `array`"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "Invalid enum value 'tool'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            "'image_url' is not supported",
        ),
        ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "messages[0].images", "only text"),
        ({"messages": [{"role": "assistant", "content": "x", "prefix": True}]}, "messages[0].prefix", "goes on"),
        ({"messages": [{"role": "assistant", "content": "x", "partial": True}]}, "messages[0].partial", "goes on"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
            "Invalid enum value",
        ),
        ({"stream": True, "stream_options": {"pad": 1}}, "stream_options", "unknown field `pad`"),
        ({"stop": [""]}, "stop[0]", "length >= 1"),
        ({"top_logprobs": 2}, "top_logprobs", "needs `logprobs`"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "goes with `stream`"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server: LoggingServer, changes: dict, param: str, message: str):
    reply = ask(server.url, **changes)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'"x"',
        b"[" * 4000,
        b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        b"null",
    ],
)
def test_what_is_no_request_is_refused_in_openais_form(server: LoggingServer, body: bytes):
    reply = post(server.url, body)
    assert reply.status_code == 400
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_the_official_client_raises_its_own_errors(server: LoggingServer):
    client = client_of(server.url)
    messages: Any = [{"role": "user", "content": "Why?"}]
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-9' here"):
        client.chat.completions.create(model="gpt-9", messages=messages)
    with pytest.raises(openai.BadRequestError, match="room for 512 together") as refused:
        client.completions.create(model="tiny", prompt="word " * 600, max_tokens=8)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError, match="longer than 5000 bytes") as long:
        client.completions.create(model="tiny", prompt="word " * 2000)
    assert long.value.status_code == 413
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "tracekit"


HARMLESS = {
    "user": "me",
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "safety_identifier": "x",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "explicit"},
    "parallel_tool_calls": False,
    "store": True,
    "request_id": "a",
    "priority": 3,
    "cache_salt": "s",
    "n": 1,
    "best_of": 1,
    "logit_bias": {},
    "tools": None,
    "tool_choice": "none",
    "frequency_penalty": 0.0,
    "presence_penalty": 0,
    "repetition_penalty": 1.0,
    "min_p": 0.0,
    "ignore_eos": False,
    "min_tokens": 0,
    "stop_token_ids": [],
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_reasoning": True,
    "chat_template_kwargs": {},
    "add_generation_prompt": True,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "reasoning_effort": None,
    "vllm_xargs": {},
    "never_heard_of": None,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_parameter_that_shapes_no_answer_is_taken(name: str):
    parsed = parse_chat(json.dumps({"messages": [{"role": "user", "content": "Why?"}], name: HARMLESS[name]}).encode())
    assert parsed == parse_chat(b'{"messages": [{"role": "user", "content": "Why?"}]}')


def test_what_the_official_client_knows_is_taken_or_refused_by_name(server: LoggingServer):
    assert ask(server.url, **HARMLESS).status_code == 200
    for create in (openai.resources.chat.Completions.create, openai.resources.Completions.create):
        names = set(inspect.signature(create).parameters) - {"self", "timeout", "messages", "prompt"}
        for name in {name for name in names if not name.startswith("extra_")}:
            assert f"`{name}` is no parameter" not in ask(server.url, **{name: ["odd"]}).text


@pytest.mark.attack
@pytest.mark.parametrize(
    "name", ["foo", "Temperature", "max_token", "dynamic_temperature", "steering_vectors", "\x1b[31m", "a" * 500, ""]
)
@pytest.mark.parametrize("value", [0, False, "", [], {}, 1.5, "on"])
def test_a_parameter_that_the_server_does_not_know_is_refused_by_name(name: str, value: Any):
    for parse, asked in (
        (parse_chat, {"messages": [{"role": "user", "content": "q"}]}),
        (parse_completion, {"prompt": ""}),
    ):
        with pytest.raises(RequestError, match="is no parameter that this server knows") as refused:
            parse(json.dumps(asked | {name: value}).encode())
        assert (refused.value.status, refused.value.param) == (400, name[:64])
        assert len(refused.value.message) < 200


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_of_an_earlier_turn_is_refused_by_name(server: LoggingServer, field: str):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", field: "c"}]
    error = ask(server.url, messages=[*said, {"role": "user", "content": "d"}]).json()["error"]
    assert (error["param"], error["code"]) == (f"messages[1].{field}", "unsupported_parameter")


@pytest.mark.parametrize("settings", [{}, {"stop": ["e", " "]}, {"max_tokens": 1}, {"temperature": 1, "seed": 3}])
def test_token_ids_are_returned_where_vllm_returns_them(
    server: LoggingServer, chat_model: Path, settings: dict[str, Any]
):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    asked = {"max_tokens": 40, "temperature": 0, "return_token_ids": True} | settings
    for path, body in (
        ("chat/completions", {"messages": [{"role": "user", "content": "Why?"}]}),
        ("completions", {"prompt": ["One", "Two three"]}),
    ):
        whole = post(server.url, asked | body, path).json()
        sent = post(server.url, asked | body | {"stream": True}, path).text
        chunks = [json.loads(line[6:]) for line in sent.splitlines() if line.startswith("data: {")]
        for choice in whole["choices"]:
            mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
            prompts = [chunks, [whole]] if path.startswith("chat") else [mine, [choice]]
            streamed, prompt_ids = (
                [one["prompt_token_ids"] for one in held if "prompt_token_ids" in one] for held in prompts
            )
            assert streamed == prompt_ids
            assert "prompt_token_ids" in prompts[0][0]
            assert [token for one in mine for token in one.get("token_ids", [])] == choice["token_ids"]
            text = choice["message"]["content"] if path.startswith("chat") else choice["text"]
            assert tokenizer.decode(choice["token_ids"], skip_special_tokens=True).startswith(text)
            assert mine[-1]["stop_reason"] == choice["stop_reason"]
            assert choice["stop_reason"] in [None, *asked.get("stop", [])]
        assert whole["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in whole["choices"])
        bare = post(server.url, asked | body | {"return_token_ids": False}, path).text
        assert "token_ids" not in bare


def test_parts_of_text_are_joined_and_a_developer_is_the_system(server: LoggingServer):
    parts = [{"type": "text", "text": "Why"}, {"type": "text", "text": "not?"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert post(server.url, {"messages": messages, "max_tokens": 2}).status_code == 200


def test_a_long_body_without_a_length_is_cut_off(server: LoggingServer):
    chunks = (b" " * 1000 for _ in range(100))
    headers = {"Content-Type": "application/json"}
    reply = httpx.post(f"{server.url}/v1/completions", content=chunks, headers=headers)
    assert reply.status_code == 413


def test_pages_of_a_browser_cannot_ask(server: LoggingServer):
    body = b'{"prompt": "x"}'
    assert post(server.url, body, "completions", headers={"Host": "evil.example"}).status_code == 403
    assert post(server.url, body, "completions", headers={"Content-Type": "text/plain"}).status_code == 415
    assert post(server.url, body, "completions", headers={"Host": "localhost:1"}).status_code == 200


def test_localhost_is_itself_however_it_is_written(server: LoggingServer):
    assert httpx.get(f"{server.url}/health", headers={"Host": "LOCALHOST:80"}).status_code == 200


def raw(url: str, sent: bytes) -> bytes:
    """What comes back for bytes on a connection, until it is closed."""
    wait_for(lambda: _listens(url))
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as connection:
        connection.sendall(sent)
        received = b""
        while part := connection.recv(65536):
            received += part
    return received


HALF = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{"
)


def test_what_is_no_http_is_refused_in_openais_form(server: LoggingServer):
    head, _, body = raw(server.url, b"what is this\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["code"] == "invalid_http"


def test_a_body_that_does_not_come_is_answered_408(chat_model: Path, tmp_path: Path):
    with serving(tmp_path / "out", chat_model, body_seconds=0.3) as server:
        received = raw(server.url, HALF.replace(b"Host:", b"Connection: close\r\nHost:"))
        assert received.startswith(b"HTTP/1.1 408")
        assert b"body_too_slow" in received


def test_a_head_that_does_not_come_closes_the_connection(server: LoggingServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tracekit.serve.protocol._HEAD_SECONDS", 0.2)
    assert raw(server.url, b"") == b""
    assert raw(server.url, b"POST /v1/comple") == b""


def test_a_half_sent_request_does_not_hold_up_the_end(chat_model: Path, tmp_path: Path):
    with serving(tmp_path / "out", chat_model) as server, ThreadPoolExecutor(1) as pool:
        wait_for(lambda: _listens(server.url))
        waiting = pool.submit(raw, server.url, HALF)
        wait_for(lambda: ask(server.url).status_code == 200)
        started = time.monotonic()
        server.stop()
        received = waiting.result()
        assert time.monotonic() - started < 10
    assert received.startswith(b"HTTP/1.1 503")


def test_past_the_limit_of_connections_requests_are_answered_503(chat_model: Path, tmp_path: Path):
    with serving(tmp_path / "out", chat_model, max_connections=2) as server:
        wait_for(lambda: _listens(server.url))
        with httpx.Client() as one, httpx.Client() as two:
            assert [client.get(f"{server.url}/health").status_code for client in (one, two)] == [200, 200]
            late = httpx.get(f"{server.url}/health")
            assert (late.status_code, late.json()["error"]["code"]) == (503, "too_many_connections")
        wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 200)


FULL_PLACES = {
    "tensors": ("os.writev",),
    "journal": ("tracekit.format.shards.ShardWriter._note",),
    "new shard": ("tracekit.format.shards.ShardWriter._open",),
    "keys": ("tracekit.serve.growing._KeysFile.write",),
    "request log": ("tracekit.serve.batcher.append_line",),
    "text log": ("tracekit.console.Path.open",),
}
"""What a full disk may hit, and whether a request needs it."""
NOT_NEEDED = ("request log", "text log")


@pytest.mark.attack
@pytest.mark.parametrize("error_number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("place", FULL_PLACES)
def test_a_full_disk_is_a_503_until_there_is_room(
    place: str, error_number: int, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*of: Any, **named: Any) -> Any:
        raise OSError(error_number, os.strerror(error_number))

    with serving(tmp_path / "out", chat_model, close_after=0.05 if place == "new shard" else 60) as server:
        before = ask(server.url)
        wait_for(lambda: place != "new shard" or (tmp_path / "out/data/serve/train-00000.tar").exists())
        server._dataset._next_key = server._dataset._reserved  # the next key has to be noted
        with monkeypatch.context() as patch:
            patch.setattr(FULL_PLACES[place][0], full)
            while_full = [ask(server.url), ask(server.url, store=False), ask(server.url, n=2)]
        after = ask(server.url)
    assert before.status_code == after.status_code == 200
    assert [reply.status_code for reply in while_full] == [200 if place in NOT_NEEDED else 503, 200, 400]
    if place not in NOT_NEEDED:
        error = while_full[0].json()["error"]
        assert (error["code"], error["type"]) == ("disk_full", "server_error")
        assert "disk of the server is full" in error["message"]
        assert str(tmp_path) not in error["message"]
    assert verify(tmp_path / "out").problems == []
    kept = {one.headers["x-tracekit-key"] for one in (before, *while_full, after) if "x-tracekit-key" in one.headers}
    with TraceStore(tmp_path / "out") as store:
        assert set(store.keys) == kept


@pytest.mark.attack
def test_a_shard_that_a_full_disk_keeps_open_is_closed_later(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*of: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tracekit.serve.growing._RETRY_SECONDS", 0.05)
    with serving(tmp_path / "out", chat_model, samples_per_shard=1) as server:
        with monkeypatch.context() as patch:
            patch.setattr("tracekit.format.shards.write_atomic", full)
            assert ask(server.url).status_code == 200
            assert not list(tmp_path.glob("out/data/serve/*.tar.json"))
        wait_for(lambda: verify(tmp_path / "out").num_samples == 1)
        assert ask(server.url).status_code == 200
    assert (verify(tmp_path / "out").problems, verify(tmp_path / "out").num_samples) == ([], 2)


@pytest.mark.attack
def test_a_disk_that_is_full_at_the_end_is_said_with_what_to_do(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*of: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    def ask_once() -> None:
        with serving(tmp_path / "out", chat_model) as server:
            assert ask(server.url).status_code == 200
            monkeypatch.setattr("tracekit.format.shards.write_atomic", full)

    with pytest.raises(NoSpaceError, match=f"while writing {tmp_path}.*free some space"):
        ask_once()
    monkeypatch.undo()
    with serving(tmp_path / "out", chat_model):
        pass
    assert verify(tmp_path / "out").num_samples == 1


@pytest.mark.attack
@pytest.mark.parametrize("has_sample", [False, True])
@pytest.mark.parametrize("how", ["deleted", "moved", "replaced", "copied", "shard deleted"])
def test_a_folder_that_is_gone_is_noticed_before_an_answer_is_given(
    how: str, has_sample: bool, chat_model: Path, tmp_path: Path
):
    out, other = tmp_path / "out", tmp_path / "other"

    def ask_after() -> None:
        with serving(out, chat_model) as server:
            if has_sample:
                assert ask(server.url).status_code == 200
            if how == "shard deleted":
                for path in out.glob("data/serve/train*"):
                    path.unlink()
            elif how == "deleted":
                shutil.rmtree(out)
            else:
                out.rename(other)
            if how == "replaced":
                (out / "data/serve").mkdir(parents=True)
                (out / "data/serve/keys.partial").touch()
            elif how == "copied":
                shutil.copytree(other, out)
            reply = ask(server.url, stream=False)
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_answered")
            assert "deleted, moved or replaced" in reply.json()["error"]["message"]
            assert str(tmp_path) not in reply.text

    if how == "shard deleted" and not has_sample:
        return
    with pytest.raises(DatasetError, match=r"'.*out' .--out. was deleted, moved or replaced"):
        ask_after()
    if how in ("deleted", "moved"):
        assert not out.exists(), "the folder was made again"


def test_unknown_paths_and_methods_are_said_in_openais_form(server: LoggingServer):
    for reply, status in (
        (httpx.get(f"{server.url}/v1/nothing"), 404),
        (httpx.get(f"{server.url}/v1/chat/completions"), 405),
    ):
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, "no_such_endpoint")


def test_a_client_that_goes_away_breaks_nothing_and_its_sample_is_logged(chat_model: Path, tmp_path: Path):
    out = tmp_path / "out"
    with serving(out, chat_model) as server:
        body = {"prompt": "Who", "max_tokens": 200, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as stream:
            next(stream.iter_lines())
        assert ask(server.url).status_code == 200
    with TraceStore(out) as store:
        assert len(store) == 2
        assert len(store[0].record.generated_token_ids) > 20


def test_an_api_key_is_asked_for_and_never_written(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TRACEKIT_API_KEY", "secret-7f3a")
    messages: Any = [{"role": "user", "content": "Why?"}]
    with serving(tmp_path / "out", chat_model) as server:
        for wrong in ("none", "secret-7f3", "sécret"):
            header = {"Authorization": f"Bearer {wrong}".encode()}
            reply = post(server.url, {"messages": messages}, headers=header)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
        right = client_of(server.url, "secret-7f3a")
        assert right.chat.completions.create(model="tiny", messages=messages, max_tokens=2).choices
        assert "secret-7f3a" not in "\n".join(server.about())
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b"secret-7f3a" not in written
    assert "secret-7f3a" not in "".join(capfd.readouterr())


def test_an_address_that_others_reach_needs_a_key(chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRACEKIT_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="set TRACEKIT_API_KEY"):
        new_server(tmp_path / "out", chat_model, host=EVERYWHERE).__enter__()
    assert not (tmp_path / "out").exists()
    with serving(tmp_path / "out", chat_model, host=EVERYWHERE, allow_no_key=True) as server:
        assert httpx.get(f"http://127.0.0.1:{server.url.rpartition(':')[2]}/health").status_code == 200


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(
    server: LoggingServer, chat_model: Path, tmp_path: Path
):
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1 port {port}"):
        new_server(tmp_path / "out", chat_model, port=port).__enter__()
    assert not (tmp_path / "out").exists()


def test_a_base_model_takes_completions_and_refuses_chats(model: Path, tmp_path: Path):
    with serving(tmp_path / "out", model) as server:
        reply = ask(server.url)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages")
        assert "no chat template" in reply.json()["error"]["message"]
        assert post(server.url, {"prompt": "Why"}, "completions").json()["usage"]["completion_tokens"] <= 16
    assert verify(tmp_path / "out").num_samples == 1


def test_a_full_queue_answers_429_and_loses_nothing_that_it_took(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    most = 0
    original = engine_module.answer_variously

    def counted(traced, prompts, *further, **named):
        nonlocal most
        most = max(most, len(prompts))
        return original(traced, prompts, *further, **named)

    monkeypatch.setattr(engine_module, "answer_variously", counted)
    out = tmp_path / "out"
    with serving(out, chat_model, max_queue=8, max_batch=4) as server:
        with ThreadPoolExecutor(24) as pool:
            replies = list(pool.map(lambda n: ask(server.url, f"Number {n}?", max_tokens=20), range(72)))
        refused = [reply for reply in replies if reply.status_code == 429]
        taken = [reply for reply in replies if reply.status_code == 200]
        assert len(refused) + len(taken) == 72
        assert refused, "72 requests from 24 threads never filled a queue of 8"
        assert {reply.headers["retry-after"] for reply in refused} == {"1"}
        assert {reply.json()["error"]["type"] for reply in refused} == {"rate_limit_error"}
        assert ask(server.url).status_code == 200, "the server does not recover"
    assert 1 <= most <= 4
    with TraceStore(out) as store:
        assert {reply.headers["x-tracekit-key"] for reply in taken} < set(store.keys)
        assert len(store) == len(taken) + 1


def test_a_slow_disk_fills_the_queue_and_not_the_memory(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    opened, writing = hold_writing(monkeypatch)
    out = tmp_path / "out"
    with serving(out, chat_model, max_queue=3, max_batch=1) as server, ThreadPoolExecutor(20) as pool:
        first = pool.submit(ask, server.url)
        wait_for(writing.is_set)
        others = [pool.submit(ask, server.url) for _ in range(12)]
        wait_for(lambda: sum(one.done() for one in others) == 9)
        assert not first.done(), "an answer has its end before its sample is written"
        opened.set()
        statuses = sorted(one.result().status_code for one in others)
        assert first.result().status_code == 200
    assert statuses == [200] * 3 + [429] * 9
    assert verify(out).num_samples == 4


def test_a_stream_flows_while_its_sample_is_not_written_and_ends_after_it(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    opened, _ = hold_writing(monkeypatch)
    told = threading.Event()
    body = {"prompt": "Who", "max_tokens": 8, "temperature": 0, "stream": True}
    lines: list[str] = []

    def listen(url: str) -> None:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as stream:
            for line in stream.iter_lines():
                lines.append(line)
                told.set()

    with serving(tmp_path / "out", chat_model) as server, ThreadPoolExecutor(4) as pool:
        listening = pool.submit(listen, server.url)
        assert told.wait(60), "no text comes before the sample is written"
        hushed = pool.submit(ask, server.url, store=False)
        assert not any("[DONE]" in line or '"finish_reason":"' in line for line in lines)
        assert not listening.done()
        opened.set()
        listening.result()
        assert hushed.result().status_code == 200
    assert lines[-2] == "data: [DONE]"
    assert sum('"finish_reason":"' in line for line in lines) == 1


def test_a_text_that_cannot_be_captured_is_left_out_and_the_others_are_kept(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    original, original_traces = engine_module.capture, DecodedTraces.traces

    def refuse(tokenizer, texts) -> None:
        if any("bad" in tokenizer.decode(text.token_ids) for text in texts):
            raise CaptureError("a value is not finite")

    def picky(traced, texts, *further, **named):
        refuse(traced.tokenizer, texts)
        return original(traced, texts, *further, **named)

    def picky_traces(self, texts):
        refuse(self._traced.tokenizer, texts.values())
        return original_traces(self, texts)

    monkeypatch.setattr(engine_module, "capture", picky)
    monkeypatch.setattr(DecodedTraces, "traces", picky_traces)
    out = tmp_path / "out"
    with serving(out, chat_model, batch_wait_ms=300) as server, ThreadPoolExecutor(8) as pool:
        texts = ["good 1", "good 2", "bad 1", "good 3"]
        replies = list(pool.map(lambda text: ask(server.url, text), texts))
    assert [reply.status_code for reply in replies] == [200] * 4
    with TraceStore(out) as store:
        assert sorted(record["content"] for (record,) in store.records["messages"].to_pylist()) == [
            "good 1",
            "good 2",
            "good 3",
        ]
    assert ["x-tracekit-key" in reply.headers for reply in replies] == [True, True, False, True]
    assert re.search(r"00000\d is answered but not logged: a value is not finite", capfd.readouterr().err)
    logged = [json.loads(line)["key"] for line in (out / "logs/serve.jsonl").read_text().splitlines()]
    assert logged.count(None) == 1


def test_a_failed_replay_ends_the_server(chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def wrong(*arguments, **named):
        raise CaptureError("past the tolerance")

    monkeypatch.setattr(engine_module, "replay", wrong)

    def ask_until_it_ends() -> None:
        with serving(tmp_path / "out", chat_model) as server:
            assert ask(server.url).status_code == 503
            wait_for(lambda: _is_refused(server.url))

    with pytest.raises(CaptureError, match="past the tolerance"):
        ask_until_it_ends()
    assert verify(tmp_path / "out").num_samples == 0


@pytest.mark.parametrize("wrong", [1, 2, 3])
def test_the_last_batch_of_a_shard_is_replayed_when_it_closes(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: int
):
    """Answers are one a batch here, so none is padded: the first one and the last one run again."""
    own, count = DecodedTraces.traces, iter(range(1, 9))

    def damaged(self, texts):
        traces = own(self, texts)
        if next(count) == wrong:
            traces[0].tensors["hidden_states"][:] *= 1.5
        return traces

    monkeypatch.setattr(DecodedTraces, "traces", damaged)

    def ask_three_times() -> None:
        with serving(tmp_path / "out", chat_model, batch_wait_ms=0) as server:
            for _ in range(3):
                ask(server.url)

    if wrong == 2:
        ask_three_times()
        assert verify(tmp_path / "out").num_samples == 3
    else:
        with pytest.raises(CaptureError, match="differs from a lone eager run"):
            ask_three_times()


def test_where_memory_runs_out_the_request_is_refused_and_the_server_goes_on(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = engine_module.answer_variously
    calls = 0

    def full(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == 1:
            raise MemoryError
        return original(*arguments, **named)

    monkeypatch.setattr(engine_module, "answer_variously", full)
    with serving(tmp_path / "out", chat_model) as server:
        first = ask(server.url)
        assert (first.status_code, first.json()["error"]["code"]) == (503, "not_answered")
        assert ask(server.url).status_code == 200
    assert verify(tmp_path / "out").num_samples == 1


def _is_refused(url: str) -> bool:
    try:
        return ask(url).status_code == 503
    except httpx.TransportError:
        return True


def _listens(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.ConnectError:
        return False


def wait_for(condition: Any, seconds: float = 30) -> None:
    """Wait until something holds."""
    waited = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if condition():
            return
        waited.wait(0.05)
    raise AssertionError("it never came to hold")
