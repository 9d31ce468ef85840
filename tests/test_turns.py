"""Turns: what chat templates of several families write around an answer, and where reasoning goes."""

from typing import Any

import pytest

from tests.tiny_checkpoint import tiny_tokenizer
from tracekit.config import PromptConfig
from tracekit.model.prompts import Prompter
from tracekit.model.turns import Turn, turn_of

QWEN3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% set thought = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{% if loop.last or thought %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ m.content.lstrip('\n') }}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}"
    "<|assistant|>{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>{% else %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>"
    "{% endif %}{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}"
)


def turn(template: str | None, **arguments: Any) -> Turn | None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    kwargs = tuple(f"{name}={value}" for name, value in arguments.items())
    return turn_of(Prompter(tokenizer, PromptConfig(template_kwargs=kwargs), default_system=""))


@pytest.mark.parametrize(
    ("template", "prompt", "written"),
    [
        (QWEN3, "user\nQ<|im_end|>\n<|im_start|>assistant\n", "<think>\nHm.\n</think>\n\nSo."),
        (QWEN3, "user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n", "Hm.\n</think>\n\nSo."),
        (QWEN3, "user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", None),
        (QWEN3, "One two", None),
        (R1, "<|user|>Q<|assistant|><think>\n", "Hm.\n</think>\n\nSo."),
        (R1, "<|user|>Q<|assistant|>", "<think>\nHm.\n</think>\n\nSo."),
        (
            GPT_OSS,
            "<|start|>user<|message|>Q<|end|><|start|>assistant",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>So.",
        ),
        (MISTRAL, "[INST] Q [/INST]", None),
    ],
)
def test_reasoning_goes_between_the_markers_of_the_template(template: str, prompt: str, written: str | None):
    found = turn(template)
    assert found is not None
    assert found.with_reasoning(prompt, "\nHm.\n", "So.", is_cut=False) == written
    cut = found.with_reasoning(prompt, "Hm.", "", is_cut=True)
    assert cut == (None if written is None else written[: written.index("Hm.") + 3])


def test_a_prompt_that_closes_reasoning_has_no_place_for_it():
    found = turn(QWEN3, enable_thinking="false")
    assert found is not None
    prompt = "user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert found.with_reasoning(prompt, "Hm.", "So.", is_cut=False) is None


@pytest.mark.parametrize(
    ("template", "closing"), [(QWEN3, "<|im_end|>\n"), (R1, "</s>"), (GPT_OSS, "<|return|>"), (MISTRAL, "</s>")]
)
def test_the_end_token_is_the_one_that_the_template_writes(template: str, closing: str):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|im_end|>", "<|return|>"], special_tokens=True)
    found = turn(template)
    assert found is not None
    assert found.closing == closing
    end = tokenizer.convert_tokens_to_ids(closing.strip())
    assert found.end_token(tokenizer, {end, 10**6}) == end
    assert found.end_token(tokenizer, {10**6}) is None


@pytest.mark.parametrize("template", [None, STRICT])
def test_without_a_template_that_takes_an_answer_there_is_no_turn(template: str | None):
    assert turn(template) is None
