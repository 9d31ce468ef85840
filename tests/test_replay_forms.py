"""Answers from elsewhere: how a turn ended times in what form the answer is given; reasoning put back or refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from builders.kit.columns import TableSource
from builders.kit.sources import SourceRow
from builders.replay.answers import AnswerExample, parse_row
from builders.replay.record import ReplayRecord
from builders.replay.task import TASK as REPLAY
from builders.replay.task import ReplayConfig
from tests.serving_for_tests import ask, serving
from tests.tiny_checkpoint import tiny_tokenizer
from tracekit import TraceStore, verify
from tracekit.answering import open_tracer
from tracekit.config import CaptureConfig, ModelConfig, OutputConfig, PromptConfig
from tracekit.errors import SourceError
from tracekit.model.generation import Generated
from tracekit.model.prompts import Prompt
from tracekit.records import Span
from tracekit.run.runner import execute
from tracekit.serve.record import ServeRecord

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{{ opened }}{% endif %}"
TAIL = "{{ m.content }}<|im_end|>\n{% endfor %}" + ASKS
THINKING = HEAD + (
    "{% if m.role == 'assistant' and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
)
"""A template that puts reasoning back, as Qwen3's."""
MUTE = HEAD + TAIL
"""One that knows of no reasoning."""
DROPS = HEAD + "{% set content = m.content.split('</think>')[-1] %}" + TAIL
"""One that drops reasoning, as DeepSeek's: its markers are known by the one that it looks for."""
CHAT = THINKING + TAIL
OPENED = CHAT.replace("{{ opened }}", "<think>\n")
CHANNEL = HEAD + "{% if m.role == 'assistant' %}<|channel|>final<|message|>{% endif %}" + TAIL
"""One that names a channel before every answer, as gpt-oss's."""
EMPTY = HEAD + "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}" + TAIL
"""One that writes an empty reasoning before an answer, as Qwen3's."""
CLOSED = CHAT.replace("{{ opened }}", "<think>\n\n</think>\n\n")
ANSWER = " Paris, where else?"


class Made(NamedTuple):
    """A checkpoint whose turns end with another token than its tokenizer's sequences."""

    folder: Path
    tokenizer: PreTrainedTokenizerFast
    eos: int
    end: int

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHAT
    eos, end = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    folder = tmp_path_factory.mktemp("two-ends") / "tiny"
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=[eos, end],
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[eos, end])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Made(folder, tokenizer, eos, end)


class Read(NamedTuple):
    """What the model would read of rows."""

    prompts: list[Prompt]
    answers: list[Generated]


def read(config: ReplayConfig, made: Made, examples: Sequence[AnswerExample]) -> Read:
    """Prompts and answers of examples, rendered and checked; no weights are loaded."""
    tracer: Any = open_tracer(REPLAY, config, made.tokenizer, examples)
    prompts = [tracer.prompt(one) for one in examples]
    answers = [tracer.given(one, prompt) for one, prompt in zip(examples, prompts, strict=True)]
    return Read(prompts, answers)


def opened(made: Made, *rows: dict[str, Any], template: str | None = None) -> Read:
    """The same of rows, with a chat template."""
    if template is not None:
        made.tokenizer.chat_template = template
    try:
        examples = [parse_row(SourceRow(index, "here", row)) for index, row in enumerate(rows)]
        config = ReplayConfig(model=ModelConfig(model=str(made.folder)), prompt=PromptConfig())
        return read(config, made, examples)
    finally:
        made.tokenizer.chat_template = CHAT


def answer_ids(made: Made, row: dict[str, Any], template: str | None = None) -> list[int]:
    return opened(made, row, template=template).answers[0].token_ids


# ---------------------------------------------------------------- how it ended, times the form that it is given in

USER = [{"role": "user", "content": "Where?"}]
PROMPT = "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
ENDINGS: dict[str, dict[str, Any]] = {
    "own": {"finish_reason": "stop", "stop_reason": None},
    "bare": {"finish_reason": "stop"},
    "other": {"finish_reason": "stop", "stop_reason": "END"},
    "string": {"finish_reason": "stop", "stop_reason": "\n\n"},
    "cut": {"finish_reason": "length", "stop_reason": None},
    "null": {"finish_reason": None},
    "filter": {"finish_reason": "content_filter"},
    "none": {},
}
ENDED = ("own", "bare", "other")


