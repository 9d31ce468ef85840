"""Loading: a model's name in, a proven TracedModel out.

The name is that of tracekit.model.references. With it go an adapter (tracekit.model.adapters), quantised weights
(tracekit.model.quantisation), a dtype, and the devices of tracekit.model.placement. Remote code is never run unless
asked for.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultipleChoice,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)

from tracekit.config import ModelConfig
from tracekit.console import say
from tracekit.errors import ModelError
from tracekit.model.adapters import adapter_file, adapter_name, may_add_rows, with_adapter
from tracekit.model.families import OFF_INTERFACE
from tracekit.model.generation import find_padding_rule
from tracekit.model.memory import is_out_of_memory
from tracekit.model.placement import (
    computing_device,
    loading_arguments,
    settle,
    watch_offloaded,
)
from tracekit.model.proof import prove
from tracekit.model.quantisation import (
    check_loaded,
    is_row_coupled,
    quantization_arguments,
    quantization_of,
    use_plain_4bit_matmul,
)
from tracekit.model.references import LOAD_ERRORS, Reference, load_error, resolve
from tracekit.model.traced import Head, Loads, TracedModel
from tracekit.model.vocabulary import note_num_rows, say_missing_rows
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

_AUTO = {
    "lm": AutoModelForCausalLM,
    "image_lm": AutoModelForImageTextToText,
    "choices": AutoModelForMultipleChoice,
}

_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet", "data2vec-text", "xlm-roberta-xl", "xmod")
"""Families that count positions from the one after the padding id, so that they have fewer than they say."""


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer, or the one that its adapter brings; with the chat template that the adapter brings.

    It knows how many rows the model's embedding table has, so that `check_rows` can refuse a prompt.

    Raises:
        ModelError: it cannot be found or loaded, or is not a fast one (offsets are needed).
    """
    reference = _weights(config) if config.model_path is not None else resolve(config.model)
    own = Path(config.model_path or "").expanduser()
    if config.model_path is not None and own.is_dir() and not (own / "tokenizer_config.json").exists():
        reference = resolve(config.model)  # weights alone
    adapter = None if config.adapter is None else resolve(config.adapter, is_adapter=True)
    if adapter is not None and adapter_file(adapter, "tokenizer_config.json") is not None:
        reference = adapter
    elif adapter is not None and adapter_file(adapter, "tokenizer.json") is not None:
        say(
            f"the tokenizer of adapter {config.adapter!r} is not used: it has no tokenizer_config.json. Save it there "
            "with save_pretrained if the adapter was trained with it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            reference.path, trust_remote_code=config.trust_remote_code, **reference.arguments
        )
    except LOAD_ERRORS as error:
        name = reference.arguments.get("gguf_file", "")
        raise load_error("tokenizer", str(Path(reference.path, name)), error) from error
    if not tokenizer.is_fast:
        raise ModelError(f"{reference.path!r} has no fast tokenizer (tokenizer.json); character offsets need one")
    if adapter is not None and (template := adapter_file(adapter, "chat_template.jinja")) is not None:
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    num_rows = _vocab_size(_load_config(_weights(config), config))
    is_unsure = adapter is not None and num_rows is not None and may_add_rows(adapter, num_rows)
    note_num_rows(tokenizer, None if is_unsure else num_rows)
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
    except LOAD_ERRORS as error:
        raise load_error("processor", config.model, error) from error
    if not hasattr(processor, "image_processor"):
        raise ModelError(f"model {config.model!r} takes no pictures: it has no image processor; leave --image out")
    return processor


