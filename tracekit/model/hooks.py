"""Hooks: attach at sites, hand over every tensor as it appears, always detach.

    with record(model, anatomy, sites, sink, resid_rule=rule):
        model(...)            # sink(site, layer, tensor) is called while the model runs

Attention is read in functions registered with transformers' `AttentionInterface`, each with the mask function of the
implementation that it calls. One calls the model's own `eager_attention_forward`, so soft-caps, sinks, sliding
windows and grouped heads are right by construction; the other calls sdpa, for Q/K/V without probabilities. Layers are
told apart by the module's `layer_idx`, or by the block that runs, never by the order of calls. The tensors handed over
belong to the model: a sink copies what it keeps. A sink may also return a changed tensor, which then takes the
original's place: at the block sites (`resid_post_attn` not where it is derived), and for queries, keys and values that
go through the AttentionInterface.

Several may be open at once. The one opened first is called first, and later ones see what it has put there.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tracekit.errors import ModelError, UnsupportedSiteError
from tracekit.model.anatomy import Anatomy, ResidRule, block_input, block_output
from tracekit.model.families import COMPARES_NAMES, QueryKeyValue
from tracekit.sites import ATTENTION_SITES, QKV_SITES

__all__ = [
    "EAGER",
    "SDPA",
    "AttentionCall",
    "Sink",
    "check_attention",
    "eager_attention",
    "record",
    "runs_in_sdpa",
    "with_output",
]

Sink = Callable[[str, int, Tensor], Tensor | None]
"""Receives (site, layer, tensor with the batch first); may return a tensor to take its place."""

EAGER = "tracekit_eager"
SDPA = "tracekit_sdpa"

_ACTIVE: ContextVar[Callable[..., QueryKeyValue] | None] = ContextVar("tracekit_sink", default=None)
_PROBABILITIES: ContextVar[Callable[[nn.Module, Tensor], None] | None] = ContextVar("tracekit_probs", default=None)
_CALLS: ContextVar[Callable[[nn.Module, "AttentionCall"], None] | None] = ContextVar("tracekit_calls", default=None)


class AttentionCall(NamedTuple):
    """What an attention function is called with."""

    module: nn.Module
    query: Tensor
    """(B, H, q, E)"""
    key: Tensor
    """(B, K, k, E)"""
    value: Tensor
    """(B, K, k, E)"""
    mask: Tensor | None
    """(B, 1, q, k), bool, or float to be added; None where the queries, the last of the keys, see all before them."""
    arguments: dict[str, Any]
    """All others, such as `scaling`."""

    def probabilities(self) -> Tensor:
        """Attention probabilities (B, H, q, k), by the model's own eager function.

        Raises: as `own_eager_attention`.
        """
        value = self.value[..., :1]  # the product with it is not wanted
        call = own_eager_attention(self.module)
        return call(self.module, self.query, self.key, value, self.mask, **self.arguments)[1]


def own_eager_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """The eager attention function of the module's own modeling file.

    Raises:
        ModelError: the file defines none.
    """
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise ModelError(f"{type(module).__name__}: its modeling file defines no eager_attention_forward")
    return function


def _eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    query, key, value = _hand_over(module, query, key, value)
    output, probabilities = own_eager_attention(module)(module, query, key, value, attention_mask, **kwargs)
    sink = _PROBABILITIES.get()
    if sink is not None:
        sink(module, probabilities)
    return output, probabilities


def _sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    query, key, value = _hand_over(module, query, key, value)
    sink = _CALLS.get()
    if sink is not None:
        sink(module, AttentionCall(module, query, key, value, attention_mask, kwargs))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _hand_over(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> QueryKeyValue:
    sink = _ACTIVE.get()
    return QueryKeyValue(query, key, value) if sink is None else sink(module, query, key, value)


AttentionInterface.register(EAGER, _eager)
AttentionInterface.register(SDPA, _sdpa)
AttentionMaskInterface.register(EAGER, eager_mask)
AttentionMaskInterface.register(SDPA, sdpa_mask)


@contextmanager
def record(
    model: Any,
    anatomy: Anatomy,
    sites: tuple[str, ...],
    sink: Sink,
    *,
    resid_rule: ResidRule | None = None,
    calls: Callable[[int, AttentionCall], None] | None = None,
) -> Iterator[None]:
    """While open, every forward pass of `model` hands the tensors of `sites` to `sink`, layer by layer.

    `calls` is given what sdpa attention is called with, layer by layer, of a model that `runs_in_sdpa`.

    `hidden_states` and the top-k sites come from the model's output and are not handed over here.

    Raises:
        UnsupportedSiteError: the architecture cannot give a site.
    """
    with ExitStack() as stack:
        if set(sites) & set(ATTENTION_SITES) or calls is not None:
            if anatomy.family is None:
                stack.enter_context(_attention_interface(model, anatomy, sites, sink, calls))
            else:
                _attach_attention_modules(stack, model, anatomy, sites, sink)
        _attach_blocks(stack, anatomy, sites, sink, resid_rule)
        yield


def runs_in_sdpa(model: Any, anatomy: Anatomy) -> bool:
    """Whether the attention of a model is transformers' sdpa, through the AttentionInterface."""
    return anatomy.family is None and model.config._attn_implementation in ("sdpa", SDPA)


