"""The parts of a model that capture needs: the inner model, its blocks, and where the residual stream can be read.

Found from the loaded model, not from a list of architectures. Where a block keeps `resid_post_attn` is found by
arithmetic on a short text: among all that goes in or out of the block's submodules, the tensor c is searched with

    c = x + a * (output of a submodule)       and       out = c + b * (output of a submodule)

x and out being the block's input and output, up to a LayerNorm after either sum (post-LN blocks). Blocks that add
attention and MLP to the same x (parallel blocks) have no such tensor; there `x + attention output` is computed and the
site is marked derived. Element by element the sums must hold to rounding, and must fail without the submodule's output.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tracekit.errors import ModelError
from tracekit.model.families import OFF_INTERFACE, Family

__all__ = ["Anatomy", "ResidRule", "block_input", "block_output", "examine", "find_resid_rule", "is_carried"]

_MAX_MISMATCH = 1e-3
_MIN_CONTRAST = 0.2


class ResidRule(NamedTuple):
    """Where `resid_post_attn` is read in every block."""

    path: str
    """Submodule of the block."""
    side: str
    """`input` or `output` of that submodule, or `derived`: block input plus the submodule's output."""


class Anatomy(NamedTuple):
    """The parts of a model."""

    inner: nn.Module
    """The model without its head: what the whole model calls once."""
    blocks: Sequence[nn.Module]
    """The transformer blocks, first to last."""
    family: Family | None
    """The family's row, where attention does not go through the AttentionInterface."""
    model_type: str
    """transformers' name of the architecture."""


