"""Length rules: what the longest row of a batch decides for the other rows.

    rope type      the longest row decides                      limit, in tokens
    longrope       short or long factors                        original_max_position_embeddings
    dynamic        the base of all frequencies (NTK scaling)    max_position_embeddings
    (Doge)         which of equal keys a dynamic mask keeps     keep_window_size

Rows within the limit do not influence one another, so they run together. Every longer row runs alone. The proof of a
model measures whether this is enough (tracekit.model.proof); where it is not, the limit is 0.

Dynamic scaling keeps the frequencies of a long pass until a short pass comes. `RotaryState` puts them back, so that
every pass begins as it does in a model that was just loaded.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RotaryState", "groups_within", "length_limit", "longest_text", "rope_parameters", "windows"]

_WINDOW_NAMES = r"window|chunk|local|sliding|block_size|index_topk|budget|compress|floor_scale"


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Rotary parameters of a text configuration, one for each type of layer; none where nothing is rotated."""
    whole = getattr(config, "rope_parameters", None) or {}
    nested = [part for part in whole.values() if isinstance(part, dict)]
    return nested or [whole] * bool(whole)


def length_limit(config: Any) -> int | None:
    """Longest row, in tokens, that may run beside others; None where the configuration has no length rule."""
    text = config.get_text_config()
    return min(_limits(text), default=None)


def _limits(config: Any) -> Iterator[int]:
    for rope in rope_parameters(config):
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind == "longrope":
            yield rope.get("original_max_position_embeddings") or config.max_position_embeddings
        elif "dynamic" in kind:
            yield config.max_position_embeddings
    if (window := getattr(config, "keep_window_size", None)) is not None:
        yield window


def longest_text(config: Any) -> int | None:
    """Longest text, in tokens, that a model computes as it computes a short one; None where there is no such limit.

    BigBird's block-sparse attention becomes full attention for good with the first text that is too short for it.
    """
    text = config.get_text_config()
    is_sparse = getattr(text, "attention_type", None) == "block_sparse"
    return (5 + 2 * text.num_random_blocks) * text.block_size if is_sparse else None


def windows(config: Any) -> list[int]:
    """Lengths, in tokens, at which a model begins to compute in another way: windows, chunks and the like of any part,
    told by the names of its settings. Some numbers among them may be something else."""
    settings: dict[str, Any] = config.get_text_config().to_dict()
    named = [value for name, value in settings.items() if re.search(_WINDOW_NAMES, name)]
    return sorted({number for value in named for number in _numbers(value) if number > 1})


def _numbers(value: Any) -> Iterator[int]:
    """Whole numbers of a setting, of lists and dictionaries as well."""
    if isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _numbers(one)
    elif type(value) is int:
        yield value


def groups_within(lengths: Sequence[int], limit: int | None) -> list[list[int]]:
    """Rows that may run together, by their numbers: all within the limit, and each longer row alone."""
    if limit is None:
        return [[*range(len(lengths))]]
    short = [row for row, length in enumerate(lengths) if length <= limit]
    return [short] * bool(short) + [[row] for row, length in enumerate(lengths) if length > limit]


class RotaryState:
    """What the rotary modules of a model compute with, as it was when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [
            (module, _tensors(module), {name: v for name, v in vars(module).items() if type(v) in (int, float)})
            for module in model.modules()
            if any(name.endswith("inv_freq") for name in module._buffers)
        ]

    @torch.inference_mode(False)  # transformers writes into these tensors, outside of inference mode too
    def restore(self) -> None:
        """Put it back."""
        for module, tensors, numbers in self._kept:
            for name in [name for name in vars(module) if name.endswith("max_seq_len_cached") and name not in numbers]:
                delattr(module, name)
            for name, value in numbers.items():
                setattr(module, name, value)
            for name, value in tensors.items():
                module._buffers[name] = value.clone()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module._buffers.items() if value is not None}
