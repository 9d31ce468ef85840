"""A tiny configuration of any architecture that transformers has: every field that is a size is made small.

config = tiny_config("deepseek_v3")           layers of every kind that the family mixes, windows that bite

Families in which sizes depend on one another have a row in OVERRIDES.
"""

import dataclasses
from itertools import cycle, islice
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

__all__ = ["NUM_LAYERS", "OVERRIDES", "VOCAB_SIZE", "tiny_config"]

VOCAB_SIZE = 97
NUM_LAYERS = 4
_WIDTH = 32
_INNER = 48
_POSITIONS = 128
_WINDOW = 5

_VALUES: tuple[tuple[int, str], ...] = (
    (
        VOCAB_SIZE,
        """vocab_size vocab_size_per_layer_input entity_vocab_size decoder_vocab_size audio_vocab_size
        shape_vocab_size pronunciation_vocab_size unpadded_vocab_size""",
    ),
    (
        NUM_LAYERS,
        """num_hidden_layers n_layer n_layers num_layers num_blocks encoder_layers decoder_layers
        num_encoder_layers num_decoder_layers""",
    ),
    (
        _WIDTH,
        """hidden_size d_model n_embd dim emb_dim embedding_size embedding_dim input_embedding_size
        output_embedding_size attention_hidden_size lru_width entity_emb_size word_embed_proj_dim backbone_hidden_size
        router_hidden_size pronunciation_embed_dim shape_embed_dim d_latents projection_dim prediction_head_size
        true_hidden_size ple_embed_dim""",
    ),
    (
        _INNER,
        """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size hidden_dim d_inner dff dim_ff
        moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size intermediate_size_mlp
        feed_forward_size dense_intermediate_size shared_intermediate_size shared_experts_intermediate_size
        moe_shared_expert_intermediate_size prefix_dense_intermediate_size""",
    ),
    (
        4,
        """num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads num_experts num_local_experts n_routed_experts
        moe_num_experts mamba_n_heads mamba_num_heads linear_num_value_heads linear_num_heads swa_num_attention_heads
        num_buckets position_buckets
        zero_expert_num num_hash hash_code_len index_topk block_size index_block_size""",
    ),
    (
        2,
        """num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok moe_topk
        moe_k top_k_experts num_experts_per_token num_shared_experts index_topk_blocks n_group topk_group n_groups
        mamba_n_groups num_global_key_value_heads indexer_kv_heads""",
    ),
    (
        8,
        """head_dim d_head attention_head_dim dim_head kv_channels qk_rope_head_dim qk_nope_head_dim index_head_dim
        indexer_head_dim swa_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim global_head_dim d_rel
        mamba_head_dim state_size ssm_state_size mamba_d_state rotary_dim chunk_size mamba_chunk_size
        attention_head_size hidden_size_per_layer_input laurel_rank gated_norm_rank adapter_rank hc_lowrank
        mamba_d_head relative_attention_num_buckets position_bias_num_buckets query_pre_attn_scalar
        lsh_attn_chunk_length local_attn_chunk_length""",
    ),
    (12, "v_head_dim swa_v_head_dim"),
    (32, "index_n_heads indexer_n_heads"),
    (16, "q_lora_rank kv_lora_rank o_lora_rank embedding_rank rel_extent position_bias_max_distance time_step_rank"),
    (
        _WINDOW,
        """sliding_window sliding_window_size attention_window_size local_attention window_size
        local_attention_window_len keep_window_size attention_chunk_size""",
    ),
    (
        _POSITIONS,
        """max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions
        max_source_positions original_max_position_embeddings position_bias_max_distance""",
    ),
    (1, "first_k_dense_replace num_dense_layers moe_layer_start_index bos_token_id num_kv_shared_layers"),
    (0, "pad_token_id"),
)
_BY_NAME = {name: value for value, names in _VALUES for name in names.split()}
_WHERE_UNSET = ("head_dim", "q_lora_rank", "num_key_value_heads", "num_experts_per_tok", "n_group", "topk_group")
"""Sizes that are given where the family leaves them open, too."""

