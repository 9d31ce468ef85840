"""Configurations of the builders: what their flags are. Nothing here imports torch, so that flags are read at once.

The degradation builder has its own, with names: builders/degradation_configs.py
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, get_args

import msgspec

from builders.nonsense_names import SAMPLES
from tracekit.clients.client import ClientConfig
from tracekit.config import (
    CaptureConfig,
    GenerationConfig,
    ModelConfig,
    Positive,
    RunConfig,
    SourceConfig,
)
from tracekit.format.layout import Layout

__all__ = [
    "MAX_NEW_TOKENS",
    "PASSES",
    "CsqaConfig",
    "CsqaMcqConfig",
    "FinetuneConfig",
    "IntrospectionConfig",
    "JudgeConfig",
    "Kind",
    "NamesConfig",
    "NextTokenConfig",
    "NonsenseConfig",
    "Pass",
    "ReplayConfig",
    "TrainingConfig",
    "TriviaQAConfig",
    "WikiQAConfig",
    "answers_layout",
]

Pass = Literal["mcq", "self_confidence", "other_confidence"]
"""What introspection asks of a question."""
PASSES: tuple[Pass, ...] = get_args(Pass)
Kind = Literal["ud_ewt", "go_emotions", "csqa", "wikitext2", "wikitext103", "text"]
"""What a text is."""

MAX_NEW_TOKENS = 96
"""Longest reply of a question writer; one that reasons first needs more."""
JUDGED_BY = ("judge", "client", "output.dataset_config", "model.device", "model.dtype", "model.quantize")
"""Settings that the stage `evaluate` reads: a judge that is a local model is loaded as the tested model is."""


class TriviaQAConfig(RunConfig, frozen=True, kw_only=True):
    """Questions of TriviaQA, answered and traced."""

    grows: ClassVar[tuple[str, ...]] = ("source.limit",)
    correctness: Literal["exact_match", "alias_in_answer"] = "exact_match"
    """What counts as right: the answer is an alias, or an alias occurs in it; both after TriviaQA's normalisation."""


class CsqaConfig(RunConfig, frozen=True, kw_only=True):
    """Questions of CommonsenseQA as prompts, traced, every option scored. Flags of generation change nothing here."""

    generation: GenerationConfig = GenerationConfig(num_beams=1, max_new_tokens=1)
    """Not used: nothing is generated."""
    max_seq_len: Positive | Literal["auto"] = "auto"
    """Most tokens of a prompt and the longest option after it; longer ones lose the beginning of their question.
    `auto`: what the model has positions for."""


class CsqaMcqConfig(RunConfig, frozen=True, kw_only=True):
    """Questions of CommonsenseQA, answered by an encoder with a multiple-choice head. Nothing is generated."""

    model: ModelConfig = ModelConfig(model="google-bert/bert-base-uncased")
    """Which model."""
    generation: GenerationConfig = GenerationConfig(num_beams=1, max_new_tokens=1)
    """Not used: nothing is generated."""
    max_seq_len: Positive | Literal["auto"] = "auto"
    """Longest sequence of question and option, tokens; `auto`: the model's positions, at most 512."""


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which encoder, and how it is trained."""

    model: str = "google-bert/bert-base-uncased"
    """Encoder: Hub id (`org/name` or `org/name@revision`) or local folder."""
    max_seq_len: Annotated[int, msgspec.Meta(ge=8)] = 128
    """Most tokens of a question with one option; longer ones lose the beginning of their question."""
    batch_size: Positive = 8
    """Questions a step."""
    lr: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 2e-5
    """Learning rate at the start; it falls to 0 in a straight line."""
    epochs: Positive = 2
    """Times that every question is seen."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, more time."""
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] = 41
    """Seed of the fresh head, of dropout and of the order of the questions."""


class FinetuneConfig(TrainingConfig, frozen=True, kw_only=True):
    """Fine-tune an encoder on CommonsenseQA's questions, for builders.csqa_mcq."""

    train_source: str = "default"
    """Questions to train on: `default` (the Hub's train split), a Hub id, a JSONL, Parquet or CSV file, or `sample`."""
    eval_source: str = "default"
    """Questions to evaluate on after each epoch: `default` (the Hub's validation split), and so on. The file that is
    trained on, or `sample` twice: every fifth question is kept for evaluation."""
    limit: Positive | None = None
    """Most rows of each source; all by default."""
    question_column: str | None = None
    """Column with the question; by default the names that CommonsenseQA's copies have. So for the columns below."""
    choices_columns: tuple[str, ...] = ()
    """Column with the list of options, or a column for each option."""
    label_column: str | None = None
    """Column with the right option."""
    id_column: str | None = None
    """Column with the id of the row."""
    label_start: Literal[0, 1] | None = None
    """Number of the first option, where the right option is a number. Default: as the options are numbered."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a malformed row does: stop, or be counted, reported and left out."""
    out: str | None = None
    """Folder of the checkpoint; a readable name under checkpoints/ by default."""
    dry_run: bool = False
    """Print what would be done, with the time of a step measured here, and write nothing."""


