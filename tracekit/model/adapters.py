"""Adapters: what peft trained beside a model, made part of the model that is traced, and proven to be.

    adapter_config.json, adapter_model.safetensors      every key fits the model, and every one of the model's is there
    rows for tokens that were added                     the embedding table grows to hold them
    tokenizer files, a chat template                    used in place of the model's own

The traced model is the one inside peft's wrapper. An adapter that works in the wrapper alone (prompt tuning, prefix
tuning, activated LoRA) never reaches it. So both models run on loading and have to agree, whatever the adapter's type.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from tracekit.config import ModelConfig
from tracekit.console import say
from tracekit.errors import ModelError
from tracekit.model.memory import is_out_of_memory
from tracekit.model.placement import input_device
from tracekit.model.references import LOAD_ERRORS, Reference, load_error, resolve
from tracekit.model.traced import probe_tokens, tolerance_of
from tracekit.records import ModelInfo

__all__ = ["adapter_file", "adapter_name", "may_add_rows", "with_adapter"]

_ADAPTER = "default"
_MAX_NAMED = 32
"""Most token ids that a probe takes from an adapter's configuration."""
_MAX_SHARE = 0.01
"""How far the traced model may lie from the wrapped one, as a share of what the adapter changes."""


def adapter_name(config: ModelConfig) -> str:
    """Adapter and revision, and whether its weights are part of the model's."""
    assert config.adapter is not None
    adapter = resolve(config.adapter, is_adapter=True)
    revision = adapter.revision or adapter.arguments.get("revision", "main")
    return f"{adapter.id}@{revision}" + " (merged)" * config.merge_adapter


def adapter_file(adapter: Reference, name: str) -> Path | None:
    """A file that lies beside an adapter's weights, here or on the Hub; None where there is none."""
    found = cached_file(
        adapter.path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **adapter.arguments,
    )
    return None if found is None else Path(found)


def may_add_rows(adapter: Reference, num_rows: int) -> bool:
    """Whether an adapter brings a matrix that may be an embedding table of more rows than the model's."""
    return any(value.dim() == 2 and value.shape[0] > num_rows for value in _stored(adapter).values())


def with_adapter(
    model: Any, config: ModelConfig, info: ModelInfo, tokenizer: Any, run: Callable[[Any, Tensor], Tensor]
) -> Any:
    """The model with its adapter active inside it, or merged. `run` gives the logits of a model for ids (1, T).

    Raises:
        ModelError: its keys or shapes are not the model's; it changes nothing; it works in peft's wrapper alone; or it
            lacks rows for tokens that it was trained with.
    """
    with warnings.catch_warnings():  # peft warns of tying, biases, names: what matters is checked here
        warnings.simplefilter("ignore")
        return _with_adapter(model, config, info, tokenizer, run)


def _with_adapter(
    model: Any, config: ModelConfig, info: ModelInfo, tokenizer: Any, run: Callable[[Any, Tensor], Tensor]
) -> Any:
    from peft import PeftConfig

    assert config.adapter is not None
    reference = resolve(config.adapter, is_adapter=True)
    try:
        settings: Any = PeftConfig.from_pretrained(reference.path, **reference.arguments)
    except LOAD_ERRORS as error:
        raise load_error("adapter", config.adapter, error) from error
    kind = getattr(settings.peft_type, "value", str(settings.peft_type))
    is_activated = bool(getattr(settings, "alora_invocation_tokens", None))
    name = f"adapter {config.adapter!r} ({kind}{', activated' * is_activated})"
    if settings.is_prompt_learning:
        raise _works_outside(name)
    stored = _stored(reference)
    _check_finite(stored, name)
    _say_other_base(settings, config, name)
    num_rows = _rows(model)
    _resize(model, stored, name)
    wrapped = _wrapped(model, reference, stored, name)
    ids = _probe(settings, tokenizer, num_rows, _rows(wrapped.get_base_model()), input_device(model))
    seen = _Seen.of(wrapped, ids, run, name)
    _check_effect(wrapped, seen, name)
    inner = wrapped.get_base_model()
    try:
        is_inside = seen.agrees(run(inner, ids), _MAX_SHARE * seen.effect)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _works_outside(name) from error
    if not is_inside:
        raise _works_outside(name)
    if not config.merge_adapter:
        return inner
    merged = _merged(wrapped, name)
    if not seen.agrees(run(merged, ids), tolerance_of(info).max_rel_error * float(seen.active.abs().max())):
        raise ModelError(
            f"{name}: merged into the weights it gives other logits than beside them. Leave --merge-adapter out"
        )
    return merged


