"""A model proves itself before anything of it is captured; captured samples are replayed alone and compared.

On loading, on a short text: shapes at every requested site, recorded tensors equal to transformers' own, attention
rows that sum to one (sink models: at most one), no attention to the future in a causal model, hooks that leave the
logits untouched, sites whose change moves the logits, and a head that gives the same logits row by row.
"""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from itertools import product
from typing import Any, Literal, NamedTuple

import ml_dtypes
import msgspec
import numpy as np
import torch
from torch import Tensor

from tracekit.config import CaptureConfig, DrawConfig
from tracekit.console import say
from tracekit.errors import CaptureError, ModelError, UnsupportedSiteError
from tracekit.format.manifest import SiteError, Verification
from tracekit.model.capture import (
    Text,
    Trace,
    capture,
    head_logits,
    keep_inner_output,
    to_numpy,
)
from tracekit.model.checks import ROW_SUM_TOLERANCE
from tracekit.model.choices import Choices, ChoiceTrace, capture_choices
from tracekit.model.decoding import AnswerTrace, ToAnswer, answer_several, answer_traced
from tracekit.model.early_stop import examine_passes
from tracekit.model.families import NOT_REPEATABLE
from tracekit.model.hooks import check_attention, eager_attention, record, runs_in_sdpa
from tracekit.model.lengths import rope_parameters, windows
from tracekit.model.memory import is_out_of_memory
from tracekit.model.references import LOAD_ERRORS
from tracekit.model.traced import (
    CaptureFrom,
    DecodingRule,
    SiteLayout,
    Tolerance,
    TracedModel,
    is_quantized,
    rounding_of,
    tolerance_of,
)
from tracekit.sites import ATTENTION_SITES, QKV_SITES, RESID_SITES, SITES
from tracekit.storage import unpacked
from tracekit.tensors import TensorSpec, is_companion, positions_of, site_of, unpack_causal

__all__ = ["Scored", "choose_capture", "prove", "prove_decoding", "replay", "replay_scored"]

_PROVEN_WINDOW = 256
"""Longest window, in tokens, beyond which a model's decoding is run to prove it; longer texts would take too long."""
_NUM_PROVEN = 4
"""New tokens of the answers that prove decoding."""


class Scored(NamedTuple):
    """A continuation of a prompt, and the log-probability that was recorded for it."""

    name: str
    """Field of the record."""
    token_ids: list[int]
    """The continuation."""
    logprob: float
    """Its log-probability after the prompt, summed over its tokens, nats."""


class _Reference(NamedTuple):
    """What plain transformers says of a text, in eager mode."""

    logits: Tensor
    hidden_states: Sequence[Tensor]
    attentions: Sequence[Tensor] | None
    """Of the layers that have attention, in their order."""


def prove(traced: TracedModel, sites: Sequence[str]) -> None:
    """Measure what the model gives at `sites` and prove it; fills `layouts`, `is_causal`, `rows_sum_to_one` and
    `order`, sets `is_row_coupled` where padding changes a row, and `length_limit` to 0 where any longer row does.

    Raises:
        UnsupportedSiteError: the architecture cannot give a site.
        ModelError: a proof failed; the message says which.
    """
    ids = traced.probe_ids()
    check_attention(traced.model, traced.anatomy, tuple(sites))
    _check_family(traced)
    before = _plain(traced, ids, attentions="attentions" in sites)
    _check_plain(traced, ids, before)
    _find_causality(traced, ids, before)
    _find_coupling(traced, ids, before)
    _find_length_rule(traced, ids, before)
    if "hidden_states" in sites:
        _check_embeddings(traced, ids, before)
    if "resid_post_attn" in sites:
        traced.find_resid_rule()
    _measure(traced, ids, sites, before)
    for site in sites:
        if site in RESID_SITES or (site in QKV_SITES and traced.anatomy.family is None):
            _prove_that_it_matters(traced, ids, site)
    if traced.head == "lm":
        _prove_head(traced, ids, before)
        if not traced.is_offloaded:  # accelerate would not take the weights back that it brought for a pass
            traced.order = examine_passes(traced.anatomy, partial(traced.run, ids))
    after = _plain(traced, ids, attentions=False)
    if not torch.equal(before.logits, after.logits):
        raise _failed(traced, "the logits changed after the hooks were taken off")


