"""Tiny random models of many families, and the same made ready to be traced.

model = tiny_model("gemma2")                  plain transformers: the reference
made = traced("gemma2")                       a TracedModel with the very same weights, proven at every site it gives

A family's quirks (soft-caps, multipliers, windows, sinks) are set strongly enough here to move the numbers.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    CohereConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3Config,
)

from tracekit.model.families import OFF_INTERFACE
from tracekit.model.models import _clean_generation_config
from tracekit.model.proof import prove
from tracekit.model.traced import TracedModel
from tracekit.records import ModelInfo
from tracekit.sites import SITES

__all__ = [
    "CAUSAL",
    "FAMILIES",
    "NUM_LAYERS",
    "VOCAB_SIZE",
    "WITH_ATTENTIONS",
    "model_info",
    "proven",
    "sites_of",
    "tiny_model",
    "token_ids",
    "traced",
]

VOCAB_SIZE = 97
NUM_LAYERS = 3
_HIDDEN_SIZE = 32
_SPREAD = 0.1

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": _HIDDEN_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
}
_SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_COMMON: dict[str, Any] = {**_SIZES, **_SPECIAL, "intermediate_size": 64, "max_position_embeddings": 128}
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2}
_SLIDING_FIRST = ["sliding_attention", "full_attention", "sliding_attention"]
_GPT2: dict[str, Any] = {
    **_SPECIAL,
    "vocab_size": VOCAB_SIZE,
    "n_embd": _HIDDEN_SIZE,
    "n_layer": NUM_LAYERS,
    "n_head": 4,
}
_OPT: dict[str, Any] = {**_SIZES, **_SPECIAL, "ffn_dim": 64, "max_position_embeddings": 128}
_FALCON: dict[str, Any] = {**_SIZES, **_SPECIAL}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(**_GPT2, n_positions=128),
    "llama": lambda: LlamaConfig(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=16),
    "gemma2": lambda: Gemma2Config(
        **_GROUPED,
        head_dim=16,
        query_pre_attn_scalar=8,
        sliding_window=4,
        layer_types=_SLIDING_FIRST,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_GROUPED, head_dim=16, query_pre_attn_scalar=8, sliding_window=4, layer_types=_SLIDING_FIRST
    ),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=5),
    "gpt_neox": lambda: GPTNeoXConfig(**_COMMON, rotary_pct=0.5),
    "opt": lambda: OPTConfig(**_OPT, word_embed_proj_dim=16),
    "opt_post_norm": lambda: OPTConfig(**_OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "phi": lambda: PhiConfig(**_COMMON, partial_rotary_factor=0.5),
    "bloom": lambda: BloomConfig(**_SPECIAL, vocab_size=VOCAB_SIZE, hidden_size=_HIDDEN_SIZE, n_layer=3, n_head=4),
    "falcon": lambda: FalconConfig(**_FALCON),
    "falcon_new": lambda: FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "granite": lambda: GraniteConfig(
        **_GROUPED, embedding_multiplier=3.0, residual_multiplier=0.3, attention_multiplier=0.7, logits_scaling=4.0
    ),
    "gpt_oss": lambda: GptOssConfig(
        **_GROUPED, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=4
    ),
    "mixtral": lambda: MixtralConfig(**_GROUPED, num_local_experts=4),
    "cohere": lambda: CohereConfig(**_GROUPED, logit_scale=0.25),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **_COMMON,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=32,
    ),
    "olmo2": lambda: Olmo2Config(**_GROUPED),
    "gptj": lambda: GPTJConfig(**_GPT2, n_positions=128, rotary_dim=4),
    "gpt_neo": lambda: GPTNeoConfig(
        **_SPECIAL,
        vocab_size=VOCAB_SIZE,
        hidden_size=_HIDDEN_SIZE,
        num_layers=NUM_LAYERS,
        num_heads=4,
        max_position_embeddings=128,
        attention_types=[[["global", "local"], 1], [["global"], 1]],
        window_size=4,
    ),
    "mpt": lambda: MptConfig(
        **_SPECIAL, vocab_size=VOCAB_SIZE, d_model=_HIDDEN_SIZE, n_heads=4, n_layers=NUM_LAYERS, max_seq_len=128
    ),
    "bert": lambda: BertConfig(**_COMMON),
}
"""Configurations by name. The last one is no decoder: every token sees every other."""

CAUSAL = tuple(name for name in FAMILIES if name != "bert")
WITH_ATTENTIONS = tuple(name for name in FAMILIES if name != "falcon_alibi")

OTHERS: dict[str, Callable[[], PreTrainedConfig]] = {
    "falcon_alibi": lambda: FalconConfig(**_FALCON, alibi=True, parallel_attn=False, multi_query=False),
    "lfm2": lambda: Lfm2Config(
        **_GROUPED | {"num_hidden_layers": 4}, layer_types=["conv", "full_attention", "conv", "full_attention"]
    ),
}
"""Configurations that only some tests take: lfm2 is a hybrid, with attention in its layers 1 and 3 only; transformers'
eager attention adds the ALiBi of falcon_alibi twice, so it runs in sdpa and gives no probabilities."""


FEW = ("gpt2", "llama", "gemma2", "falcon", "bert")
"""Families that every run of the tests looks at; the others are `slow`."""


def few_first(names: Iterable[str]) -> list[Any]:
    """Names for `parametrize`, of which only the FEW are tried by default."""
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in names]


def sites_of(name: str) -> tuple[str, ...]:
    """Every site that a family gives."""
    return tuple(site for site in SITES if site != "attentions" or name in WITH_ATTENTIONS)


def token_ids(length: int, start: int = 0) -> list[int]:
    """A text as ids, without those of special tokens; no two neighbours are alike."""
    return [3 + (start + i * (i + 7)) % (VOCAB_SIZE - 3) for i in range(length)]


def tiny_model(
    name: str, dtype: str = "float32", attention: str | None = "plain", *, seed: int = 1, **settings: Any
) -> Any:
    """A plain transformers model; the same weights for the same name, seed and settings of the configuration.

    Plain attention is eager, but sdpa where transformers' own eager attention is wrong. With `attention=None`
    transformers selects the implementation.
    """
    if attention == "plain":
        attention = "sdpa" if name == "falcon_alibi" else "eager"
    config = (FAMILIES | OTHERS)[name]()
    for setting, value in settings.items():
        setattr(config, setting, value)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape) * _SPREAD
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    _clean_generation_config(model, None)
    return model.to(getattr(torch, dtype))


def model_info(name: str, dtype: str = "float32") -> ModelInfo:
    """What is written down of a tiny model."""
    return ModelInfo(
        id=f"tiny/{name}",
        revision="none",
        variant="base",
        adapter=None,
        quantization=None,
        dtype=dtype,
        attention="eager",
    )


def proven(model: Any, name: str, sites: tuple[str, ...] | None = None, *, dtype: str = "float32") -> TracedModel:
    """A model that went through its proof at `sites`, by default at all that its family gives."""
    made = TracedModel(model, None, model_info(name, dtype))
    prove(made, sites_of(name) if sites is None else sites)
    return made


def traced(
    name: str, dtype: str = "float32", *, sites: tuple[str, ...] | None = None, seed: int = 1, **settings: Any
) -> TracedModel:
    """A proven tiny model, loaded as load_model does it: with the attention that transformers selects, but the plain
    one where the family does not use the AttentionInterface."""
    attention = "plain" if (FAMILIES | OTHERS)[name]().model_type in OFF_INTERFACE else None
    return proven(tiny_model(name, dtype, attention, seed=seed, **settings), name, sites, dtype=dtype)
