"""Answers: which generated tokens are reasoning, which are the answer, and where each lies in the text.

Reasoning is what stands between a thinking model's markers. Where the template has already opened the reasoning, or
where it is cut before it ends, everything up to the closing marker (or the end) is reasoning, and no answer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tracekit.model.prompts import Prompt, tokens_of
from tracekit.records import Span

__all__ = [
    "THINKING",
    "Answer",
    "end_of_thinking",
    "parse_answer",
    "prompt_of_ids",
    "token_offsets",
    "without_thinking",
]

THINKING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>", "<|channel|>final<|message|>"),
)
"""Opening and closing markers of reasoning: Qwen and DeepSeek, others, Magistral, Seed, Command A, gpt-oss last."""


class Answer(NamedTuple):
    """The generated part of a text, taken apart."""

    whole_text: str
    """Prompt and generated tokens as text, special tokens included."""
    text: str
    """The answer alone."""
    start_char: int
    """Where the answer starts in `whole_text`."""
    offsets: list[list[int]]
    """Characters of every token, prompt and generated, in `whole_text`."""
    spans: list[Span]
    """thinking and answer, those that exist, as token ranges of the whole text."""
    has_ended: bool
    """Whether the answer came to its own end: end of sequence, or for a plain prompt the end of its first line."""

    def span(self, name: str) -> Span | None:
        """A span by name."""
        return next((span for span in self.spans if span.name == name), None)


def parse_answer(
    tokenizer: Any, prompt: Prompt, token_ids: Sequence[int], *, eos_included: bool, is_one_line: bool = True
) -> Answer:
    """Find reasoning and answer among the generated tokens.

    A plain prompt's answer ends with its first line: a base model goes on and asks itself the next question. Free
    texts, for which `is_one_line` is False, do not.
    """
    anchor = prompt.token_ids[-1:]
    pieces = token_offsets(tokenizer, token_ids, anchor=anchor)
    generated = _decoded_after(tokenizer, anchor, token_ids)
    base = len(prompt.text)
    whole = prompt.text + generated
    offsets = [*prompt.offsets, *[[base + start, base + stop] for start, stop in pieces]]
    visible = pieces[-1][0] if eos_included and pieces else len(generated)
    think_end = end_of_thinking(prompt.text, generated[:visible])
    start, stop = _strip(generated, think_end, visible)
    has_more_lines = is_one_line and prompt.template_sha256 is None and "\n" in generated[start:visible]
    if has_more_lines:
        start, stop = _strip(generated, start, generated.index("\n", start))
    text = tokenizer.decode(
        [token for token, (first, last) in zip(token_ids, pieces, strict=True) if first < stop and last > start],
        skip_special_tokens=True,
    )
    text = generated[start:stop] if generated[start:stop] in text else text.strip()
    spans = []
    for name, first, last in (("thinking", 0, think_end), ("answer", start, stop)):
        low, high = tokens_of(offsets[len(prompt.offsets) :], base + first, base + last)
        if high > low and last > first:
            spans.append(Span(name=name, start=len(prompt.token_ids) + low, stop=len(prompt.token_ids) + high))
    return Answer(whole, text, base + start, offsets, spans, eos_included or has_more_lines)


def without_thinking(text: str) -> str:
    """A generated text without its reasoning, where the prompt is not at hand: a closing marker that nothing opens was
    opened by the chat template."""
    closing = next((closing for opening, closing in THINKING[:-1] if closing in text and opening not in text), None)
    stop = text.index(closing) + len(closing) if closing is not None else end_of_thinking("", text)
    return text[stop:].strip()


def prompt_of_ids(tokenizer: Any, token_ids: Sequence[int]) -> Prompt:
    """A prompt that is given as ids, which stay as they are; the text is what they decode to."""
    text = tokenizer.decode(list(token_ids))
    spans = [Span(name="user", start=0, stop=len(token_ids))] if token_ids else []
    return Prompt(text, list(token_ids), token_offsets(tokenizer, token_ids), spans, text, None)


def token_offsets(tokenizer: Any, token_ids: Sequence[int], *, anchor: Sequence[int] = ()) -> list[list[int]]:
    """Characters of each token in the text decoded after `anchor`, the tokens before.

    A character made of several tokens belongs to all of them.
    """
    ids = [*anchor, *token_ids]
    whole_length = len(_decoded_after(tokenizer, anchor, token_ids))
    offsets: list[list[int]] = []
    start = window = 0  # characters done; first token of the window that is decoded
    settled = len(anchor)  # tokens done
    for count in range(settled + 1, len(ids) + 1):
        before, after = tokenizer.decode(ids[window:settled]), tokenizer.decode(ids[window:count])
        is_last = count == len(ids)
        if is_last or (len(after) > len(before) and not after.endswith("\ufffd")):
            stop = whole_length if is_last else min(start + len(after) - len(before), whole_length)
            offsets += [[start, stop]] * (count - settled)
            start, window, settled = stop, settled, count
    return [list(pair) for pair in offsets]


def _decoded_after(tokenizer: Any, anchor: Sequence[int], token_ids: Sequence[int]) -> str:
    """Tokens as they read after the ones before: alone, some tokenizers lose the space at their start."""
    before, whole = tokenizer.decode(list(anchor)), tokenizer.decode([*anchor, *token_ids])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(list(token_ids))


def end_of_thinking(prompt: str, generated: str) -> int:
    """Where reasoning ends in the generated text; 0 where there is none. A marker counts where it was opened."""
    for opening, closing in THINKING:
        if prompt.rstrip().endswith(opening) or generated.lstrip().startswith(opening):
            return generated.index(closing) + len(closing) if closing in generated else len(generated)
    return 0


def _strip(text: str, start: int, stop: int) -> tuple[int, int]:
    """The range without white space at its ends."""
    inner = text[start:stop]
    return start + len(inner) - len(inner.lstrip()), stop - len(inner) + len(inner.rstrip()) if inner.strip() else start