def model_info(config: ModelConfig, *, variant: str, sites: Sequence[str] = ()) -> ModelInfo:
    """What is known of a model before its weights are loaded; enough to recognise a run that is already complete.

    Raises:
        ModelError: no such model, or a quantisation that cannot be loaded here.
        ConfigError: `--quantize` or `--merge-adapter` with a checkpoint that is quantised already.
    """
    reference = _weights(config)
    settings = _load_config(reference, config)
    dtype = config.dtype
    if dtype == "auto":
        own = getattr(settings.get_text_config(), "dtype", None) or getattr(settings, "dtype", None)
        dtype = (
            str(own or torch.float32).removeprefix("torch.") if "gguf_file" not in reference.arguments else "float32"
        )
    quantization = quantization_of(reference, settings, config, dtype)
    return ModelInfo(
        id=reference.id,
        revision=reference.revision or getattr(settings, "_commit_hash", None) or "unknown",
        variant=variant,
        adapter=adapter_name(config) if config.adapter else None,
        quantization=quantization,
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
    head: Head = "choices" if loads == "choices" else "lm"
    try:
        return _proven(
            _loaded(reference, settings, config, info, loads), settings, config, info, tokenizer, sites, head
        )
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise load_error("model", info.id, error) from error


def _proven(
    loaded: "_Loaded",
    settings: Any,
    config: ModelConfig,
    info: ModelInfo,
    tokenizer: Any,
    sites: Sequence[str],
    head: Head,
) -> TracedModel:
    """A loaded model with its adapter, proven."""
    model, missing = loaded
    if config.adapter:
        model, missing = _adapted(loaded, config, info, tokenizer, head)
    with watch_offloaded(model, info.id):
        traced = TracedModel(model, tokenizer, info, is_row_coupled=is_row_coupled(model), head=head)
        if tokenizer is not None:
            note_num_rows(tokenizer, traced.num_rows)
            say_missing_rows(tokenizer, traced.num_rows)
        if head == "lm":
            _clean_generation_config(model, tokenizer)
        traced.is_head_fresh = is_head_fresh(model, traced.anatomy.inner, missing, info.id)
        _check_head(settings, info, head, traced.is_head_fresh, config)
        prove(traced, sites)
        if traced.is_offloaded and head == "lm":  # generation may take other ways through a model, with its cache
            model.generate(traced.probe_ids(), max_new_tokens=2, do_sample=False)
        if traced.is_causal and head == "lm":
            find_padding_rule(traced)
    if head == "lm" and not traced.is_causal:
        raise ModelError(
            f"{info.id} ({settings.get_text_config().model_type}) is no causal language model: it sees the tokens that "
            "it is to predict. Encoders are for tasks that score options by a multiple-choice head"
        )
    return traced


def _adapted(loaded: "_Loaded", config: ModelConfig, info: ModelInfo, tokenizer: Any, head: Head) -> "_Loaded":
    """The model with its adapter. Weights that no checkpoint has are followed by what they are: peft renames them."""
    parameters = dict(loaded.model.named_parameters(remove_duplicate=False))
    embeddings = loaded.model.get_input_embeddings().weight
    drawn = {id(parameters[path]) for path in loaded.missing if path in parameters} - {id(embeddings)}

    def run(model: Any, ids: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=ids[:, None] if head == "choices" else ids).logits

    model = with_adapter(loaded.model, config, info, tokenizer, run)
    named = model.named_parameters(remove_duplicate=False)
    missing = [path for path, weight in named if id(weight) in drawn and ".original_module." not in path]
    return _Loaded(model, missing)


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
    quantised = quantization_arguments(reference, settings, config, info.dtype, device)
    pad = getattr(settings.get_text_config(), "pad_token_id", None)
    if pad is not None and pad >= (_vocab_size(settings) or pad + 1):
        arguments["pad_token_id"] = None  # the added token has no row, and transformers would not build the table
    auto: Any = _AUTO[loads]
    torch.manual_seed(0)  # a head that the checkpoint does not have is the same on every run
    with loading_arguments(config) as placed:
        try:
            model, loading = auto.from_pretrained(
                reference.path,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                **(arguments | quantised | placed),
            )
            if getattr(model, "_hf_peft_config_loaded", False):
                raise _adapter_beside(reference.path)
            check_loaded(model, info.id, info.quantization, info.dtype)
            if not placed and "device_map" not in quantised:
                model = model.to(device)
        except LOAD_ERRORS as error:
            if isinstance(error, ModelError):
                raise
            raise _explained(error, settings, config, loads) from error
        if placed:
            missing, folder = loading["missing_keys"], placed.get("offload_folder")
            settle(model, config, info.id, missing=missing, folder=folder)
    if device.type == "cpu":
        use_plain_4bit_matmul(model)
    return _Loaded(model, loading["missing_keys"])


def _explained(error: Exception, settings: Any, config: ModelConfig, loads: Loads) -> ModelError:
    """What it means that transformers does not load a model."""
    reason = " ".join(str(error).split())
    if is_out_of_memory(error) or isinstance(error, ImportError):
        return load_error("model", config.model, error)
    if loads == "choices":
        return ModelError(
            f"model {config.model_path or config.model!r} cannot be loaded with a multiple-choice head: {reason[:200]}"
            "\nExpected an encoder (BERT, RoBERTa, DistilBERT, ELECTRA, MPNet, DeBERTa, ...), fine-tuned or not, as a "
            "local folder or a Hub id"
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
    return load_error("model", config.model, error)


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
            "another than on one device; fine-tune it first, or use --device"
        )
    names = settings.architectures or []
    if head == "choices" and not is_fresh and names and not any(name.endswith("ForMultipleChoice") for name in names):
        raise ModelError(
            f"{info.id} is a checkpoint of {names[0]}, whose head is none for multiple choice; fine-tune it first"
        )


def _vocab_size(settings: Any) -> int | None:
    """Rows of the embedding table, as a checkpoint's configuration has them."""
    return getattr(settings.get_text_config(), "vocab_size", None)


def _adapter_beside(name: str) -> ModelError:
    return ModelError(
        f"model {name!r} has an adapter beside it (adapter_config.json), which transformers would load unchecked. Give "
        "the base with --model, and the adapter with --adapter"
    )


def _load_config(reference: Reference, config: ModelConfig) -> Any:
    if (Path(reference.path) / "adapter_config.json").is_file():
        raise _adapter_beside(reference.path)
    try:
        return AutoConfig.from_pretrained(
            reference.path, trust_remote_code=config.trust_remote_code, **reference.arguments
        )
    except LOAD_ERRORS as error:
        raise load_error("model", config.model, error) from error


def _clean_generation_config(model: Any, tokenizer: Any) -> None:
    """Keep only the special tokens of the checkpoint's generation defaults: what is asked for is what happens."""
    own = model.generation_config
    eos_ids = _end_ids(own, tokenizer)
    num_rows = model.get_input_embeddings().weight.shape[0]
    pad = own.pad_token_id if own.pad_token_id is not None else next(iter(sorted(eos_ids)), 0)
    pad = pad if pad < num_rows else 0  # it is masked, and only needs a row
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=sorted(eos_ids) or None, pad_token_id=pad
    )


def _end_ids(own: Any, tokenizer: Any) -> set[int]:
    """The end tokens of a generation config, and the tokenizer's."""
    eos = own.eos_token_id if own.eos_token_id is not None else []
    ids = {*(eos if isinstance(eos, list) else [eos])}
    return ids if tokenizer is None or tokenizer.eos_token_id is None else ids | {tokenizer.eos_token_id}
