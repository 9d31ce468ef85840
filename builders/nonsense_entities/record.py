"""The record of the task nonsense_entities."""

from tracekit.records import AnsweredRecord

__all__ = ["NonsenseEntitiesRecord"]


class NonsenseEntitiesRecord(AnsweredRecord, frozen=True, kw_only=True, tag="nonsense_entities"):
    """One question about a thing that does not exist, and what the model made of it.

    Samples about one name share `question_id`. Whether the answer takes the thing for real is in label sets, not here.
    """

    question: str
    """The question, the name in it."""
    domain: str
    """What it would be: `animals`, `plants` or `medicines`."""
    name: str
    """The name."""
    made_of: list[str]
    """The real names that it is made of; of a real one that name alone."""
    name_group: str
    """Class, family or number of words within which it was made."""
    wording_id: str
    """Which wording the question has."""
    is_invented: bool
    """False for a real name, asked about as a control."""
