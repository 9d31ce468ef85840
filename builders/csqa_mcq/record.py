"""The record of the task csqa_mcq: a question whose options an encoder scores."""

from builders.kit.choices import ChoiceRecord

__all__ = ["CsqaMcqRecord"]


class CsqaMcqRecord(ChoiceRecord, frozen=True, kw_only=True, tag="csqa_mcq"):
    """A question with its options, each read together with the question by an encoder.

    `token_ids`, `tokens` and `token_offsets` hold the options' sequences one after the other, split at
    `choice_offsets`; offsets are characters of `prompt`, where they stand one a line as `question option`.
    """

    choice_offsets: list[int]
    """Where each option's sequence starts in `token_ids`, and the end."""
    choice_logits: list[float]
    """The head's logit of each option."""
    choice_probs: list[float]
    """Softmax of the logits: the distribution that `pred_idx`, `entropy`, `margin` are of."""
    is_head_fresh: bool
    """True where the checkpoint has no multiple-choice head, so it was drawn at random and predictions mean nothing."""
    token_type_ids: list[int] | None
    """Segment of each token (0 question, 1 option); null for models without segments."""
