"""What a capture says, held against plain transformers by other means than the library's own.

Q, K      log softmax is linear in QK^T: centred by row, log-probabilities are the scores times one number (plus, with
          ALiBi, a slope times the key's position); sinks fall out, soft-caps are applied
V         probabilities times values go into one of the block's maps
resid_post_attn   the block, run by itself with one submodule's output set to 0, puts it out; with a second one set to
          0 it puts out its own input (up to its LayerNorms)
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

__all__ = [
    "BlockRun",
    "carries",
    "explain_attention",
    "mixes_values",
    "relative",
    "watch_blocks",
    "watch_eager_attention",
]

_CLOSE = 2e-4


class BlockRun(NamedTuple):
    """One block's part of a pass."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: Tensor
    """What went in (1, T, D)."""
    out: Tensor
    """What came out (1, T, D)."""
    inputs: list[Tensor]
    """What went into each of its submodules."""


def relative(mine: Any, theirs: Any) -> float:
    """Largest difference divided by the largest value of `theirs`; infinite where shapes differ or values are nan."""
    a, b = (np.asarray(values, dtype=np.float64) for values in (mine, theirs))
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-12))


@contextmanager
def watch_blocks(blocks: Sequence[nn.Module]) -> Iterator[list[BlockRun]]:
    """While open, keeps what goes in and out of each block, in the order of the calls."""
    runs: list[BlockRun] = []
    inside: dict[nn.Module, list[Tensor]] = {block: [] for block in blocks}

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x, out = _stream(args, kwargs), _first(output)
        runs.append(BlockRun(module, *began.pop(module), x, out.detach().clone(), inside[module][:]))
        inside[module].clear()

    began: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        began[module] = (_copied(args), {name: _copied(value) for name, value in kwargs.items()})

    def keep(module: nn.Module, args: Any, *, block: nn.Module) -> None:
        if args and isinstance(args[0], Tensor):
            inside[block].append(args[0].detach().clone())

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after, with_kwargs=True).remove)
            for module in [m for m in block.modules() if m is not block]:
                hook = module.register_forward_pre_hook(lambda m, args, block=block: keep(m, args, block=block))
                stack.callback(hook.remove)
        yield runs


@contextmanager
def watch_eager_attention(blocks: Sequence[nn.Module]) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """While open, keeps the Q, K and V that modules of these blocks hand to their own file's eager attention."""
    inside = {module for block in blocks for module in block.modules()}
    handed: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module in inside:
            handed.append((query.clone(), key.clone(), value.clone()))
        own = sys.modules[type(module).__module__].eager_attention_forward
        return own(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("eager", attend)  # for all: some modeling files have an interface of their own
    try:
        yield handed
    finally:
        del AttentionInterface._global_mapping["eager"]


def explain_attention(query_HTE: Any, key_KTE: Any, probs_HTT: Any, *, cap: float | None, scale: float) -> float:
    """How far attention rows are from what Q and K make of them, as relative error of the centred log-probabilities.

    Head by head; the scale is the same for all heads.
    """
    query, key, probs = (
        torch.as_tensor(np.asarray(part, dtype=np.float64)) for part in (query_HTE, key_KTE, probs_HTT)
    )
    scores = query @ key.repeat_interleave(len(query) // len(key), 0).mT
    if cap is not None:
        scores = torch.tanh(scores * scale / cap)
    visible = probs > 1e-9
    visible &= visible.sum(-1, keepdim=True) > 1
    count = visible.sum(-1, keepdim=True).clamp(min=1)

    def centred(values: Tensor) -> Tensor:
        values = values.where(visible, values.new_zeros(()))
        return (values - values.sum(-1, keepdim=True) / count).where(visible, values.new_zeros(()))

    target, known = centred(probs.clamp(min=1e-30).log()), centred(scores)
    position = centred(torch.arange(probs.shape[-1]).double().expand(probs.shape))
    worst = 0.0
    for head in range(len(target)):
        columns = torch.stack([known[head].flatten(), position[head].flatten()], -1)
        fitted = torch.linalg.lstsq(columns, target[head].flatten()[:, None]).solution
        missed = (columns @ fitted)[:, 0] - target[head].flatten()
        worst = max(worst, (missed.abs().max() / target[head].abs().max().clamp(min=1e-3)).item())
    return worst


def mixes_values(probs_HTT: Any, value_KTE: Any, inputs: Sequence[Tensor]) -> float:
    """How far the nearest of a block's inner inputs is from probabilities times values, heads side by side."""
    value = np.asarray(value_KTE)
    mixed_HTE = np.asarray(probs_HTT) @ value.repeat(len(probs_HTT) // len(value), 0)
    whole = mixed_HTE.swapaxes(0, 1).reshape(mixed_HTE.shape[1], -1)
    same_size = [tensor for tensor in inputs if tensor.numel() == whole.size]
    return min((relative(tensor.reshape(whole.shape), whole) for tensor in same_size), default=float("inf"))


def carries(run: BlockRun, carried: Tensor) -> bool:
    """Whether `carried` (1, T, D) is what the block adds its MLP to, by setting outputs inside the block to 0."""
    norms = [m for path, m in run.block.named_modules() if "norm" in path.lower() and not [*m.children()]]
    names = [path for path, _ in run.block.named_modules() if path]
    ends = [path for path in names if any(_near(end, _outcome(run, [path])) for end in _normed(carried, norms))]
    if not ends or _near(carried, run.x):
        return False
    starts = [*_normed(run.x, norms), *(end for one in _normed(run.x, norms) for end in _normed(one, norms))]
    for end, begin in product(ends, names):
        if any(_near(start, _outcome(run, [end, begin])) for start in starts):
            return True
    return False


def _normed(value: Tensor, norms: Sequence[nn.Module]) -> list[Tensor]:
    """The value, and what each LayerNorm of its width makes of it."""
    fitting = [norm for norm in norms if getattr(getattr(norm, "weight", None), "shape", None) == value.shape[-1:]]
    made = [value]
    for norm in fitting:
        with suppress(RuntimeError, TypeError, ValueError, IndexError):  # some norms take heads, or a gate beside it
            made.append(norm(value))
    return made


def _outcome(run: BlockRun, paths: Sequence[str]) -> Tensor | None:
    """What the block puts out while these submodules put out 0; None where it cannot run so."""

    def silence(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    with ExitStack() as stack:
        for path in paths:
            stack.callback(run.block.get_submodule(path).register_forward_hook(silence).remove)
        try:
            kwargs = {name: _copied(value) for name, value in run.kwargs.items()}
            return _first(run.block(*_copied(run.args), **kwargs))
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None


def _near(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and relative(a, b) < _CLOSE


def _stream(args: Any, kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def _copied(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_copied(part) for part in value)
    return value.detach().clone() if isinstance(value, Tensor) else value
