"""Text of an answer, token by token: what can be sent is sent, no character is cut, and no stop string gets out."""

from collections.abc import Sequence
from typing import Any

__all__ = ["TextStream"]

_NUM_BEFORE = 4
"""Tokens of the prompt that are decoded with the answer: alone, some tokenizers lose the space at its start."""


class TextStream:
    """The text of one answer while its tokens come, as tokenizers decode it without special tokens.

    A character of several tokens comes with the last of them. Text that may be the start of a stop string waits until
    that is known; from a stop string on nothing comes.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids = list(prompt_ids[-_NUM_BEFORE:])
        self._from, self._settled = 0, len(self._ids)  # tokens that are decoded; those of them whose text is known
        self._before = self._decode(self._settled)  # text of the settled ones
        self._held = ""
        self.text = ""  # what was let out
        self.whole = ""  # that, what is held back, and what a stop string cut off
        self.stop_string: str | None = None

    def add(self, token_id: int) -> str:
        """Take in a token; the text that is certain now and was not before."""
        self._ids.append(token_id)
        after = self._decode(len(self._ids))
        if len(after) <= len(self._before) or after.endswith("\ufffd"):
            return ""
        new = after[len(self._before) :]
        self._from, self._settled = self._settled, len(self._ids)
        self._before = self._decode(self._settled)
        return self._let_out(new, is_last=False)

    def alternative(self, token_id: int) -> str:
        """How a token would read in the place of the next one; a special token as it is written."""
        text = self._tokenizer.decode([*self._ids[self._from :], token_id], skip_special_tokens=True)
        return text[len(self._before) :] or self._tokenizer.decode([token_id])

    def finish(self) -> str:
        """The rest, once no more tokens come."""
        if self.stop_string is not None:
            return ""
        return self._let_out(self._decode(len(self._ids))[len(self._before) :], is_last=True)

    def _decode(self, stop: int) -> str:
        return self._tokenizer.decode(self._ids[self._from : stop], skip_special_tokens=True)

    def _let_out(self, new: str, *, is_last: bool) -> str:
        self.whole += new
        held = self._held + new
        places = [(held.find(one), one) for one in self._stop if one in held]
        if places:  # the first to be complete, however the text came in tokens
            cut, self.stop_string = min(places, key=lambda pair: (pair[0] + len(pair[1]), pair[0]))
        else:
            cut = len(held) if is_last else len(held) - self._num_held(held)
        out, self._held = held[:cut], held[cut:]
        self.text += out
        return out

    def _num_held(self, text: str) -> int:
        """Characters at the end that may be the start of a stop string."""
        lengths = (n for one in self._stop for n in range(1, len(one)) if text.endswith(one[:n]))
        return max(lengths, default=0)