def reply(form: str, made: Made, ending: dict[str, Any], token_ids: list[int] | None) -> dict[str, Any]:
    """A row of a form, with ids where there are any."""
    ids = {} if token_ids is None else {"token_ids": token_ids}
    prompt_ids = made.ids(PROMPT)
    message = {"role": "assistant", "content": ANSWER, "tool_calls": [], "refusal": None}
    choice = {"index": 0, "logprobs": None} | ids | ending
    chat = {"id": "c", "object": "chat.completion", "model": "m", "choices": [choice | {"message": message}]}
    output = {"index": 0, "text": ANSWER, "cumulative_logprob": None} | ids | ending
    parts = [{"type": "text", "text": ANSWER}]
    forms: dict[str, dict[str, Any]] = {
        "text": {"messages": USER, "answer": ANSWER} | ids | ending,
        "plain prompt": {"prompt": PROMPT, "completion": ANSWER} | ids | ending,
        "question": {"question": "Where?", "generation": ANSWER} | ids | ending,
        "conversation": {"messages": [*USER, message]} | ending,
        "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Where?"}]}]}
        | {"choices": [choice | {"message": {"content": parts}}]},
        "chat log": {"messages": USER} | chat,
        "prompt as messages": {"prompt": USER} | chat,
        "completion log": {"prompt": [PROMPT], "object": "text_completion", "choices": [choice | {"text": ANSWER}]},
        "ids as prompt": {"prompt": prompt_ids, "choices": [choice | {"text": ANSWER}]},
        "vllm": {"request_id": "7", "prompt": PROMPT, "prompt_token_ids": prompt_ids, "outputs": [output]},
        "vllm of ids": {"request_id": "7", "prompt": None, "prompt_token_ids": prompt_ids, "outputs": [output]},
        "ids in choice": {"prompt": PROMPT, "choices": [choice | {"text": ANSWER, "prompt_token_ids": prompt_ids}]},
        "batch": {
            "custom_id": "b",
            "method": "POST",
            "body": {"model": "m", "messages": USER},
            "response": {"status_code": 200, "request_id": "r", "body": chat | {"prompt_token_ids": prompt_ids}},
            "error": None,
        },
        "log": {"request": {"messages": USER, "stop": None}, "response": chat},
    }
    return forms[form]


FORMS = (
    "text",
    "plain prompt",
    "question",
    "conversation",
    "parts",
    "chat log",
    "prompt as messages",
    "completion log",
    "ids as prompt",
    "vllm",
    "vllm of ids",
    "ids in choice",
    "batch",
    "log",
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_text_gets_the_end_of_its_turn_where_the_model_ended_it(form: str, ending: str, made: Made):
    said = dict(ENDINGS[ending])
    if ending == "other":
        said["stop_reason"] = made.eos
    task = opened(made, reply(form, made, said, None))
    assert task.prompts[0].token_ids == made.ids(PROMPT)
    end = {"own": [made.end], "bare": [made.end], "other": [made.eos]}.get(ending, [])
    assert task.answers[0].token_ids == made.ids(ANSWER) + end
    assert task.answers[0].eos_included == (ending in ENDED)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("conversation",)])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("last", ["eos", "end", None])
def test_ids_are_kept_as_they_are_given(form: str, ending: str, last: str | None, made: Made):
    said = dict(ENDINGS[ending])
    token_ids = made.ids(ANSWER) + ([] if last is None else [getattr(made, last)])
    if ending == "other":
        said["stop_reason"] = made.eos
    if ending == "string":
        token_ids = made.ids(ANSWER + "\n\n")
    task = opened(made, reply(form, made, said, token_ids))
    assert task.answers[0].token_ids == token_ids
    assert task.answers[0].eos_included == (token_ids[-1] in (made.eos, made.end))


def test_where_a_prompt_is_no_turn_the_tokenizer_ends_the_text(made: Made):
    row = {"prompt": "One two", "completion": " three", "finish_reason": "stop"}
    assert answer_ids(made, row) == [*made.ids(" three"), made.eos]
    assert answer_ids(made, {"question": "One?"} | {"answer": "two", "finish_reason": "stop"}, MUTE)[-1] == made.end


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>"])
def test_an_end_that_the_text_has_is_not_doubled(end: str, made: Made):
    for after in ("", "\n"):  # as a template writes it
        row = {"messages": USER, "answer": "Paris" + end + after, "finish_reason": "stop"}
        assert answer_ids(made, row) == made.ids("Paris" + end)


def test_of_several_stop_strings_nobody_says_whether_one_ended_it(made: Made):
    body = {"messages": USER, "stop": ["\n"]}
    choices = [{"message": {"content": "Paris"}, "finish_reason": "stop"}]
    assert answer_ids(made, {"request": body, "response": {"choices": choices}}) == made.ids("Paris")
    told = [choices[0] | {"stop_reason": None}]
    assert answer_ids(made, {"request": body, "response": {"choices": told}}) == [*made.ids("Paris"), made.end]


