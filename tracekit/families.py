"""One row of data per architecture family, for what cannot be found generically.

Most architectures need no row: their attention goes through transformers' `AttentionInterface`, where every layer's
queries, keys, values and probabilities are handed over. The families here compute attention inside their own module.
Their probabilities are the second output of that module; Q/K/V are rebuilt from the fused projection with the
module's own methods. Such a model must be loaded with eager attention: its other paths return no probabilities. Where
transformers' eager path itself is wrong, the model keeps the other path and its probabilities are refused.
"""

import sys
from collections.abc import Callable, Mapping
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
    fused: str | None
    """Path of the fused projection inside the attention module; None where Q/K/V cannot be given."""
    split: Callable[[nn.Module, Tensor, Mapping[str, Any]], QueryKeyValue] | None
    """(attention module, output of the fused projection, the module's keyword arguments) -> Q, K, V."""
    eager_fault: Callable[[Any], str | None] = lambda config: None
    """(configuration) -> what is wrong with transformers' own eager attention; such a model runs without it."""


def _split_bloom(module: Any, fused: Tensor, kwargs: Mapping[str, Any]) -> QueryKeyValue:
    return QueryKeyValue(*module._reshape(fused))


def _split_falcon(module: Any, fused: Tensor, kwargs: Mapping[str, Any]) -> QueryKeyValue:
    query, key, value = (part.transpose(1, 2) for part in module._split_heads(fused))
    if module.new_decoder_architecture:  # repeated for every query head of a group
        group = module.num_heads // module.num_kv_heads
        key, value = key[:, ::group], value[:, ::group]
    if kwargs.get("alibi") is None:
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        query, key = rotate(query, key, *kwargs["position_embeddings"])
    return QueryKeyValue(query, key, value)


def _falcon_fault(config: Any) -> str | None:
    return "its ALiBi bias is added twice, in the mask and in the attention" if config.alibi else None


OFF_INTERFACE: dict[str, Family] = {
    "bloom": Family("self_attention", "query_key_value", _split_bloom),
    "falcon": Family("self_attention", "query_key_value", _split_falcon, _falcon_fault),
    "gptj": Family("attn", None, None),
    "gpt_neo": Family("attn", None, None),
    "codegen": Family("attn", None, None),
    "mpt": Family("attn", None, None),
}
"""Families whose attention does not go through the AttentionInterface, by `model_type`."""
