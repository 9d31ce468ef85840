"""Answers: reasoning and answer among generated tokens, and where each token lies in the text."""

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from tests.tiny_checkpoint import tiny_tokenizer
from tracekit.config import PromptConfig
from tracekit.model.answers import Answer, parse_answer, token_offsets
from tracekit.model.prompts import Prompt, Prompter

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENED = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
CLOSED = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif")
GPT_OSS = (
    "<|start|>user<|message|>{{ messages[-1].content }}<|end|>"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"]
SMALL = tiny_tokenizer()
TEXTS = (
    "Paris",
    " Paris and London",
    "🐎",
    "a🐎b 🐎🐎 c",
    "👩‍👩‍👧 family",
    "中文 and é, ñ, ø",
    "line\n\nline\t tabs  ",
    "e\u0301 combining",
    " ",
    "\n",
    "\ufffd real replacement",
    "ends with \ufffd",
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, with the markers of several families of models."""
    made = tiny_tokenizer()
    made.add_tokens(SPECIAL, special_tokens=True)
    made.add_tokens(["<think>", "</think>"])
    return made


@pytest.fixture(scope="module", params=["small", "gpt2", "stories260K"])
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "small":
        return SMALL
    shared: Path = request.getfixturevalue("shared")
    if request.param == "gpt2":
        return GPT2TokenizerFast.from_pretrained(shared / "tokenizers/gpt2")
    return AutoTokenizer.from_pretrained(shared / "models/stories260K-hf")


def prompt_of(tokenizer: Any, template: str | None, question: str = "Where?") -> Prompt:
    tokenizer.chat_template = template
    return Prompter(tokenizer, PromptConfig(), default_system="").prompt(question)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def parsed(tokenizer: Any, template: str | None, generated: str) -> Answer:
    """The answer in a generated text; one that ends with an end token was generated to its end."""
    ids = ids_of(tokenizer, generated)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<|return|>")]
    return parse_answer(tokenizer, prompt_of(tokenizer, template), ids, eos_included=bool(ids) and ids[-1] in ends)


def held(answer: Answer, name: str) -> str | None:
    """The characters that a span's tokens hold; None where there is no such span."""
    span = answer.span(name)
    return answer.whole_text[answer.offsets[span.start][0] : answer.offsets[span.stop - 1][1]] if span else None


# ---------------------------------------------------------------- characters of tokens


def check_offsets(tokenizer: Any, ids: Sequence[int]) -> None:
    """The pieces stand one after the other and make the whole text; tokens of one character share their piece."""
    text = tokenizer.decode(list(ids))
    offsets = token_offsets(tokenizer, ids)
    assert len(offsets) == len(ids)
    pieces = list(dict.fromkeys(map(tuple, offsets)))
    assert "".join(text[start:stop] for start, stop in pieces) == text
    assert pieces == sorted(pieces)
    assert pieces[0][0] == 0
    assert pieces[-1][1] == len(text)
    for (_, stop), (start, _) in pairwise(pieces):
        assert start == stop


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_cut_a_text_into_pieces(text: str, any_tokenizer: Any) -> None:
    check_offsets(any_tokenizer, ids_of(any_tokenizer, text))


@pytest.mark.parametrize("text", [text for text in TEXTS if not text.startswith("\ufffd")])
def test_a_piece_holds_what_the_tokenizer_says_of_its_token(text: str) -> None:
    encoded = SMALL(text, return_offsets_mapping=True)
    for mine, theirs in zip(token_offsets(SMALL, encoded.input_ids), encoded.offset_mapping, strict=True):
        assert mine[0] <= theirs[0] < theirs[1] <= mine[1]
        assert text[mine[0] : mine[1]].isascii() is False or tuple(mine) == theirs


def test_a_character_made_of_several_tokens_belongs_to_all_of_them() -> None:
    ids = ids_of(SMALL, "a🐎b")
    assert len(ids) == 6
    assert token_offsets(SMALL, ids) == [[0, 1], [1, 2], [1, 2], [1, 2], [1, 2], [2, 3]]


def test_characters_that_never_become_whole_have_pieces_too() -> None:
    horse = ids_of(SMALL, "🐎")
    check_offsets(SMALL, horse[:2])
    check_offsets(SMALL, [*horse[:3], *ids_of(SMALL, "x y")])
    check_offsets(SMALL, [*ids_of(SMALL, "x"), *horse[2:], *ids_of(SMALL, "y"), *horse[:1]])
    check_offsets(SMALL, [*horse[:2], *horse])
    check_offsets(SMALL, [horse[0]] * 5)


def test_no_token_has_no_piece() -> None:
    assert token_offsets(SMALL, []) == []


def test_one_token_is_the_whole() -> None:
    assert token_offsets(SMALL, ids_of(SMALL, "a")) == [[0, 1]]


def test_whatever_a_model_generates_is_cut_into_pieces(any_tokenizer: Any) -> None:
    draw = random.Random(0)
    for _ in range(100):
        ids = [draw.randrange(len(any_tokenizer)) for _ in range(draw.randrange(1, 20))]
        check_offsets(any_tokenizer, ids)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 319), min_size=1, max_size=30))