class NextTokenConfig(RunConfig, frozen=True, kw_only=True):
    """Texts, and how a language model predicts each of their tokens.

    --source: ud_ewt, go_emotions, csqa, wikitext2 (default) or wikitext103 on the Hub; sample or sample:KIND; a
    CoNLL-U, TSV, JSONL, Parquet, CSV, .txt, .raw or .tokens file; or a Hub id. --limit and --offset count rows: in
    WikiText lines. Nothing is generated, so the flags of generation change nothing. There is no prompt around a text:
    of the flags of the prompt only --bos has a meaning.
    """

    generation: GenerationConfig = GenerationConfig(num_beams=1, max_new_tokens=1)
    """Not used: nothing is generated."""
    kind: Kind | Literal["auto"] = "auto"
    """What the source is, where neither its name nor its columns say so."""
    max_seq_len: Annotated[int, msgspec.Meta(ge=2)] | Literal["auto"] = "auto"
    """Most tokens of a window; `auto`: as many as the model has positions, at most 1024."""
    stride: Positive | None = None
    """Tokens by which windows of a long text advance; as long as a window by default, so that they do not overlap."""


class IntrospectionConfig(RunConfig, frozen=True, kw_only=True):
    """Multiple-choice questions: the model's answer, its confidence in itself, and in somebody else; traced."""

    source: SourceConfig = SourceConfig(split="test")
    """Which data."""
    generation: GenerationConfig = GenerationConfig(num_beams=1, max_new_tokens=8)
    """How outputs are generated: one a question, so --num-samples and --trace-samples have no meaning here."""
    capture: CaptureConfig = CaptureConfig(sites=("hidden_states", "resid_post_mlp"))
    """What is recorded."""
    passes: tuple[Pass, ...] = PASSES
    """What is asked of every question, each pass a configuration of the dataset."""
    bin_edges: tuple[float, ...] = (0, 5, 10, 20, 40, 60, 80, 90, 100)
    """Edges of the confidence bins, percent, from 0 to 100."""
    bin_midpoints: tuple[float, ...] = ()
    """What each bin counts for, percent; its middle by default."""
    shuffle_options: bool = False
    """Show the options of each question in an order drawn by --seed; the same in every pass."""
    do_sample: bool = False
    """Draw outputs at --temperature, --top-p and --top-k; otherwise the most probable one is taken."""


class JudgeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who judges the answers."""

    judge: str = "rules"
    """`rules` (phrases, no model), or a model that is asked: Hub id, folder, `.gguf` file, endpoint."""
    judge_max_new_tokens: Annotated[int, msgspec.Meta(ge=8)] = 64
    """Longest reply of a judge; the JSON object takes about ten. A model that reasons first needs some thousand."""


class NamesConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which names are invented; the stage `questions` alone reads it."""

    species: str | None = None
    """TSV of real animals (class, genus, scientific_name, english_name); a small list of our own by default."""
    plants: str | None = None
    """JSON of real plants ({"plants": [{"name", "species"}]}); likewise."""
    medicines: str | None = None
    """JSON of real medicines ({"drugs": [...]}); likewise."""
    num_names: Annotated[int, msgspec.Meta(ge=1)] = 12
    """Names to invent in each domain."""
    num_wordings: Annotated[int, msgspec.Meta(ge=1)] = 12
    """Wordings in which each name is asked about."""
    controls: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Real names in each domain that are asked about in the same way."""

    def files(self) -> dict[str, Path]:
        """The list of each domain."""
        given = {"animals": self.species, "plants": self.plants, "medicines": self.medicines}
        return {name: SAMPLES[name] if path is None else Path(path).expanduser() for name, path in given.items()}


class NonsenseConfig(RunConfig, frozen=True, kw_only=True):
    """Questions about things that do not exist: invented, answered and traced, judged."""

    not_recorded: ClassVar[tuple[str, ...]] = ("stages", "names", "judge", "client")
    local_files: ClassVar[tuple[str, ...]] = ("names.species", "names.plants", "names.medicines")
    local_models: ClassVar[tuple[str, ...]] = ("judge.judge",)
    stages_read: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "questions": ("names", "output.seed", "output.dataset_config"),
        "evaluate": JUDGED_BY,
    }
    source: SourceConfig = SourceConfig(split="test")
    """Which of the questions: --limit and --offset. The names they are about come from lists of names instead."""
    generation: GenerationConfig = GenerationConfig(num_beams=1, max_new_tokens=96)
    """How answers are generated: one a question."""
    stages: tuple[Literal["questions", "answers", "evaluate"], ...] = ("questions", "answers", "evaluate")
    """What to do, in this order."""
    names: NamesConfig = NamesConfig()
    """Which names are invented."""
    judge: JudgeConfig = JudgeConfig()
    """Who judges."""
    client: ClientConfig = ClientConfig()
    """How a judge that is a model is asked."""


class WikiQAConfig(RunConfig, frozen=True, kw_only=True):
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
    capture: CaptureConfig = CaptureConfig()
    """What is recorded."""

    def settled(self) -> Self:
        """The run over the questions, wherever they came from: articles are read by the first stage alone."""
        source = SourceConfig(source=str(answers_layout(self, "wiki_qa").questions), split=self.source.split)
        return msgspec.structs.replace(self, source=source)


class ReplayConfig(RunConfig, frozen=True, kw_only=True):
    """Prompts and answers from elsewhere, traced."""

    source: SourceConfig = SourceConfig(split="train")
    """Which answers: --source FILE, or `sample`."""


def answers_layout(config: RunConfig, task: str) -> Layout:
    """The configuration that a run writes, or has written."""
    assert config.output.out is not None, "stages are called with a folder"
    return Layout(Path(config.output.out), config.output.dataset_config or task)
