"""Numbers of logits: what the model thought of the tokens that follow, a few numbers a row.

On a CPU rows are worked on in pieces that stay in its cache, since each is read several times; sums of a row are of
exponentials that are at most 1, so entropies are right to a millionth for large vocabularies too.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Scores", "score"]

_CACHED_VALUES = 1 << 18
"""Logits that are worked on at a time: a megabyte."""
_BLOCK = 128


class Scores(NamedTuple):
    """Numbers of rows of logits, one each."""

    logprobs: Tensor
    """Log-probability of the token that follows (n,); of no meaning where none does."""
    entropies: Tensor
    """Entropy (n,)."""
    best: Tensor
    """Most likely tokens, best first (n, k)."""
    best_logprobs: Tensor
    """Their log-probabilities (n, k)."""
    asked_logits: Tensor
    """Logits of the tokens that a text asks for (n, A); of meaning in the row after its prompt."""
    asked_logprobs: Tensor
    """Their log-probabilities (n, A)."""


def score(logits_nV: Tensor, targets: Tensor, asked_nA: Tensor, width: int) -> Scores:
    """Numbers of rows of logits (n, V), float32.

    `targets` (n,) are the tokens that follow, -1 where none does; `asked_nA` ids whose logits are wanted of each row;
    `width` how many of the most likely tokens.
    """
    size = max(1, _CACHED_VALUES // logits_nV.shape[1]) if logits_nV.device.type == "cpu" else len(logits_nV)
    pieces = zip(logits_nV.split(size), targets.split(size), asked_nA.split(size), strict=True)
    room = torch.empty_like(logits_nV[:size]), torch.empty_like(logits_nV[:size])  # new memory for each piece is slow
    return Scores(*(torch.cat(column) for column in zip(*(_piece(*one, width, room) for one in pieces), strict=True)))


def _piece(logits_nV: Tensor, targets: Tensor, asked_nA: Tensor, width: int, room: tuple[Tensor, Tensor]) -> Scores:
    """log_softmax and entropy from one exp: log p = x - max - log sum, entropy = log sum - sum p (x - max)."""
    largest = logits_nV.amax(-1, keepdim=True)
    shifted_nV, weights_nV = (one[: len(logits_nV)] for one in room)
    torch.sub(logits_nV, largest, out=shifted_nV)
    torch.exp(shifted_nV, out=weights_nV)
    sums = weights_nV.sum(-1, keepdim=True)
    log_sums = sums.log()
    entropies = (log_sums - torch.linalg.vecdot(weights_nV, shifted_nV)[:, None] / sums)[:, 0]
    if not torch.isfinite(entropies).all():  # 0 times -inf, where a head rules tokens out: entr knows it for 0, slowly
        entropies = torch.special.entr(logits_nV.softmax(-1)).sum(-1)
    best_logits, best = _largest(logits_nV, width)
    targets = torch.where(targets < 0, best[:, 0], targets)  # nothing follows, or nobody asks
    return Scores(
        (shifted_nV.gather(1, targets[:, None]) - log_sums)[:, 0],
        entropies,
        best,
        best_logits - largest - log_sums,
        logits_nV.gather(1, asked_nA),
        shifted_nV.gather(1, asked_nA) - log_sums,
    )


def _largest(logits_nV: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The largest values (n, width), best first, and their places: in the blocks that have the largest maxima."""
    num_blocks = logits_nV.shape[1] // _BLOCK
    if width > num_blocks or logits_nV.device.type != "cpu":
        return logits_nV.topk(width)
    filled = nn.functional.pad(logits_nV, (0, -logits_nV.shape[1] % _BLOCK), value=float("-inf"))
    blocks = filled.unflatten(1, (-1, _BLOCK))
    chosen = blocks.amax(-1).topk(width).indices
    candidates = blocks.gather(1, chosen[..., None].expand(-1, -1, _BLOCK)).flatten(1)
    values, within = candidates.topk(width)
    places = chosen.gather(1, within // _BLOCK) * _BLOCK + within % _BLOCK
    if (places >= logits_nV.shape[1]).any():  # so few are finite that what fills the last block is among them
        return logits_nV.topk(width)
    return values, places
