"""Made-up samples of realistic shape: a 30-layer model of width 576 with 9 heads, about 120 tokens, fp16, 8 MB each."""

from collections.abc import Sequence

import numpy as np

from tests.datasets_for_tests import MODEL, Made, make_record
from tracekit.tensors import TensorSpec, num_packed, pack_indices

__all__ = ["NUM_HIDDEN", "make_samples", "total_bytes"]

NUM_LAYERS, NUM_HEADS, D_MODEL = 30, 9, 576
NUM_HIDDEN = NUM_LAYERS + 1
"""Layers of hidden_states."""
_TOKENS = (100, 140)
_SPLIT = "train"


def make_samples(count: int, *, seed: int = 41) -> list[Made]:
    """Samples with hidden states (31, T, 576) and packed causal attention (30, 9, T(T+1)/2)."""
    rng = np.random.default_rng(seed)
    return [_sample(rng, f"{number:06d}", int(rng.integers(*_TOKENS))) for number in range(count)]


def total_bytes(samples: Sequence[Made]) -> int:
    """Bytes of all tensors."""
    return sum(array.nbytes for sample in samples for array in sample.stored.values())


def _sample(rng: np.random.Generator, key: str, num_tokens: int) -> Made:
    hidden = rng.standard_normal((NUM_HIDDEN, num_tokens, D_MODEL), dtype=np.float32).astype(np.float16)
    stored = {"hidden_states": hidden, "attentions": _attention(rng, num_tokens)}
    specs = [_spec("hidden_states", hidden, ["L", "T", "D"], "dense", num_tokens)]
    specs.append(_spec("attentions", stored["attentions"], ["L", "H", "S"], "causal", num_tokens))
    record = make_record(
        key,
        specs,
        num_tokens=num_tokens,
        prompt_length=num_tokens - 16,
        has_answer=True,
        question_id=f"q{key}",
        split=_SPLIT,
        model=MODEL,
    )
    return Made(record, stored, {})


def _attention(rng: np.random.Generator, num_tokens: int) -> np.ndarray:
    """Rows that sum to one over the keys before them, packed."""
    weights = np.exp(2 * rng.standard_normal((NUM_LAYERS, NUM_HEADS, num_tokens, num_tokens), dtype=np.float32))
    weights = np.tril(weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    rows = np.arange(num_tokens)
    packed = weights.reshape(NUM_LAYERS, NUM_HEADS, -1)[..., pack_indices(rows, num_tokens)]
    assert packed.shape[-1] == num_packed(rows), packed.shape
    return np.ascontiguousarray(packed, dtype=np.float16)  # picking values leaves another memory order


def _spec(name: str, array: np.ndarray, axes: list[str], layout: str, num_tokens: int) -> TensorSpec:
    return TensorSpec(
        name=name,
        dtype=str(array.dtype),
        shape=list(array.shape),
        axes=axes,
        layers=list(range(len(array))),
        positions=[[0, num_tokens]],
        layout=layout,
        num_keys=num_tokens if layout == "causal" else 0,
        choice_offsets=[],
    )