@pytest.mark.parametrize("name", ["stop", "stop_sequences", "stop_strings"])
@pytest.mark.parametrize("place", ["", "sampling_params", "parameters", "options", "extra_body"])
@pytest.mark.parametrize("form", ["row", "log"])
def test_stop_strings_are_seen_wherever_a_request_keeps_them(form: str, place: str, name: str, made: Made):
    asked = {name: ["\n"]} if not place else {place: {name: ["\n"]}}
    choice = {"message": {"content": "Paris"}, "finish_reason": "stop"}
    body = {"messages": USER} | asked
    row = body | {"choices": [choice]} if form == "row" else {"request": body, "response": {"choices": [choice]}}
    assert answer_ids(made, row) == made.ids("Paris")


@pytest.mark.parametrize(
    ("said", "reason", "has_ended"),
    [
        ({"done_reason": "stop"}, "stop", True),
        ({"done_reason": "length"}, "length", False),
        ({"stop_reason": "end_turn", "stop_sequence": None}, "stop", True),
        ({"stop_reason": "max_tokens"}, "length", False),
        ({"stop_reason": "length"}, "length", False),
        ({"stop_reason": "stop_sequence", "stop_sequence": "is"}, "stop", False),
        ({"finish_reason": "stop", "stop_reason": "stop_sequence"}, "stop", False),
        ({"finish_reason": "length", "stop_reason": "max_tokens"}, "length", False),
        ({"finish_reason": "eos_token"}, "stop", True),
        ({"finish_reason": "MAX_TOKENS"}, "length", False),
        ({"finish_reason": "MAX_OUTPUT_TOKENS"}, "length", False),
    ],
    ids=str,
)
def test_other_servers_words_for_an_end_are_read(said: dict[str, Any], reason: str, has_ended: bool, made: Made):
    row = {"messages": USER, "answer": "The length"} | said
    assert parse_row(SourceRow(0, "here", row)).finish_reason == reason
    assert answer_ids(made, row) == made.ids("The length") + [made.end] * has_ended
    assert parse_row(SourceRow(0, "here", row)).stop == said.get("stop_sequence")


@pytest.mark.parametrize("stop", [None, "\n\n"])
def test_a_record_of_this_projects_own_server_is_read_by_its_ids(stop: str | None, made: Made):
    new = made.ids(ANSWER + (stop or "<|im_end|>"))
    record = {
        "task": "serve",
        "key": "000004",
        "model": {"id": "org/m", "revision": "x"},
        "messages": [{"role": "user", "content": "Where?"}],
        "prompt": PROMPT,
        "spans": [{"name": "user", "start": 1, "stop": 3}, {"name": "answer", "start": 90, "stop": 99}],
        "prompt_length": len(made.ids(PROMPT)),
        "token_ids": made.ids(PROMPT) + new,
        "generated_token_ids": new,
        "generated_answer": ANSWER,
        "finish_reason": "stop",
        "stop_string": stop,
        "stop": [stop] if stop else [],
    }
    example = parse_row(SourceRow(0, "here", record))
    assert (example.example_id, example.model, example.stop) == ("000004", "org/m", stop)
    task = opened(made, record)
    assert (task.prompts[0].token_ids, task.answers[0].token_ids) == (made.ids(PROMPT), new)
    assert task.answers[0].eos_included == (stop is None)
    assert task.prompts[0].spans == [Span(name="user", start=1, stop=3)]


# ---------------------------------------------------------------- reasoning


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("place", ["message", "choice", "row", "conversation", "raw prompt"])
@pytest.mark.parametrize(
    ("template", "generated"),
    [
        (CHAT, "<think>\nIn France.\n</think>\n\nParis"),
        (OPENED, "In France.\n</think>\n\nParis"),
        (DROPS, "<think>\nIn France.\n</think>\n\nParis"),
        (DROPS.replace("{{ opened }}", "<think>\n"), "In France.\n</think>\n\nParis"),
    ],
)
def test_reasoning_is_put_back_between_the_markers(template: str, generated: str, place: str, name: str, made: Made):
    text, thought = {"content": "Paris"}, {name: "\nIn France.\n"}
    other = {"reasoning_content", "reasoning", "thinking"} - {name}
    empty = dict.fromkeys(other)
    ending = {"finish_reason": "stop"}
    row = {
        "message": {"messages": USER, "choices": [{"message": text | thought | empty} | ending]},
        "choice": {"messages": USER, "choices": [{"message": text} | thought | ending]},
        "row": {"question": "Where?", "answer": "Paris"} | thought | ending,
        "conversation": {"messages": [*USER, {"role": "assistant"} | text | thought | empty]} | ending,
        "raw prompt": {"prompt": PROMPT} | {"outputs": [{"text": "Paris"} | thought | ending]},
    }[place]
    if place == "raw prompt":
        row["prompt"] = opened(made, {"messages": USER, "token_ids": [9]}, template=template).prompts[0].text
    assert answer_ids(made, row, template) == [*made.ids(generated), made.end]


