"""Continuations of a prompt: how each is spelled in tokens, and how probable it is.

A continuation is scored by the summed log-probability of its tokens after the prompt, teacher-forced. Letters, words
and whole answers are all scored so.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tracekit.capture import Text, Trace, capture
from tracekit.config import CaptureConfig
from tracekit.prompts import Exchange, Prompter
from tracekit.traced import TracedModel

__all__ = ["answer_joint", "continuation_ids", "score_continuations", "softmax"]

_NOTHING_KEPT = CaptureConfig(sites=("none",))


def answer_joint(prompter: Prompter) -> str:
    """What stands between a prompt and its answer: a space after "Answer:", mostly nothing in a chat.

    The tokenizer's own template tells: in a conversation that goes on, an answer stands where this prompt ends.
    """
    prompt = prompter.prompt("Q").text
    longer = prompter.prompt("Q", [Exchange("Q", "A")]).text
    rest = longer.removeprefix(prompt)
    answer = rest.lstrip()
    if rest != longer and answer.startswith("A"):
        return rest[: len(rest) - len(answer)]
    return "" if prompter.variant == "chat" or prompt[-1:].isspace() else " "  # a template that rewrites the past


def continuation_ids(tokenizer: Any, prompt: str, joint: str, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text as it follows the prompt, whose own ids stay as they are.

    Prompt and text are tokenised as one, and what comes after the prompt's ids is the text's: with the joining space
    inside its first token or not, as the tokenizer does it. Where the tokenizer would merge the two, so that the
    prompt's ids are no prefix any more, the text is tokenised alone: with the joint or without it, whichever decodes
    to the right text after the prompt.
    """
    encoded = tokenizer([prompt, *(prompt + joint + text for text in texts)], add_special_tokens=False, verbose=False)
    base, *wholes = (list(ids) for ids in encoded.input_ids)
    return [
        whole[len(base) :]
        if whole[: len(base)] == base and len(whole) > len(base)
        else _apart(tokenizer, base, joint, text)
        for whole, text in zip(wholes, texts, strict=True)
    ]


def _apart(tokenizer: Any, base: list[int], joint: str, text: str) -> list[int]:
    """Ids of a text tokenised on its own, to stand after the ids of a prompt."""
    tries = [list(tokenizer(form, add_special_tokens=False).input_ids) for form in (joint + text, text)]
    wanted = tokenizer.decode(base) + joint + text
    return next((ids for ids in tries if ids and tokenizer.decode(base + ids) == wanted), tries[0])


def score_continuations(
    traced: TracedModel, prompts: Sequence[list[int]], continuations: Sequence[Sequence[list[int]]]
) -> list[list[float]]:
    """Log-probability of every continuation of every prompt, nats, in passes of as many texts as there are prompts.

    Continuations that differ in their last token only, as letters do, share a pass.
    """
    stems = [sorted({tuple(ids[:-1]) for ids in options}) for options in continuations]
    texts = [
        Text(
            [*prompt, *stem],
            len(prompt) + len(stem),
            scored_from=len(prompt),
            asked_ids=tuple(ids[-1] for ids in options if tuple(ids[:-1]) == stem),
        )
        for prompt, options, some in zip(prompts, continuations, stems, strict=True)
        for stem in some
    ]
    size = len(prompts)
    traces = (
        trace
        for start in range(0, len(texts), size)
        for trace in capture(traced, texts[start : start + size], _NOTHING_KEPT)
    )
    found: list[list[float]] = []
    for options, some in zip(continuations, stems, strict=True):
        last = {stem: _sums(next(traces)) for stem in some}
        found.append([next(last[tuple(ids[:-1])]) for ids in options])
    return found


def _sums(trace: Trace) -> Iterator[float]:
    """Log-probability of the stem with each of the last tokens that were asked for."""
    stem = trace.logprobs.sum(dtype=np.float64)
    return (float(stem + logprob) for logprob in trace.asked_logprobs.astype(np.float64))


def softmax(values: Sequence[float]) -> np.ndarray:
    """Probabilities in proportion to exp of the values, float64 (n,)."""
    shifted = np.asarray(values, dtype=np.float64)
    weights = np.exp(shifted - shifted.max())
    return weights / weights.sum()
