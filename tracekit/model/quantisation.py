"""Quantisation: how a checkpoint stores its weights, what a record calls it, and what follows for its numbers.

    --quantize int8                 int8(threshold=6)
    config.json, bitsandbytes       int8(threshold=6), nf4, fp4(double_quant, compute=bfloat16)
    config.json, other methods      gptq-4bit, awq-4bit, fp8, torchao(Int8WeightOnlyConfig), ...
    unpacked on loading             Q4_1, dequantised to float32 (GGUF; fp8 without a GPU that has it)

Weights that are dequantised on loading compute as plain ones do: with the tolerance of their dtype.
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

from tracekit.config import ModelConfig
from tracekit.errors import ConfigError, ModelError, TracekitError
from tracekit.model.gguf_file import gguf_type
from tracekit.model.references import LOAD_ERRORS, Reference

__all__ = [
    "check_loaded",
    "is_row_coupled",
    "quantization_arguments",
    "quantization_of",
    "use_plain_4bit_matmul",
]

_BIT_FIELDS = ("bits", "w_bit", "nbits", "num_bits", "weight_bits")
_KIND_FIELDS = ("weights", "weights_dtype", "weight_dtype", "quant_type", "quant_algo", "_type")


def quantization_of(reference: Reference, settings: Any, config: ModelConfig, dtype: str) -> str | None:
    """What a record calls the quantisation of a model; None where nothing was ever quantised.

    Raises:
        ConfigError: `--quantize` or `--merge-adapter`, and the checkpoint is quantised already.
        ModelError: transformers does not know the method, or lacks a package for it; or what is stored is malformed.
    """
    try:
        stored = _stored_name(reference, settings, dtype)
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, TracekitError):
            raise
        raise ModelError(f"{reference.id}: quantization_config in its config.json is malformed: {error}") from error
    if stored is not None and config.quantize != "none":
        raise ConfigError(
            f"--quantize {config.quantize}: the checkpoint {reference.id!r} is quantised already ({stored}). Load it "
            "without --quantize, or give the checkpoint that it was made from"
        )
    if stored is not None and config.merge_adapter and not stored.endswith(_unpacked(dtype)):
        raise ConfigError(
            f"--merge-adapter: the weights of {reference.id!r} are quantised ({stored}), and merging would round them "
            "again. Leave --merge-adapter out, or give a checkpoint that is not quantised"
        )
    if config.quantize == "none":
        return stored
    return _int8(config.int8_threshold) if config.quantize == "int8" else config.quantize


def quantization_arguments(
    reference: Reference, settings: Any, config: ModelConfig, dtype: str, device: torch.device
) -> dict[str, Any]:
    """What `from_pretrained` is given for the quantisation; empty where the weights are plain."""
    if config.quantize == "int8":
        wanted = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=config.int8_threshold)
    elif config.quantize == "nf4":
        wanted = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
        )
    elif "gguf_file" in reference.arguments:
        whole = getattr(transformers, "GgufConfig", None)  # versions without it always dequantise
        return {} if whole is None else {"quantization_config": whole(dequantize=True)}
    else:
        stored = _stored(settings)
        if stored is None:
            return {}
        # other methods read the CPU in a device map as offloading, and take the CPU where there is no map
        is_placed = device.type != "cpu" or stored.get("quant_method", "bitsandbytes") == "bitsandbytes"
        return {"device_map": {"": str(device)}} if is_placed else {}
    return {"quantization_config": wanted, "device_map": {"": str(device)}}


def is_row_coupled(model: Any) -> bool:
    """Whether a layer picks outlier columns over all rows of a call, as int8 with a threshold above 0 does."""
    states = [getattr(module, "state", None) for module in model.modules()]  # of bitsandbytes' 8-bit layers
    return any(getattr(state, "threshold", 0) > 0 for state in states)


def use_plain_4bit_matmul(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for AVX512-BF16: other bytes on other processors, and it fails on
    layers whose width is no multiple of 32."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_loaded(model: Any, name: str, quantization: str | None, dtype: str) -> None:
    """See that a model was loaded as its record says.

    Raises:
        ModelError: transformers dequantised the weights, or left them quantised, against what the plan says.
    """
    expected = quantization is not None and not quantization.endswith(_unpacked(dtype))
    found = getattr(model, "is_quantized", False) and _stored(model.config) is not None
    if found != expected:
        raise ModelError(
            f"{name}: the plan says quantisation {quantization or 'none'}, and here the model was loaded "
            f"{'quantised' if found else 'without quantised weights'}. Plan and run on machines with the same devices "
            "and packages"
        )


def _stored_name(reference: Reference, settings: Any, dtype: str) -> str | None:
    """What the quantisation of a checkpoint is called as it is loaded."""
    if "gguf_file" in reference.arguments:
        kind = gguf_type(Path(reference.path) / reference.arguments["gguf_file"])
    else:
        kind = reference.dequantised
    if kind is not None:
        return kind + _unpacked(dtype)
    stored = _stored(settings)
    if stored is None:
        return None
    name = _name(stored, dtype)
    return name + _unpacked(dtype) if _is_dequantised(stored, reference.id, name) else name


def _unpacked(dtype: str) -> str:
    return f", dequantised to {dtype}"


def _stored(settings: Any) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint, where transformers looks for it; not that of a GGUF file."""
    found = getattr(settings, "quantization_config", None) or getattr(
        settings.get_text_config(decoder=True), "quantization_config", None
    )
    if found is None:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    return None if found.get("quant_method") == "gguf" else found