@pytest.mark.parametrize("name", ["reasoning", "thinking", "reasoning_details", "thinking_blocks", "thoughts"])
@pytest.mark.parametrize("place", ["message", "choice", "row"])
def test_reasoning_in_another_form_is_refused_by_name(place: str, name: str, made: Made):
    thought = {name: [{"type": "text", "text": "In France."}]}
    row = {
        "message": {"messages": USER, "choices": [{"message": {"content": "Paris"} | thought}]},
        "choice": {"messages": USER, "choices": [{"message": {"content": "Paris"}} | thought]},
        "row": {"messages": USER, "answer": "Paris"} | thought,
    }[place]
    with pytest.raises(SourceError, match=f"{name}|no message with a text"):
        answer_ids(made, row)
    if place == "message" and name == "reasoning_details":
        row["choices"][0]["message"]["reasoning"] = "In France."  # OpenRouter gives both
        assert answer_ids(made, row) == made.ids("<think>\nIn France.\n</think>\n\nParis")


def test_reasoning_that_stands_in_the_answer_too_is_refused(made: Made):
    row = {"messages": USER, "answer": "<think>\nHm.\n</think>\n\nParis", "reasoning": "Hm."}
    with pytest.raises(SourceError, match="leave one of the two out"):
        answer_ids(made, row)


def test_a_text_as_the_model_wrote_it_gets_nothing_in_front(made: Made):
    raw = "<|channel|>analysis<|message|>Hm.<|im_end|><|im_start|>assistant\n<|channel|>final<|message|>Paris"
    assert answer_ids(made, {"messages": USER, "answer": raw}, CHANNEL) == made.ids(raw)


def test_ids_that_begin_with_the_prompt_are_refused_without_a_beginning_of_sequence_too(made: Made):
    with pytest.raises(SourceError, match="'token_ids' begin with the prompt"):
        opened(made, {"messages": USER, "token_ids": made.ids(PROMPT + "Paris")})
    words = {"prompt": "One two", "token_ids": made.ids("One two three")}
    assert answer_ids(made, words) == made.ids("One two three")


@pytest.mark.parametrize(
    "name", ["tools", "functions", "documents", "system", "system_prompt", "continue_final_message"]
)
def test_what_the_request_puts_beside_its_messages_is_not_left_out(name: str, made: Made):
    body = {"messages": USER, name: ["x"]}
    reply = {"choices": [{"message": {"content": "Paris"}}]}
    with pytest.raises(SourceError, match=f"'{name}' stands beside the prompt.*'prompt_token_ids'"):
        opened(made, {"request": body, "response": reply})
    ids = {"prompt_token_ids": made.ids(PROMPT)}
    assert answer_ids(made, {"request": body, "response": reply | ids}) == made.ids("Paris")
    assert answer_ids(made, {"request": body | {name: None}, "response": reply}) == made.ids("Paris")


@pytest.mark.parametrize("is_nested", [False, True])
def test_template_kwargs_of_the_request_have_to_be_those_of_the_run(is_nested: bool, made: Made):
    given = {"chat_template_kwargs": {"enable_thinking": False}}
    body = {"messages": USER} | ({"extra_body": given} if is_nested else given)
    row = {"request": body, "response": {"choices": [{"message": {"content": "Paris"}}]}}
    with pytest.raises(SourceError, match=r"pass --template-kwargs enable_thinking=false"):
        opened(made, row)
    config = ReplayConfig(
        model=ModelConfig(model=str(made.folder)), prompt=PromptConfig(template_kwargs=("enable_thinking=false",))
    )
    task = read(config, made, [parse_row(SourceRow(0, "here", row))])
    assert task.answers[0].token_ids == made.ids("Paris")


@pytest.mark.parametrize("answer", ["Paris", "<|channel|>final<|message|>Paris"])
def test_what_a_template_writes_before_every_answer_stands_before_it(answer: str, made: Made):
    row = {"messages": USER, "choices": [{"message": {"content": answer}, "finish_reason": "stop"}]}
    assert answer_ids(made, row, CHANNEL) == made.ids("<|channel|>final<|message|>Paris<|im_end|>")
    assert answer_ids(made, {"prompt": PROMPT, "answer": "Paris"}, CHANNEL) == made.ids("Paris")


def test_an_empty_reasoning_is_not_made_up(made: Made):
    row = {"messages": USER, "choices": [{"message": {"content": "Paris"}, "finish_reason": "stop"}]}
    assert answer_ids(made, row, EMPTY) == made.ids("Paris<|im_end|>")


