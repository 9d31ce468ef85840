"""The record of the task trivia_qa."""

from tracekit.records import AnsweredRecord

__all__ = ["TriviaQARecord"]


class TriviaQARecord(AnsweredRecord, frozen=True, kw_only=True, tag="trivia_qa"):
    """One question, one answer, and whether it is right."""

    question: str
    """The question."""
    ground_truth_answers: list[str]
    """Every accepted answer; the first is the source's main one."""
    global_example_id: int
    """Row of the example in the source, counted from 0."""
    shard: int
    """Number of the shard that holds the sample."""
    index_in_shard: int
    """Place of the sample in its shard."""
    matched_alias: str | None
    """The accepted answer that was found in the generated one; null where none was."""
    matched_alias_span: list[int] | None
    """`[start, stop)` tokens of that alias; null where none was found."""
    is_correct: bool
    """Whether the answer is right, by `correctness_rule`."""
    correctness_rule: str
    """`exact_match` (normalised, any alias) or `alias_in_answer`."""
    exact_match: bool
    """Normalised exact match with any alias (TriviaQA's normalisation)."""
    f1: float
    """Best token F1 over the aliases, 0 to 1."""
