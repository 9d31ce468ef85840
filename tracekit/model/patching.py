"""Interventions: put directions and stored activations back into a running model.

    with patch(model, "resid_post_mlp", 12, -1, stored, mode="replace"):
        model.generate(...)     # the last prompt position leaves block 12 as `stored`

A patch takes the place of the tensor at a capture site (tracekit.sites), so all that is computed from it changes too.
Positions are counted from the start of the sequence through cached generation: a pass begins where the cache ends when
it reaches the inner model. Keys and values are patched as attention reads them, on every pass; the cache keeps the
model's own, so generating with and without a cache is the same.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from operator import index
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn

from tracekit.errors import ConfigError
from tracekit.model.anatomy import block_output
from tracekit.model.hooks import record, with_output
from tracekit.model.patchable import PROVING, Patchable, find_patchable
from tracekit.model.traced import SiteLayout, TracedModel

__all__ = ["Mode", "Positions", "patch"]

Mode: TypeAlias = Literal["add", "replace", "project_out"]
"""What becomes of a tensor: value added, put in its place, or its direction taken out."""
Positions: TypeAlias = int | Sequence[int] | slice | Literal["all"] | None
"""Which positions of the sequence."""


@contextmanager
def patch(
    model: Any,
    site: str,
    layer: int,
    positions: Positions,
    value: Tensor | np.ndarray,
    *,
    mode: Mode = "replace",
) -> Iterator[None]:
    """While open, every forward pass of `model` goes on with another tensor at `site`.

    `replace` by a stored activation is activation patching (Vig et al. 2020, "Investigating Gender Bias in Language
    Models Using Causal Mediation Analysis", https://arxiv.org/abs/2004.12265; Meng et al. 2022, "Locating and Editing
    Factual Associations in GPT", https://arxiv.org/abs/2202.05262). `add` is steering (Turner et al. 2023,
    https://arxiv.org/abs/2308.10248). `project_out` is directional ablation (Arditi et al. 2024,
    https://arxiv.org/abs/2406.11717): x - (x·v̂)v̂ with v̂ = v/|v|, for Q/K/V head by head, in float32 or wider; a head
    whose row is zero stays as it is.

    Patches nest: the one opened first is applied first, and later ones, and a capture opened inside, see its result.
    `output_hidden_states` and captured `hidden_states` show what is patched in the residual stream, those after a
    `resid_post_attn` from the block's output on. Gradients flow through the model and into `value`. A model's first
    patch at a site runs proofs over a few tokens, without effect on patches already open.

    Args:
        model: a transformers language model, or a `TracedModel`, which needs no further proof at its own sites.
        site: `resid_embed` (layer 0), `resid_pre_attn`, `resid_post_attn`, `resid_post_mlp`, `queries`, `keys`,
            `values`; or `hidden_states`, counted as transformers does: 0 the embeddings, l what leaves block l-1, the
            last what leaves the final norm.
        layer: number of the block, or of the hidden state; negative from the end.
        positions: a position, several, a slice, or None or "all". They are columns of the batch, so padding on the
            left shifts them: pad on the right, or run one prompt at a time. Negative ones, in slices too, count from
            the end of the first pass, the prompt. An open slice and "all" go on through generated tokens.
        value: tensor or array of any dtype: (D,) for every position, (P, D) with a row for each, or (B, P, D). For
            Q/K/V (H, E), (H, P, E) or (B, H, P, E), as stored; keys and values have K heads. P positions are those
            listed; of a slice with an end, those up to there; of an open one, those of the first pass, and no more may
            come. B must be the rows of the pass: batch times beams. For `project_out` only (D,) or (H, E).
        mode: `replace`, `add` or `project_out`.

    Raises:
        ConfigError: an unknown site or mode, no such layer, a value of a wrong shape or not finite, a position before
            the start or given twice; on leaving, passes that reached none of the positions, or not all that were
            listed.
        UnsupportedSiteError: the model cannot be patched at this site.
        ModelError: the model failed its proof.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"unknown mode {mode!r}; expected one of {', '.join(get_args(Mode))}")
    parts = find_patchable(model, site)
    edit = _Edit(parts, site, _checked_layer(site, layer, parts.layout), positions, value, mode)
    with ExitStack() as stack:
        edit.attach(stack, model.model if isinstance(model, TracedModel) else model)
        yield
    edit.check_done()