def test_any_tokens_are_cut_into_pieces(ids: list[int]) -> None:
    check_offsets(SMALL, ids)


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=30))
def test_any_text_is_cut_into_pieces(text: str) -> None:
    ids = ids_of(SMALL, text)
    assert SMALL.decode(ids) == text
    check_offsets(SMALL, ids)


# ---------------------------------------------------------------- chat answers


def test_an_answer_is_everything_up_to_the_end_token(tokenizer: Any) -> None:
    answer = parsed(tokenizer, CHATML, "Paris, of course.</s>")
    prompt = prompt_of(tokenizer, CHATML)
    assert answer.text == "Paris, of course."
    assert answer.whole_text == f"{prompt.text}Paris, of course.</s>"
    assert answer.start_char == len(prompt.text)
    assert held(answer, "answer") == "Paris, of course."
    assert [span.name for span in answer.spans] == ["answer"]
    span = answer.span("answer")
    assert (span.start, span.stop) == (len(prompt.token_ids), len(answer.offsets) - 1)
    assert answer.has_ended


def test_offsets_go_on_where_the_prompts_end(tokenizer: Any) -> None:
    answer, prompt = parsed(tokenizer, CHATML, "Paris 🐎</s>"), prompt_of(tokenizer, CHATML)
    assert answer.offsets[: len(prompt.offsets)] == prompt.offsets
    assert answer.offsets[len(prompt.offsets)][0] == len(prompt.text)
    assert answer.offsets[-1] == [len(answer.whole_text) - len("</s>"), len(answer.whole_text)]
    ids = [*prompt.token_ids, *ids_of(tokenizer, "Paris 🐎</s>")]
    assert len(answer.offsets) == len(ids)
    assert tokenizer.decode(ids) == answer.whole_text


def test_an_answer_that_was_cut_has_not_ended(tokenizer: Any) -> None:
    answer = parsed(tokenizer, CHATML, "Paris, of cou")
    assert (answer.text, answer.has_ended) == ("Paris, of cou", False)
    assert answer.span("answer").stop == len(answer.offsets)


@pytest.mark.parametrize("generated", ["  Paris \n</s>", "\n\nParis\n", " Paris</s>"])
def test_white_space_around_an_answer_is_not_part_of_it(generated: str, tokenizer: Any) -> None:
    answer = parsed(tokenizer, CHATML, generated)
    assert answer.text == "Paris"
    assert answer.whole_text[answer.start_char :].startswith("Paris")
    assert held(answer, "answer").strip() == "Paris"


def test_a_chat_answer_may_have_several_lines(tokenizer: Any) -> None:
    answer = parsed(tokenizer, CHATML, "Paris\n\nor Rome\n</s>")
    assert answer.text == held(answer, "answer").strip() == "Paris\n\nor Rome"


@pytest.mark.parametrize("generated", ["</s>", "", "  \n </s>", " \n"])
@pytest.mark.parametrize("template", [CHATML, None])
def test_an_empty_answer_has_no_span(generated: str, template: str | None, tokenizer: Any) -> None:
    answer = parsed(tokenizer, template, generated)
    assert answer.text == ""
    assert answer.spans == []
    assert answer.span("answer") is None
    assert len(prompt_of(tokenizer, template).text) <= answer.start_char <= len(answer.whole_text)


def test_special_tokens_inside_an_answer_are_not_in_its_text(tokenizer: Any) -> None:
    answer = parsed(tokenizer, CHATML, "Paris<|im_end|> or Rome</s>")
    assert answer.text == "Paris or Rome"
    assert held(answer, "answer") == "Paris<|im_end|> or Rome"


def test_a_character_that_was_cut_is_part_of_the_answer(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, "Paris 🐎")
    answer = parse_answer(tokenizer, prompt_of(tokenizer, CHATML), ids[:-1], eos_included=False)
    assert answer.text == "Paris \ufffd"
    assert answer.span("answer").stop == len(answer.offsets)


# ---------------------------------------------------------------- plain answers


@pytest.mark.parametrize(
    ("generated", "text", "has_ended"),
    [
        (" Paris\n\nQuestion: Who?\nAnswer: He", "Paris", True),
        (" Paris\n", "Paris", True),
        (" Paris", "Paris", False),
        (" Paris</s>", "Paris", True),
        ("\n\n Paris \nRome", "Paris", True),
        (" a b c \n d", "a b c", True),
        ("\nParis", "Paris", False),
    ],
)
def test_a_plain_answer_is_its_first_line(generated: str, text: str, has_ended: bool, tokenizer: Any) -> None:
    answer = parsed(tokenizer, None, generated)
    assert answer.text == text
    assert held(answer, "answer").strip() == text
    assert answer.whole_text.endswith(f"Answer:{generated}")
    assert answer.has_ended is has_ended


def test_a_line_break_inside_a_token_ends_a_plain_answer_too(tokenizer: Any) -> None:
    made = tiny_tokenizer()
    made.add_tokens(["Paris\n\n"])
    answer = parse_answer(made, prompt_of(made, None), ids_of(made, "Paris\n\nRome"), eos_included=False)
    assert answer.text == "Paris"
    span = answer.span("answer")
    assert span.stop - span.start == 1


