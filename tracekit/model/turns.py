"""Turns: what a chat template writes around an assistant's message, found by rendering one.

<|im_end|>\\n<|im_start|>assistant\\n<think>\\n  REASONING  \\n</think>\\n\\n  ANSWER  <|im_end|>\\n
opening                                                  between                  closing
"""

import re
from collections.abc import Set
from typing import Any, NamedTuple

from tracekit.errors import ConfigError
from tracekit.model.answers import THINKING
from tracekit.model.prompts import Prompter

__all__ = ["Turn", "turn_of"]

_USER, _REASONING, _ANSWER = "USERSAYS", "MODELTHINKS", "MODELSAYS"


class Turn(NamedTuple):
    """The texts around an assistant's message."""

    header: str
    """From the user's text to where an assistant's turn begins."""
    opening: str
    """From the user's text to the reasoning; it starts with the header."""
    between: str | None
    """From the reasoning to the answer; None where the template has no place for reasoning."""
    closing: str
    """After the answer."""
    lead: str = ""
    """From the header to an answer without reasoning, where the model writes more there than white space and an empty
    reasoning: gpt-oss names the channel."""

    def with_lead(self, prompt: str, answer: str) -> str:
        """What the model wrote after a prompt to give an answer without reasoning."""
        marker = re.match(r"<[^<>]*>|", self.lead.strip())
        assert marker is not None, self.lead
        is_there = not self.lead or answer.lstrip().startswith(marker[0] or self.lead.strip())
        return answer if is_there or not prompt.endswith(self.header) else self.lead + answer.lstrip()

    def with_reasoning(self, prompt: str, reasoning: str, answer: str, *, is_cut: bool) -> str | None:
        """What the model wrote after a prompt, its reasoning between the template's markers; None where there is no
        place for it. Of an answer that was cut before it began, the reasoning alone."""
        lengths = range(len(self.opening), len(self.header) - 1, -1)
        told = next((length for length in lengths if length and prompt.endswith(self.opening[:length])), None)
        if self.between is None or told is None:
            return None
        opened = self.opening[told:] + reasoning.strip()
        return opened if is_cut and not answer.strip() else opened + self.between + answer.lstrip()

    def end_token(self, tokenizer: Any, ends: Set[int]) -> int | None:
        """The end token that the template writes after an answer; None where it writes none of `ends`."""
        ids = tokenizer(self.closing, add_special_tokens=False).input_ids
        return next((token for token in ids if token in ends), None)


def turn_of(prompter: Prompter) -> Turn | None:
    """The turn of a prompter's chat template; None where it has none, or one that does not take a plain exchange."""
    asked, said = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}
    thought = said | dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _REASONING)
    if prompter.template is None:
        return None
    try:
        prompt = prompter.render([asked], add_generation_prompt=True)
        plain, full = (prompter.render([asked, one], add_generation_prompt=False) for one in (said, thought))
    except ConfigError:
        return None
    header, closing = prompt.rpartition(_USER)[2], plain.rpartition(_ANSWER)[2]
    opening, _, rest = full.rpartition(_USER)[2].partition(_REASONING)
    between, has_answer, _ = rest.partition(_ANSWER)
    lead = _lead(header, plain.rpartition(_ANSWER)[0].rpartition(_USER)[2])
    if has_answer:
        return Turn(_unopened(header if opening.startswith(header) else opening), opening, between, closing, lead)
    return _by_markers(prompter.template, header, closing)._replace(lead=lead)


def _lead(header: str, before: str) -> str:
    """What a template writes between its header and an answer; none where that is an empty reasoning."""
    lead = before.removeprefix(header) if before.startswith(header) else ""
    bare = lead
    for marker in (marker for pair in THINKING[:-1] for marker in pair):
        bare = bare.replace(marker, "")
    return lead if bare.strip() else ""


def _by_markers(template: str, header: str, closing: str) -> Turn:
    """The turn of a template that drops reasoning, and names the markers that it drops."""
    bare = header.rstrip()
    for first, last in THINKING:
        if bare.endswith(first):
            gap = header[len(bare) :]
            return Turn(_unopened(header), header, f"{gap}{last}{gap * 2}", closing)
        if last in template and first.endswith(">") and not first.startswith("<|"):
            return Turn(header, f"{header}{first}\n", f"\n{last}\n\n", closing)
    return Turn(header, header, None, closing)


def _unopened(header: str) -> str:
    """A header without the marker that opens reasoning."""
    bare = header.rstrip()
    return next((bare.removesuffix(first) for first, _ in THINKING if bare.endswith(first)), header)
