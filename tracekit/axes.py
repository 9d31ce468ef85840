"""The one legend of axes: which letter stands for what, everywhere in tracekit.

Variable names in array code carry these letters as a suffix (`probs_HTT`), tensor entries in records
carry them as `axes`.
"""

__all__ = ["LEGEND"]

LEGEND = {
    "L": "layers (hidden_states: L+1, the embeddings are index 0)",
    "T": "tokens: the kept positions of one sample",
    "S": "packed attention: the kept query rows one after the other",
    "H": "attention heads",
    "K": "key/value heads (grouped-query attention has fewer than H)",
    "E": "size of one head",
    "D": "d_model, the width of the residual stream",
    "V": "vocabulary",
    "C": "choices of a multiple-choice question",
    "k": "the k most likely tokens",
    "W": "kept weights of sparse attention, query row after query row",
}