def prove_decoding(traced: TracedModel, *, repeats: bool = True) -> DecodingRule:
    """Measure whether the steps of decoding compute what a pass over the whole text does, at every proven site; once a
    model, into `traced.decoding`. With `repeats` also whether prompts may be read once for several answers.

    Prompts of several lengths are answered together, or where that does not hold, prompts of one length; texts reach
    beyond every window of the model up to `_PROVEN_WINDOW` tokens, and what is longer is the rule's limit.
    """
    known = windows(traced.model.config)
    beyond = [window for window in known if window > _PROVEN_WINDOW]
    limits: list[int] = [*beyond, *([] if traced.length_limit is None else [traced.length_limit])]
    limit = min(limits, default=None)
    lengths = [len(traced.probe_ids()[0]), *(w + n for w in known if w <= _PROVEN_WINDOW for n in (-2, 3))]
    lengths = sorted({n for n in lengths if n > 1 and (limit is None or n + _NUM_PROVEN <= limit)})
    if traced.decoding is None:
        traced.decoding = _decoding_rule(traced, lengths, limit)
    rule = traced.decoding
    if repeats and rule.fault is None and rule.repeats is None:
        traced.decoding = rule._replace(repeats=True)
        faults = (_repeating_fault(traced, length, by_length=rule.by_length) for length in lengths)
        traced.decoding = rule = rule._replace(repeats=not any(faults))
    return rule


def _decoding_rule(traced: TracedModel, lengths: Sequence[int], limit: int | None) -> DecodingRule:
    """What is found with texts of these lengths."""
    rule = DecodingRule(limit=limit)
    if traced.is_row_coupled or not lengths:
        return rule._replace(
            fault="rows of a batch influence one another" if lengths else "its texts are too short to show it"
        )
    can_keep = "attentions" in traced.layouts and runs_in_sdpa(traced.model, traced.anatomy)
    for by_length, keeps_queries in product((False, True), (True, False) if can_keep else (False,)):
        traced.decoding = rule = rule._replace(fault=None, by_length=by_length, keeps_queries=keeps_queries)
        faults = (_decoding_fault(traced, length, by_length=by_length) for length in lengths)
        rule = rule._replace(fault=next(filter(None, faults), None))
        if rule.fault is None:
            break
    return rule


def choose_capture(traced: TracedModel, asked: CaptureFrom, *, repeats: bool = True) -> Literal["decoding", "pass"]:
    """How traces of answers are taken from this model, as `--capture-from` asks; `repeats` as in `prove_decoding`.

    Raises:
        ModelError: `decoding` is asked for, and is not proven.
    """
    fault = None if asked == "pass" else prove_decoding(traced, repeats=repeats).fault
    if fault is not None and asked == "decoding":
        raise ModelError(
            f"--capture-from decoding: {traced.info.id} does not compute in its steps what it does in a pass: {fault}. "
            "Use --capture-from pass, in a folder of its own where this one was begun otherwise"
        )
    if fault is not None:
        say(f"answers are captured in a pass of their own ({fault})")
    return "pass" if asked == "pass" or fault is not None else "decoding"


def _decoding_fault(traced: TracedModel, length: int, *, by_length: bool) -> str | None:
    """What is not in the steps of decoding as it is in a pass, of prompts of up to `length` tokens; None if nothing.

    One is answered alone, and several together: without padding, masks and kernels are others.
    """
    asked, config = _probes(traced, length, by_length=by_length), DrawConfig(num_beams=1, max_new_tokens=_NUM_PROVEN)

    def answer(settings: CaptureConfig) -> list[AnswerTrace]:
        groups = (asked[:1], asked)
        return [one for some in groups for one in answer_traced(traced, some, config, settings, from_decoding=True)]

    return _fault(traced, answer)


def _repeating_fault(traced: TracedModel, length: int, *, by_length: bool) -> str | None:
    """The same of prompts that are read once: for beams, whose answers are read over them, and for several answers."""
    asked = [one for one in _probes(traced, length, by_length=by_length) if len(one.token_ids) > 1]
    beams = DrawConfig(num_beams=2, max_new_tokens=_NUM_PROVEN)
    draws = msgspec.structs.replace(beams, num_beams=1)

    def answer(settings: CaptureConfig) -> list[AnswerTrace]:
        seeds = [[f"proof {n}"] for n in range(len(asked))]
        several = answer_several(traced, asked, seeds, draws, settings, are_traced=True, from_decoding=True)
        groups = (asked[:1], asked)
        searched = [answer_traced(traced, some, beams, settings, from_decoding=True) for some in groups]
        return [one for some in (*several, *searched) for one in some]

    return _fault(traced, answer)


