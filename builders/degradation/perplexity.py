"""Sliding-window perplexity of a text under a model, also under one whose numbers are no longer finite.

The usual computation for models with a limited context, https://huggingface.co/docs/transformers/perplexity: windows of
`max_length` tokens advance by `stride`; each token is scored once, in the first window that holds it; the first token
of the text, which nothing precedes, is not scored, nor is the first of any window where windows do not overlap.
Perplexity is exp of the mean negative log-probability over all scored tokens, every token with the same weight.

    tokens     0 1 2 3 4 5 6 7 8 9      max_length 6, stride 4
    window 0   0 1 2 3 4 5                scores 1 2 3 4 5
    window 1           4 5 6 7 8 9        scores 6 7 8 9
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tracekit.config import CaptureConfig
from tracekit.errors import ConfigError, SourceError
from tracekit.model.capture import Text, capture
from tracekit.model.traced import TracedModel
from tracekit.model.values import ValuePolicy
from tracekit.run.metrics import exp_or_none

__all__ = ["TextPerplexity", "text_perplexity", "token_perplexity"]

_NOTHING_KEPT = CaptureConfig(sites=("none",))


class TextPerplexity(NamedTuple):
    """Perplexity of a text."""

    perplexity: float
    """exp(loss); inf where that is beyond a float, nan where the loss is."""
    loss: float
    """Mean negative log-probability of the scored tokens, nats; inf or nan where one of them is."""
    num_scored: int
    """Number of scored tokens."""


def text_perplexity(
    traced: TracedModel, text: str, *, max_length: int, stride: int, batch_size: int = 1
) -> TextPerplexity:
    """Perplexity of a text, tokenised whole and with the special tokens that the tokenizer puts around a text.

    Raises: as `token_perplexity`.
    """
    return token_perplexity(
        traced,
        traced.tokenizer(text, verbose=False).input_ids,
        max_length=max_length,
        stride=stride,
        batch_size=batch_size,
    )


def token_perplexity(
    traced: TracedModel, token_ids: Sequence[int], *, max_length: int, stride: int, batch_size: int = 1
) -> TextPerplexity:
    """Perplexity of a text given as tokens (T,); `batch_size` windows run at a time.

    Values that are not finite are results, not errors: a damaged model has them.

    Raises:
        ConfigError: windows of fewer than two tokens, a stride below 1, or one longer than a window.
        SourceError: a text of fewer than two tokens, in which nothing is predicted.
    """
    if max_length < 2 or not 1 <= stride <= max_length:
        raise ConfigError(
            f"perplexity windows of {max_length} tokens, a stride of {stride}; expected at least 2 tokens, and a "
            "stride from 1 to the window's length"
        )
    if len(token_ids) < 2:
        raise SourceError(f"a text of {len(token_ids)} tokens has no perplexity: nothing precedes its first token")
    windows = _windows(token_ids, max_length, stride)
    logprobs = [
        trace.next_tokens.logprobs.astype(np.float64)
        for first in range(0, len(windows), batch_size)
        for trace in capture(
            traced, windows[first : first + batch_size], _NOTHING_KEPT, policy=ValuePolicy(may_be_nonfinite=True)
        )
    ]
    scored = np.concatenate(logprobs)
    loss = float(-scored.mean())
    value = exp_or_none(loss)
    return TextPerplexity(math.inf if value is None else value, loss, len(scored))


def _windows(token_ids: Sequence[int], max_length: int, stride: int) -> list[Text]:
    """The windows, each with where its own scored tokens start."""
    windows: list[Text] = []
    stop = 0
    for start in range(0, len(token_ids), stride):
        num_context = stop - start
        stop = min(start + max_length, len(token_ids))
        ids = list(token_ids[start:stop])
        windows.append(Text(ids, len(ids), scored_from=max(1, num_context)))
        if stop == len(token_ids):
            break
    return windows