class _Edit:
    """A patch at work: knows which positions a pass covers, changes them, and remembers which it has changed."""

    def __init__(
        self, parts: Patchable, site: str, layer: int, positions: Positions, value: Tensor | np.ndarray, mode: Mode
    ) -> None:
        self.parts, self.site, self.layer = parts, site, layer
        self.mode: Mode = mode
        self.name = f"{site}, layer {layer}"
        tail = parts.layout.tails[parts.layout.layers.index(layer)]
        self.value = _checked_value(value, self.name, tail, parts.layout.dtype, mode)
        self.has_rows = self.value.dim() > len(tail)
        if not self.has_rows:
            self.value = self.value.unsqueeze(-2)
        self.has_batch = self.value.dim() > len(tail) + 1
        self.positions = _checked_positions(positions)
        self.wanted: Sequence[int] = ()
        self.stop = 0
        self.first_stop: int | None = None
        self.covered: set[int] = set()
        self.shown: Tensor | None = None

    def attach(self, stack: ExitStack, model: Any) -> None:
        """Put hooks on the model until the stack is closed."""
        anatomy, site, layer = self.parts.anatomy, self.site, self.layer
        self.argument_names = [*signature(anatomy.inner.forward).parameters]
        stack.callback(anatomy.inner.register_forward_pre_hook(self.before_pass, with_kwargs=True).remove)
        stack.callback(anatomy.inner.register_forward_hook(self.after_pass).remove)
        if site == "hidden_states" and layer == len(anatomy.blocks):
            assert self.parts.last is not None
            stack.callback(self.parts.last.register_forward_hook(self.after_last).remove)
            return
        if site == "hidden_states":
            site, layer = ("resid_post_mlp", layer - 1) if layer else ("resid_embed", 0)

        def sink(name: str, number: int, x: Tensor) -> Tensor | None:
            return self.change(x) if number == layer else None

        stack.enter_context(record(model, anatomy, (site,), sink, resid_rule=self.parts.resid_rule))

    def before_pass(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Where this pass ends in the sequence; the first pass settles which positions are meant."""
        if PROVING.get():
            return
        given = dict(zip(self.argument_names, args, strict=False)) | kwargs
        tokens = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        cache = given.get("past_key_values")
        self.stop = tokens.shape[1] + (0 if cache is None else int(cache.get_seq_length()))
        self.shown = None
        if self.first_stop is None:
            self.wanted = _resolve(self.positions, self.stop)
            num_rows = self.value.shape[-2]
            num_wanted = sum(p in self.wanted for p in range(self.stop)) if self.is_open else len(self.wanted)
            if self.has_rows and num_rows != num_wanted:
                raise ConfigError(
                    f"{self.name}: a value {tuple(self.value.shape)} has {num_rows} rows for {num_wanted} positions "
                    f"({self.positions}, in a first pass of {self.stop}); give one row for each, or one for all"
                )
            self.first_stop = self.stop

    @property
    def is_open(self) -> bool:
        """Whether positions go on without end."""
        return isinstance(self.wanted, range) and self.wanted.stop == sys.maxsize

    def change(self, x: Tensor) -> Tensor | None:
        """What takes the place of (B, T, D) or (B, H, T, E); None where the pass covers no wanted position."""
        if PROVING.get():
            return None
        start = max(0, self.stop - x.shape[-2])  # keys come with the cache, or as many as a window holds
        hit = [p for p in range(start, min(self.stop, start + x.shape[-2])) if p in self.wanted]
        if not hit:
            return None
        rows = [self.wanted.index(p) for p in hit] if self.has_rows else []
        if rows and max(rows) >= self.value.shape[-2]:
            raise ConfigError(
                f"{self.name}: no row of the value {tuple(self.value.shape)} for position {hit[-1]}; give positions "
                "with an end, or one row for all"
            )
        if self.has_batch and len(self.value) != len(x):
            raise ConfigError(f"{self.name}: a value {tuple(self.value.shape)} for {len(x)} rows (batch times beams)")
        value = self.value.to(x.device)
        columns = torch.tensor(hit, device=x.device) - start
        part = x.index_select(-2, columns)
        value = value.index_select(-2, torch.tensor(rows, device=x.device)) if rows else value
        changed = x.index_copy(-2, columns, _changed(part, value, self.mode))
        self.covered.update(hit)
        self.shown = changed
        return changed

    def after_last(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The last hidden state has no capture site of its own."""
        replacement = self.change(block_output(output))
        return None if replacement is None else with_output(output, replacement)

    def after_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        """Show what was patched in output.hidden_states: transformers takes it down before any hook of ours."""
        number = self.layer + 1 if self.site == "resid_post_mlp" else self.layer
        hidden = getattr(output, "hidden_states", None)
        is_stream = self.site in ("hidden_states", "resid_embed", "resid_pre_attn", "resid_post_mlp")
        if is_stream and hidden and self.shown is not None and number < len(self.parts.anatomy.blocks):
            output["hidden_states"] = (*hidden[:number], self.shown, *hidden[number + 1 :])
        self.shown = None

    def check_done(self) -> None:
        """Passes that changed nothing, or less than was asked for, are an error; no pass at all is none."""
        missing = [] if isinstance(self.wanted, range) else sorted({*self.wanted} - self.covered)
        if self.first_stop is not None and (missing or not self.covered):
            raise ConfigError(
                f"{self.name}: positions {missing or self.positions} were never reached while the patch was open; the "
                f"first pass had {self.first_stop} positions, the last ended at {self.stop}"
            )


def _changed(x: Tensor, value: Tensor, mode: Mode) -> Tensor:
    if mode == "replace":
        return value.to(x.dtype).expand_as(x)
    if mode == "add":
        return x + value.to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    direction = nn.functional.normalize(value.to(wide), dim=-1, eps=torch.finfo(wide).tiny)
    return (x - (x.to(wide) * direction).sum(-1, keepdim=True) * direction).to(x.dtype)


def _checked_layer(site: str, layer: int, layout: SiteLayout) -> int:
    number = layer + layout.layers[-1] + 1 if layer < 0 else layer
    if number not in layout.layers:
        numbers = ", ".join(map(str, layout.layers))
        raise ConfigError(f"{site}, layer {layer}: the model has layers {numbers} there")
    return number


def _checked_positions(positions: Positions) -> list[int] | slice:
    """As a list or a slice."""
    if positions is None or isinstance(positions, str):
        if positions not in (None, "all"):
            raise ConfigError(f'positions {positions!r}; expected a number, several, a slice, "all" or None')
        return slice(None)
    if isinstance(positions, slice):
        if positions.step is not None and positions.step < 1:
            raise ConfigError(f"positions {positions}: a step of {positions.step}; expected 1 or more")
        return positions
    numbers = [index(p) for p in positions] if isinstance(positions, Iterable) else [index(positions)]
    if not numbers:
        raise ConfigError('positions []: none at all; None or "all" stands for every position')
    return numbers


def _resolve(positions: list[int] | slice, length: int) -> Sequence[int]:
    """Positions from the start, negative ones counted back from `length`.

    Raises:
        ConfigError: one lies before the start, or is given twice.
    """
    if isinstance(positions, slice):
        start, stop = positions.start or 0, sys.maxsize if positions.stop is None else positions.stop
        start, stop = (max(0, p + length) if p < 0 else p for p in (start, stop))
        return range(start, max(start, stop), positions.step or 1)
    numbers = [p + length if p < 0 else p for p in positions]
    if min(numbers) < 0 or len({*numbers}) < len(numbers):
        raise ConfigError(
            f"positions {positions}: before the start, or twice the same, in a first pass of {length} positions"
        )
    return numbers


def _checked_value(
    value: Tensor | np.ndarray, name: str, tail: tuple[int, ...], dtype: torch.dtype, mode: Mode
) -> Tensor:
    """As a tensor in the model's dtype, of a shape that fits."""
    # float64 holds every dtype of a dataset, bfloat16 too, which torch.from_numpy does not know
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value, dtype=np.float64))
    *heads, size = map(str, tail)
    lead = ", ".join([*heads, ""]) if heads else ""
    expected = [f"({lead}{size})" if heads else f"({size},)", f"({lead}P, {size})", f"(B, {lead}P, {size})"]
    more = tensor.dim() - len(tail)
    sizes = (*tensor.shape[1 if more == 2 else 0 :][: len(heads)], *tensor.shape[-1:])
    if mode == "project_out":
        expected = expected[:1]
    if not 0 <= more < len(expected) or sizes != tail:
        raise ConfigError(f"{name}: a value of {tuple(tensor.shape)}; expected {' or '.join(expected)} for {mode}")
    if not torch.isfinite(tensor.to(dtype)).all():
        raise ConfigError(f"{name}: the value is not finite in the model's {dtype}")
    if mode == "project_out" and not tensor.any():
        raise ConfigError(f"{name}: the direction to project out is zero")
    return tensor if tensor.is_floating_point() else tensor.to(dtype)