def _probes(traced: TracedModel, length: int, *, by_length: bool) -> list[ToAnswer]:
    """Prompts of up to `length` tokens, of one length or of several."""
    ids = traced.probe_ids()[0].tolist()
    ids = (ids * (1 + length // len(ids)))[:length]
    if by_length:
        return [ToAnswer(ids), ToAnswer(ids[::-1])]
    return [ToAnswer(ids), ToAnswer(ids[: max(1, length // 3)]), ToAnswer(ids[: max(1, 2 * length // 3)])]


def _fault(traced: TracedModel, answer: Callable[[CaptureConfig], list[AnswerTrace]]) -> str | None:
    """What of answers is not as in a lone pass over their texts; None if nothing."""
    settings = CaptureConfig(sites=tuple(traced.layouts) or ("none",))
    try:
        made = answer(settings)
        texts = {tuple(one.text.token_ids): one.text for one in made}
        known = {ids: capture(traced, [text], settings)[0] for ids, text in texts.items()}
        lone = [known[tuple(one.text.token_ids)] for one in made]
    except LOAD_ERRORS as error:
        if is_out_of_memory(error):
            raise
        return " ".join(str(error).split())[:200] or type(error).__name__
    allowed = rounding_of(traced.info)
    for one, alone in zip(made, lone, strict=True):
        pairs = [(name, one.trace.tensors[name], value) for name, value in alone.tensors.items()]
        pairs.append(("token_logprobs", one.trace.next_tokens.logprobs, alone.next_tokens.logprobs))
        for name, mine, reference in pairs:
            error = _compare(name, mine, reference, allowed).max_rel_error
            if not error <= allowed:
                return f"{site_of(name)} is {error:.1g} off a pass over the whole text"
    return None


def _plain(traced: TracedModel, ids: Tensor, *, attentions: bool, **arguments: Tensor) -> _Reference:
    """Plain transformers, eager where the model can switch, one unpadded text (1, T)."""
    with torch.inference_mode(), eager_attention(traced.model, traced.anatomy):
        output = traced.run(ids, output_hidden_states=True, output_attentions=attentions, **arguments)
    given = getattr(output, "attentions", None) if attentions else None
    layers = [layer for layer in given if layer is not None] if given else None
    return _Reference(output.logits, output.hidden_states, layers)


def _check_family(traced: TracedModel) -> None:
    """Families whose eager attention is wrong in transformers itself must not run in it; some cannot be traced."""
    name = traced.anatomy.model_type
    if name in NOT_REPEATABLE:
        raise ModelError(f"{name} ({traced.info.id}) cannot be traced: {NOT_REPEATABLE[name]}")
    family, config = traced.anatomy.family, traced.model.config
    fault = family.eager_fault(config.get_text_config()) if family is not None else None
    if fault is not None and config._attn_implementation == "eager":
        raise _failed(traced, f"in transformers' eager attention {fault}; load it with sdpa attention")


def _check_plain(traced: TracedModel, ids: Tensor, before: _Reference) -> None:
    """Plain transformers gives what can be worked with: finite, one stream, the same whatever the attention."""
    if not torch.isfinite(before.logits).all():
        raise _failed(traced, f"its logits are not finite in {traced.info.dtype}; use another --dtype or checkpoint")
    shapes = {tuple(hidden.shape[:2]) for hidden in before.hidden_states} | {tuple(ids.shape)}
    if len(shapes) > 1 or any(hidden.dim() != 3 for hidden in before.hidden_states):
        raise UnsupportedSiteError(
            f"{traced.anatomy.model_type} ({traced.info.id}): hidden_states are "
            f"{tuple(before.hidden_states[-1].shape)} for a text of {tuple(ids.shape)}; models with several residual "
            "streams are not supported"
        )
    with torch.inference_mode():
        selected = traced.run(ids).logits
    if not _relative(selected, before.logits) <= tolerance_of(traced.info).max_rel_error:
        raise _failed(traced, "its eager attention computes something else than the attention transformers selects")


def _find_causality(traced: TracedModel, ids: Tensor, before: _Reference) -> None:
    """Whether a change of the last token leaves all earlier positions as they are."""
    changed = ids.clone()
    changed[0, -1] = ids[0, 0] if ids[0, 0] != ids[0, -1] else ids[0, 1]
    other = _plain(traced, changed, attentions=False)
    earlier = [hidden[:, :-1] for hidden in (before.hidden_states[-1], other.hidden_states[-1])]
    is_exact = traced.info.dtype == "float32" and not is_quantized(traced.info)
    traced.is_causal = traced.head == "lm" and _relative(*earlier) < (1e-4 if is_exact else 1e-2)
    declared = any(getattr(module, "is_causal", False) for block in traced.anatomy.blocks for module in block.modules())
    if declared and not traced.is_causal:
        int8 = (traced.info.quantization or "").startswith("int8")
        hint = (
            "; int8 with outliers couples a text's positions: try --int8-threshold 0 (llm_int8_threshold in the "
            "config.json of a checkpoint that is stored so), --quantize nf4, or neither"
        )
        raise _failed(traced, "it attends to the future, and declares itself causal" + hint * int8)
    for layer in before.attentions or []:
        slack = ROW_SUM_TOLERANCE[layer.dtype] / (20 if layer.dtype == torch.float32 else 2)
        traced.rows_sum_to_one &= bool(((layer.sum(-1, dtype=torch.float32) - 1).abs() < slack).all())
        if traced.is_causal and layer.triu(1).any():
            raise _failed(traced, "a causal model whose attention is not zero above the diagonal")


def _check_embeddings(traced: TracedModel, ids: Tensor, before: _Reference) -> None:
    """The first hidden state is of the embeddings, each of its own token (or a few neighbours), before any block."""
    changed = ids.clone()
    changed[0, 0] = ids[0, -1] if ids[0, 0] != ids[0, -1] else ids[0, 1]
    other = _plain(traced, changed, attentions=False).hidden_states[0]
    if not torch.equal(other[:, 4:], before.hidden_states[0][:, 4:]):
        raise UnsupportedSiteError(
            f"{traced.anatomy.model_type}: transformers' hidden_states do not begin with the embeddings, so its layers "
            "would be counted wrongly; take --sites resid"
        )


def _find_coupling(traced: TracedModel, ids: Tensor, before: _Reference) -> None:
    """Whether padding changes a row: some convolutions, poolings and Fourier transforms do not know of masks."""
    lengths = [ids.shape[1], ids.shape[1] - 3, ids.shape[1] // 2]
    rows, mask = ids.repeat(len(lengths), 1), torch.ones_like(ids).repeat(len(lengths), 1)
    for row, length in enumerate(lengths):
        rows[row, length:], mask[row, length:] = 0, 0
    with torch.inference_mode(), eager_attention(traced.model, traced.anatomy):
        together = traced.run(rows, mask, output_hidden_states=True).hidden_states[-1]
        alone = [traced.run(ids[:, :n], output_hidden_states=True).hidden_states[-1] for n in lengths[1:]]
    errors = [
        _relative(together[row, :length], hidden[0])
        for row, (length, hidden) in enumerate(zip(lengths, [before.hidden_states[-1], *alone], strict=True))
    ]
    traced.is_row_coupled |= not max(errors) <= rounding_of(traced.info)


def _find_length_rule(traced: TracedModel, ids: Tensor, before: _Reference) -> None:
    """Whether a row changes with the last position of the row beside it, in a model with rotary embeddings.

    That row reaches to the limit that the configuration tells; where it tells none, to twice the last position.
    """
    config: Any = traced.model.config.get_text_config()
    takes_positions = "position_ids" in signature(traced.model.forward).parameters
    known, last = traced.length_limit, getattr(config, "max_position_embeddings", None)
    if not (takes_positions and rope_parameters(config) and last):
        return
    stop = 2 * last if known is None else known
    own = torch.arange(ids.shape[1], device=ids.device)
    if stop < len(own):
        return
    positions = torch.stack([own, own + stop - len(own)])
    with torch.inference_mode(), eager_attention(traced.model, traced.anatomy):
        beside = traced.run(ids.repeat(2, 1), position_ids=positions, output_hidden_states=True).hidden_states[-1]
    if not _relative(beside[0], before.hidden_states[-1][0]) <= rounding_of(traced.info):
        traced.length_limit = 0


def _measure(traced: TracedModel, ids: Tensor, sites: Sequence[str], before: _Reference) -> None:
    """Record every site once: shapes, and equality with what plain transformers hands out."""
    seen: dict[str, dict[int, Tensor]] = {site: {} for site in sites}

    def sink(site: str, layer: int, value: Tensor) -> None:
        if layer in seen[site] and not torch.equal(seen[site][layer], value):
            raise UnsupportedSiteError(
                f"{traced.anatomy.model_type} ({traced.info.id}): {site}, layer {layer}, is handed over twice in a "
                "pass, with other values; there is one place for a layer"
            )
        seen[site][layer] = value.detach().clone()

    hooked = tuple(site for site in sites if SITES[site].source in ("attention", "block"))
    with torch.inference_mode(), record(traced.model, traced.anatomy, hooked, sink, resid_rule=traced.resid_rule):
        output = traced.run(ids)
    if hooked and not _relative(output.logits, before.logits) <= tolerance_of(traced.info).max_rel_error:
        raise _failed(traced, "the logits differ while hooks are attached")
    if "hidden_states" in sites:
        seen["hidden_states"] = dict(enumerate(before.hidden_states))
    silent = [site for site in sites if SITES[site].source != "head" and not seen[site]]
    if silent:
        raise UnsupportedSiteError(
            f"{traced.anatomy.model_type} ({traced.info.id}): nothing arrived from {', '.join(silent)}; its attention "
            "does not go through transformers' AttentionInterface and tracekit/model/families.py has no row for it"
        )
    for site, layers in seen.items():
        if layers:
            traced.layouts[site] = _layout_of(traced, site, layers, ids.shape[1])
    if before.attentions is not None:
        if len(before.attentions) != len(seen["attentions"]):
            counts = (
                f"{len(seen['attentions'])} layers gave attention, output_attentions gives {len(before.attentions)}"
            )
            raise _failed(traced, counts)
        for (layer, mine), theirs in zip(sorted(seen["attentions"].items()), before.attentions, strict=True):
            if not _relative(mine, theirs) <= 1e-5 and not is_quantized(traced.info):
                raise _failed(traced, f"attention of layer {layer} differs from output_attentions=True")
    _check_stream(traced, seen)


def _check_stream(traced: TracedModel, seen: dict[str, dict[int, Tensor]]) -> None:
    """Blocks hand the residual stream on unchanged."""
    for layer, value in seen.get("resid_post_mlp", {}).items():
        following = seen.get("resid_pre_attn", {}).get(layer + 1)
        if following is not None and not torch.equal(value, following.to(value.device)):
            raise _failed(traced, f"resid_post_mlp[{layer}] is not resid_pre_attn[{layer + 1}]")


def _layout_of(traced: TracedModel, site: str, layers: dict[int, Tensor], num_tokens: int) -> SiteLayout:
    """Sizes of a site, layer by layer, each checked against the text's length."""
    order = sorted(layers)
    tails: list[tuple[int, ...]] = []
    for layer in order:
        shape = tuple(layers[layer].shape)
        if site == "attentions":
            expected, tail = (1, shape[1], num_tokens, num_tokens), (shape[1],)
        elif site in ATTENTION_SITES:
            expected, tail = (1, shape[1], num_tokens, shape[-1]), (shape[1], shape[-1])
        else:
            expected, tail = (1, num_tokens, shape[-1]), (shape[-1],)
        if shape != expected:
            raise UnsupportedSiteError(
                f"{traced.anatomy.model_type}: {site}, layer {layer}, is {shape}, expected {expected}"
            )
        tails.append(tail)
    return SiteLayout(tuple(order), tuple(tails), layers[order[0]].dtype)


def _prove_that_it_matters(traced: TracedModel, ids: Tensor, site: str) -> None:
    """Changing a site moves the logits; resid_post_attn has proven itself by arithmetic (see anatomy)."""
    if site == "resid_post_attn":
        return

    def nudge(name: str, layer: int, value: Tensor) -> Tensor:
        # differs by position and by feature: softmax ignores a shift common to all keys, RMSNorm a common scale
        along_T, along_D = (torch.linspace(-1, 1, size, device=value.device) for size in value.shape[-2:])
        return value + (value.abs().mean() * torch.outer(along_T, along_D)).to(value.dtype)

    def watch(name: str, layer: int, value: Tensor) -> None:
        return None

    logits = []
    for sink in (watch, nudge):
        with torch.inference_mode(), record(traced.model, traced.anatomy, (site,), sink, resid_rule=traced.resid_rule):
            logits.append(traced.run(ids).logits)
    if torch.equal(*logits):
        raise _failed(traced, f"changing {site} does not change the logits")


def _prove_head(traced: TracedModel, ids: Tensor, before: _Reference) -> None:
    """The head alone, row by row, gives the model's logits."""
    try:
        with torch.inference_mode(), keep_inner_output(traced.anatomy.inner) as kept:
            traced.run(ids)
        backwards = kept[0].last_hidden_state[0].flip(0)  # a head that looks at other rows gives something else
        rows = torch.cat(list(head_logits(traced, backwards, type(kept[0])))).flip(0)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _failed(traced, f"its head does not run alone, on the last hidden state ({error})") from error
    if not _relative(rows, before.logits[0].float()) <= tolerance_of(traced.info).max_rel_error:
        raise _failed(traced, "its head, run alone, gives other logits")


def _failed(traced: TracedModel, what: str) -> ModelError:
    return ModelError(f"{traced.anatomy.model_type} ({traced.info.id}) did not pass its proof: {what}")


def _relative(a: Tensor, b: Tensor) -> float:
    """Largest difference divided by the largest value of b, wherever the two lie."""
    a = a.to(b.device)
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


def replay(
    traced: TracedModel,
    key: str,
    text: Text | Choices,
    trace: Trace | ChoiceTrace,
    config: CaptureConfig,
) -> Verification:
    """Compare captured tensors with the same text, or each of the options, run alone, unpadded, eager.

    hidden_states and attentions are compared with transformers' own output, every other site with a lone capture.
    Tensors may be in the forms of tracekit.storage; of sparse attention the weights that were kept are compared.
    Where the trace's policy allows values that are not finite (of options it does not), both have to be so in the same
    way; or one alone, where the other is beyond what the stored dtype holds, or within the tolerance of it.

    Raises:
        CaptureError: an error is past the tolerance of the model's dtype.
    """
    if isinstance(text, Choices):
        assert isinstance(trace, ChoiceTrace), type(trace)
        return _replay_choices(traced, key, text, trace, config)
    assert isinstance(trace, Trace), type(trace)
    allow_nonfinite = trace.policy.may_be_nonfinite
    lone = capture(traced, [text], config, policy=trace.policy._replace(may_overflow=allow_nonfinite))[0]
    further = {name: value.to(traced.device) for name, value in text.inputs.items()}
    if text.token_type_ids is not None:
        further["token_type_ids"] = _row(traced, text.token_type_ids)
    plain = _plain(traced, _row(traced, text.token_ids), attentions=_has_attentions(trace), **further)
    is_decoded = traced.decoding is not None and traced.decoding.fault is None
    hint = "--capture-from pass (in a folder of its own), " if is_decoded else ""
    compared = partial(_compared, key, allow_nonfinite=allow_nonfinite, hint=hint)
    result = Verification.nothing()
    for spec in trace.specs:
        site = site_of(spec.name)
        if site == "topk_ids" or is_companion(spec.name):
            continue
        mine, reference = unpacked(spec, trace.tensors), lone.tensors[spec.name]
        if site in ("hidden_states", "attentions"):
            reference = _select(traced, plain, spec)
        if spec.layout == "sparse":
            reference = np.where(mine != 0, reference, np.zeros((), reference.dtype))
        if spec.layout == "causal":
            mine = unpack_causal(mine, positions_of(spec.positions), spec.num_keys)
            reference = _without_future(reference, spec) if allow_nonfinite else reference
        tolerance = tolerance_of(traced.info, spec.dtype, captured_from=trace.captured_from)
        result = result.with_more(compared(site, mine, reference, tolerance, by_layer=bool(spec.layers)))
    for name, mine, reference in _answer_numbers(plain, text, trace):
        tolerance = tolerance_of(traced.info, captured_from=trace.captured_from)
        result = result.with_more(compared(name, mine, reference, tolerance, by_layer=False))
    scored = range(0) if config.numbers == "none" else text.scored
    predicted = plain.logits[0, scored.start : scored.stop].argmax(-1).cpu().numpy()
    own = trace.next_tokens.predicted_ids
    return msgspec.structs.replace(
        result,
        num_replayed=1,
        num_positions=len(predicted),
        num_agreeing=int((predicted == (own if len(own) else lone.next_tokens.predicted_ids)).sum()),
    )


def _without_future(probs: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Attention (L, H, T, keys) with 0 where a future token's is not finite: in a row that is spoilt, all of it is."""
    is_future = np.arange(spec.num_keys) > positions_of(spec.positions)[:, None]
    return np.where(is_future & ~np.isfinite(probs), np.zeros((), probs.dtype), probs)


def replay_scored(
    traced: TracedModel,
    key: str,
    prompt_ids: Sequence[int],
    scored: Sequence[Scored],
) -> Verification:
    """Compare scores of continuations of a prompt with plain transformers, each alone, eager.

    Raises:
        CaptureError: an error is past the tolerance of the model's dtype.
    """
    found: dict[str, tuple[list[float], list[float]]] = {}
    for one in scored:
        ids = [*prompt_ids, *one.token_ids]
        plain = _plain(traced, _row(traced, ids), attentions=False)
        logprobs = plain.logits[0, len(prompt_ids) - 1 : -1].float().log_softmax(-1)
        picked = logprobs.gather(1, torch.tensor(one.token_ids, device=logprobs.device)[:, None])
        mine, reference = found.setdefault(one.name, ([], []))
        mine.append(one.logprob)
        reference.append(picked.double().sum().item())
    result = Verification.nothing()
    for name, (mine, reference) in found.items():
        values = _compared(key, name, np.array(mine), np.array(reference), tolerance_of(traced.info), by_layer=False)
        result = result.with_more(values)
    return result


def _replay_choices(
    traced: TracedModel, key: str, item: Choices, trace: ChoiceTrace, config: CaptureConfig
) -> Verification:
    result = Verification.nothing()
    logits: list[float] = []
    for number, text in enumerate(item.texts):
        lone = capture_choices(traced, [Choices([text])], config)[0]
        extra = {} if text.token_type_ids is None else {"token_type_ids": _row(traced, text.token_type_ids)}
        plain = _plain(traced, _row(traced, text.token_ids), attentions=_has_attentions(trace), **extra)
        logits.append(plain.logits[0, 0].item())
        for spec in trace.specs:
            site = site_of(spec.name)
            if is_companion(spec.name):
                continue
            mine, reference = _choice(unpacked(spec, trace.tensors), spec, number), lone.tensors[spec.name]
            if site in ("hidden_states", "attentions"):
                whole = msgspec.structs.replace(spec, positions=[[0, len(text.token_ids)]])
                reference = _select(traced, plain, whole).reshape(mine.shape)
            tolerance = tolerance_of(traced.info, spec.dtype)
            result = result.with_more(_compared(key, site, mine, reference, tolerance, by_layer=bool(spec.layers)))
    numbers = _compared(key, "choice_logits", trace.logits, np.array(logits), tolerance_of(traced.info), by_layer=False)
    return msgspec.structs.replace(
        result.with_more(numbers),
        num_replayed=1,
        num_positions=1,
        num_agreeing=int(trace.logits.argmax() == np.array(logits).argmax()),
    )


def _choice(array: np.ndarray, spec: TensorSpec, number: int) -> np.ndarray:
    """One option's part of a stored tensor."""
    lengths = np.diff(spec.choice_offsets)
    starts = np.concatenate(([0], np.cumsum(lengths**2 if "S" in spec.axes else lengths)))
    along = spec.axes.index("S" if "S" in spec.axes else "T")
    return array.take(range(starts[number], starts[number + 1]), axis=along)


def _row(traced: TracedModel, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], device=traced.device)


def _has_attentions(trace: Trace | ChoiceTrace) -> bool:
    return any(site_of(spec.name) == "attentions" for spec in trace.specs)


def _answer_numbers(plain: _Reference, text: Text, trace: Trace) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Log-probabilities and entropies of the answer tokens: name, captured, by plain transformers."""
    own = trace.next_tokens
    if not len(own.logprobs):
        return []
    logprobs = plain.logits[0, text.scored.start : -1].float().log_softmax(-1)
    answer = torch.tensor(text.token_ids[text.scored.start + 1 :], device=logprobs.device)
    picked = logprobs.gather(1, answer[:, None])[:, 0]
    entropies = torch.special.entr(logprobs.exp()).sum(-1)
    pairs = (("token_logprobs", own.logprobs, picked), ("token_entropies", own.entropies, entropies))
    return [(name, _bare(mine), _bare(reference.cpu().numpy())) for name, mine, reference in pairs]


def _bare(values: np.ndarray) -> np.ndarray:
    """Values with nan for all that is not finite, as records know it."""
    return np.where(np.isfinite(values), values, np.nan)


def _compared(
    key: str,
    site: str,
    mine: np.ndarray,
    reference: np.ndarray,
    tolerance: Tolerance,
    *,
    by_layer: bool,
    allow_nonfinite: bool = False,
    hint: str = "",
) -> Verification:
    """The largest errors, layer by layer: a layer is held against its own values, not against the largest of all.
    `hint` says what else may be tried.

    Raises:
        CaptureError: an error is past the tolerance.
    """
    result = Verification.nothing()
    for a, b in zip(mine, reference, strict=True) if by_layer else [(mine, reference)]:
        error = _compare(site, a, b, tolerance.max_rel_error, allow_nonfinite=allow_nonfinite)
        _check_error(key, error, tolerance, hint)
        result = result.with_more(Verification(num_replayed=0, num_positions=0, num_agreeing=0, sites=[error]))
    return result


def _check_error(key: str, error: SiteError, tolerance: Tolerance, hint: str) -> None:
    if not (error.max_rel_error <= tolerance.max_rel_error and error.min_cosine >= tolerance.min_cosine):
        raise CaptureError(
            f"sample {key}: {error.site} differs from a lone eager run by {error.max_abs_error:g} (relative "
            f"{error.max_rel_error:g}, cosine {error.min_cosine:.6f}); tolerance {tolerance.max_rel_error:g} and "
            f"{tolerance.min_cosine}. Its batch was not written. Try {hint}--batch-size 1 or --dtype float32"
        )


def _select(traced: TracedModel, plain: _Reference, spec: TensorSpec) -> np.ndarray:
    """The stored layers and positions of plain transformers' output."""
    positions = torch.from_numpy(positions_of(spec.positions))
    if spec.name.startswith("hidden_states"):
        chosen = [plain.hidden_states[layer][0].cpu()[positions] for layer in spec.layers]
    else:
        assert plain.attentions is not None
        order = traced.layouts["attentions"].layers
        chosen = [plain.attentions[order.index(layer)][0].cpu()[:, positions] for layer in spec.layers]
    return to_numpy(torch.stack(chosen))


def _overflowed_alike(a: np.ndarray, b: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """The same values, inf in both where it is in one and the other is beyond the limit, to the same side."""
    both = (np.isinf(a) | np.isinf(b)) & (np.abs(a) >= limit) & (np.abs(b) >= limit) & (np.sign(a) == np.sign(b))
    return np.where(both, np.copysign(np.inf, a), a), np.where(both, np.copysign(np.inf, b), b)


def _compare(
    site: str, mine: np.ndarray, reference: np.ndarray, tolerance: float, *, allow_nonfinite: bool = False
) -> SiteError:
    """The errors of a site. Where it is allowed, nan, inf and -inf are equal to themselves, inf to a value at the limit
    of the stored dtype, and infinitely far from all else; the rest is measured."""
    a, b = mine.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    if allow_nonfinite:
        a, b = _overflowed_alike(a, b, (1 - tolerance) * float(ml_dtypes.finfo(mine.dtype).max))
        kinds = [np.where(np.isfinite(values), 0.0, values) for values in (a, b)]
        if not np.array_equal(*kinds, equal_nan=True):
            inf = float("inf")
            return SiteError(site=site, max_abs_error=inf, max_rel_error=inf, min_cosine=0.0, tolerance=tolerance)
        a, b = a[np.isfinite(a)], b[np.isfinite(b)]
    if a.size == 0:
        return SiteError(site=site, max_abs_error=0.0, max_rel_error=0.0, min_cosine=1.0, tolerance=tolerance)
    largest = float(np.abs(a - b).max())
    norms = float(np.sqrt(np.square(a).sum()) * np.sqrt(np.square(b).sum()))
    return SiteError(
        site=site,
        max_abs_error=largest,
        max_rel_error=largest / max(float(np.abs(b).max()), 1e-12),
        min_cosine=min(float((a * b).sum()) / norms, 1.0) if norms else 1.0,  # not a @ b: BLAS sums by its threads
        tolerance=tolerance,
    )
