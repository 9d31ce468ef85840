"""The records of the tasks csqa (decoder prompts) and csqa_mcq (encoders with a multiple-choice head)."""

import msgspec

from tracekit.records.base import Record, Summary

__all__ = ["Choice", "CsqaMcqRecord", "CsqaRecord"]


class Choice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One option of a question."""

    label: str
    """Its letter."""
    text: str
    """Its text."""


class _Question(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of both tasks."""

    question: str
    """The question."""
    concept: str | None
    """The question's concept in ConceptNet; null where the source has none."""
    choices: list[Choice]
    """The options, in order."""
    label_idx: int | None
    """Number of the right option; null for an unlabelled split."""
    gold_label: str | None
    """Its letter; null for an unlabelled split."""
    pred_idx: int
    """Number of the option that the model prefers."""
    pred_label: str
    """Its letter."""
    is_correct: bool | None
    """Whether the preferred option is the right one; null for an unlabelled split."""
    entropy: float
    """Entropy of the distribution over the options, nats."""
    margin: float
    """Probability of the preferred option minus that of the next best."""
    num_layers: int
    """Number of transformer blocks."""
    num_truncated: int
    """Tokens cut off to fit `--max-seq-len`, all options together; never of an option's text."""

    def summary(self) -> Summary:
        """Question and preferred option."""
        chosen = self.choices[self.pred_idx]
        right = self.choices[self.label_idx] if self.label_idx is not None else chosen
        return Summary(
            self.question, f"{chosen.label} {chosen.text}", "" if right is chosen else f"{right.label} {right.text}"
        )


class CsqaRecord(_Question, frozen=True, kw_only=True, tag="csqa", forbid_unknown_fields=True):
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


class CsqaMcqRecord(_Question, frozen=True, kw_only=True, tag="csqa_mcq", forbid_unknown_fields=True):
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