def _name(stored: Mapping[str, Any], dtype: str) -> str:
    """What a method is called: with its bits where it says them, else with the kind of its weights."""
    if stored.get("load_in_8bit"):
        return _int8(stored.get("llm_int8_threshold", 6.0))
    if stored.get("load_in_4bit"):
        compute = str(stored.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
        notes = ["double_quant"] * bool(stored.get("bnb_4bit_use_double_quant"))
        notes += [f"compute={compute}"] * (compute != dtype)
        return str(stored.get("bnb_4bit_quant_type") or "fp4") + (f"({', '.join(notes)})" if notes else "")
    method = getattr(stored.get("quant_method"), "value", stored.get("quant_method"))
    if bits := sorted({int(value) for value in _values(stored, _BIT_FIELDS) if str(value).isdecimal()}):
        return f"{method}-{'/'.join(map(str, bits))}bit"
    kinds = sorted({value for value in _values(stored, _KIND_FIELDS) if isinstance(value, str)})
    return f"{method}({', '.join(kinds)})" if kinds else str(method)


def _int8(threshold: float) -> str:
    return f"int8(threshold={threshold:g})"


def _values(settings: Any, names: tuple[str, ...]) -> Iterator[Any]:
    """The values of some fields, wherever they stand; those of activations are not of the weights."""
    items = settings.items() if isinstance(settings, Mapping) else enumerate(settings)
    for name, value in items:
        if name in names and isinstance(value, str | int) and not isinstance(value, bool):
            yield value
        if isinstance(value, Mapping | list | tuple) and name not in ("input_activations", "output_activations"):
            yield from _values(value, names)


def _is_dequantised(stored: Mapping[str, Any], model: str, name: str) -> bool:
    """Whether transformers unpacks the weights on this machine, as it does with fp8 on a CPU.

    Raises:
        ModelError: it does not know the method, or lacks a package for it.
    """
    is_bnb = stored.get("load_in_8bit") or stored.get("load_in_4bit")
    method = stored.get("quant_method")
    if not is_bnb and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise ModelError(
            f"{model}: its config.json says quantisation {method!r}, which transformers {transformers.__version__} "
            f"does not know; it knows {', '.join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))}"
        )
    try:
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(dict(stored)), pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
    except LOAD_ERRORS as error:
        raise ModelError(
            f"{model} is quantised ({name}), and cannot be loaded here: {' '.join(str(error).split())[:400]}\n"
            "Install the package that is named, or give a checkpoint that is not quantised"
        ) from error
    return bool(getattr(quantizer.quantization_config, "dequantize", False))
