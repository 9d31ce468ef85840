"""Settings of wiki_qa."""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import msgspec

from builders.judging.config import JUDGED_BY, JudgeConfig, answers_layout
from builders.kit.columns import ArticleSource
from tracekit.clients.client import ClientConfig
from tracekit.config import AnswerCaptureConfig, GenerationConfig, Positive, PromptedConfig

__all__ = ["MAX_NEW_TOKENS", "WikiQAConfig"]

MAX_NEW_TOKENS = 96
"""Longest reply of a question writer; one that reasons first needs more."""


class WikiQAConfig(PromptedConfig, frozen=True, kw_only=True):
    """Questions written about articles, answered without them, and judged."""

    not_recorded: ClassVar[tuple[str, ...]] = (
        *("stages", "client", "judge", "question_model", "question_max_new_tokens", "num_questions"),
        *("sections_per_article", "min_section_tokens", "max_section_tokens"),
    )
    local_models: ClassVar[tuple[str, ...]] = ("judge.judge", "question_model")
    stages_read: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "questions": (
            *("source", "model", "client", "question_model", "question_max_new_tokens", "num_questions"),
            *("sections_per_article", "min_section_tokens", "max_section_tokens"),
            *("output.seed", "output.dataset_config"),
        ),
        "evaluate": JUDGED_BY,
    }
    source: ArticleSource = ArticleSource()
    """Which articles."""
    stages: tuple[Literal["questions", "answers", "evaluate"], ...] = ("questions", "answers", "evaluate")
    """What to do, in this order."""
    question_model: str | None = None
    """Who writes the questions: a model as --model takes it, or `openai:NAME` at an endpoint; by default --model."""
    question_max_new_tokens: Positive = MAX_NEW_TOKENS
    """Longest reply of the question model. One that reasons first needs some thousand."""
    num_questions: Positive | None = None
    """Questions wanted, spread evenly over the articles' bins of difficulty; all that can be had by default."""
    sections_per_article: Positive = 1
    """Sections drawn of an article, each for one question."""
    min_section_tokens: Positive = 200
    """Shortest section, in tokens of the question model (of --model, where an endpoint writes)."""
    max_section_tokens: Positive = 500
    """Longest section."""
    judge: JudgeConfig = JudgeConfig()
    """Who judges the answers."""
    client: ClientConfig = ClientConfig()
    """How question model and judge are asked."""
    generation: GenerationConfig = GenerationConfig(num_beams=1)
    """How answers are generated."""
    capture: AnswerCaptureConfig = AnswerCaptureConfig()
    """What is recorded."""

    def settled(self) -> Self:
        """The run over the questions, wherever they came from: articles are read by the first stage alone."""
        source = ArticleSource(source=str(answers_layout(self, "wiki_qa").questions), split=self.source.split)
        return msgspec.structs.replace(self, source=source)
