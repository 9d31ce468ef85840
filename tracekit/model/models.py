"""Loading: a model's name in, a proven TracedModel out.

The name is that of tracekit.model.references. With it go a LoRA adapter (active beside the weights, or merged into
them), int8 or nf4 (bitsandbytes, also on CPU), a dtype, and the devices of tracekit.model.placement. Remote code is
never run unless asked for.
"""

import logging
import struct
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultipleChoice,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)

from tracekit.config import ModelConfig
from tracekit.errors import ConfigError, ModelError
from tracekit.model.families import OFF_INTERFACE
from tracekit.model.placement import (
    computing_device,
    input_device,
    loading_arguments,
    settle,
    watch_offloaded,
)
from tracekit.model.proof import prove
from tracekit.model.references import Reference, resolve
from tracekit.model.traced import Head, Loads, TracedModel
from tracekit.records import ModelInfo

__all__ = [
    "end_token_ids",
    "is_head_fresh",
    "load_model",
    "load_processor",
    "load_tokenizer",
    "max_positions",
    "model_info",
]

_LOAD_ERRORS = (OSError, ValueError, LookupError, ImportError, RuntimeError, struct.error, SafetensorError)
"""What transformers, peft and the readers of their files raise for a checkpoint that is missing, damaged or unknown."""

_AUTO = {
    "lm": AutoModelForCausalLM,
    "image_lm": AutoModelForImageTextToText,
    "choices": AutoModelForMultipleChoice,
}

_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet", "data2vec-text", "xlm-roberta-xl", "xmod")
"""Families that count positions from the one after the padding id, so that they have fewer than they say."""


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer.

    Raises:
        ModelError: it cannot be found or loaded, or is not a fast one (offsets are needed).
    """
    reference = _weights(config) if config.model_path is not None else resolve(config.model)
    own = Path(config.model_path or "").expanduser()
    if config.model_path is not None and own.is_dir() and not (own / "tokenizer_config.json").exists():
        reference = resolve(config.model)  # weights alone
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            reference.path, trust_remote_code=config.trust_remote_code, **reference.arguments
        )
    except _LOAD_ERRORS as error:
        raise _load_error("tokenizer", reference.path, error) from error
    if not tokenizer.is_fast:
        raise ModelError(f"{reference.path!r} has no fast tokenizer (tokenizer.json); character offsets need one")
    return tokenizer


def load_processor(config: ModelConfig) -> Any:
    """The processor of a model that takes pictures.

    Raises:
        ModelError: there is none, or it cannot be loaded.
    """
    reference = resolve(config.model)
    try:
        processor = AutoProcessor.from_pretrained(
            reference.path, trust_remote_code=config.trust_remote_code, **reference.arguments
        )
    except _LOAD_ERRORS as error:
        raise _load_error("processor", config.model, error) from error
    if not hasattr(processor, "image_processor"):
        raise ModelError(f"model {config.model!r} takes no pictures: it has no image processor; leave --image out")
    return processor


def model_info(config: ModelConfig, *, variant: str, sites: Sequence[str] = ()) -> ModelInfo:
    """What is known of a model before its weights are loaded; enough to recognise a run that is already complete."""
    reference = _weights(config)
    settings = _load_config(reference, config)
    dtype = config.dtype
    if dtype == "auto":
        own = getattr(settings.get_text_config(), "dtype", None) or getattr(settings, "dtype", None)
        dtype = (
            str(own or torch.float32).removeprefix("torch.") if "gguf_file" not in reference.arguments else "float32"
        )
    return ModelInfo(
        id=reference.id,
        revision=reference.revision or getattr(settings, "_commit_hash", None) or "unknown",
        variant=variant,
        adapter=_adapter_name(config) if config.adapter else None,
        quantization=_quantization_name(config),
        dtype=dtype,
        attention="eager" if "attentions" in sites else "auto",
    )


def max_positions(config: ModelConfig) -> int | None:
    """Longest text a model has positions for; None where it has no limit."""
    settings = _load_config(_weights(config), config).get_text_config()
    positions = getattr(settings, "max_position_embeddings", None) or getattr(settings, "max_seq_len", None)
    is_shifted = settings.model_type in _POSITIONS_AFTER_PADDING and positions is not None
    return positions - settings.pad_token_id - 1 if is_shifted else positions


def end_token_ids(config: ModelConfig, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer of a model, known before its weights are loaded."""
    reference = _weights(config)
    places = {name: value for name, value in reference.arguments.items() if name != "gguf_file"}
    try:
        own = GenerationConfig.from_pretrained(reference.path, **places)
    except OSError:  # it has none of its own: transformers makes one of the model's configuration
        own = GenerationConfig.from_model_config(_load_config(reference, config))
    return frozenset(_end_ids(own, tokenizer))


