"""Attention matrices as edges."""

import numpy as np
import pytest

from tracekit.errors import ConfigError
from tracekit.read.graphs import attention_edges

WEIGHTS = np.array([[1.0, 0.0, 0.0], [0.4, 0.6, 0.0], [0.2, 0.2, 0.6]], np.float32)


def _edges(weights: np.ndarray, **options: float) -> list[tuple[int, int, float]]:
    """(source, target, weight) of each edge."""
    index, weight = attention_edges(weights, np.arange(len(weights)), **options)
    return [(int(s), int(t), round(float(w), 3)) for s, t, w in zip(*index, weight, strict=True)]


def test_every_weight_that_is_not_zero_is_an_edge_from_key_to_query() -> None:
    assert _edges(WEIGHTS) == [(0, 0, 1.0), (0, 1, 0.4), (1, 1, 0.6), (0, 2, 0.2), (1, 2, 0.2), (2, 2, 0.6)]


def test_top_k_keeps_the_strongest_of_each_query_the_earlier_of_equals() -> None:
    assert _edges(WEIGHTS, top_k=1) == [(0, 0, 1.0), (1, 1, 0.6), (2, 2, 0.6)]
    assert _edges(WEIGHTS, top_k=2)[-2:] == [(0, 2, 0.2), (2, 2, 0.6)]
    assert _edges(WEIGHTS, top_k=99) == _edges(WEIGHTS)


def test_threshold_keeps_what_is_at_least_that() -> None:
    assert _edges(WEIGHTS, threshold=0.6) == [(0, 0, 1.0), (1, 1, 0.6), (2, 2, 0.6)]
    assert _edges(WEIGHTS, threshold=0.3, top_k=2) == [(0, 0, 1.0), (0, 1, 0.4), (1, 1, 0.6), (2, 2, 0.6)]
    assert _edges(WEIGHTS, threshold=2.0) == []


def test_rows_stand_for_the_positions_they_were_kept_from() -> None:
    edges = attention_edges(WEIGHTS[1:].astype(np.float16), np.array([1, 2]), top_k=1)
    assert edges.edge_index.tolist() == [[1, 2], [1, 2]]
    assert edges.edge_index.dtype == np.int64
    assert edges.edge_weight.dtype == np.float32


def test_no_rows_give_no_edges() -> None:
    edges = attention_edges(np.zeros((0, 5), np.float32), np.arange(0), top_k=2, threshold=0.1)
    assert edges.edge_index.shape == (2, 0)
    assert edges.edge_weight.shape == (0,)


def test_weights_that_are_no_numbers_are_no_strong_edges() -> None:
    damaged = np.array([[np.nan, 0.5]], np.float32)
    assert _edges(damaged, threshold=0.1) == [(1, 0, 0.5)]


def test_top_k_of_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="top_k is 0, expected 1 or more; leave it out to keep every edge"):
        attention_edges(WEIGHTS, np.arange(3), top_k=0)
