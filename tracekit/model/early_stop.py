"""Early stop: a pass ends before the first block that nothing waits for.

    with early_stop(anatomy, sink, is_done):
        model(...)            # sink("hidden_states", layer, tensor), the input of each block that is reached

Where the head is not wanted, and only some layers are, nothing needs the blocks that follow. The pass ends by an
exception in a hook, which is caught here: every context around it closes as after a whole pass. What was handed over
until then is what a whole pass hands over, bit by bit.

It relies on two facts, which `examine_passes` measures when a model is loaded. The blocks run one after the other, each
once. Hidden state l is what goes into block l; where it is not, hidden states are taken from a whole pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tracekit.model.anatomy import Anatomy, block_input

__all__ = ["PassOrder", "early_stop", "examine_passes"]


class PassOrder(NamedTuple):
    """What a pass of a model is like, as far as an early stop relies on it."""

    can_stop: bool = False
    """Whether the blocks run one after the other, each once, and a pass may end between two of them."""
    inputs_are_hidden: bool = False
    """Whether hidden state l of transformers is what goes into block l, for all blocks."""


class _Stop(Exception):  # noqa: N818 - nothing is wrong
    """The rest of the pass is not needed."""


@contextmanager
def early_stop(
    anatomy: Anatomy, sink: Callable[[str, int, Tensor], object], is_done: Callable[[], bool]
) -> Iterator[None]:
    """While open, blocks hand their input to `sink` as hidden states, and a pass ends before the first block that
    begins when `is_done`. To be opened after the hooks that hand over everything else."""

    def before(layer: int, block: nn.Module, args: Any, kwargs: Any) -> None:
        sink("hidden_states", layer, block_input(args, kwargs))
        if is_done():
            raise _Stop

    with ExitStack() as stack:
        for layer, block in enumerate(anatomy.blocks):
            stack.callback(block.register_forward_pre_hook(partial(before, layer), with_kwargs=True).remove)
        try:
            yield
        except _Stop:
            return


def examine_passes(anatomy: Anatomy, run: Callable[..., Any]) -> PassOrder:
    """Run a short text whole, and once more up to its middle. `run` runs it, and takes `output_hidden_states`."""
    num_blocks = len(anatomy.blocks)
    half = num_blocks // 2 + 1
    try:
        with torch.inference_mode():
            inputs, output = _inputs(anatomy, partial(run, output_hidden_states=True), num_blocks + 1)
            first, _ = _inputs(anatomy, run, half)
    except (KeyError, IndexError):  # a block that takes its input under another name
        return PassOrder()
    are_in_order = [layer for layer, _ in inputs] == [*range(num_blocks)] and len(first) == half
    if not are_in_order or not all(_is_same(a, b) for (_, a), (_, b) in zip(first, inputs, strict=False)):
        return PassOrder()
    hidden: Sequence[Any] = output.hidden_states
    are_hidden = len(hidden) == num_blocks + 1 and all(_is_same(value, hidden[layer]) for layer, value in inputs)
    return PassOrder(can_stop=True, inputs_are_hidden=are_hidden)


def _inputs(anatomy: Anatomy, run: Callable[[], Any], most: int) -> tuple[list[tuple[int, Any]], Any]:
    """The blocks that run and what goes into each, in their order, until there are so many; and the output, if any."""
    seen: list[tuple[int, Any]] = []
    output = None

    def keep(site: str, layer: int, value: Any) -> None:
        seen.append((layer, value.detach().clone() if isinstance(value, Tensor) else None))

    with early_stop(anatomy, keep, lambda: len(seen) == most):
        output = run()
    return seen, output


def _is_same(mine: Any, other: Any) -> bool:
    return isinstance(mine, Tensor) and isinstance(other, Tensor) and torch.equal(mine, other.to(mine.device))
