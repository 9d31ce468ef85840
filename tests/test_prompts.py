"""Prompts: what the model reads, with one beginning at most, and which of its tokens are whose."""

import datetime
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from tests.tiny_checkpoint import tiny_tokenizer
from tracekit.config import PromptConfig
from tracekit.errors import ConfigError
from tracekit.model.prompts import Exchange, Prompt, Prompter, is_surely_longer, sha256_text, tokens_of

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML
REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
SYSTEM_IN_USER = (  # as Gemma 3: the system message becomes the head of the first question
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set head = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set head = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}<|im_start|>{{ 'model' if message.role == 'assistant' else 'user' }}\n"
    "{{ (head if loop.first else '') + message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
DATED = "{{ strftime_now('%d %B %Y') }} " + CHATML
QUESTION = "What is the capital of France?"
SHOTS = (Exchange("Who wrote Romeo and Juliet?", "William Shakespeare"), Exchange("Where is London?", "England"))


def tokenizer(template: str | None = None, *, begins: bool = False, ends: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; `begins` and `ends`: it adds <s> and </s> to every text by itself."""
    made = tiny_tokenizer()
    made.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    made.add_tokens(["<think>", "</think>"])
    single = " ".join(["<s>"] * begins + ["$A"] + ["</s>"] * ends)
    special = [(token, made.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    made.chat_template = template
    return made


def prompter(made: Any, *, default_system: str = "", **settings: Any) -> Prompter:
    return Prompter(made, PromptConfig(**settings), default_system=default_system)


def parts(prompt: Prompt) -> dict[str, str]:
    """The characters that the tokens of each span hold."""
    return {
        span.name: prompt.text[prompt.offsets[span.start][0] : prompt.offsets[span.stop - 1][1]]
        for span in prompt.spans
    }


def decoded(made: Any, prompt: Prompt) -> str:
    return made.decode(prompt.token_ids)


def error_of(render: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        render()
    return str(caught.value)


# ---------------------------------------------------------------- plain prompts


@pytest.mark.parametrize(("text", "is_longer"), [("word " * 10**6, True), ("word " * 10, False), (" " * 10**6, False)])
def test_a_text_that_is_surely_longer_is_known_by_its_beginning(text: str, is_longer: bool):
    seen: list[int] = []

    class Words:
        def __call__(self, text: str, **settings: Any) -> Any:
            seen.append(len(text))
            return SimpleNamespace(input_ids=text.split())

    assert is_surely_longer(Words(), text, 100) is is_longer
    assert sum(seen) < (10_000 if is_longer else len(text))


def test_a_plain_prompt_is_a_question_with_an_open_answer() -> None:
    made = tokenizer()
    prompt = prompter(made).prompt(QUESTION)
    assert prompt.text == f"Question: {QUESTION}\nAnswer:"
    assert prompt.token_ids == made(prompt.text, add_special_tokens=False).input_ids
    assert prompt.input_text == QUESTION
    assert prompt.template_sha256 is None
    assert prompter(made).variant == "base"


def test_a_plain_prompt_has_system_text_and_solved_examples_before_it() -> None:
    prompt = prompter(tokenizer(), default_system="Answer briefly.").prompt(QUESTION, SHOTS)
    assert prompt.text == (
        "Answer briefly.\n\n"
        "Question: Who wrote Romeo and Juliet?\nAnswer: William Shakespeare\n\n"
        "Question: Where is London?\nAnswer: England\n\n"
        "Question: What is the capital of France?\nAnswer:"
    )
    spans = parts(prompt)
    assert list(spans) == ["system", "shots", "user", "assistant_header"]
    assert spans["system"] == "Answer briefly."
    assert "Who wrote" in spans["shots"]
    assert "England" in spans["shots"]
    assert "capital" not in spans["shots"]
    assert spans["user"].strip() == QUESTION
    assert spans["assistant_header"] == "\nAnswer:"


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_bare_prompt_is_the_text_alone_whatever_the_tokenizer_has(template: str | None) -> None:
    made = tokenizer(template, begins=True)
    plain = prompter(made, prompt_form="plain", default_system="Be brief.")
    prompt = plain.prompt("The capital of France is")
    assert (prompt.text, decoded(made, prompt)) == ("The capital of France is", "<s>The capital of France is")
    assert parts(prompt) == {"user": "The capital of France is"}
    assert (plain.variant, prompt.template_sha256) == ("base", None)


def test_a_bare_prompt_goes_on_after_a_given_system_text_and_solved_examples() -> None:
    prompt = prompter(tokenizer(), prompt_form="plain", system="Capitals.").prompt(
        "Spain:", (Exchange("Italy:", "Rome"),)
    )
    assert prompt.text == "Capitals.\n\nItaly: Rome\n\nSpain:"
    assert parts(prompt)["user"] == "Spain:"
    assert parts(prompt)["system"] == "Capitals."


def test_a_form_of_prompts_can_be_chosen() -> None:
    assert prompter(tokenizer(CHATML), prompt_form="question").prompt(QUESTION).text == f"Question: {QUESTION}\nAnswer:"
    assert prompter(tokenizer(CHATML), prompt_form="chat").prompt(QUESTION).text.startswith("<|im_start|>user")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_form": "chat"}, "--prompt-form chat - at `$.prompt.prompt_form`; the tokenizer has no chat template"),
        ({"prompt_form": "chat", "chat_template": "none"}, "--prompt-form chat with --chat-template none"),
        ({"prompt_form": "plain", "chat_template": "x.jinja"}, "--prompt-form plain with --chat-template x.jinja"),
    ],
)
def test_a_form_that_the_template_contradicts_is_refused(settings: dict[str, Any], message: str) -> None:
    assert message in error_of(lambda: prompter(tokenizer(), **settings))


def test_the_tokenizers_template_can_be_left_out() -> None:
    made = prompter(tokenizer(CHATML), chat_template="none")
    assert made.variant == "base"
    assert made.template_sha256 is None
    assert made.prompt(QUESTION).text == f"Question: {QUESTION}\nAnswer:"


# ---------------------------------------------------------------- chat prompts


def test_a_chat_prompt_is_what_the_template_renders() -> None:
    made = tokenizer(CHATML)
    rendered = prompter(made)
    prompt = rendered.prompt(QUESTION)
    assert prompt.text == f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert decoded(made, prompt) == prompt.text
    assert rendered.variant == "chat"
    assert prompt.template_sha256 == rendered.template_sha256 == sha256_text(CHATML)
    assert parts(prompt) == {"user": QUESTION, "assistant_header": "<|im_start|>assistant\n"}


def test_a_template_from_a_file_takes_the_place_of_the_tokenizers(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[-1].content }} -> ", encoding="utf-8")
    for made in (tokenizer(CHATML), tokenizer()):
        rendered = prompter(made, chat_template=str(file))
        assert rendered.variant == "chat"
        assert rendered.prompt(QUESTION).text == f"{QUESTION} -> "
        assert rendered.template_sha256 == sha256_text(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_template_file_that_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    if content is not None:
        file.write_bytes(content)
    message = error_of(lambda: prompter(tokenizer(), chat_template=str(file)))
    assert message.startswith(f"chat template '{file}' - at `$.prompt.chat_template`; cannot be read: ")


def test_a_tokenizer_with_several_named_templates_is_a_chat_tokenizer() -> None:
    made = tokenizer()
    made.chat_template = {"default": CHATML, "tool_use": "{{ tools }}"}
    assert prompter(made).prompt(QUESTION).text == f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0].content ", "unexpected end of template"),
        ("{% for message in messages %}", "Unexpected end of template"),
        ("{{ raise_exception('only tools here') }}", "only tools here"),
        ("{{ messages[0].nothing.content }}", "has no attribute 'nothing'"),
        ("{{ messages[0].content + 1 }}", 'can only concatenate str (not "int") to str'),
    ],
)
def test_a_template_that_does_not_render(template: str, reason: str) -> None:
    message = error_of(lambda: prompter(tokenizer(template)).prompt(QUESTION))
    assert message.startswith("the chat template does not render: ")
    assert reason in message
    assert "--system" not in message


def test_solved_examples_are_turns_of_the_chat() -> None:
    prompt = prompter(tokenizer(CHATML), default_system="Be brief.").prompt(QUESTION, SHOTS)
    assert prompt.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWho wrote Romeo and Juliet?<|im_end|>\n"
        "<|im_start|>assistant\nWilliam Shakespeare<|im_end|>\n"
        "<|im_start|>user\nWhere is London?<|im_end|>\n"
        "<|im_start|>assistant\nEngland<|im_end|>\n"
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    spans = parts(prompt)
    assert list(spans) == ["system", "shots", "user", "assistant_header"]
    assert spans["shots"].count("<|im_start|>assistant\n") == 2
    assert QUESTION not in spans["shots"]


# ---------------------------------------------------------------- system message


def test_the_tasks_system_message_is_used_where_none_is_given() -> None:
    prompt = prompter(tokenizer(CHATML), default_system="Be brief.").prompt(QUESTION)
    assert prompt.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert parts(prompt)["system"] == "Be brief."


def test_a_given_system_message_takes_its_place() -> None:
    prompt = prompter(tokenizer(CHATML), default_system="Be brief.", system="Rhyme.").prompt(QUESTION)
    assert "Be brief." not in prompt.text
    assert parts(prompt)["system"] == "Rhyme."


@pytest.mark.parametrize("template", [CHATML, None])
def test_an_empty_system_message_is_none(template: str | None) -> None:
    prompt = prompter(tokenizer(template), default_system="Be brief.", system="").prompt(QUESTION)
    assert prompt == prompter(tokenizer(template)).prompt(QUESTION)
    assert "system" not in parts(prompt)


def test_a_template_that_refuses_a_system_message_says_what_to_pass() -> None:
    made = tokenizer(REFUSES_SYSTEM)
    assert error_of(lambda: prompter(made, default_system="Be brief.").prompt(QUESTION)) == (
        "the chat template does not render: System role not supported "
        "(this template takes no system message: pass --system '')"
    )
    assert QUESTION in prompter(made, default_system="Be brief.", system="").prompt(QUESTION).text


def test_a_system_message_inside_the_question_is_found() -> None:
    prompt = prompter(tokenizer(SYSTEM_IN_USER), default_system="Be brief.").prompt(QUESTION)
    assert prompt.text == f"<s><|im_start|>user\nBe brief.\n\n{QUESTION}<|im_end|>\n<|im_start|>model\n"
    spans = parts(prompt)
    assert spans["system"] == "Be brief."
    assert spans["user"].strip() == QUESTION


# ---------------------------------------------------------------- beginning of sequence


@pytest.mark.parametrize("template", [CHATML, WITH_BOS, None])
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("bos", ["auto", "always", "never"])
def test_there_is_one_beginning_or_none(template: str | None, begins: bool, bos: str) -> None:
    made = tokenizer(template, begins=begins)
    prompt = prompter(made, bos=bos).prompt(QUESTION)
    has_one = {"always": True, "never": False, "auto": template == WITH_BOS if template else begins}[bos]
    assert prompt.token_ids.count(made.bos_token_id) == has_one
    assert (prompt.token_ids[0] == made.bos_token_id) == has_one
    assert len(prompt.offsets) == len(prompt.token_ids)
    without = [i for i, token in enumerate(prompt.token_ids) if token != made.bos_token_id]
    plain = prompt.text.removeprefix("<s>")
    assert made.decode([prompt.token_ids[i] for i in without]) == plain
    for i in without:
        start, stop = prompt.offsets[i]
        assert made.decode([prompt.token_ids[i]]) == prompt.text[start:stop]


def test_two_beginnings_of_a_template_become_one() -> None:
    made = tokenizer("{{ bos_token }}" + WITH_BOS, begins=True)
    assert prompter(made).prompt(QUESTION).token_ids.count(made.bos_token_id) == 1
    assert prompter(made, bos="always").prompt(QUESTION).token_ids.count(made.bos_token_id) == 1
    assert prompter(made, bos="never").prompt(QUESTION).token_ids.count(made.bos_token_id) == 0


def test_a_beginning_written_into_the_question_stays() -> None:
    made = tokenizer(CHATML)
    prompt = prompter(made, bos="never").prompt("Is <s> a tag?")
    assert prompt.token_ids.count(made.bos_token_id) == 1
    assert parts(prompt)["user"] == "Is <s> a tag?"


def test_a_tokenizer_without_beginning_has_none_to_give() -> None:
    made = tokenizer()
    made.bos_token = None
    assert prompter(made).prompt(QUESTION).token_ids
    assert prompter(made, bos="never").prompt(QUESTION).token_ids
    assert error_of(lambda: prompter(made, bos="always").prompt(QUESTION)) == (
        "--bos always: this tokenizer has no beginning-of-sequence token"
    )


@pytest.mark.parametrize("begins", [False, True])
def test_an_end_that_the_tokenizer_adds_is_taken_off_a_plain_prompt(begins: bool) -> None:
    made = tokenizer(begins=begins, ends=True)
    prompt = prompter(made).prompt(QUESTION)
    assert made.eos_token_id not in prompt.token_ids
    assert prompt.token_ids == [made.bos_token_id] * begins + made(prompt.text, add_special_tokens=False).input_ids
    assert len(prompt.offsets) == len(prompt.token_ids)


def test_an_end_that_the_template_writes_stays() -> None:
    made = tokenizer("{{ messages[-1].content }}{{ eos_token }}", ends=True)
    assert prompter(made).prompt(QUESTION).token_ids[-1] == made.eos_token_id


# ---------------------------------------------------------------- arguments and date


@pytest.mark.parametrize(
    ("arguments", "header"),
    [
        ((), "<|im_start|>assistant\n"),
        (("enable_thinking=true",), "<|im_start|>assistant\n"),
        (("enable_thinking=false",), "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ],
)
def test_arguments_reach_the_template_and_their_text_is_of_the_header(arguments: tuple[str, ...], header: str) -> None:
    prompt = prompter(tokenizer(THINKING), template_kwargs=arguments).prompt(QUESTION)
    assert prompt.text.endswith(f"{QUESTION}<|im_end|>\n{header}")
    assert parts(prompt)["assistant_header"] == header


def test_arguments_are_json_where_they_are_json_and_text_where_not() -> None:
    made = tokenizer("{{ (a, b, c, d, e) }}{{ messages[-1].content }}")
    arguments = ("a=1", "b=[true, null]", 'c={"x": 0.5}', "d=low", "e=a=b")
    text = prompter(made, template_kwargs=arguments).prompt(QUESTION).text
    assert text == f"(1, [True, None], {{'x': 0.5}}, 'low', 'a=b'){QUESTION}"


@pytest.mark.parametrize("entry", ["enable_thinking", "=1", "a-b=1", ""])
def test_an_argument_without_name_or_value_is_refused(entry: str) -> None:
    assert error_of(lambda: prompter(tokenizer(THINKING), template_kwargs=(entry,))) == (
        f"{entry!r} - at `$.prompt.template_kwargs`; expected name=value, as enable_thinking=false"
    )


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "chat_template"])
def test_an_argument_that_tracekit_gives_itself_is_refused(name: str) -> None:
    made = prompter(tokenizer(THINKING), template_kwargs=(f"{name}=true",))
    message = error_of(lambda: made.prompt(QUESTION))
    assert message.startswith("the chat template does not render: ")
    assert name in message


@pytest.mark.parametrize(("date", "text"), [("2026-01-01", "01 January 2026"), ("1999-12-31", "31 December 1999")])
def test_the_date_that_templates_see_is_frozen(date: str, text: str) -> None:
    prompt = prompter(tokenizer(DATED), template_date=date).prompt(QUESTION)
    assert prompt.text.startswith(f"{text} <|im_start|>user\n")


def test_two_dates_can_be_rendered_in_turns() -> None:
    made = [prompter(tokenizer(DATED), template_date=date) for date in ("2026-01-01", "1999-12-31")]
    years = [rendered.prompt(QUESTION).text.split()[2] for rendered in (*made, *made)]
    assert years == ["2026", "1999", "2026", "1999"]


@pytest.mark.parametrize(
    "form", ["%d %b %Y", "%Y-%m-%d", "%A, %-d %B %Y", "%B %e, %y", "%d/%m/%Y %H:%M:%S %p", "week day %a, day %j of %Y"]
)
def test_the_frozen_date_has_any_form(form: str) -> None:
    template = "{{ strftime_now('" + form + "') }}|" + CHATML
    text = prompter(tokenizer(template), template_date="2024-02-05").prompt(QUESTION).text
    assert text.split("|")[0] == datetime.date(2024, 2, 5).strftime(form)


@pytest.mark.parametrize(
    "template",
    [
        "{% set today = strftime_now('%Y') %}{{ today }}" + CHATML,
        "{%- if strftime_now is defined %}{{ strftime_now('%Y') }}{%- endif %}\n" + CHATML,
        "{{- bos_token }}\n{{ strftime_now('%Y') ~ '' }}" + CHATML,
        "\n{% if true %}{{ strftime_now('%Y') }}{% endif %}\n" + CHATML,
        "  {% if true %}\n    x{{ strftime_now('%Y') | trim }}\n  {% endif %}\n" + CHATML,
        "{% macro head() %}[{{ strftime_now('%Y') }}]{% endmacro %}{{ head() }}" + CHATML,
        "{% for message in messages %}{{ strftime_now('%Y') }}{% endfor %}" + CHATML,
    ],
)
def test_a_template_with_a_frozen_date_renders_as_transformers_does(template: str) -> None:
    made = tokenizer(template)
    today = str(datetime.date.today().year)
    messages = [{"role": "user", "content": "Who?"}]
    expected = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).replace(today, "1987")
    assert prompter(made, template_date="1987-06-05").prompt("Who?").text == expected
    assert "1987" in expected


@pytest.mark.parametrize("date", ["today", "2026-13-01", "01.01.2026", ""])
def test_a_date_that_is_none_is_refused(date: str) -> None:
    assert error_of(lambda: prompter(tokenizer(), template_date=date)) == (
        f"date {date!r} - at `$.prompt.template_date`; expected YYYY-MM-DD"
    )


# ---------------------------------------------------------------- spans and offsets

QUESTIONS = (
    QUESTION,
    "Is 🐎 or 中文 “quoted” é?",
    "first line\nsecond line\n\nthird",
    "  spaces around  ",
    "<|im_start|> in a question",
    "?",
    "0",
    "user",
    "assistant",
    "Answer: Question: Answer:",
)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("shots", [(), SHOTS])
@pytest.mark.parametrize("template", [CHATML, WITH_BOS, SYSTEM_IN_USER, THINKING, None])
def test_spans_hold_the_right_characters(question: str, shots: tuple[Exchange, ...], template: str | None) -> None:
    prompt = prompter(tokenizer(template), default_system="Be brief.").prompt(question, shots)
    spans = parts(prompt)
    assert list(spans) == ["system", *["shots"] * bool(shots), "user", "assistant_header"]
    assert spans["system"] == "Be brief."
    assert spans["user"].strip() == question.strip()
    assert prompt.text.endswith(spans["assistant_header"])
    assert spans["assistant_header"].strip() in ("<|im_start|>assistant", "<|im_start|>model", "Answer:")
    ranges = [(span.start, span.stop) for span in prompt.spans]
    assert ranges == sorted(ranges)
    for (_, stop), (start, _) in pairwise(ranges):
        assert stop <= start
    assert ranges[-1][1] == len(prompt.token_ids)


@pytest.mark.parametrize("question", QUESTIONS)
def test_offsets_are_the_characters_of_each_token(question: str) -> None:
    made = tokenizer(WITH_BOS)
    prompt = prompter(made, default_system="Be brief.").prompt(question)
    assert len(prompt.offsets) == len(prompt.token_ids)
    for token, (start, stop) in zip(prompt.token_ids, prompt.offsets, strict=True):
        piece = made.decode([token])
        assert piece == prompt.text[start:stop] or "\ufffd" in piece
    assert prompt.offsets == sorted(prompt.offsets)
    covered = {i for start, stop in prompt.offsets for i in range(start, stop)}
    assert covered == set(range(len(prompt.text)))


def test_the_question_is_the_last_of_its_like() -> None:
    shots = (Exchange(QUESTION, "Paris"), Exchange("Paris?", QUESTION))
    prompt = prompter(tokenizer(CHATML), system=QUESTION).prompt(QUESTION, shots)
    span = next(span for span in prompt.spans if span.name == "user")
    assert prompt.offsets[span.start][0] == prompt.text.rindex(QUESTION)
    assert parts(prompt)["system"] == QUESTION


def test_a_template_without_generation_prompt_has_no_header() -> None:
    prompt = prompter(tokenizer("{{ messages[-1].content }}")).prompt(QUESTION)
    assert parts(prompt) == {"user": QUESTION}


def test_a_header_is_found_though_the_template_renders_otherwise_without_it() -> None:
    template = "{{ '' if add_generation_prompt else 'closed ' }}{{ messages[-1].content }}</s>\n>>"
    prompt = prompter(tokenizer(template)).prompt(QUESTION)
    assert parts(prompt) == {"user": QUESTION, "assistant_header": "</s>\n>>"}


@pytest.mark.parametrize("question", ["  spaces around  ", QUESTION])
def test_a_question_that_the_template_alters_is_no_crash(question: str) -> None:
    template = "{{ '' if add_generation_prompt else 'closed ' }}{{ messages[-1].content | trim | upper }}</s>\n>>"
    assert prompter(tokenizer(template)).prompt(question).text.endswith("</s>\n>>")


def test_a_header_that_begins_like_the_question_ends() -> None:
    template = "Q:{{ messages[-1].content }}{% if add_generation_prompt %}a:{% endif %}"
    prompt = prompter(tokenizer(template)).prompt("a")
    assert [span.name for span in prompt.spans] == ["user", "assistant_header"]


def test_tokens_of_a_range_are_those_with_a_character_in_it() -> None:
    offsets = [[0, 0], [0, 2], [2, 5], [5, 6], [5, 6], [6, 9]]
    assert tokens_of(offsets, 0, 9) == (1, 6)
    assert tokens_of(offsets, 2, 5) == (2, 3)
    assert tokens_of(offsets, 3, 6) == (2, 5)
    assert tokens_of(offsets, 4, 7) == (2, 6)
    assert tokens_of(offsets, 9, 12) == (0, 0)
    assert tokens_of([], 0, 1) == (0, 0)


def test_a_hash_is_of_the_utf8_bytes() -> None:
    assert sha256_text("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert sha256_text("é") == "4a99557e4033c3539de2eb65472017cad5f9557f7a0625a09f1c3f6e2ba69c4c"
    assert sha256_text("\ud800") != sha256_text("")


# ---------------------------------------------------------------- real tokenizers


def test_the_small_llamas_tokenizer_begins_once(shared: Path) -> None:
    made = AutoTokenizer.from_pretrained(shared / "models/stories260K-hf")
    for bos, count in (("auto", 1), ("always", 1), ("never", 0)):
        prompt = prompter(made, bos=bos).prompt("Who? 🐎 é")
        assert prompt.token_ids.count(made.bos_token_id) == count
        assert prompt.text == "Question: Who? 🐎 é\nAnswer:"
        assert parts(prompt)["user"].strip() == "Who? 🐎 é"
        assert made.decode(prompt.token_ids, skip_special_tokens=True).strip() == prompt.text


@pytest.mark.parametrize("question", [QUESTION, "Is 🐎 or 中文 “quoted” é?", "a\n\nb"])
def test_gpt2s_tokenizer_adds_nothing_unless_asked(question: str, shared: Path) -> None:
    made = GPT2TokenizerFast.from_pretrained(shared / "tokenizers/gpt2")
    prompt = prompter(made).prompt(question, SHOTS)
    assert prompt.token_ids == made(prompt.text).input_ids
    assert decoded(made, prompt) == prompt.text
    assert parts(prompt)["user"].strip() == question
    begun = prompter(made, bos="always").prompt(question, SHOTS)
    assert begun.token_ids == [50256, *prompt.token_ids]
    assert begun.offsets == [[0, 0], *prompt.offsets]
    assert [(span.start, span.stop) for span in begun.spans] == [
        (span.start + 1, span.stop + 1) for span in prompt.spans
    ]


# ---------------------------------------------------------------- conversations and texts


def test_a_conversation_is_what_the_template_renders_and_its_parts_are_found() -> None:
    made = tiny_tokenizer(chat=True)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "He."},
        {"role": "user", "content": "Why?"},
    ]
    prompt = prompter(made).conversation(messages)
    assert prompt.text == made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.token_ids == made(prompt.text, add_special_tokens=False).input_ids
    assert prompt.input_text == "Why?"
    assert parts(prompt) == {"system": "Be brief.", "user": "Why?", "assistant_header": "<|assistant|>"}


def test_a_conversation_without_a_template_or_against_it_is_refused() -> None:
    messages = [{"role": "user", "content": "Why?"}]
    assert "no chat template" in error_of(lambda: prompter(tiny_tokenizer()).conversation(messages))
    made = tiny_tokenizer()
    made.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert "roles must alternate" in error_of(lambda: prompter(made).conversation(messages))


@pytest.mark.parametrize("chat", [True, False])
def test_a_text_to_be_continued_is_tokenised_as_the_tokenizer_does(chat: bool) -> None:
    made = tiny_tokenizer(chat=chat)
    prompt = prompter(made).plain("Once upon")
    assert (prompt.text, prompt.token_ids) == ("Once upon", made("Once upon").input_ids)
    assert (parts(prompt), prompt.template_sha256) == ({"user": "Once upon"}, None)
    assert prompter(made).plain("").spans == []