@pytest.mark.parametrize("name", ["prediction", "generated_answer", "model_output"])
def test_an_answer_beside_a_prediction_is_refused(name: str):
    with pytest.raises(SourceError, match=f"two answers: 'answer' and '{name}'"):
        parse_row(SourceRow(0, "here", {"question": "Where?", "answer": "Paris", name: "Rome"}))


@pytest.mark.parametrize("empty", [None, "", "absent"])
@pytest.mark.parametrize("template", [CHAT, MUTE, DROPS, CLOSED])
def test_no_reasoning_adds_nothing(template: str, empty: str | None, made: Made):
    message = {"content": "Paris"} | ({} if empty == "absent" else {"reasoning_content": empty, "reasoning": empty})
    row = {"messages": USER, "choices": [{"message": message, "finish_reason": "stop"}]}
    assert answer_ids(made, row, template) == [*made.ids("Paris"), made.end]


@pytest.mark.parametrize("template", [MUTE, CLOSED])
def test_reasoning_without_a_place_is_refused(template: str, made: Made):
    row = {"id": "x", "messages": USER, "answer": "Paris", "reasoning": "Hm.", "finish_reason": "stop"}
    with pytest.raises(SourceError, match=r"row 0 .x.: there is reasoning .*no place .*--chat-template"):
        opened(made, row, template=template)


@pytest.mark.parametrize("ending", [{"finish_reason": "stop"}, {"finish_reason": "length"}, {}])
@pytest.mark.parametrize("empty", [None, ""])
def test_an_answer_is_never_filed_as_reasoning(ending: dict[str, str], empty: str | None, made: Made):
    message = {"content": "Paris", "reasoning_content": empty}
    with pytest.raises(SourceError, match="would be filed as reasoning; give 'reasoning_content' or 'token_ids'"):
        opened(made, {"messages": USER, "choices": [{"message": message} | ending]}, template=OPENED)


def test_a_text_that_closes_its_reasoning_itself_is_read(made: Made):
    row = {"messages": USER, "answer": "Hm.</think>Paris", "finish_reason": "stop"}
    assert answer_ids(made, row, OPENED) == [*made.ids("Hm.</think>Paris"), made.end]


@pytest.mark.parametrize(("template", "generated"), [(CHAT, "<think>\nIn Fr"), (OPENED, "In Fr")])
def test_reasoning_that_was_cut_stays_open(template: str, generated: str, made: Made):
    message = {"content": None, "reasoning": "In Fr"}
    row = {"messages": USER, "choices": [{"message": message, "finish_reason": "length"}]}
    assert answer_ids(made, row, template) == made.ids(generated)


def test_ids_are_compared_with_the_answer_and_not_with_the_reasoning(made: Made):
    ids = made.ids("<think>\nHm.\n</think>\n\nParis<|im_end|>")
    row = {"messages": USER, "choices": [{"message": {"content": "Paris", "reasoning": "Hm."}, "token_ids": ids}]}
    assert answer_ids(made, row) == ids
    row["choices"][0]["message"]["content"] = "Rome"
    with pytest.raises(SourceError, match="'token_ids' say 'Paris'"):
        opened(made, row)


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("has_bos", [True, False])
@pytest.mark.parametrize("prompt", ["One two", PROMPT, "<s>One two"])
def test_a_beginning_of_sequence_that_only_the_ids_have_is_no_error(prompt: str, has_bos: bool, made: Made):
    bare = made.ids(prompt.removeprefix("<s>"))
    ids = [made.tokenizer.bos_token_id, *bare] if has_bos else bare
    task = opened(made, {"prompt": prompt, "prompt_token_ids": ids, "outputs": [{"token_ids": [9]}]})
    assert task.prompts[0].token_ids == ids
    assert task.prompts[0].template_sha256 is None


def test_ids_of_another_prompt_are_refused(made: Made):
    ids = [made.tokenizer.bos_token_id, *made.ids("One three")]
    with pytest.raises(SourceError, match="'prompt_token_ids' say '<s>One three', the text beside them 'One two'"):
        opened(made, {"prompt": "One two", "prompt_token_ids": ids, "answer": "a"})


def test_a_developer_is_the_system_and_parts_are_joined(made: Made):
    parts = [{"type": "text", "text": "Where"}, {"type": "text", "text": "to?"}]
    row = {"messages": [{"role": "developer", "content": "Brief."}, {"role": "user", "content": parts}], "answer": "a"}
    assert "<|im_start|>system\nBrief.<|im_end|>\n<|im_start|>user\nWhere\nto?<|im_end|>" in (
        opened(made, row).prompts[0].text
    )


