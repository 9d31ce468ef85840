"""Continuations of a prompt: how each is spelled in tokens, and how probable it is.

A continuation is scored by the summed log-probability of its tokens after the prompt, teacher-forced. Letters, words
and whole answers are all scored so.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tracekit.config import CaptureConfig
from tracekit.errors import ConfigError
from tracekit.model.capture import Text, Trace, capture
from tracekit.model.prompts import Exchange, Prompter
from tracekit.model.traced import TracedModel

__all__ = ["answer_joint", "continuation_ids", "score_continuations", "softmax"]

_NOTHING_KEPT = CaptureConfig(sites=("none",))
_ANCHORS = ("\n", ":", "(")
"""Signs that merge with few texts; a tokenizer may turn the first into a space."""


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
    prompt's ids are no prefix any more, the text is tokenised apart from the prompt, and ids count only where they
    decode, after the prompt's, to what prompt and text together decode to.

    Raises:
        ConfigError: no ids decode to the text after this prompt.
    """
    encoded = tokenizer([prompt, *(prompt + joint + text for text in texts)], add_special_tokens=False, verbose=False)
    base, *wholes = (list(ids) for ids in encoded.input_ids)
    found: list[list[int]] = []
    for whole, text in zip(wholes, texts, strict=True):
        is_prefix = whole[: len(base)] == base and len(whole) > len(base)
        ids = whole[len(base) :] if is_prefix else _apart(tokenizer, base, whole, joint + text)
        if ids is None:
            raise ConfigError(
                f"the tokenizer has no tokens for {joint + text!r} after a prompt that ends in {prompt[-20:]!r}: it "
                "merges the two, and nothing it makes of the text alone reads the same there; end the prompt otherwise "
                "(--chat-template), or use another tokenizer"
            )
        found.append(ids)
    return found


def _apart(tokenizer: Any, base: list[int], whole: list[int], text: str) -> list[int] | None:
    """Ids of a text tokenised apart from a prompt, the first that read after it as prompt and text do as one."""
    wanted = _decoded(tokenizer, whole)
    return next((ids for ids in _forms(tokenizer, text) if ids and _decoded(tokenizer, base + ids) == wanted), None)


def _forms(tokenizer: Any, text: str) -> Iterator[list[int]]:
    """Ids that a text may have: alone, after a sign that it is cut off from, and as one entry of the vocabulary.

    Some tokenizers put a space before a text that stands alone; after a sign it stands as it is.
    """
    bare = text.lstrip()
    for form in dict.fromkeys((text, bare)):
        yield _ids(tokenizer, form)
    for anchor in _ANCHORS:
        before, both = _ids(tokenizer, anchor), _ids(tokenizer, anchor + text)
        if both[: len(before)] == before:
            yield both[len(before) :]
    entry = tokenizer.get_vocab().get(text)
    yield [] if entry is None else [entry]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # which would hide a space too many


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
    stem = trace.next_tokens.logprobs.sum(dtype=np.float64)
    return (float(stem + logprob) for logprob in trace.next_tokens.asked_logprobs.astype(np.float64))


def softmax(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Probabilities in proportion to exp of the values, float64 (n,)."""
    shifted = np.asarray(values, dtype=np.float64)
    weights = np.exp(shifted - shifted.max())
    return weights / weights.sum()
