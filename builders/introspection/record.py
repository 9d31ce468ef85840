"""The record of the task introspection: a multiple-choice question, in one of three passes."""

import msgspec

from builders.kit.choices import Choice
from tracekit.records import Record

__all__ = ["ConfidenceBin", "IntrospectionRecord"]


class ConfidenceBin(msgspec.Struct, frozen=True, kw_only=True):
    """A range of confidence that a letter stands for."""

    label: str
    """Its letter."""
    low: float
    """Lower edge, percent."""
    high: float
    """Upper edge, percent."""
    midpoint: float
    """What it counts for, percent."""

    def text(self) -> str:
        """The range in words: `under 5 %`, `5 to 10 %`, `over 90 %`."""
        low, high = f"{self.low:.12g}", f"{self.high:.12g}"
        if self.low <= 0:
            return f"under {high} %"
        return f"over {low} %" if self.high >= 100 else f"{low} to {high} %"


class IntrospectionRecord(Record, frozen=True, kw_only=True, tag="introspection"):
    """A question, what the model was asked about it, and how it spread its probability over the allowed answers.

    The allowed answers are the options' letters in the pass `mcq`, the bins' letters in the others. `logits` and all
    that follows from them are of the position `last_prompt_index`, which predicts the first generated token.
    """

    prompt_type: str
    """The pass: `mcq`, `self_confidence` or `other_confidence`."""
    question_text: str
    """The question."""
    subject: str | None
    """Its subject; null where the source has none."""
    options: list[Choice]
    """The four options, as shown."""
    option_order: list[int]
    """Number in the source of each option shown; 0 1 2 3 where they were not shuffled."""
    correct_answer_letter: str | None
    """Letter of the right option as shown; null for an unlabelled source."""
    model_name: str
    """Hub id or name of the model; `model.id`."""
    checkpoint_id: str
    """What was run: the model's revision, or its adapter, `name@revision`, and ` (merged)` where it was merged."""
    prompt_text: str
    """The user's message, before the chat template; `prompt` is what the model read."""
    instruction_sha256: str
    """SHA-256 of the pass's template and system message, before anything is filled in."""
    bins: list[ConfidenceBin]
    """Bins of the confidence passes; empty in `mcq`."""
    temperature: float
    """Temperature of the generated output; 1.0 where nothing was sampled."""
    top_p: float
    """Nucleus mass of the generated output."""
    max_new_tokens: int
    """Longest output, tokens."""
    output_text: str
    """What the model generated, reasoning left out."""
    finish_reason: str
    """`stop`: it ended by itself; `length`: it was cut at `max_new_tokens`."""
    token_logprobs: list[float]
    """Log-probability of each generated token under the raw model, nats."""
    token_entropies: list[float]
    """Entropy at each generated token, nats."""
    parsed_answer: str | None
    """Letter read from the output; null where none could be."""
    parse_failure: str | None
    """Why none could be; null where one was."""
    is_correct: bool | None
    """Pass `mcq`: whether `parsed_answer` is right; null where nothing parsed, and for an unlabelled source."""
    pred_letter: str
    """The most probable of the allowed answers."""
    is_pred_correct: bool | None
    """Pass `mcq`: whether `pred_letter` is right; null for an unlabelled source."""
    answer_spelling: str
    """Spelling by which letters are scored: `A`, or ` A` with a space before; the one with more probability."""
    answer_scoring: str
    """`token` where every letter is one token, else `sequence`: log-probabilities summed over its tokens."""
    answer_token_ids: list[list[int]]
    """Token ids of each allowed answer as it follows the prompt."""
    logits: list[float]
    """Raw logit of each allowed answer; with `answer_scoring` sequence its summed log-probability."""
    logprobs: list[float]
    """Log-probability of each allowed answer over the whole vocabulary, nats."""
    probs: list[float]
    """Softmax of `logits`: the distribution over the allowed answers."""
    allowed_mass: float
    """Probability of all allowed answers together in the spelling that is scored."""
    other_spelling_mass: float
    """The same in the other spelling; 0.0 where the tokenizer has but one."""
    entropy: float
    """Entropy of `probs`, nats."""
    logit_margin: float | None
    """Pass `mcq`: logit of the right option minus that of the best wrong one; null for an unlabelled source."""
    answer_token_index: int | None
    """Pass `mcq`: position of the parsed letter in `token_ids`; null where nothing parsed."""
    confidence_token_index: int | None
    """Confidence passes: the same."""
    self_confidence: float | None
    """Pass `self_confidence`: expected percent, the bins' midpoints weighted by `probs`; null in other passes."""
    other_confidence: float | None
    """Pass `other_confidence`: the same."""
    char_length: int
    """Characters of the question."""
    token_length: int
    """Tokens of the question."""
    question_type: str
    """First question word: `what where when who how why which`, or `other`."""
    has_negation: bool
    """Whether the question holds a negation."""
    has_ambiguity: bool
    """Whether the question holds a hedge (may, usually, best, ...), so that several options may be arguable."""
    token_rarity_mean: float
    """Mean token id of the question: the field's rough measure, higher is rarer."""
    token_rarity_max: float
    """Largest token id of the question."""
    frequency_rarity_mean: float
    """Mean rarity of the question's tokens by what the tokenizer learned of their frequency."""
    frequency_rarity_max: float
    """Largest such rarity."""
    frequency_rarity_source: str
    """`bpe_merge_rank`: merges before the token's own; `unigram_nll`: negative log-probability, nats; `vocab_rank`."""
    num_layers: int
    """Number of transformer blocks."""
