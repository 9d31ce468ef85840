"""Damage: weights of a group perturbed in place, to a level, by a seed, and put back bit by bit.

    with Damaged(find_group(model, anatomy, "mlp:4-8")) as damaged:
        stats = damaged.apply("mult_gauss", level=0.1, seed=3)       # from the untouched weights, every time
        ...
        stats = damaged.apply("uni_quant", level=0.05, seed=3)
    # here the weights are bit by bit what they were, also after an exception

What a level means; w is a weight, w' the same when damaged, and level 0 leaves every bit as it is:

    mult_gauss   w' = w (1 + level * e)           e standard normal, drawn for each weight
    ablation     w' = 0 with probability level    decided for each weight, so the share is level on average; 0 to 1
    uni_quant    w' = round(w / d) * d            d = level * max |w| over the piece: the matrix, or the part (q of a
                                                  fused q, k, v; one expert) that is a piece of the group; halves
                                                  are rounded to even

uni_quant at level 1 leaves -max, 0 and max; at 0.05 there are 20 steps to either side, 41 values, 5.4 bits; in general
2 round(1 / level) + 1 values, about log2(2 / level + 1) bits; 1 / 127 = 0.0079 is the symmetric grid of int8. From
level 2 all is zero. It draws nothing, so its seed does not matter.

Arithmetic is in float32 (float64 for float64 weights) on the weights' own device, and its result is rounded to their
dtype. Every piece has a generator of its own, seeded with the seed, the parameter's name and the part. So a weight's
draw depends neither on the other pieces of the group nor on the order, and damaging `attn` is damaging q, k, v and o;
and the draws are the same at every level: with one seed, what is zero at one level of ablation is zero at all higher
ones. The draws are those of torch's generator: the same on every run on a kind of device, not across kinds.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from builders.degradation.methods import METHODS, Method, check_level
from builders.degradation.weight_groups import Group, WeightPiece

__all__ = ["METHODS", "DamageStats", "Damaged", "Method", "check_level"]

_CHUNK = 2**24
"""Weights that are worked on at a time: some 300 MB of temporaries in float32."""


class DamageStats(NamedTuple):
    """What was done to the weights of a group, measured on the weights as they then are."""

    num_weights: int
    """Weights of the group."""
    num_changed: int
    """Weights with another value than before."""
    num_nonfinite: int
    """Weights that are not finite now (mult_gauss beyond the largest float16)."""
    relative_change: float
    """||w' - w|| / ||w||, L2 norms over the whole group; weights that are not finite now are left out of the first."""

    @property
    def share_changed(self) -> float:
        """Share of the weights with another value than before; of ablation, the share that was realised, except that a
        weight that was zero before does not count."""
        return self.num_changed / self.num_weights


class Damaged:
    """The weights of a group for as long as they are damaged.

    While open, a copy of them is kept in CPU memory, pinned where they are on a CUDA device. Leaving restores them.
    Several may be open at once, over groups that share weights too, if the one opened last is left first. For models
    with tied embeddings see `Group.note`.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._kept: list[Tensor] = []

    def __enter__(self) -> "Damaged":
        assert not self._kept, "entered twice"
        self._kept = [_copied(piece.weight) for piece in self._group.pieces]
        return self

    def __exit__(self, *of: object) -> None:
        self.restore()
        self._kept = []

    def apply(self, method: Method, *, level: float, seed: int) -> DamageStats:
        """Restore the weights, then damage them.

        Raises:
            ConfigError: as check_level.
        """
        check_level(level, method=method, at="level")
        self.restore()
        sums = [_damage(piece, method, level, seed) for piece in self._group.pieces]
        changed, nonfinite = sum(s.num_changed for s in sums), sum(s.num_nonfinite for s in sums)
        moved, whole = math.fsum(s.moved for s in sums), math.fsum(s.whole for s in sums)
        relative = math.sqrt(moved / whole) if whole else 0.0
        return DamageStats(self._group.num_weights, changed, nonfinite, relative)

    def restore(self) -> None:
        """Put back every weight of the group, bit by bit."""
        assert self._kept, "not entered"
        with torch.no_grad():
            for piece, kept in zip(self._group.pieces, self._kept, strict=True):
                piece.weight.copy_(kept)


def _copied(weight: Tensor) -> Tensor:
    kept = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=weight.device.type == "cuda")
    return kept.copy_(weight.detach())


class _ChunkSums(NamedTuple):
    """Of one chunk or piece: counts, and squared L2 norms of the change and of the weights before it."""

    num_changed: int
    num_nonfinite: int
    moved: float
    whole: float


def _damage(piece: WeightPiece, method: Method, level: float, seed: int) -> _ChunkSums:
    """Damage one piece, chunk by chunk."""
    generator = torch.Generator(device=piece.weight.device)
    name = f"{seed}\n{piece.path}\n{piece.part}"
    generator.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
    step = 0.0
    with torch.no_grad():
        if method == "uni_quant":
            step = level * max(chunk.abs().amax().item() for chunk in _chunks(piece.weight))
        sums = [_damage_chunk(chunk, method, level, step, generator) for chunk in _chunks(piece.weight)]
    columns = list(zip(*sums, strict=True))
    return _ChunkSums(sum(columns[0]), sum(columns[1]), math.fsum(columns[2]), math.fsum(columns[3]))


def _chunks(weight: Tensor) -> Iterator[Tensor]:
    """Views of at most _CHUNK weights, in order."""
    if weight.numel() <= _CHUNK:
        yield weight
    elif len(weight) == 1:
        yield from _chunks(weight[0])
    else:
        for part in weight.split(max(1, _CHUNK * len(weight) // weight.numel())):
            yield from _chunks(part)


def _damage_chunk(weight: Tensor, method: Method, level: float, step: float, generator: torch.Generator) -> _ChunkSums:
    """Damage a few weights in place; `step` is that of uni_quant."""
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True).contiguous()
    if level > 0:  # at 0, not even the sign of a zero may change
        weight.copy_(_damaged(exact, method, level, step, generator))
    now = weight.to(exact.dtype)
    difference = now - exact
    is_finite = now.isfinite()
    return _ChunkSums(
        int((now != exact).sum().item()),
        exact.numel() - int(is_finite.sum().item()),
        _square_sum(torch.where(is_finite, difference, 0)),
        _square_sum(exact),
    )


def _damaged(exact: Tensor, method: Method, level: float, step: float, generator: torch.Generator) -> Tensor:
    """The new values of some weights; see the module's docstring."""
    match method:
        case "mult_gauss":
            noise = torch.empty_like(exact).normal_(generator=generator)
            return noise.mul_(level).add_(1).mul_(exact)
        case "ablation":
            drawn = torch.empty_like(exact).uniform_(generator=generator)  # in [0, 1)
            return exact.masked_fill(drawn < level, 0)
        case "uni_quant":
            if not math.isfinite(step):
                return torch.zeros_like(exact)
            is_grid = step >= torch.finfo(exact.dtype).tiny  # all weights zero, or a level next to zero: no grid
            return (exact / step).round_().mul_(step) if is_grid else exact


def _square_sum(values: Tensor) -> float:
    """The sum of squares, row by row and then in numpy: the same for any number of threads; scaled against overflow."""
    largest = values.abs().amax().item()
    if largest == 0:
        return 0.0
    return float((values / largest).square().sum(-1).cpu().double().numpy().sum()) * largest**2
