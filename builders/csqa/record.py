"""The record of the task csqa: a question with its options as a prompt."""

from builders.kit.choices import ChoiceRecord

__all__ = ["CsqaRecord"]


class CsqaRecord(ChoiceRecord, frozen=True, kw_only=True, tag="csqa"):
    """A question with its options as a prompt, and how likely the model finds each option."""

    letter_token_ids: list[list[int]]
    """Token ids by which each option's letter is scored, as they follow the prompt."""
    letter_logprobs: list[float]
    """Log-probability of each letter after the prompt, summed over its tokens, nats."""
    letter_probs: list[float]
    """Softmax of `letter_logprobs`: the distribution over the options that `pred_idx`, `entropy`, `margin` are of."""
    text_token_ids: list[list[int]]
    """Token ids of each option's text, as they follow the prompt."""
    text_logprobs: list[float]
    """Log-probability of each option's text after the prompt, summed over its tokens, nats."""
    text_logprobs_normalized: list[float]
    """The same divided by the number of its tokens."""
    pred_idx_by_text: int
    """Option with the highest `text_logprobs_normalized`."""
    is_correct_by_text: bool | None
    """Whether that is the right one; null for an unlabelled split."""
