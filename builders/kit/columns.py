"""Which columns of a file a task reads: sources as configurations have them, one for each kind of data."""

from typing import Literal

from tracekit.config import FileSource

__all__ = ["ArticleSource", "ChoiceSource", "PromptSource", "QuestionSource", "TableSource", "TextSource"]


class TableSource(FileSource, frozen=True, kw_only=True):
    """Rows with an id of their own, and how many of them."""

    id_column: str | None = None
    """Column with the id of the row; by default the names that the task knows."""


class QuestionSource(TableSource, frozen=True, kw_only=True):
    """Questions with accepted answers, and how many of them."""

    question_column: str | None = None
    """Column with the question; by default the names that the task knows. So for the columns below."""
    answer_column: str | None = None
    """Column with the accepted answers."""


class ChoiceSource(TableSource, frozen=True, kw_only=True):
    """Multiple-choice questions, and how many of them."""

    question_column: str | None = None
    """Column with the question; by default the names that the task knows. So for the columns below."""
    choices_columns: tuple[str, ...] = ()
    """Column with the list of options, or a column for each option."""
    label_column: str | None = None
    """Column with the right option."""
    answer_column: str | None = None
    """The same as `label_column`."""
    label_start: Literal[0, 1] | None = None
    """Number of the first option, where the right option is a number. Default: 0, or as the options are numbered."""


class TextSource(TableSource, frozen=True, kw_only=True):
    """Texts, and how many of them."""

    text_column: str | None = None
    """Column with the text; by default the names that the task knows. So for the column below."""
    label_column: str | None = None
    """Column with the labels of the text."""


class ArticleSource(FileSource, frozen=True, kw_only=True):
    """Articles, and how many of them."""

    text_column: str | None = None
    """Column with the text of the article; by default the names that the task knows."""


class PromptSource(TableSource, frozen=True, kw_only=True):
    """Prompts, and how many of them."""

    text_column: str | None = None
    """Column with the prompt; by default the names that the task knows. So for the column below."""
    answer_column: str | None = None
    """Column with a short expected answer."""
