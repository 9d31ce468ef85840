"""CommonsenseQA for encoders: each option read together with its question, scored by a multiple-choice head.

Address, paper, licence and a row: builders/kit/csqa_questions.py

    python -m builders.csqa_mcq --model google-bert/bert-base-uncased --model-path runs/bert-csqa --split validation

`--model-path` is what `python -m builders.finetune_csqa --out` wrote. A checkpoint without a multiple-choice head gets
a random one, the same on every run; that is said in the output, in every record and on the card, because predictions
then mean nothing (the traces are the encoder's own all the same).
"""

from typing import Literal

from builders.csqa_mcq.record import CsqaMcqRecord
from builders.kit.choices import CHOICE_OUTCOME
from builders.kit.columns import ChoiceSource
from builders.kit.csqa_questions import CsqaQuestion, read_questions
from tracekit.config import ModelConfig, Positive, RunConfig, SiteConfig
from tracekit.records import Mean
from tracekit.task import Examples, Task, lazy

__all__ = ["TASK", "CsqaMcqConfig"]


class CsqaMcqConfig(RunConfig, frozen=True, kw_only=True):
    """Questions of CommonsenseQA, answered by an encoder with a multiple-choice head. Nothing is generated."""

    model: ModelConfig = ModelConfig(model="google-bert/bert-base-uncased")
    """Which model."""
    source: ChoiceSource = ChoiceSource()
    """Which data."""
    capture: SiteConfig = SiteConfig()
    """What is recorded."""
    max_seq_len: Positive | Literal["auto"] = "auto"
    """Longest sequence of question and option, tokens; `auto`: the model's positions, at most 512."""


def examples(config: CsqaMcqConfig) -> Examples[CsqaQuestion]:
    """The questions of the source."""
    return read_questions(config.source)


TASK = Task(
    name="csqa_mcq",
    title="Multiple-choice questions of everyday knowledge, answered by an encoder that reads each option.",
    category="multiple-choice",
    config=CsqaMcqConfig,
    record=CsqaMcqRecord,
    examples=examples,
    tracer=lazy("builders.csqa_mcq.tracer:CsqaMcqTracer"),
    replay=lazy("builders.csqa_mcq.tracer:CsqaMcqReplay"),
    card="csqa_mcq.md.j2",
    outcome=CHOICE_OUTCOME.but(
        probs="choice_probs",
        means=[
            *CHOICE_OUTCOME.means,
            Mean(
                name="fresh_head_share",
                field="is_head_fresh",
                definition="Share of samples whose multiple-choice head was drawn at random: predictions mean nothing.",
                warn_above=0.0,
                warning="of the samples have a multiple-choice head drawn at random: predictions mean nothing",
            ),
        ],
    ),
)