@contextmanager
def _attention_interface(
    model: Any,
    anatomy: Anatomy,
    sites: tuple[str, ...],
    sink: Sink,
    calls: Callable[[int, AttentionCall], None] | None,
) -> Iterator[None]:
    """Switch the model to a recording attention implementation, and back."""
    number_of = {block: number for number, block in enumerate(anatomy.blocks)}
    inside = {module for block in anatomy.blocks for module in block.modules()}
    running: list[int] = [0]
    wants_probabilities = "attentions" in sites
    sdpa_is_safe = runs_in_sdpa(model, anatomy) and not wants_probabilities
    wanted_qkv = set(sites) & set(QKV_SITES)
    own = inside  # a vision tower attends too, and another model may run meanwhile
    outer, outer_probabilities, outer_calls = _ACTIVE.get(), _PROBABILITIES.get(), _CALLS.get()

    def take(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> QueryKeyValue:
        qkv = QueryKeyValue(query, key, value) if outer is None else outer(module, query, key, value)
        return _offer(sink, sites, _layer_of(module, running[0]), qkv) if wanted_qkv and module in own else qkv

    def take_probabilities(module: nn.Module, probabilities: Tensor) -> None:
        if outer_probabilities is not None:
            outer_probabilities(module, probabilities)
        if wants_probabilities and module in own:
            sink("attentions", _layer_of(module, running[0]), probabilities)

    def take_call(module: nn.Module, call: AttentionCall) -> None:
        if outer_calls is not None:
            outer_calls(module, call)
        if calls is not None and module in own:
            calls(_layer_of(module, running[0]), call)

    def enter(block: nn.Module, args: Any) -> None:
        running[0] = number_of[block]

    with ExitStack() as stack:
        for block in anatomy.blocks:
            stack.callback(block.register_forward_pre_hook(enter).remove)
        stack.callback(_ACTIVE.reset, _ACTIVE.set(take))
        stack.callback(_PROBABILITIES.reset, _PROBABILITIES.set(take_probabilities))
        stack.callback(_CALLS.reset, _CALLS.set(take_call))
        if anatomy.model_type in COMPARES_NAMES:
            name, function = ("sdpa", _sdpa) if sdpa_is_safe else ("eager", _eager)
            stack.enter_context(_under_its_name(name, function))
        else:
            name = SDPA if sdpa_is_safe else EAGER
        stack.enter_context(_switched(model, anatomy, name))
        yield


@contextmanager
def _under_its_name(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Stand in for one of transformers' own implementations; other models' calls are handed on as they are."""
    before = ALL_ATTENTION_FUNCTIONS.get(name)
    if before is function:  # several are open
        yield
        return
    ALL_ATTENTION_FUNCTIONS[name] = function
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


@contextmanager
def _switched(model: Any, anatomy: Anatomy, implementation: str) -> Iterator[None]:
    """While open, the blocks, and what they are part of, compute attention in one implementation.

    Other towers keep their own: they need not be able to switch, and an audio tower may have no sdpa.
    """
    first = anatomy.blocks[0]
    around = [m for m in model.modules() if isinstance(m, PreTrainedModel) and any(n is first for n in m.modules())]
    configs: list[Any] = [part.config for part in around if part._can_set_attn_implementation()]
    if configs:
        own = (getattr(module, "config", None) for block in anatomy.blocks for module in block.modules())
        configs += [config for config in own if isinstance(config, PreTrainedConfig)]
    before = [(config, config._attn_implementation) for config in {id(config): config for config in configs}.values()]
    try:
        for config, _ in before:
            config._attn_implementation_internal = implementation  # the property would set it in other towers, too
        yield
    finally:
        for config, own in before:
            config._attn_implementation_internal = own


@contextmanager
def eager_attention(model: Any, anatomy: Anatomy) -> Iterator[None]:
    """While open, the model computes attention in transformers' eager mode, where it can switch to it."""
    switch = anatomy.family is None and model.config._attn_implementation != "eager"
    with _switched(model, anatomy, "eager") if switch else nullcontext():
        yield


def check_attention(model: Any, anatomy: Anatomy, sites: tuple[str, ...]) -> None:
    """Refuse what a family that does not use the AttentionInterface cannot give.

    Raises:
        UnsupportedSiteError: probabilities that transformers itself computes wrongly.
        ModelError: probabilities are asked for, and the model was not loaded with eager attention.
    """
    family = anatomy.family
    if family is None:
        return
    fault = family.eager_fault(model.config.get_text_config())
    if "attentions" in sites and fault is not None:
        raise UnsupportedSiteError(
            f"{anatomy.model_type} gives no attentions: in transformers' eager attention {fault}; it gives all else"
        )
    if "attentions" in sites and model.config._attn_implementation != "eager":
        raise ModelError(
            f"{anatomy.model_type} was loaded with {model.config._attn_implementation} attention, which returns no "
            'probabilities; load it with attn_implementation="eager"'
        )


def _attach_attention_modules(
    stack: ExitStack, model: Any, anatomy: Anatomy, sites: tuple[str, ...], sink: Sink
) -> None:
    """Hooks on the attention modules of a family that does not use the AttentionInterface."""
    family = anatomy.family
    assert family is not None
    check_attention(model, anatomy, sites)
    for layer, block in enumerate(anatomy.blocks):
        module = block.get_submodule(family.attention)
        kept: list[list[Tensor]] = [[] for _ in family.projections]
        for path, outputs in zip(family.projections, kept, strict=True):
            projection = module.get_submodule(path)
            stack.callback(projection.register_forward_hook(partial(_keep_first, outputs)).remove)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any, layer: int = layer, kept: Any = kept) -> None:
            if set(sites) & set(QKV_SITES):
                named = {**dict(zip(signature(module.forward).parameters, args, strict=False)), **kwargs}
                _offer(sink, sites, layer, family.split(module, [outputs[0] for outputs in kept], named))
            for outputs in kept:
                outputs.clear()
            if "attentions" in sites:
                sink("attentions", layer, output[family.place])

        stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        if "attentions" in sites:
            stack.callback(module.register_forward_pre_hook(_ask_for_attention, with_kwargs=True).remove)


def _ask_for_attention(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    names = [*signature(module.forward).parameters]
    place = names.index("output_attentions") if "output_attentions" in names else len(args)
    if place < len(args):  # some callers pass it by position
        return (*args[:place], True, *args[place + 1 :]), kwargs
    return args, {**kwargs, "output_attentions": True}


def _keep_first(kept: list[Tensor], module: nn.Module, args: Any, output: Tensor) -> None:
    """DeBERTa runs the same projections a second time, over its relative positions."""
    if not kept:
        kept.append(output)


def _attach_blocks(
    stack: ExitStack, anatomy: Anatomy, sites: tuple[str, ...], sink: Sink, rule: ResidRule | None
) -> None:
    """Hooks on the blocks, for the residual stream."""
    if "resid_post_attn" in sites and rule is None:
        raise UnsupportedSiteError(f"{anatomy.model_type}: no place in its blocks proves to be resid_post_attn")

    def before(layer: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = block_input(args, kwargs)
        names = ["resid_embed"] * (layer == 0) + ["resid_pre_attn"]
        changed = [sink(name, layer, x) for name in names if name in sites]
        replacement = next((tensor for tensor in changed if tensor is not None), None)
        if replacement is None:
            return None
        return ((replacement, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": replacement})

    def after(layer: int, module: nn.Module, args: Any, output: Any) -> Any:
        replacement = sink("resid_post_mlp", layer, block_output(output))
        return None if replacement is None else with_output(output, replacement)

    for layer, block in enumerate(anatomy.blocks):
        if "resid_embed" in sites or "resid_pre_attn" in sites:
            stack.callback(block.register_forward_pre_hook(partial(before, layer), with_kwargs=True).remove)
        if "resid_post_mlp" in sites:
            stack.callback(block.register_forward_hook(partial(after, layer)).remove)
        if "resid_post_attn" in sites:
            assert rule is not None
            _attach_post_attn(stack, block, layer, sink, rule)


def with_output(output: Any, replacement: Tensor) -> Any:
    """The output of a block or submodule with another residual stream in it."""
    if not isinstance(output, tuple | list):
        return replacement
    parts = [replacement, *output[1:]]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)


def _attach_post_attn(stack: ExitStack, block: nn.Module, layer: int, sink: Sink, rule: ResidRule) -> None:
    """Read the rule's place; blocks that flatten (B, T, D) to (BT, D) get their shape back."""
    module = block.get_submodule(rule.path)
    x: list[Tensor] = []

    def keep_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        x[:] = [block_input(args, kwargs)]

    def read_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        value = block_input(args, kwargs)
        replacement = sink("resid_post_attn", layer, value.reshape(x[0].shape))
        if replacement is not None:  # in place: the block holds the same tensor, to add the MLP's output to it
            value.copy_(replacement.reshape(value.shape))

    def read_output(module: nn.Module, args: Any, output: Any) -> Any:
        value = block_output(output)
        shaped = value.reshape(x[0].shape)
        carried = x[0].to(shaped.device) + shaped if rule.side == "derived" else shaped  # x may come from another
        replacement = sink("resid_post_attn", layer, carried)
        if replacement is None or rule.side == "derived":
            return None
        return with_output(output, replacement.reshape(value.shape))

    stack.callback(block.register_forward_pre_hook(keep_input, with_kwargs=True).remove)
    if rule.side == "input":
        stack.callback(module.register_forward_pre_hook(read_input, with_kwargs=True).remove)
    else:
        stack.callback(module.register_forward_hook(read_output).remove)


def _offer(sink: Sink, sites: tuple[str, ...], layer: int, qkv: QueryKeyValue) -> QueryKeyValue:
    """Hand Q, K and V to the sink, and take what it puts in their place."""
    parts = []
    for site, tensor in zip(QKV_SITES, qkv, strict=True):
        replacement = sink(site, layer, tensor) if site in sites else None
        parts.append(tensor if replacement is None else replacement)
    return QueryKeyValue(*parts)


def _layer_of(module: nn.Module, running: int) -> int:
    """The module's own number, or that of the block which runs: modules that blocks share have none, or -1."""
    layer = getattr(module, "layer_idx", None)
    return running if layer is None or int(layer) < 0 else int(layer)
