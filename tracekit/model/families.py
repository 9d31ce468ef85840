"""One row of data per architecture family, for what cannot be found generically.

Most architectures need no row: their attention goes through transformers' `AttentionInterface`, where every layer's
queries, keys, values and probabilities are handed over. The families here compute attention inside their own module.
Their probabilities are the second output of that module; Q/K/V are rebuilt from its projections with the module's own
methods. Such a model must be loaded with eager attention: its other paths return no probabilities. Where
transformers' eager path itself is wrong, the model keeps the other path and its probabilities are refused.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["OFF_INTERFACE", "Family", "QueryKeyValue"]


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
    """Paths of the projections inside the attention module, one fused or three; empty where Q/K/V cannot be given."""
    split: Callable[[nn.Module, Sequence[Tensor], Mapping[str, Any]], QueryKeyValue]
    """(attention module, first output of each projection, the module's keyword arguments) -> Q, K, V."""
    eager_fault: Callable[[Any], str | None] = lambda config: None
    """(configuration) -> what is wrong with transformers' own eager attention; such a model runs without it."""


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


def _split_heads(module: Any, outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> QueryKeyValue:
    """Three projections (B, T, HE), heads side by side."""
    heads = (*outputs[0].shape[:-1], module.num_attention_heads, -1)
    return QueryKeyValue(*(output.view(heads).transpose(1, 2) for output in outputs))


def _no_split(module: Any, outputs: Sequence[Tensor], kwargs: Mapping[str, Any]) -> QueryKeyValue:
    raise AssertionError(f"{type(module).__name__} has no projections to split")


def _falcon_fault(config: Any) -> str | None:
    return "its ALiBi bias is added twice, in the mask and in the attention" if config.alibi else None


OFF_INTERFACE: dict[str, Family] = {
    "bloom": Family("self_attention", ("query_key_value",), _split_bloom),
    "falcon": Family("self_attention", ("query_key_value",), _split_falcon, _falcon_fault),
    "gptj": Family("attn", (), _no_split),
    "gpt_neo": Family("attn", (), _no_split),
    "codegen": Family("attn", (), _no_split),
    "mpt": Family("attn", (), _no_split),
    "deberta-v2": Family("attention.self", ("query_proj", "key_proj", "value_proj"), _split_heads),
    "mpnet": Family("attention.attn", ("q", "k", "v"), _split_heads),
}
"""Families whose attention does not go through the AttentionInterface, by `model_type`."""
