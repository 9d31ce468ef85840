"""Surface features of a question: what can be said of it without a model.

Rarity has two measures. Token ids, as they are often used, are rare in the order in which a tokenizer numbers its
tokens. Beside them stands what the tokenizer itself learned of frequency: for BPE the rank of the merge that makes a
token (merges are learned most frequent first; 0 for single bytes and characters), for Unigram a token's negative
log-probability, and for vocabularies that are only sorted (WordPiece, WordLevel) the rank in them.

The question's type is the first of `what where when who how why which` as a whole word, without regard to case; `whom`
and `whose` are `who`.

A negation is one of these as a whole word, without regard to case: not, no, never, none, nothing, nobody, neither, nor,
cannot, except, without, false, least (but not in "at least"); or a word that ends in n't. Parts of words (unable,
impossible) are none.

A hedge is one of these as a whole word, without regard to case: might, could, possibly, perhaps, probably, likely,
usually, often, sometimes, generally, typically, commonly, mainly, mostly, primarily, best, better, approximately,
roughly; or may, in small or in capital letters throughout ("May" is a month).
"""

import re
from typing import Any, NamedTuple

import msgspec

__all__ = ["Rarity", "Surface", "surface_of"]

_QUESTION_WORDS = {
    "what": "what",
    "where": "where",
    "when": "when",
    "who": "who",
    "whom": "who",
    "whose": "who",
    "how": "how",
    "why": "why",
    "which": "which",
}
_WORD = re.compile(r"[a-z]+")
_NEGATION = re.compile(
    r"\b(?:not|no|never|none|nothing|nobody|neither|nor|cannot|except|without|(?<!at )least|false)\b|n['’]t\b"
)
_HEDGE = re.compile(
    # a capital makes a month of "may"
    r"\b(?:may|MAY|(?i:might|could|possibly|perhaps|probably|likely|usually|often|sometimes|generally|typically|"
    r"commonly|mainly|mostly|primarily|best|better|approximately|roughly))\b"
)


class Surface(NamedTuple):
    """What can be said of a question without a model."""

    char_length: int
    """Characters."""
    token_length: int
    """Tokens."""
    question_type: str
    """First question word: `what where when who how why which`, or `other`."""
    has_negation: bool
    """Whether it holds a negation, as listed above."""
    has_ambiguity: bool
    """Whether it holds a hedge, as listed above."""
    token_rarity_mean: float
    """Mean token id."""
    token_rarity_max: float
    """Largest token id."""
    frequency_rarity_mean: float
    """Mean rarity by what the tokenizer learned of frequency."""
    frequency_rarity_max: float
    """Largest such rarity."""
    frequency_rarity_source: str
    """`bpe_merge_rank`, `unigram_nll` (nats) or `vocab_rank`."""


class Rarity:
    """Rarity of tokens by what a tokenizer learned of their frequency."""

    def __init__(self, tokenizer: Any) -> None:
        model = msgspec.json.decode(tokenizer.backend_tokenizer.to_str())["model"]
        kind = model["type"]
        self._by_id: dict[int, float] = {}
        if kind == "BPE":
            self.source = "bpe_merge_rank"
            prefix = model.get("continuing_subword_prefix") or ""
            for rank, merge in enumerate(model["merges"], start=1):
                left, right = merge.split(" ") if isinstance(merge, str) else merge
                token = model["vocab"].get(left + right.removeprefix(prefix))
                if token is not None:
                    self._by_id.setdefault(token, float(rank))
        elif kind == "Unigram":
            self.source = "unigram_nll"
            self._by_id = {token: -float(score) for token, (_, score) in enumerate(model["vocab"])}
        else:
            self.source = "vocab_rank"
            self._by_id = {token: float(token) for token in model["vocab"].values()}

    def __call__(self, token_id: int) -> float:
        """Rarity of a token: merge rank, nats, or rank in a sorted vocabulary, as `source` says.

        0 for one that the tokenizer's model did not learn: for `bpe_merge_rank` a byte or character, for every source
        a token added to it beside its vocabulary, as special tokens often are. For `vocab_rank` the rank is the token
        id, so that special tokens that stand first in the vocabulary have small ones.
        """
        return self._by_id.get(token_id, 0.0)


def surface_of(tokenizer: Any, rarity: Rarity, question: str) -> Surface:
    """The surface features of a question; rarities are 0 where the tokenizer makes no token of it."""
    ids = list(tokenizer(question, add_special_tokens=False, verbose=False).input_ids)
    rarities = [rarity(token) for token in ids]
    text = question.lower()
    words = (_QUESTION_WORDS[word] for word in _WORD.findall(text) if word in _QUESTION_WORDS)
    return Surface(
        char_length=len(question),
        token_length=len(ids),
        question_type=next(words, "other"),
        has_negation=bool(_NEGATION.search(text)),
        has_ambiguity=bool(_HEDGE.search(question)),
        token_rarity_mean=sum(ids) / len(ids) if ids else 0.0,
        token_rarity_max=float(max(ids, default=0)),
        frequency_rarity_mean=sum(rarities) / len(rarities) if ids else 0.0,
        frequency_rarity_max=max(rarities, default=0.0),
        frequency_rarity_source=rarity.source,
    )