NESTED = {
    "id": "q",
    "answerKey": "A",
    "question": {
        "question_concept": "city",
        "stem": "Where?",
        "choices": [{"label": "A", "text": "Paris"}, {"label": "B", "text": "Rome"}],
    },
}
FLAT = {"id": "q", "question": "Where?", "choices": {"label": ["A", "B"], "text": ["Paris", "Rome"]}, "answerKey": "A"}


@pytest.mark.parametrize("row", [NESTED, FLAT, FLAT | {"choices": NESTED["question"]["choices"]}])
def test_commonsense_qa_is_read_in_each_of_its_forms(row: dict[str, Any]):
    for name in ("answer", "output", "generation"):
        said = parse_row(SourceRow(0, "here", row | {name: "It is B. Rome"}))
        assert (said.question, said.answer) == ("Where?\nA. Paris\nB. Rome", "It is B. Rome")
    found = parse_row(SourceRow(0, "here", row | {"generation": "B"}))
    assert (found.example_id, found.question, found.answer) == ("q", "Where?\nA. Paris\nB. Rome", "B")
    asked = parse_row(SourceRow(0, "here", row | {"prompt": "Q", "outputs": [{"text": "B"}]}))
    assert (asked.question, asked.prompt, asked.answer) == (None, "Q", "B")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (NESTED, "no answer; expected a text in 'answer', .*'outputs' or 'choices'.*'messages', 'question'"),
        ({"custom_id": "b", "response": {"status_code": 200, "body": {"choices": [{"text": "a"}]}}}, "'request' or"),
        ({"messages": USER, "response": {"status_code": 500, "body": {}}}, "the request failed .status 500"),
        ({"messages": USER, "response": None, "error": {"code": "x"}}, "the request failed"),
        ({"messages": USER, "choices": [{"message": {"tool_calls": [{"id": "1"}]}}]}, "tool_calls: calls of tools"),
        ({"messages": USER, "choices": [{"text": "a", "finish_reason": "tool_calls"}]}, "calls of tools are no text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}], "answer": "a"},
            r"messages\[0\].content: content of type 'image_url'",
        ),
        (
            {"messages": [*USER, {"role": "assistant", "content": "a", "reasoning": "b"}, *USER], "answer": "c"},
            r"messages\[1\].reasoning: reasoning of an earlier turn",
        ),
        ({"messages": USER, "answer": "a", "reasoning": "b", "reasoning_content": "c"}, "differ"),
        ({"prompt_length": 9, "token_ids": [1, 2]}, "'prompt_length' is 9"),
        ({"question": "Where?", "token_ids": [1], "generated_token_ids": [2]}, "several lists of ids"),
        ({"messages": USER, "choices": [{"delta": {"content": "a"}}]}, "no answer"),
    ],
)
def test_what_is_no_text_and_no_ids_is_refused_by_name(data: dict[str, Any], message: str):
    with pytest.raises(SourceError, match=message):
        parse_row(SourceRow(0, "here", data))


def test_ids_that_begin_with_the_prompt_are_refused(made: Made):
    prompt = [made.tokenizer.bos_token_id, *made.ids("One")]
    with pytest.raises(SourceError, match=r"'token_ids' begin with the prompt; .*'prompt_length'"):
        opened(made, {"prompt_token_ids": prompt, "token_ids": [*prompt, 9]})


# ---------------------------------------------------------------- a whole run


