"""Attention as a graph: tokens are nodes, attention weights are edges.

    edge_index[0]   source: the key token, where information comes from
    edge_index[1]   target: the query token, where it goes

This is PyTorch Geometric's order, so `Data(x=g.x, edge_index=g.edge_index, edge_weight=g.edge_weight)` works with the
torch form. Edges stand by target, then source. This module knows numpy and nothing of files.
"""

from typing import NamedTuple

import numpy as np

from tracekit.errors import ConfigError

__all__ = ["Edges", "Graph", "attention_edges"]


class Edges(NamedTuple):
    """The edges of one attention matrix."""

    edge_index: np.ndarray
    """int64 (2, E): source (key) and target (query) position of each edge."""
    edge_weight: np.ndarray
    """float32 (E,): attention weight."""


class Graph(NamedTuple):
    """One layer's attention over one sample."""

    edge_index: np.ndarray
    """int64 (2, E): source (key) and target (query) token of each edge."""
    edge_weight: np.ndarray
    """float32 (E,): attention weight, of one head or the mean of all."""
    x: np.ndarray | None
    """(T, D): the layer's input, `hidden_states[layer]`; None where it is not stored for every token."""
    num_nodes: int
    """Tokens of the sample."""
    tokens: list[str]
    """The tokens, as the tokenizer writes them."""
    layer: int
    """Number of the layer."""


def attention_edges(
    weights_QT: np.ndarray, query_positions: np.ndarray, *, top_k: int | None = None, threshold: float | None = None
) -> Edges:
    """Edges of an attention matrix (queries, keys) whose rows are these query positions.

    Weights of exactly zero are no edges. `top_k` keeps the strongest of each query row (ties: the earlier key),
    `threshold` the weights that are at least that; both together keep what passes both.

    Raises:
        ConfigError: `top_k` is less than 1.
    """
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k is {top_k}, expected 1 or more; leave it out to keep every edge")
    weights_QT = weights_QT.astype(np.float32)
    is_kept = weights_QT != 0
    if threshold is not None:
        is_kept &= weights_QT >= threshold
    if top_k is not None:
        strongest = np.argsort(-weights_QT, axis=1, kind="stable")[:, :top_k]
        is_strongest = np.zeros_like(is_kept)
        np.put_along_axis(is_strongest, strongest, True, axis=1)
        is_kept &= is_strongest
    query, key = np.nonzero(is_kept)
    edge_index = np.stack([key, query_positions[query]]).astype(np.int64)
    return Edges(edge_index, weights_QT[query, key])