def load_model(
    config: ModelConfig, info: ModelInfo, tokenizer: Any, sites: Sequence[str], *, loads: Loads = "lm"
) -> TracedModel:
    """Load a model, quantised and with its adapter as asked, and have it prove itself at `sites`.

    A multiple-choice head that the checkpoint does not have is drawn at random, by a fixed seed, and
    `TracedModel.is_head_fresh` says so.

    Raises:
        ModelError: unknown model or adapter, an adapter that changes nothing, a failed proof.
        UnsupportedSiteError: the architecture cannot give a site.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    reference = _weights(config)
    settings = _load_config(reference, config)
    if config.model_path is not None:
        _check_base(settings, _load_config(resolve(config.model), config), config)
    if config.quantize != "none" and "gguf_file" in reference.arguments:
        raise ConfigError(f"--quantize {config.quantize} with a GGUF file: it is quantised already; load it without")
    model, missing = _loaded(reference, settings, config, info, loads)
    if config.adapter:
        model = _with_adapter(model, config.adapter, tokenizer, merge=config.merge_adapter)
    head: Head = "choices" if loads == "choices" else "lm"
    if head == "lm":
        _clean_generation_config(model, tokenizer)
    is_coupled = config.quantize == "int8" and config.int8_threshold > 0
    with watch_offloaded(model, info.id):
        traced = TracedModel(model, tokenizer, info, is_row_coupled=is_coupled, head=head)
        traced.is_head_fresh = is_head_fresh(model, traced.anatomy.inner, missing, info.id)
        _check_head(settings, info, head, traced.is_head_fresh, config)
        prove(traced, sites)
        if traced.is_offloaded and head == "lm":  # generation may take other ways through a model, with its cache
            model.generate(traced.probe_ids(), max_new_tokens=2, do_sample=False)
    if head == "lm" and not traced.is_causal:
        raise ModelError(
            f"{info.id} ({settings.get_text_config().model_type}) is no causal language model: it sees the tokens that "
            "it is to predict. Encoders are for builders.csqa_mcq"
        )
    return traced


class _Loaded(NamedTuple):
    """A model on its devices."""

    model: Any
    missing: Iterable[str]
    """Weights that the checkpoint does not have, by name."""


def _loaded(reference: Reference, settings: Any, config: ModelConfig, info: ModelInfo, loads: Loads) -> _Loaded:
    """Load the weights, quantised as asked, and put them where they belong.

    Raises:
        ModelError: transformers cannot load them so; or as `tracekit.model.placement.settle`.
        ConfigError: as `computing_device` and `loading_arguments`.
    """
    arguments: dict[str, Any] = {"dtype": getattr(torch, info.dtype), **reference.arguments}
    family = OFF_INTERFACE.get(settings.get_text_config().model_type)
    if family is not None and family.eager_fault(settings.get_text_config()) is None:
        arguments["attn_implementation"] = "eager"
    device = computing_device(config)
    if config.quantize != "none":
        arguments |= {"quantization_config": _quantization(config, info), "device_map": {"": str(device)}}
    auto: Any = _AUTO[loads]
    torch.manual_seed(0)  # a head that the checkpoint does not have is the same on every run
    with loading_arguments(config) as placed:
        try:
            model, loading = auto.from_pretrained(
                reference.path,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                **(arguments | placed),
            )
        except _LOAD_ERRORS as error:
            raise _explained(error, settings, config, loads) from error
        if placed:
            missing, folder = loading["missing_keys"], placed.get("offload_folder")
            settle(model, config, info.id, missing=missing, folder=folder)
    if config.quantize == "none" and not placed:
        model = model.to(device)
    elif config.quantize != "none" and device.type == "cpu":
        _use_plain_4bit_matmul(model)
    return _Loaded(model, loading["missing_keys"])


def _explained(error: Exception, settings: Any, config: ModelConfig, loads: Loads) -> ModelError:
    """What it means that transformers does not load a model."""
    reason = " ".join(str(error).split())
    if loads == "choices":
        return ModelError(
            f"model {config.model_path or config.model!r} cannot be loaded with a multiple-choice head: {reason[:200]}"
            "\nExpected an encoder (BERT, RoBERTa, DistilBERT, ELECTRA, MPNet, DeBERTa, ...), or what "
            "builders.finetune_csqa wrote, as a local folder or a Hub id"
        )
    if loads == "lm" and hasattr(settings, "vision_config"):
        return ModelError(f"model {config.model!r} is loaded for text, and takes pictures; give --image FILE")
    if config.device_map != "none":
        return ModelError(
            f"model {config.model!r} cannot be loaded with --device-map {config.device_map}: "
            f"{shorten(reason, 400, placeholder=' ...') or type(error).__name__}\n"
            "What fits into no memory is left to the disk, which needs --offload-folder DIR; weights in int8 or nf4 "
            "have to fit on accelerators, or all on the CPU (--max-memory), since they cannot be offloaded"
        )
    return _load_error("model", config.model, error)


def _weights(config: ModelConfig) -> Reference:
    """Where the weights come from: the fine-tuned checkpoint, or the model itself.

    Raises:
        ModelError: no such model; or a checkpoint that should be in a folder here and is not.
    """
    path = Path(config.model_path or "").expanduser()
    if config.model_path is not None and not path.exists() and path.parent != Path() and path.parent.is_dir():
        raise ModelError(f"--model-path {config.model_path!r}: there is no such folder in {str(path.parent)!r}")
    return resolve(config.model_path or config.model)


def _check_base(checkpoint: Any, base: Any, config: ModelConfig) -> None:
    """Refuse a checkpoint that is not one of the base model."""
    for name in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        ours, theirs = getattr(checkpoint, name, None), getattr(base, name, None)
        if ours != theirs:
            raise ModelError(
                f"--model-path {config.model_path!r} is no checkpoint of --model {config.model!r}: {name} is {ours}, "
                f"the base's is {theirs}. Give the base that was fine-tuned"
            )


def is_head_fresh(model: Any, inner: nn.Module, missing: Iterable[str], name: str) -> bool:
    """Whether weights of the head were not in the checkpoint, and so drawn at random.

    Weights that are the embeddings' own (tied) are not missing. `missing` is what transformers reports on loading.

    Raises:
        ModelError: weights of the inner model are missing, which makes it useless.
    """
    prefix = next(path for path, module in model.named_modules() if module is inner)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    embeddings = model.get_input_embeddings().weight
    fresh = [path for path in missing if path in parameters and parameters[path] is not embeddings]
    lost = [path for path in fresh if path.startswith(f"{prefix}.") and "pooler" not in path]
    if lost:
        raise ModelError(f"{name}: the checkpoint lacks weights of the model itself: {', '.join(lost[:3])}")
    return bool(fresh)


def _check_head(settings: Any, info: ModelInfo, head: Head, is_fresh: bool, config: ModelConfig) -> None:
    """Refuse a head that means nothing: a random one of a language model, or one that was trained for something else
    and happens to have the shape; and a random one whose draw would depend on the device that it is drawn on."""
    if is_fresh and head == "lm":
        raise ModelError(
            f"{info.id}: the checkpoint has no language-model head, so a random one would stand in and every predicted "
            "token would mean nothing. Give the model that it was made from, or a checkpoint saved with its head"
        )
    if is_fresh and config.device_map != "none":
        raise ModelError(
            f"{info.id}: the checkpoint has no multiple-choice head, and with --device-map a random one would be "
            "another than on one device; fine-tune it first (python -m builders.finetune_csqa), or use --device"
        )
    names = settings.architectures or []
    if head == "choices" and not is_fresh and names and not any(name.endswith("ForMultipleChoice") for name in names):
        raise ModelError(
            f"{info.id} is a checkpoint of {names[0]}, whose head is none for multiple choice; fine-tune it first "
            "(python -m builders.finetune_csqa)"
        )


def _load_config(reference: Reference, config: ModelConfig) -> Any:
    try:
        return AutoConfig.from_pretrained(
            reference.path, trust_remote_code=config.trust_remote_code, **reference.arguments
        )
    except _LOAD_ERRORS as error:
        raise _load_error("model", config.model, error) from error


def _load_error(what: str, name: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())
    return ModelError(
        f"{what} {name!r} cannot be loaded: {reason[:400]}\n"
        "Check the name and revision; for a gated or private model log in with `hf auth login`; without network give a "
        "local folder, a .gguf file, or `demo`"
    )


def _quantization_name(config: ModelConfig) -> str | None:
    if config.quantize == "none":
        return None
    return f"int8(threshold={config.int8_threshold:g})" if config.quantize == "int8" else config.quantize


def _quantization(config: ModelConfig, info: ModelInfo) -> BitsAndBytesConfig:
    if config.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=config.int8_threshold)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, info.dtype)
    )


def _use_plain_4bit_matmul(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for AVX512-BF16: other bytes on other processors, and it fails on
    layers whose width is no multiple of 32."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _adapter_name(config: ModelConfig) -> str:
    """Adapter and revision, and whether its weights are part of the model's."""
    assert config.adapter is not None
    adapter = resolve(config.adapter)
    revision = adapter.revision or adapter.arguments.get("revision", "main")
    return f"{adapter.id}@{revision}" + " (merged)" * config.merge_adapter


