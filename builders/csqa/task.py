"""CommonsenseQA for decoders: a question with its lettered options as a prompt, traced, and every option scored.

What the data is stands in builders/kit/csqa_questions.py. One prompt of a model without chat template:

    Choose the option that answers the question best. Give its letter alone.

    Question: A revolving door is convenient for two direction travel, but ...
    A. bank
    B. library
    ...
    Answer:

Nothing is generated: tensors are of the prompt. Each option is scored by the log-probability of its letter and of its
text after the prompt, teacher-forced.

    python -m builders.csqa --model Qwen/Qwen3-4B-Instruct-2507 --split validation --limit 1000
"""

from typing import Literal

from builders.csqa.record import CsqaRecord
from builders.kit.choices import CHOICE_OUTCOME
from builders.kit.columns import ChoiceSource
from builders.kit.csqa_questions import CsqaQuestion, read_questions
from tracekit.config import Positive, ReadingConfig, RunConfig, ShotsConfig
from tracekit.records import Mean
from tracekit.task import Examples, Task, lazy

__all__ = ["SYSTEM", "TASK", "CsqaConfig"]

SYSTEM = "Choose the option that answers the question best. Give its letter alone."


class CsqaConfig(RunConfig, frozen=True, kw_only=True):
    """Questions of CommonsenseQA as prompts, traced, every option scored. Nothing is generated."""

    source: ChoiceSource = ChoiceSource()
    """Which data."""
    prompt: ShotsConfig = ShotsConfig()
    """How a question becomes a prompt."""
    capture: ReadingConfig = ReadingConfig()
    """What is recorded."""
    max_seq_len: Positive | Literal["auto"] = "auto"
    """Most tokens of a prompt and the longest option after it; longer ones lose the beginning of their question.
    `auto`: what the model has positions for."""


def examples(config: CsqaConfig) -> Examples[CsqaQuestion]:
    """The questions of the source."""
    return read_questions(config.source)


TASK = Task(
    name="csqa",
    title="Multiple-choice questions of everyday knowledge as prompts, and how likely the model finds each option.",
    category="multiple-choice",
    config=CsqaConfig,
    record=CsqaRecord,
    examples=examples,
    tracer=lazy("builders.csqa.tracer:CsqaTracer"),
    replay=lazy("builders.csqa.tracer:CsqaReplay"),
    card="csqa.md.j2",
    outcome=CHOICE_OUTCOME.but(
        probs="letter_probs",
        means=[
            *CHOICE_OUTCOME.means,
            Mean(
                name="accuracy_by_text",
                field="is_correct_by_text",
                definition="Share of right answers, by the log-probability a token of the options' texts.",
            ),
        ],
    ),
)