class _Seen(NamedTuple):
    """What peft's own model says of a text."""

    active: Tensor
    """Logits with the adapter."""
    effect: float
    """Largest change of a logit by the adapter."""
    noise: float
    """Largest change of a logit from one run to the next."""

    @classmethod
    def of(cls, wrapped: Any, ids: Tensor, run: Callable[[Any, Tensor], Tensor], name: str) -> "_Seen":
        """Run a wrapped model with its adapter, twice, and without.

        Raises:
            ModelError: it does not run on ids alone, gives logits of other positions, or none that are finite.
        """
        try:
            active, again = run(wrapped, ids), run(wrapped, ids)
            with wrapped.disable_adapter():
                bare = run(wrapped, ids)
        except LOAD_ERRORS as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(
                f"{name} does not run on a text alone: {' '.join(str(error).split())[:200]}. Only adapters that work "
                "inside the model's modules can be traced"
            ) from error
        if active.shape != bare.shape:
            raise _works_outside(name)
        if not torch.isfinite(active).all():
            raise ModelError(
                f"{name}: with it the model's logits are not finite. It may have been trained with added tokens whose "
                "rows it does not bring (embed_tokens, lm_head): save it with save_embedding_layers=True"
            )
        return cls(active, float((active - bare).abs().max()), float((active - again).abs().max()))

    def agrees(self, logits: Tensor, allowed: float) -> bool:
        """Whether another model gives these logits."""
        if logits.shape != self.active.shape:
            return False
        return float((logits.to(self.active.device) - self.active).abs().max()) <= max(allowed, 2 * self.noise)


def _stored(adapter: Reference) -> Mapping[str, Tensor]:
    """An adapter's weights by the names of its file."""
    from peft.utils import load_peft_weights

    try:
        with warnings.catch_warnings():  # torch's, of the form of a pickle
            warnings.simplefilter("ignore")
            return load_peft_weights(adapter.path, device="cpu", **adapter.arguments)
    except LOAD_ERRORS as error:
        raise load_error("adapter", adapter.path, error) from error


