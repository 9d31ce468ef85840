"""One row of data per architecture family, for what cannot be found generically.

Most architectures need no row: their attention goes through transformers' `AttentionInterface`, where every layer's
queries, keys, values and probabilities are handed over. The families here compute attention inside their own module.
Their probabilities are among the outputs of that module; Q/K/V are rebuilt from its projections with the module's own
methods. Such a model must be loaded with eager attention: its other paths return no probabilities. Where
transformers' eager path itself is wrong, the model keeps the other path and its probabilities are refused.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["COMPARES_NAMES", "NOT_REPEATABLE", "OFF_INTERFACE", "Family", "QueryKeyValue"]


class QueryKeyValue(NamedTuple):
    """Queries (B, H, T, E), keys and values (B, K, T, E) as attention sees them."""

    query: Tensor
    key: Tensor
    value: Tensor


class Family(NamedTuple):
    """How to reach inside an attention module that does not use the AttentionInterface."""

    attention: str
    """Path of the attention module inside a block."""
    projections: tuple[str, ...]
    """Paths of the projections inside the attention module, one fused or three."""
    split: Callable[[nn.Module, Sequence[Tensor], Mapping[str, Any]], QueryKeyValue]
    """(attention module, first output of each projection, the module's arguments by name) -> Q, K, V."""
    eager_fault: Callable[[Any], str | None] = lambda config: None
    """(configuration) -> what is wrong with transformers' own eager attention; such a model runs without it."""
    place: int = 1
    """Where in the attention module's output the probabilities are."""


def _split_bloom(module: Any, outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> QueryKeyValue:
    return QueryKeyValue(*module._reshape(outputs[0]))


def _split_falcon(module: Any, outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> QueryKeyValue:
    query, key, value = (part.transpose(1, 2) for part in module._split_heads(outputs[0]))
    if module.new_decoder_architecture:  # repeated for every query head of a group
        group = module.num_heads // module.num_kv_heads
        key, value = key[:, ::group], value[:, ::group]
    if kwargs.get("alibi") is None:
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        query, key = rotate(query, key, *kwargs["position_embeddings"])
    return QueryKeyValue(query, key, value)


def _num_heads(module: Any) -> int:
    """Number of heads, under whichever name the module keeps it."""
    names = ("num_attention_heads", "num_heads", "num_attn_heads", "n_head", "n_heads")
    return next(getattr(module, name) for name in names if hasattr(module, name))


def _split_heads(module: Any, outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> QueryKeyValue:
    """Projections (B, T, HE), heads side by side; one that is fused is queries, then keys, then values."""
    parts = outputs if len(outputs) == 3 else outputs[0].chunk(3, dim=-1)
    heads = (*parts[0].shape[:-1], _num_heads(module), -1)
    return QueryKeyValue(*(part.view(heads).transpose(1, 2) for part in parts))


def _split_scaled(module: Any, outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> QueryKeyValue:
    query, key, value = _split_heads(module, outputs, kwargs)
    return QueryKeyValue(query * module.scaling, key, value)


def _split_gpt_neo(module: Any, outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> QueryKeyValue:
    return _split_heads(module.attention, outputs, kwargs)


def _split_mpt(module: Any, outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> QueryKeyValue:
    limit = module.clip_qkv
    return _split_heads(module, [outputs[0].clamp(-limit, limit) if limit else outputs[0]], kwargs)


def _rotate_some(module: Any, query: Tensor, key: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    """GPT-J's rotary embedding of (B, H, T, E), on the first `rotary_dim` features."""
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
    sin, cos = sines.chunk(2, dim=-1)
    size = module.rotary_dim or query.shape[-1]

    def turned(tensor: Tensor) -> Tensor:
        tensor = tensor.transpose(1, 2)
        return torch.cat([rotate(tensor[..., :size], sin, cos), tensor[..., size:]], dim=-1).transpose(1, 2)

    return turned(query), turned(key)


def _split_gptj(module: Any, outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> QueryKeyValue:
    query, key, value = _split_heads(module, outputs, kwargs)
    sines = module.embed_positions.to(query.device)[kwargs["position_ids"]].to(key.dtype)
    return QueryKeyValue(*_rotate_some(module, query, key, sines), value)


def _split_codegen(module: Any, outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> QueryKeyValue:
    """Fused in four groups of heads, each with queries, values and keys."""
    grouped = outputs[0].unflatten(-1, (4, 3, -1, module.head_dim))  # (B, T, 4, 3, heads of a group, E)
    query, value, key = (part.flatten(2, 3).transpose(1, 2) for part in grouped.unbind(3))
    sines = module.embed_positions.to(query.device)[kwargs["position_ids"]]
    return QueryKeyValue(*_rotate_some(module, query, key, sines), value)


def _split_gpt_neox_japanese(module: Any, outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> QueryKeyValue:
    """Fused head by head; the first `rotary_ndims` features are turned."""
    heads = outputs[0].unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)
    query, key, value = heads.chunk(3, dim=-1)
    rotate, size = sys.modules[type(module).__module__].apply_rotary_pos_emb, module.rotary_ndims
    turned = rotate(query[..., :size], key[..., :size], *kwargs["position_embeddings"])
    query, key = (torch.cat([a, b[..., size:]], dim=-1) for a, b in zip(turned, (query, key), strict=True))
    return QueryKeyValue(query, key, value)


def _split_roformer(module: Any, outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> QueryKeyValue:
    query, key, value = _split_heads(module, outputs, kwargs)
    rotate, sines = module.apply_rotary_position_embeddings, kwargs["sinusoidal_pos"]
    if module.rotary_value:
        return QueryKeyValue(*rotate(sines, query, key, value))
    query, key = rotate(sines, query, key)
    return QueryKeyValue(query, key, value)


def _split_deberta(module: Any, outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> QueryKeyValue:
    """Fused head by head, with biases of their own; queries are scaled before they meet the keys."""
    query, key, value = module.transpose_for_scores(outputs[0]).chunk(3, dim=-1)
    query_bias, value_bias = (module.transpose_for_scores(bias[None, None]) for bias in (module.q_bias, module.v_bias))
    scale = math.sqrt(query.shape[-1] * (1 + len(module.pos_att_type)))
    return QueryKeyValue((query + query_bias) / scale, key, value + value_bias)


def _falcon_fault(config: Any) -> str | None:
    return "its ALiBi bias is added twice, in the mask and in the attention" if config.alibi else None


_PROJ = ("q_proj", "k_proj", "v_proj")
_NAMES = ("query", "key", "value")

OFF_INTERFACE: dict[str, Family] = {
    "bloom": Family("self_attention", ("query_key_value",), _split_bloom),
    "falcon": Family("self_attention", ("query_key_value",), _split_falcon, _falcon_fault),
    "gptj": Family("attn", _PROJ, _split_gptj),
    "gpt_neo": Family("attn", tuple(f"attention.{name}" for name in _PROJ), _split_gpt_neo),
    "codegen": Family("attn", ("qkv_proj",), _split_codegen),
    "mpt": Family("attn", ("Wqkv",), _split_mpt),
    "openai-gpt": Family("attn", ("c_attn",), _split_heads),
    "gpt_neox_japanese": Family("attention", ("query_key_value",), _split_gpt_neox_japanese),
    "xglm": Family("self_attn", _PROJ, _split_scaled),
    "mvp": Family("self_attn", _PROJ, _split_scaled),
    "trocr": Family("self_attn", _PROJ, _split_scaled),
    "megatron-bert": Family("attention.self", _NAMES, _split_heads),
    "rembert": Family("attention.self", _NAMES, _split_heads),
    "git": Family("attention.self", _NAMES, _split_heads),
    "luke": Family("attention.self", _NAMES, _split_heads, place=2),
    "roformer": Family("attention.self", _NAMES, _split_roformer),
    "deberta": Family("attention.self", ("in_proj",), _split_deberta),
    "deberta-v2": Family("attention.self", ("query_proj", "key_proj", "value_proj"), _split_heads),
    "mpnet": Family("attention.attn", ("q", "k", "v"), _split_heads),
}
"""Families whose attention does not go through the AttentionInterface, by `model_type`."""

COMPARES_NAMES = frozenset(
    {
        "axk2",
        "deepseek_v32",
        "dots3_note_text",
        "glm_moe_dsa",
        "hy_v4",
        "minimax_m3_vl_text",
        "mistral_large4",
    }
)
"""Families that mask what their indexer left out only where the attention implementation is called eager or sdpa, by
`model_type`: under another name they would attend to everything."""

NOT_REPEATABLE = {"reformer": "the hashes of its LSH attention are drawn anew in every pass"}
"""Why a family gives something else each time it runs, by `model_type`; it cannot be traced."""