_HYBRID = ["linear_attention", "full_attention"] * (NUM_LAYERS // 2)
_ZAMBA = ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"]

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": 3},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": _ZAMBA,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": _ZAMBA},
    "esm": {"vocab_size": VOCAB_SIZE, "pad_token_id": 1, "mask_token_id": 2},
    "esmc": {"num_key_value_heads": 4, "vocab_size": VOCAB_SIZE},
    "mpnet": {"relative_attention_num_buckets": 32},
    "blt": {
        "encoder_config": {"hidden_size_global": _WIDTH},
        "decoder_config": {"hidden_size_global": _WIDTH},
        "encoder_hash_byte_group_vocab": 50,
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 2.0},
        "ffn_config": {"moe_num_experts": 4},
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "sliding_window": _WINDOW,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gemma4_unified": {"vision_config": {"mm_embed_dim": _WIDTH, "mm_posemb_size": 8, "output_proj_dims": _WIDTH}},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 50,
        "split_ngram_parts": 2,
    },
    "neomme": {"head_dim": 16},
    "zaya": {"router_hidden_size": 16},
    "reformer": {"axial_pos_shape": (8, 16), "axial_pos_embds_dim": (8, 24), "is_decoder": True},
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
}
"""By model type, what is set in another way; nested for parts."""


def tiny_config(model_type: str, **settings: Any) -> PreTrainedConfig:
    """The configuration of a model type with small sizes; `settings` go before the table and the rules."""
    kind: Any = CONFIG_MAPPING[model_type]
    return _tiny(kind, OVERRIDES.get(model_type, {}) | settings)


def _tiny(kind: Any, settings: dict[str, Any]) -> PreTrainedConfig:
    values: dict[str, Any] = {}
    names = {field.name: field for field in dataclasses.fields(kind)}
    for name, field in names.items():
        small = _BY_NAME.get(name)
        default = field.default if field.default is not dataclasses.MISSING else None
        is_size = isinstance(default, int) and not isinstance(default, bool)
        if small is not None and (is_size or (default is None and name in _WHERE_UNSET)):
            values[name] = small if not is_size or name == "pad_token_id" else min(small, default) or default
        elif name.endswith(("_token_id", "_token_index")) and is_size:
            values[name] = 2 + len(name) % 60
        if name == "eos_token_id":
            values[name] = 2
        if name.endswith("_logit_softcapping") and default is not None:
            values[name] = 1.5
    if "kv_lora_rank" in names and "num_key_value_heads" in names:  # latent attention has keys for every head
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name, part in kind.sub_configs.items():
        if name not in settings or isinstance(settings[name], dict):
            values[name] = _part(kind, name, part, settings.get(name, {}))
    values |= {name: value for name, value in settings.items() if name not in kind.sub_configs or value is None}
    config = kind(**values)
    mixed = _mixed_lists(kind, config, names.keys() - settings.keys())
    return kind(**values | mixed) if mixed else config


def _part(kind: Any, name: str, part: Any, settings: dict[str, Any]) -> Any:
    """A part of a configuration, such as its text model."""
    if part is AutoConfig:
        own = getattr(kind(), name)
        if own is None:
            return None
        part = type(own)
    return _tiny(part, OVERRIDES.get(part.model_type, {}) | settings)


def _mixed_lists(kind: Any, config: Any, names: Any) -> dict[str, Any]:
    """Lists of what each layer is, so that every kind of layer of the full size is there."""
    full = kind()
    mixed: dict[str, Any] = {}
    for name in sorted(names):
        whole, own = (
            vars(full).get(name),
            vars(config).get(name),
        )  # some attributes refuse to be read for all layers at once
        is_kinds = isinstance(whole, list | tuple) and whole and all(isinstance(x, str) for x in whole)
        if not is_kinds or not isinstance(own, list | tuple) or {*own} == {*whole}:
            continue
        if len(whole) == vars(full).get("num_hidden_layers"):
            mixed[name] = list(islice(cycle(dict.fromkeys(whole)), len(own)))
    return mixed