def test_records_hold_ids_spans_and_the_end_of_each_form(made: Made, tmp_path: Path):
    thinking = made.ids("<think>\nHm.\n</think>\n\nParis<|im_end|>")
    rows: list[dict[str, Any]] = [
        {"messages": [*USER, {"role": "assistant", "content": "Paris", "reasoning": "Hm."}], "finish_reason": "stop"},
        {"prompt": PROMPT, "outputs": [{"text": "Paris", "token_ids": thinking, "finish_reason": "stop"}]},
        {"prompt": PROMPT, "outputs": [{"text": "Paris", "finish_reason": "stop", "stop_reason": "\n"}]},
        {
            "prompt": PROMPT,
            "outputs": [
                {"text": "Paris", "token_ids": made.ids("Paris\nRome"), "finish_reason": "stop", "stop_reason": "\n"}
            ],
        },
        {"messages": USER, "choices": [{"message": {"content": "Paris"}, "finish_reason": "length"}]},
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ReplayConfig(
        model=ModelConfig(model=str(made.folder), device="cpu"),
        source=TableSource(source=str(source), split="train"),
        capture=CaptureConfig(sites=("hidden_states",), num_replays=1),
        output=OutputConfig(samples_per_shard=8, batch_size=4),
    )
    execute(REPLAY, config, tmp_path / "run")
    assert verify(tmp_path / "run").problems == []
    with TraceStore(str(tmp_path / "run")) as store:
        records = [store[f"{index:06d}"].record for index in range(len(rows))]
    expected = [
        (thinking, True, "stop", False),
        (thinking, True, "stop", False),
        (made.ids("Paris"), False, "stop", False),
        (made.ids("Paris\nRome"), False, "stop", False),
        (made.ids("Paris"), False, "length", True),
    ]
    for record, (ids, eos_included, finish_reason, is_truncated) in zip(records, expected, strict=True):
        assert isinstance(record, ReplayRecord)
        assert record.generated_answer == "Paris"
        assert (record.generated_token_ids, record.eos_included) == (ids, eos_included)
        assert (record.finish_reason, record.is_truncated) == (finish_reason, is_truncated)
        begin, thought = record.prompt_length, made.ids("<think>\nHm.\n</think>")
        spans = [span for span in record.spans if span.start >= begin]
        if ids == thinking:
            start = len(made.ids("<think>\nHm.\n</think>\n\n"))
            assert spans == [
                Span(name="thinking", start=begin, stop=begin + len(thought)),
                Span(name="answer", start=begin + start, stop=begin + len(ids) - 1),
            ]
        else:
            assert spans == [Span(name="answer", start=begin, stop=begin + len(ids))]


def test_what_the_server_logged_is_replayed_token_by_token(made: Made, tmp_path: Path):
    with serving(tmp_path / "served", made.folder) as server:
        whole = ask(server.url, max_tokens=24).json()["choices"][0]["message"]["content"]
        for stop in (None, whole[3:5]):
            assert ask(server.url, max_tokens=24, stop=stop).status_code == 200
    table = next((tmp_path / "served").rglob("records/**/*.parquet"))
    lines = tmp_path / "rows.jsonl"
    with TraceStore(str(tmp_path / "served")) as store:
        served = [sample.record for sample in store]
    lines.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in served))
    for source in (lines, table):
        config = ReplayConfig(model=ModelConfig(model=str(made.folder)), source=TableSource(source=str(source)))
        examples, _ = REPLAY.examples(config)
        task = read(config, made, examples)
        for example, record in zip(examples, served, strict=True):
            assert isinstance(record, ServeRecord)
            assert task.answers[example.index].token_ids == record.generated_token_ids
            assert task.prompts[example.index].token_ids == record.token_ids[: record.prompt_length]
            assert task.answers[example.index].eos_included == record.eos_included
            assert (example.stop, example.example_id) == (record.stop_string, record.key)


SAYS = {"role": "assistant", "content": ANSWER}


@pytest.mark.parametrize(
    ("reason", "read", "has_end"),
    [
        ("stop", "stop", True),
        ("STOP", "stop", True),
        ("eos_token", "stop", True),
        ("end_turn", "stop", True),
        ("stop_sequence", "stop", False),
        ("max_tokens", "length", False),
        ("MAX_TOKENS", "length", False),
        ("model_length", "length", False),
        ("content_filter", "content_filter", False),
        ("abort", "abort", False),
    ],
)
def test_why_an_answer_ended_is_read_in_the_words_of_each_engine(reason: str, read: str, has_end: bool, made: Made):
    row = {"messages": USER, "answer": ANSWER}
    forms: list[dict[str, Any]] = [
        row | {"finish_reason": reason},
        row | {"done_reason": reason},
        row | {"finish_reason": {"type": reason}},
        {"messages": USER, "choices": [{"message": SAYS, "finish_reason": reason}]},
    ]
    if reason != "abort":  # as Anthropic and Inspect call it; any other text there is a stop string
        forms += [
            row | {"stop_reason": reason},
            {"messages": USER, "choices": [{"message": SAYS, "stop_reason": reason}]},
        ]
        forms += [{"request": {"messages": USER}, "response": SAYS | {"stop_reason": reason, "stop_sequence": None}}]
    for form in forms:
        example = parse_row(SourceRow(0, "here", form))
        assert (example.finish_reason, example.stop) == (read, None), form
        assert answer_ids(made, form) == made.ids(ANSWER) + [made.end] * has_end, form


def test_beside_a_finish_reason_a_stop_reason_is_a_stop_string(made: Made):
    row = {"messages": USER, "answer": "They never ", "finish_reason": "stop", "stop_reason": "stop"}
    assert parse_row(SourceRow(0, "here", row)).stop == "stop"
    assert answer_ids(made, row) == made.ids("They never ")