def _check_finite(stored: Mapping[str, Tensor], name: str) -> None:
    spoilt = [key for key, value in stored.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if spoilt:
        raise ModelError(
            f"{name}: {len(spoilt)} of its {len(stored)} weights hold values that are not finite ({spoilt[0]}). The "
            "training failed, or the file is damaged; give another checkpoint of the adapter"
        )


def _say_other_base(settings: Any, config: ModelConfig, name: str) -> None:
    """Name the base that an adapter was trained on, where that is called otherwise: shapes alone do not tell."""
    trained = str(settings.base_model_name_or_path or "").rstrip("/")
    given = {resolve(one).id.rpartition("/")[2].casefold() for one in (config.model, config.model_path) if one}
    if trained and trained.rpartition("/")[2].casefold() not in given:
        say(f"{name} was trained on {trained!r}, and runs beside {config.model_path or config.model!r}")


def _wrapped(model: Any, adapter: Reference, stored: Mapping[str, Tensor], name: str) -> Any:
    """The model in peft's wrapper.

    Raises:
        ModelError: an adapter's key that the model has no place for, a place that got nothing, or another shape.
    """
    from peft import PeftModel

    missing: set[str] = set()
    try:
        wrapped = PeftModel.from_pretrained(model, adapter.path, **adapter.arguments)
        with wrapped.register_load_state_dict_post_hook(lambda _, keys: missing.update(keys.missing_keys)):
            renamed = getattr(model, "_checkpoint_conversion_mapping", None)
            result = wrapped.load_adapter(adapter.path, _ADAPTER, key_mapping=renamed, **adapter.arguments)
    except KeyError as error:  # of a module that is saved whole, or of trained tokens
        raise _unfit(name, [str(error.args[0])], [], len(stored)) from error
    except LOAD_ERRORS as error:
        if "size mismatch" in str(error):
            raise ModelError(
                f"{name} has weights of other shapes than the model: {' '.join(str(error).split())[:400]}\n"
                "Give the model that it was trained on"
            ) from error
        raise load_error("adapter", adapter.path, error) from error
    wrapped.eval()
    lost = _without_value(wrapped, missing, {*result.missing_keys})
    unexpected = [*result.unexpected_keys, *_of_the_base(wrapped, missing)]
    if lost or unexpected:
        raise _unfit(name, lost, sorted(unexpected), len(stored))
    return wrapped


def _of_the_base(wrapped: Any, missing: set[str]) -> list[str]:
    """Weights of the base that an adapter's file replaced, and that peft would not save with such an adapter.

    peft saves embedding tables that were resized, biases that were trained, and modules that are named.
    """
    from peft import get_peft_model_state_dict

    values = wrapped.state_dict(keep_vars=True)
    saved = get_peft_model_state_dict(wrapped, values, adapter_name=_ADAPTER, save_embedding_layers=True)
    own = {id(value) for value in saved.values()}
    parameters = [name for name, _ in wrapped.named_parameters(remove_duplicate=False)]
    given = [name for name in parameters if name not in missing and _ADAPTER not in name.split(".")]
    return [name for name in given if id(values[name]) not in own]


def _without_value(wrapped: Any, missing: set[str], told: set[str]) -> list[str]:
    """Weights of an adapter that its file did not give, neither by this name nor by another one of the same weight.

    Of the `missing` keys these are the ones that peft would save; and those that it has `told` of.
    """
    from peft import get_peft_model_state_dict

    values = wrapped.state_dict(keep_vars=True)
    saved = get_peft_model_state_dict(wrapped, values, adapter_name=_ADAPTER, save_embedding_layers=False)
    own = {id(value) for value in saved.values()} | {id(values[name]) for name in told}
    given = {id(value) for name, value in values.items() if name not in missing}
    return sorted(name for name in missing if id(values[name]) in own - given)


def _unfit(name: str, missing: list[str], unexpected: list[str], num_stored: int) -> ModelError:
    parts = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' * (len(keys) > 3)})"
        for keys, what in (
            (unexpected, "keys that the model has no place for in its adapter"),
            (missing, "keys missing"),
        )
        if keys
    ]
    return ModelError(
        f"{name} does not fit the model: of {num_stored} keys in its file, {' and '.join(parts)}. It would be active "
        "in part or not at all. Give the model that it was trained on, or save the adapter again with peft"
    )


def _works_outside(name: str) -> ModelError:
    return ModelError(
        f"{name} cannot be traced: it works in peft's wrapper (its forward or its prompt), and the traced model inside "
        "never sees it. Adapters that change modules can be traced: LoRA, DoRA, IA3, LoHa, LoKr, OFT, VeRA, ..."
    )