# ---------------------------------------------------------------- reasoning


@pytest.mark.parametrize(
    ("template", "generated", "thinking", "text"),
    [
        (CHATML, "<think>\nHm.\n</think>\n\nParis</s>", "<think>\nHm.\n</think>", "Paris"),
        (CHATML, "\n<think>Hm.</think>Paris</s>", "\n<think>Hm.</think>", "Paris"),
        (CHATML, "<think>\n\n</think>\n\nParis</s>", "<think>\n\n</think>", "Paris"),
        (CHATML, "<think>Hm. Or", "<think>Hm. Or", ""),
        (CHATML, "<think>Hm. Or</s>", "<think>Hm. Or", ""),
        (CHATML, "<think>Hm.</think>", "<think>Hm.</think>", ""),
        (CHATML, "<think>Hm.</think></s>", "<think>Hm.</think>", ""),
        (OPENED, "Hm.\n</think>\n\nParis</s>", "Hm.\n</think>", "Paris"),
        (OPENED, "Hm. Or", "Hm. Or", ""),
        (OPENED, "Hm.</s>", "Hm.", ""),
        (CLOSED, "Paris</s>", None, "Paris"),
        (CHATML, "Paris</s>", None, "Paris"),
        (CHATML, "I <think> so</s>", None, "I <think> so"),
        (CHATML, "<thinking>Hm.</thinking>Paris</s>", "<thinking>Hm.</thinking>", "Paris"),
        (CHATML, "<thinking>Hm.", "<thinking>Hm.", ""),
        (CHATML, "[THINK]Hm.[/THINK]Paris</s>", "[THINK]Hm.[/THINK]", "Paris"),
        (CHATML, "[THINK]Hm.", "[THINK]Hm.", ""),
        (CHATML, "<seed:think>Hm.</seed:think>Paris</s>", "<seed:think>Hm.</seed:think>", "Paris"),
        (CHATML, "<thought>Hm.</thought>Paris</s>", "<thought>Hm.</thought>", "Paris"),
        (CHATML, "<reasoning>Hm. <think></reasoning>Paris</s>", "<reasoning>Hm. <think></reasoning>", "Paris"),
        (CHATML, "<|START_THINKING|>Hm.<|END_THINKING|>Paris</s>", "<|START_THINKING|>Hm.<|END_THINKING|>", "Paris"),
        (
            GPT_OSS,
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Paris<|return|>",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>",
            "Paris",
        ),
        (GPT_OSS, "<|channel|>analysis<|message|>Hm. Or", "<|channel|>analysis<|message|>Hm. Or", ""),
        (
            GPT_OSS,
            "<|channel|>final<|message|>Paris<|return|>",
            "<|channel|>final<|message|>",
            "Paris",
        ),
    ],
)
def test_reasoning_and_answer_are_told_apart(
    template: str, generated: str, thinking: str | None, text: str, tokenizer: Any
) -> None:
    answer = parsed(tokenizer, template, generated)
    assert held(answer, "thinking") == thinking
    assert answer.text == text
    assert (held(answer, "answer") or "").strip() == text
    names = [span.name for span in answer.spans]
    assert names == ["thinking"] * (thinking is not None) + ["answer"] * bool(text)
    for before, after in pairwise(answer.spans):
        assert before.stop <= after.start


def test_a_line_break_after_reasoning_does_not_end_a_plain_answer(tokenizer: Any) -> None:
    answer = parsed(tokenizer, None, "<think>a\nb</think>\n\nParis\nRome")
    assert held(answer, "thinking") == "<think>a\nb</think>"
    assert answer.text == "Paris"


@pytest.mark.parametrize(
    ("generated", "text"),
    [
        ("Reasoning ends with </think> there.</s>", "Reasoning ends with </think> there."),
        ("<think>Hm.</think>It ends with </think> there.</s>", "It ends with </think> there."),
    ],
)
def test_a_marker_that_an_answer_speaks_of_is_part_of_it(generated: str, text: str, tokenizer: Any) -> None:
    assert parsed(tokenizer, CHATML, generated).text == text


# ---------------------------------------------------------------- real tokenizers


@pytest.mark.parametrize("generated", [" Paris and 🐎\nRome", " 中文 é", "Paris"])
def test_answers_of_any_tokenizer(generated: str, any_tokenizer: Any) -> None:
    prompt = prompt_of(any_tokenizer, None)
    ids = ids_of(any_tokenizer, generated)
    answer = parse_answer(any_tokenizer, prompt, [*ids, any_tokenizer.eos_token_id], eos_included=True)
    assert answer.text == generated.strip().split("\n")[0]
    assert held(answer, "answer").strip() == answer.text
    assert answer.whole_text.startswith(prompt.text)
    assert answer.whole_text.endswith(any_tokenizer.eos_token)
    assert answer.span("answer").stop <= len(prompt.token_ids) + len(ids)
    assert len(answer.offsets) == len(prompt.token_ids) + len(ids) + 1