def test_an_answer_that_says_how_it_ended_is_not_cut_there(made: Made, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    text = "They stop at the station"
    reply = {"message": SAYS | {"content": text}, "stop_reason": "stop"}
    rows.write_text(json.dumps({"messages": USER, "choices": [reply]}) + "\n")
    config = ReplayConfig(
        model=ModelConfig(model=str(made.folder)),
        source=TableSource(source=str(rows)),
        capture=CaptureConfig(sites=["hidden_states"]),
        output=OutputConfig(),
    )
    execute(REPLAY, config, tmp_path / "out")
    record = TraceStore(tmp_path / "out")[0].record
    assert isinstance(record, ReplayRecord)
    assert (record.generated_answer, record.finish_reason, record.eos_included) == (text, "stop", True)


@pytest.mark.parametrize("matched", ["eos", "end", "other", "string"])
def test_the_end_token_of_a_column_with_gaps_is_a_number(matched: str, made: Made):
    stop = {"eos": float(made.eos), "end": float(made.end), "other": 3.0, "string": "END"}[matched]
    end = {"eos": [made.eos], "end": [made.end]}.get(matched, [])
    row = {"messages": USER, "answer": ANSWER}
    for form in (
        row | {"finish_reason": "stop", "stop_reason": stop},
        row | {"finish_reason": {"type": "stop", "matched": int(stop) if isinstance(stop, float) else stop}},
    ):
        assert answer_ids(made, form) == made.ids(ANSWER) + end


INSPECT = {
    "id": 1,
    "input": "Where?",
    "target": "Paris",
    "messages": [*USER, SAYS | {"source": "generate"}],
    "output": {"model": "m", "choices": [{"message": SAYS, "stop_reason": "stop"}], "completion": ANSWER},
    "error": None,
}
TURNS: dict[str, dict[str, Any]] = {
    "trl": {"prompt": USER, "completion": [SAYS]},
    "trl, one": {"prompt": USER, "completion": SAYS},
    "inspect": INSPECT,
    "texts": {"messages": json.dumps(USER), "response": json.dumps({"choices": [{"message": SAYS}]})},
    "python": {"messages": repr(USER), "answer": ANSWER},
}


@pytest.mark.parametrize("form", TURNS)
def test_a_turn_is_read_as_other_tools_write_it(form: str, made: Made):
    task = opened(made, TURNS[form])
    assert task.prompts[0].token_ids == made.ids(PROMPT)
    assert task.answers[0].token_ids == made.ids(ANSWER) + [made.end] * (form == "inspect")


def test_what_a_model_wrote_in_a_table_of_texts_stays_a_text(made: Made):
    for said in ("2.0", "0.0"):
        row = {"question": "1.0", "answer": said, "token_ids": str(made.ids(said))}
        example = parse_row(SourceRow(0, "here", row, is_untyped=True))
        assert (example.question, example.answer, example.token_ids) == ("1.0", said, made.ids(said))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [SAYS]}, "an answer and nothing before it; expected the user's message"),
        ({"prompt": USER, "completion": [*USER, SAYS]}, "'completion' holds 2 messages; expected one"),
        ({"prompt": USER, "completion": USER}, "'completion' holds 1 messages; expected one, of the assistant"),
        ({"request": {"prompt": "Q", "echo": True}, "answer": "Q a"}, "'echo' stands beside the prompt"),
        ({"request": {"prompt": "Q", "suffix": "b"}, "answer": "a"}, "'suffix' stands beside the prompt"),
        ({"messages": USER, "chat_template": "x", "answer": "a"}, "'chat_template' stands beside the prompt"),
        ({"messages": USER, "answer": "a", "error": "timeout"}, "the request failed .timeout"),
        ({"messages": USER, "answer": "a", "finish_reason": 3}, "'finish_reason' is 3; expected a text"),
        ({"messages": [{"role": "user"}], "answer": "a"}, r"messages\[0\].content: is missing"),
        ({"messages": "[{'role': 'user', ", "answer": "a"}, "column 'messages'.* cannot be read"),
        (INSPECT | {"messages": [*USER, SAYS | {"content": "Rome"}]}, "two answers"),
    ],
)
def test_what_would_be_another_prompt_or_answer_is_refused(row: dict[str, Any], message: str):
    with pytest.raises(SourceError, match=message):
        parse_row(SourceRow(0, "here", row))


@pytest.mark.parametrize("name", ["choices", "options"])
@pytest.mark.parametrize("options", [["Paris", "Rome"], {"A": "Paris", "B": "Rome"}])
def test_options_beside_a_question_are_part_of_it(name: str, options: Any):
    found = parse_row(SourceRow(0, "here", {"question": "Where?", name: options, "response": "B"}))
    assert (found.question, found.answer) == ("Where?\nA. Paris\nB. Rome", "B")
    asked = parse_row(SourceRow(0, "here", {"prompt": "Q", "options": {"temperature": 0}, "response": "B"}))
    assert (asked.question, asked.prompt) == (None, "Q")
