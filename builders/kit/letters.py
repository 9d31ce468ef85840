"""Letters as answers: how they are spelled in tokens, and how probable each is.

A letter can follow a prompt as "A" or as " A", which most tokenizers know as two different tokens. Both spellings are
scored, and the one with more probability on all letters together counts. Where every letter is one token, its logit
comes from the captured pass itself; where one is several, as in tokenizers that keep the space apart, the letters of
that spelling are scored by the summed log-probability of their tokens, in passes of their own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tracekit.errors import ConfigError
from tracekit.model.capture import Trace
from tracekit.model.continuations import continuation_ids, score_continuations
from tracekit.model.traced import TracedModel

__all__ = ["LetterScores", "Spelling", "asked_ids", "score_letters", "spellings_of"]


class Spelling(NamedTuple):
    """One way to write the letters after a prompt."""

    form: str
    """`A`, or ` A` with a space before."""
    token_ids: list[list[int]]
    """Ids of each letter after the prompt."""

    @property
    def is_single(self) -> bool:
        """Whether every letter is one token."""
        return all(len(ids) == 1 for ids in self.token_ids)


class LetterScores(NamedTuple):
    """How probable each letter is after a prompt."""

    spelling: Spelling
    """The spelling that has more probability."""
    logits: list[float]
    """Raw logits; summed log-probabilities where letters are several tokens."""
    logprobs: list[float]
    """Log-probabilities over the whole vocabulary, nats."""
    mass: float
    """Probability of all letters together."""
    other_mass: float
    """The same in the other spelling; 0.0 where the tokenizer has but one."""


def spellings_of(tokenizer: Any, prompt: str, letters: Sequence[str]) -> list[Spelling]:
    """The spellings of the letters after a prompt: two, or one where the tokenizer makes the same tokens of both.

    A spelling in which two letters are the same tokens (both unknown to the tokenizer) is none, nor is one whose
    letters cannot be told from the end of the prompt (`continuation_ids`).

    Raises:
        ConfigError: neither spelling tells the letters apart.
    """
    found: list[Spelling] = []
    refusals: list[str] = []
    for joint in ("", " "):
        try:
            token_ids = continuation_ids(tokenizer, prompt, joint, letters)
        except ConfigError as error:
            refusals.append(str(error))
            continue
        if len({tuple(ids) for ids in token_ids}) < len(letters):
            refusals.append(
                f"the tokenizer writes several of the letters {' '.join(letters)} as the same tokens, {token_ids}; "
                "use a model whose tokenizer knows them"
            )
        elif all(token_ids != one.token_ids for one in found):
            found.append(Spelling(joint + "A", token_ids))
    if not found:
        raise ConfigError(refusals[0])
    return found


def asked_ids(spellings: Sequence[Spelling]) -> tuple[int, ...]:
    """The tokens whose logits the captured pass has to give: the letters of every spelling in single tokens."""
    return tuple(ids[0] for spelling in spellings if spelling.is_single for ids in spelling.token_ids)


def score_letters(
    traced: TracedModel, prompts: Sequence[list[int]], spellings: Sequence[Sequence[Spelling]], traces: Sequence[Trace]
) -> list[LetterScores]:
    """Scores of the letters after each prompt. `traces` were captured with the `asked_ids` of the spellings."""
    long = [[one for one in some if not one.is_single] for some in spellings]
    continuations = [[ids for one in some for ids in one.token_ids] for some in long]
    sums = score_continuations(traced, prompts, continuations)
    return [_best(*row) for row in zip(spellings, traces, sums, strict=True)]


def _best(spellings: Sequence[Spelling], trace: Trace, sums: list[float]) -> LetterScores:
    """The scores of the more probable spelling."""
    asked, summed = 0, 0
    found: list[LetterScores] = []
    for spelling in spellings:
        count = len(spelling.token_ids)
        if spelling.is_single:
            logits = trace.next_tokens.asked_logits[asked : asked + count].tolist()
            logprobs = trace.next_tokens.asked_logprobs[asked : asked + count].tolist()
            asked += count
        else:
            logits = logprobs = sums[summed : summed + count]
            summed += count
        found.append(LetterScores(spelling, logits, logprobs, float(np.exp(logprobs).sum()), 0.0))
    best = max(found, key=lambda scores: scores.mass)
    return best._replace(other_mass=sum(scores.mass for scores in found if scores is not best))