def examine(model: nn.Module, run: Callable[[], object]) -> Anatomy:
    """Find the parts of a model; `run` runs it once, on a short text.

    Raises:
        ModelError: no list of blocks as long as the configuration says, or no inner model.
    """
    from transformers import PreTrainedModel

    config: Any = model.config
    name = type(model).__name__
    num_layers = _num_layers(config.get_text_config())
    if num_layers is None:
        raise ModelError(f"{name}: its configuration does not say how many blocks it has (num_hidden_layers)")
    long_enough = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    watched = {module for blocks in long_enough for module in blocks}
    watched |= {m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model}
    called: list[nn.Module] = []
    with ExitStack() as stack, torch.no_grad():
        for module in watched:
            handle = module.register_forward_hook(lambda module, args, output: called.append(module))
            stack.callback(handle.remove)
        run()
    inner = next((module for module in reversed(called) if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        raise ModelError(f"{name}: no inner model was called; tracekit needs a transformers model with a separate head")
    # a vision tower may have as many blocks; a text does not go through them
    inside, run_through = {*inner.modules()}, {*called}
    lists = [blocks for blocks in long_enough if blocks in inside and run_through.issuperset(blocks)]
    if not lists:
        raise ModelError(f"{name}: found no list of {num_layers} blocks inside {type(inner).__name__}")
    model_type = config.get_text_config().model_type
    return Anatomy(inner, list(lists[0]), OFF_INTERFACE.get(model_type), model_type)


def _num_layers(config: Any) -> int | None:
    """Number of blocks; of the decoder, where the configuration is that of an encoder and a decoder."""
    names = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream in the arguments of a block or submodule."""
    return args[0] if args else kwargs["hidden_states"]


def block_output(output: Any) -> Tensor:
    """The residual stream in the output of a block or submodule."""
    return output[0] if isinstance(output, tuple | list) else output


class _Passed(NamedTuple):
    """A tensor that went into or came out of a submodule."""

    path: str
    side: str
    value: Tensor


def find_resid_rule(anatomy: Anatomy, run: Callable[[], object]) -> ResidRule | None:
    """Where `resid_post_attn` can be read, the same for every block; None where no place proves itself."""
    per_block = _watch(anatomy, run)
    if any(not seen or seen[-1].path != "" for seen in per_block):
        return None
    for rule in _candidates(per_block[0]):
        if all(_proves(seen, rule) for seen in per_block[1:]):
            return rule
    return None


def is_carried(anatomy: Anatomy, rule: ResidRule, run: Callable[[], object]) -> bool:
    """Whether what stands at the rule's place while `run` runs is what every block adds its MLP's output to.

    True by definition of an untouched model; with a changed value there, whether the change is carried on.
    """
    for seen in _watch(anatomy, run):
        shaped = _shaped(seen)
        index = next(i for i, s in enumerate(shaped) if (s.path, s.side) == (rule.path, rule.side))
        if not _adds_to(shaped, index, seen[-1].value):
            return False
    return True


def _watch(anatomy: Anatomy, run: Callable[[], object]) -> list[list[_Passed]]:
    """Block by block, all that goes in or out of its submodules while `run` runs, in order."""
    per_block: list[list[_Passed]] = [[] for _ in anatomy.blocks]
    with ExitStack() as stack, torch.no_grad():
        for block, seen in zip(anatomy.blocks, per_block, strict=True):
            for path, module in block.named_modules():
                hook = partial(_note, seen, path)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        run()
    for seen in per_block:  # what goes into a block may come from another device
        seen[:] = [one._replace(value=one.value.to(seen[-1].value.device)) for one in seen]
    return per_block


def _note(seen: list[_Passed], path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """Keep what went in and came out; cloned, because blocks may add in place afterwards."""
    tensor_in = args[0] if args else kwargs.get("hidden_states")
    tensor_out = block_output(output)
    if isinstance(tensor_in, Tensor):
        seen.append(_Passed(path, "input", tensor_in.detach().clone()))
    if isinstance(tensor_out, Tensor):
        seen.append(_Passed(path, "output", tensor_out.detach().clone()))


def _candidates(seen: list[_Passed]) -> list[ResidRule]:
    """Every place in a block that satisfies both sums, best first: plain reads before derived ones."""
    places = [ResidRule(s.path, s.side) for s in seen if s.path]
    reads = [rule for rule in places if _proves(seen, rule)]
    derived = [ResidRule(rule.path, "derived") for rule in places if rule.side == "output"]
    return reads or [rule for rule in derived if _proves(seen, rule)]


def _proves(seen: list[_Passed], rule: ResidRule) -> bool:
    """Whether one block satisfies the sums at this place."""
    x = _input_of(seen)
    out = seen[-1].value
    shaped = _shaped(seen)
    outputs = [s for s in shaped if s.side == "output"]
    if rule.side == "derived":
        attention = next((s for s in outputs if s.path == rule.path), None)
        if attention is None or "att" not in rule.path.lower():
            return False
        order = next(i for i, s in enumerate(outputs) if s is attention)
        carried = x + attention.value
        lost = x.abs() + attention.value.abs()  # where both cancel, rounding is that of the parts
        return _is_sum(carried, x, [attention]) and _is_sum(out, carried, outputs[order + 1 :], lost=lost)
    place = next((s for s in shaped if s.path == rule.path and s.side == rule.side), None)
    if place is None:
        return False
    index = next(i for i, s in enumerate(shaped) if s is place)
    before = [s for s in shaped[:index] if s.side == "output"]
    sums = [place.value, *_before_norm(shaped, place.value)]
    if not any(_is_sum(c, x, [s for s in before if s.value is not place.value]) for c in sums):
        return False
    return _adds_to(shaped, index, out)


def _input_of(seen: list[_Passed]) -> Tensor:
    return next(s.value for s in seen if s.path == "" and s.side == "input")


def _shaped(seen: list[_Passed]) -> list[_Passed]:
    """What is as large as the block's input, in its shape: some blocks flatten (B, T, D) to (BT, D)."""
    x = _input_of(seen)
    inside = [s for s in seen if s.path and s.value.numel() == x.numel() and s.value.shape[-1] == x.shape[-1]]
    return [s._replace(value=s.value.reshape(x.shape)) for s in inside]


def _adds_to(shaped: list[_Passed], index: int, out: Tensor) -> bool:
    """Whether the block's output is the tensor at `index` plus the output of a later submodule."""
    after = [s for s in shaped[index + 1 :] if s.side == "output"]
    return any(_is_sum(end, shaped[index].value, after) for end in [out, *_before_norm(shaped, out)])


def _before_norm(shaped: list[_Passed], value: Tensor) -> list[Tensor]:
    """Inputs of the LayerNorms whose output is this very tensor."""
    inputs: list[Tensor] = []
    for first, second in pairwise(shaped):
        same = first.path == second.path and (first.side, second.side) == ("input", "output")
        if same and "norm" in first.path.lower() and torch.equal(second.value, value):
            inputs.append(first.value)
    return inputs


def _is_sum(total: Tensor, base: Tensor, terms: list[_Passed], *, lost: Tensor | None = None) -> bool:
    """Whether total = base + scale * term for one of these terms, and not without it; `lost` is rounded away too."""
    difference = (total - base).double()
    scale_of_rounding = (total.abs() + base.abs() + (0 if lost is None else lost)).double()
    eps = torch.finfo(total.dtype).eps * 8

    def mismatch(remainder: Tensor, size: Tensor) -> float:
        return (remainder.abs() > eps * size + 1e-30).double().mean().item()

    if mismatch(difference, scale_of_rounding) < _MIN_CONTRAST:
        return False
    for term in terms:
        value = term.value.double()
        fitted = ((difference * value).sum() / value.square().sum().clamp(min=1e-30)).item()
        for scale in (1.0, fitted):
            if mismatch(difference - scale * value, scale_of_rounding + abs(scale) * value.abs()) <= _MAX_MISMATCH:
                return True
    return False
