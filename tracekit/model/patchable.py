"""What of a model can be patched, and the proof of it.

A site can be patched where a tensor put in its place reaches all that is computed from it. The capture sites have
their proof (tracekit.model.proof). `resid_post_attn` is changed, and must then be what the MLP's output is added to;
`hidden_states` must be the tensors of the block sites, and the last of them the output of some module, the final norm.
"""

from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tracekit.errors import ConfigError, UnsupportedSiteError
from tracekit.model.anatomy import Anatomy, ResidRule, block_output, is_carried
from tracekit.model.hooks import record
from tracekit.model.proof import prove
from tracekit.model.traced import Head, SiteLayout, TracedModel
from tracekit.records import ModelInfo
from tracekit.sites import QKV_SITES, RESID_SITES, SITES

__all__ = ["PROVING", "Patchable", "find_patchable"]

_PATCHABLE = ("hidden_states", *RESID_SITES, *QKV_SITES)

PROVING: ContextVar[bool] = ContextVar("tracekit_proving", default=False)
"""True while a model is run for its proof; patches that are open then must keep still."""


class Patchable(NamedTuple):
    """What a patch needs to know of a model at a site."""

    anatomy: Anatomy
    """The model's parts."""
    resid_rule: ResidRule | None
    """Where resid_post_attn is."""
    layout: SiteLayout
    """Layers and shapes of the site."""
    last: nn.Module | None
    """For hidden_states: the module whose output is the last of them, usually the final norm."""


_PROVEN: WeakKeyDictionary[nn.Module, dict[tuple[str, torch.dtype], Patchable]] = WeakKeyDictionary()
"""A proof takes some ten passes over a few tokens; sweeps over layers and positions open a patch for each."""


def _check_site(site: str) -> None:
    if site in SITES and site not in _PATCHABLE:
        raise UnsupportedSiteError(
            f"{site} cannot be patched: the model hands it out beside its computation and does not read it again; "
            f"sites that can: {', '.join(_PATCHABLE)}"
        )
    if site not in SITES:
        raise ConfigError(f"unknown site {site!r}; sites that can be patched: {', '.join(_PATCHABLE)}")


def find_patchable(given: Any, site: str) -> Patchable:
    """What a patch needs to know of a model, or of a TracedModel, at a site; found and proven once.

    Raises:
        ConfigError: an unknown site.
        UnsupportedSiteError: the model cannot be patched at the site.
        ModelError: the model failed its proof.
    """
    _check_site(site)
    model: Any = given.model if isinstance(given, TracedModel) else given
    known = _PROVEN.setdefault(model, {})
    key = (site, model.get_input_embeddings().weight.dtype)
    parts = known.get(key)
    if parts is None or not {parts.anatomy.inner, *parts.anatomy.blocks} <= set(model.modules()):
        training = [module for module in model.modules() if module.training]
        token = PROVING.set(True)
        try:
            parts = known[key] = _prove(given, site)
        finally:
            PROVING.reset(token)
            for module in training:
                module.training = True
    return parts


def _prove(given: Any, site: str) -> Patchable:
    """Refuse what cannot be patched, and prove what can.

    Raises:
        UnsupportedSiteError: the model cannot be patched at the site.
        ModelError: the model failed its proof.
    """
    needs = (site, "resid_embed", "resid_post_mlp") if site == "hidden_states" else (site,)
    traced = given if isinstance(given, TracedModel) else _traced(given, None, "lm")
    model_type = traced.anatomy.model_type
    if site in QKV_SITES and traced.anatomy.family is not None:
        raise UnsupportedSiteError(
            f"{model_type}: {site} cannot be patched: its attention does not go through transformers' "
            "AttentionInterface, so they can be read and not replaced; patch the residual stream"
        )
    if not {*needs} <= {*traced.layouts}:
        traced = _traced(traced.model, traced.tokenizer, traced.head) if traced is given else traced
        prove(traced, needs)
    rule = traced.resid_rule
    if site == "resid_post_attn":
        _prove_post_attn(traced)
    last = _prove_hidden_states(traced) if site == "hidden_states" else None
    return Patchable(traced.anatomy, rule, traced.layouts[site], last)


def _traced(model: Any, tokenizer: Any, head: Head) -> TracedModel:
    """A model on its way to its proof."""
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    quantization = getattr(model.config, "quantization_config", None)
    info = ModelInfo(
        id=model.config.name_or_path or type(model).__name__,
        revision="",
        variant="base",
        adapter=None,
        quantization=None if quantization is None else type(quantization).__name__,
        dtype="float32" if dtype == "float64" else dtype,
        attention="auto",
    )
    return TracedModel(model, tokenizer, info, head=head)


def _prove_post_attn(traced: TracedModel) -> None:
    """A change at the rule's place is carried to the block's output."""
    rule, model_type = traced.resid_rule, traced.anatomy.model_type
    assert rule is not None
    if rule.side == "derived":
        raise UnsupportedSiteError(
            f"{model_type}: resid_post_attn cannot be patched: its blocks add attention and MLP to the same input, so "
            "the sum that is captured never stands in the model; patch resid_pre_attn or resid_post_mlp"
        )

    def nudge(site: str, layer: int, x: Tensor) -> Tensor:
        return x + x.roll(1, -1)

    with torch.no_grad(), record(traced.model, traced.anatomy, ("resid_post_attn",), nudge, resid_rule=rule):
        carried = is_carried(traced.anatomy, rule, lambda: traced.run(traced.probe_ids()))
    if not carried:
        raise UnsupportedSiteError(
            f"{model_type}: resid_post_attn cannot be patched: a change of it is not what the MLP's output is added to"
        )


def _prove_hidden_states(traced: TracedModel) -> nn.Module:
    """hidden_states are the tensors that are patched in their place; the module that gives the last of them."""
    anatomy = traced.anatomy
    seen: dict[int, Tensor] = {}
    inside = {module for block in anatomy.blocks for module in block.modules()} - {anatomy.blocks[-1]}
    outputs: list[tuple[nn.Module, Tensor]] = []

    def sink(site: str, layer: int, x: Tensor) -> None:
        seen[layer + (site == "resid_post_mlp")] = x.clone()

    def note(module: nn.Module, args: Any, output: Any) -> None:
        value = block_output(output)
        if isinstance(value, Tensor):
            outputs.append((module, value.clone()))

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(record(traced.model, anatomy, ("resid_embed", "resid_post_mlp"), sink))
        for module in anatomy.inner.modules():
            if module not in inside:
                stack.callback(module.register_forward_hook(note).remove)
        *earlier, final = traced.run(traced.probe_ids(), output_hidden_states=True).hidden_states
    wrong = [number for number, hidden in enumerate(earlier) if not _equal(hidden, seen[number])]
    last = next((module for module, value in reversed(outputs) if _equal(value, final)), None)
    if wrong or last is None:
        raise UnsupportedSiteError(
            f"{anatomy.model_type}: hidden_states {wrong or [len(earlier)]} cannot be patched: no module gives them as "
            "they are; patch resid_embed, resid_pre_attn or resid_post_mlp"
        )
    return last


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether values are the same, wherever they lie."""
    return torch.equal(a, b.to(a.device))