def _with_adapter(model: Any, adapter: str, tokenizer: Any, *, merge: bool) -> Any:
    """The model with its adapter active inside it, or merged; checks that the adapter does something."""
    from peft import PeftModel

    reference = resolve(adapter)
    try:
        with warnings.catch_warnings():  # peft reads attributes that transformers has renamed
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = PeftModel.from_pretrained(model, reference.path, **reference.arguments)
    except _LOAD_ERRORS as error:
        raise _load_error("adapter", adapter, error) from error
    wrapped.eval()
    ids = torch.tensor(
        [tokenizer("The quick brown fox", add_special_tokens=False).input_ids], device=input_device(model)
    )
    with torch.inference_mode():
        active = wrapped(input_ids=ids).logits
        with wrapped.disable_adapter():
            bare = wrapped(input_ids=ids).logits
    is_trained = any(parameter.any() for name, parameter in wrapped.named_parameters() if "lora_B" in name)
    if torch.equal(active, bare) and is_trained:
        raise ModelError(f"adapter {adapter!r} is loaded but changes nothing; is it for another base model?")
    return wrapped.merge_and_unload() if merge else wrapped.get_base_model()


def _clean_generation_config(model: Any, tokenizer: Any) -> None:
    """Keep only the special tokens of the checkpoint's generation defaults: what is asked for is what happens."""
    own = model.generation_config
    eos_ids = _end_ids(own, tokenizer)
    pad = own.pad_token_id if own.pad_token_id is not None else next(iter(sorted(eos_ids)), 0)
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=sorted(eos_ids) or None, pad_token_id=pad
    )


def _end_ids(own: Any, tokenizer: Any) -> set[int]:
    """The end tokens of a generation config, and the tokenizer's."""
    eos = own.eos_token_id if own.eos_token_id is not None else []
    ids = {*(eos if isinstance(eos, list) else [eos])}
    return ids if tokenizer is None or tokenizer.eos_token_id is None else ids | {tokenizer.eos_token_id}