def _check_effect(wrapped: Any, seen: _Seen, name: str) -> None:
    """Refuse an adapter that was trained and changes nothing; of one still as peft began it that is said.

    peft begins an adapter by setting one kind of its weights to zeros (lora_B), or to ones (IA3), everywhere.
    """
    if seen.effect > 0:
        return
    kinds: dict[str, list[Tensor]] = {}
    for path, parameter in wrapped.named_parameters():
        parts = path.split(".")
        if _ADAPTER in parts and parameter.is_floating_point():
            kinds.setdefault(parts[parts.index(_ADAPTER) - 1], []).append(parameter)
    is_fresh = any(all((w == v).all() for w in weights) for weights in kinds.values() for v in (0.0, 1.0))
    if not is_fresh:
        raise ModelError(f"{name} is loaded but changes nothing; is it for another base model?")
    say(f"{name} changes nothing: its weights are those of an untrained adapter. Every number is the base model's")


def _rows(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _resize(model: Any, stored: Mapping[str, Tensor], name: str) -> None:
    """Give the embedding tables the size that an adapter's own have. Rows that are new hold no number until the
    adapter's weights are in them.

    Raises:
        ModelError: the adapter does not bring every table in that size, or the model's cannot be resized.
    """
    before = _rows(model)
    tables: dict[int, list[str]] = {}  # paths of each weight; a tied head has that of the embeddings
    weights = [table.weight for table in _tables(model)]
    for path, module in model.named_modules():
        if any(getattr(module, "weight", None) is weight for weight in weights):
            tables.setdefault(id(module.weight), []).append(path)
    sizes: list[int] = []
    for paths in tables.values():
        ends = tuple(f".{path}{inner}.weight" for path in paths for inner in ("", ".base_layer"))
        sizes += {value.shape[0] for key, value in stored.items() if f".{key}".endswith(ends)} or {before}
    if {*sizes} == {before}:
        return
    if len({*sizes}) > 1 or getattr(model, "is_quantized", False):
        raise ModelError(
            f"{name} was trained with embedding tables of {sizes} rows (embeddings, head), the model has {before}. "
            "Save the adapter with save_embedding_layers=True, and load it beside weights that are not quantised"
        )
    model.resize_token_embeddings(sizes[0], mean_resizing=False)
    with torch.no_grad():
        for table in _tables(model):
            table.weight[before:] = torch.nan


def _tables(model: Any) -> list[Any]:
    """The embeddings and, where there is one, the head."""
    return [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]


def _probe(settings: Any, tokenizer: Any, num_before: int, num_rows: int, device: torch.device) -> Tensor:
    """A text as ids (1, T), with the tokens that an adapter names (its invocation, tokens that it trains or adds):
    without them it may change nothing."""
    named: list[int] = []
    for field in ("alora_invocation_tokens", "token_indices", "trainable_token_indices"):
        value = getattr(settings, field, None) or []
        for ids in value.values() if isinstance(value, dict) else [value]:
            named += [i for i in ids if isinstance(i, int)]
    named += range(num_before, num_rows)
    text = [i % num_rows for i in probe_tokens(tokenizer)]
    ids = [*text, *[i for i in named[:_MAX_NAMED] if i < num_rows], *text]
    return torch.tensor([ids], device=device)


def _merged(wrapped: Any, name: str) -> Any:
    """The model with an adapter added to its weights. A weight that other modules share is theirs alone afterwards."""
    try:
        _untie(wrapped.get_base_model())
        return wrapped.merge_and_unload()
    except LOAD_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{name} cannot be merged: {' '.join(str(error).split())[:200]}. Leave --merge-adapter out"
        ) from error


def _untie(model: Any) -> None:
    """Give a layer with an adapter weights of its own where it shares them, as a tied head does with embeddings."""
    owned = [(module, *pair) for module in model.modules() for pair in module.named_parameters(recurse=False)]
    counts = Counter(id(parameter) for _, _, parameter in owned)
    layers = {id(module.base_layer) for module in model.modules() if hasattr(module, "base_layer")}
    for module, name, parameter in owned:
        if id(module) in layers and counts[id(parameter)] > 1:
            counts[id(parameter)] -= 1
            setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            model.config.get_text_config().tie_word_embeddings = False
            model.config.tie_word_embeddings = False
