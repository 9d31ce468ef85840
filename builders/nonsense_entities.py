"""Nonsense entities: does a model take things for real that do not exist?

    questions   names are invented and asked about: questions/<config>.jsonl, and how in .json. No model is needed
    answers     the model answers, traced
    evaluate    a judge says whether each answer takes the thing for real: labels/, output/

Names are made in builders/nonsense_names.py of real ones: small lists packaged here, or `--species`, `--plants`,
`--medicines`. One line of the questions:

    {"question_id": "animals-000", "domain": "animals", "name": "Turdus chrysaetos", "name_group": "Aves",
     "made_of": ["Turdus merula", "Aquila chrysaetos"], "wording_id": "diet", "is_invented": true,
     "question": "What does Turdus chrysaetos mostly eat?"}

    python -m builders.nonsense_entities --model Qwen/Qwen3-4B-Instruct-2507 --out traces/nonsense

Each stage reads what the one before wrote, and can be run alone: `--stages evaluate --judge MODEL`.
"""

from builders.configs import NamesConfig, NonsenseConfig
from tracekit.cli import run_builder

if __name__ == "__main__":  # flags are read before torch is imported: what follows imports it
    run_builder("builders.nonsense_entities", NonsenseConfig)

import shlex
from collections.abc import Sequence
from typing import Any

import msgspec

from builders.answering import AnsweringTask, Asked
from builders.configs import answers_layout
from builders.evaluation import Evaluation, evaluate
from builders.judging import Judged
from builders.nonsense_names import DOMAINS, SAMPLES, Name, draw_real, invent, known_names, read_names
from builders.nonsense_prompts import SYSTEM, WORDINGS
from builders.sources import HubSource, Row, read_examples
from tracekit.errors import UNREADABLE, ConfigError, DatasetError, SourceError
from tracekit.format.layout import Layout, read_whole, write_atomic
from tracekit.format.manifest import SourceInfo, to_bytes
from tracekit.format.shards import sha256_file
from tracekit.model.prompts import sha256_text
from tracekit.records import NonsenseEntitiesRecord, Record
from tracekit.run.command import stage_asked
from tracekit.run.plan import Example

__all__ = ["BUILDER", "STAGES", "NamesConfig", "NonsenseBuilder", "NonsenseConfig", "NonsenseExample", "Questions"]

NAME = "nonsense_entities"


class Questions(msgspec.Struct, frozen=True, kw_only=True):
    """How the questions of a configuration were made: `questions/<config>.json`."""

    lists: dict[str, str]
    """List of real names of each domain: its file, `name@sha256:...`."""
    num_names: int
    """Names invented in each domain."""
    num_wordings: int
    """Wordings in which each is asked about."""
    controls: int
    """Real names asked about in each domain."""
    seed: int
    """Seed of what was drawn."""
    wordings_sha256: str
    """SHA-256 of all wordings."""
    num_questions: int
    """Questions in all."""
    kept: dict[str, int]
    """Invented names by domain."""
    rejected: dict[str, dict[str, int]]
    """Names that were not kept, by domain and reason."""
    asked: dict[str, Any] = {}
    """Settings of this stage that are not at their defaults, by path: tracekit.run.command."""


class NonsenseExample(Example, frozen=True, kw_only=True):
    """One question."""

    question_id: str
    """Shared by the questions about one name."""
    domain: str
    """Domain of the name."""
    name: str
    """The name."""
    made_of: list[str]
    """Real names that it is made of."""
    name_group: str
    """Class, family or word count."""
    wording_id: str
    """Its wording."""
    is_invented: bool
    """False for a control."""
    question: str
    """The question."""

    @property
    def text(self) -> str:
        """The question."""
        return self.question


def make_questions(config: NonsenseConfig) -> tuple[list[NonsenseExample], Questions]:
    """Invent names and ask about them. Domains take turns, and so do names, so that any `--limit` is even over them.

    Raises:
        SourceError: a list of names cannot be read, or is too small.
        ConfigError: more wordings than there are.
    """
    names, seed, files = config.names, config.output.seed, config.names.files()
    most = min(len(wordings) for wordings in WORDINGS.values())
    if names.num_wordings > most:
        raise ConfigError(f"--num-wordings {names.num_wordings} - at `$.names.num_wordings`; there are {most}")
    lists = {domain: read_names(domain, path) for domain, path in files.items()}
    known = known_names([*lists.values(), *(read_names(domain, path) for domain, path in SAMPLES.items())])
    made = {domain: invent(lists[domain], known, num_names=names.num_names, seed=seed) for domain in DOMAINS}
    chosen = {
        domain: [*made[domain].names, *draw_real(lists[domain], num_names=names.controls, seed=seed)]
        for domain in DOMAINS
    }
    examples: list[NonsenseExample] = []
    for turn in range(names.num_wordings):
        for number in range(names.num_names + names.controls):
            for domain in DOMAINS:
                examples.append(_example(len(examples), chosen[domain][number], number, turn))
    how = Questions(
        lists={domain: f"{path.name}@sha256:{sha256_file(path)}" for domain, path in files.items()},
        num_names=names.num_names,
        num_wordings=names.num_wordings,
        controls=names.controls,
        seed=seed,
        wordings_sha256=sha256_text(msgspec.json.encode(WORDINGS).decode()),
        num_questions=len(examples),
        kept={domain: len(made[domain].names) for domain in DOMAINS},
        rejected={domain: made[domain].rejected for domain in DOMAINS},
        asked=stage_asked(config, "questions"),
    )
    return examples, how


def _example(index: int, name: Name, number: int, turn: int) -> NonsenseExample:
    """One question; names begin with different wordings, so that few turns show them all."""
    wordings = list(WORDINGS[name.domain].items())
    wording_id, wording = wordings[(number + turn) % len(wordings)]
    return NonsenseExample(
        index=index,
        question_id=f"{name.domain}-{number:03d}",
        domain=name.domain,
        name=name.name,
        made_of=name.made_of,
        name_group=name.group,
        wording_id=wording_id,
        is_invented=name.is_invented,
        question=wording.format(name=name.name),
    )


def parse_row(row: Row) -> NonsenseExample:
    """A line of the questions as an example.

    Raises:
        SourceError: a field is missing or of another type.
    """
    try:
        return msgspec.convert({**row.data, "index": row.index}, NonsenseExample)
    except msgspec.ValidationError as error:
        raise SourceError(f"no question of this builder: {error}") from error


def write_questions(config: NonsenseConfig) -> int:
    """The stage `questions`; the exit code, 0.

    Raises:
        ConfigError: other questions are there.
    """
    _check(config)
    layout = answers_layout(config, NAME)
    examples, how = make_questions(config)
    lines = b"".join(msgspec.json.encode(_row(example)) + b"\n" for example in examples)
    counts = ", ".join(f"{how.kept[domain]} {domain}" for domain in DOMAINS)
    path, summary = layout.questions, layout.question_set
    if config.output.dry_run:
        print(f"would ask       {len(examples)} questions about {counts}, as in: {examples[0].question}")
        print(f"questions       {path} (nothing was written)")
        return 0
    if path.exists() and summary.exists() and path.read_bytes() == lines:
        print(f"nothing to do: the {len(examples)} questions are in {path}")
        return 0
    if path.exists() and summary.exists():
        _refuse_others(layout, how, is_forced=config.output.force_run)
    write_atomic(path, lines)
    write_atomic(summary, to_bytes(how))
    rejected = sum(sum(reasons.values()) for reasons in how.rejected.values())
    print(f"questions       {len(examples)}, about {counts}; {rejected} names were rejected ({path})")
    return 0


def _row(example: NonsenseExample) -> dict[str, Any]:
    return {field: value for field, value in msgspec.structs.asdict(example).items() if field != "index"}


def _refuse_others(layout: Layout, how: Questions, *, is_forced: bool) -> None:
    """Say that a folder holds other questions, unless it may lose them."""
    if is_forced and not layout.plan.exists():
        return
    try:
        there = msgspec.json.decode(read_whole(layout.question_set), type=dict[str, Any])
    except UNREADABLE as error:
        raise DatasetError(f"{layout.question_set}: {error}; delete it and make the questions again") from error
    ours = msgspec.to_builtins(how)
    fields = [name for name in ours if name != "asked" and there.get(name) != ours[name]]
    what = "; ".join(f"{name} {there.get(name)!r} there, {ours[name]!r} here" for name in fields) or "other lines"
    advice = "or pass --force-run" if not layout.plan.exists() else "for they are being answered"
    raise ConfigError(f"{layout.questions} holds other questions ({what}); choose another --out, {advice}")


class NonsenseBuilder:
    """Questions in, answered and traced samples out."""

    name = NAME

    def examples(self, config: NonsenseConfig) -> tuple[Sequence[NonsenseExample], SourceInfo]:
        """The questions that the first stage wrote; of a dry run that begins with it, those that it would write."""
        _check(config)
        layout = answers_layout(config, NAME)
        if layout.questions.exists():
            source = msgspec.structs.replace(config.source, source=str(layout.questions))
            found = read_examples(source, default=HubSource("", None), sample=layout.questions, parse=parse_row)
            return found.examples, found.info
        if config.output.dry_run and "questions" in config.stages:
            examples, _ = make_questions(config)
            chosen = examples[config.source.offset :][: config.source.limit]
            info = SourceInfo(
                id=layout.questions.name,
                revision="not written yet",
                subset=None,
                split=config.source.split,
                num_rows=len(examples),
                num_used=len(chosen),
                skipped=[],
            )
            return chosen, info
        raise SourceError(
            f"there are no questions to answer: no {layout.questions}; write them first: python -m builders.{NAME} "
            f"--stages questions --out {shlex.quote(str(layout.root))}"
        )

    def open(self, config: NonsenseConfig, tokenizer: Any, examples: Sequence[NonsenseExample]) -> "NonsenseTask":
        """Render every prompt."""
        return NonsenseTask(config, tokenizer, examples)


def _check(config: NonsenseConfig) -> None:
    """Refuse settings that have no meaning here."""
    if config.output.out is None:
        raise ConfigError("stages need a folder - at `$.output.out`; give --out")
    if config.source.source != "default":
        raise ConfigError(
            f"--source {config.source.source!r} - at `$.source.source`; names come from --species, --plants and "
            "--medicines, and questions from the stage `questions`"
        )
    if config.generation.num_samples > 1 or config.generation.trace_samples or config.prompt.num_shots:
        raise ConfigError(
            "--num-samples, --trace-samples and --num-shots have no meaning here: there is one answer a question, and "
            "no right one to show"
        )


class NonsenseTask(AnsweringTask[NonsenseExample]):
    """The questions at work."""

    def __init__(self, config: NonsenseConfig, tokenizer: Any, examples: Sequence[NonsenseExample]) -> None:
        asked = [
            Asked(one, f"{one.index:06d}", f"{one.question_id}-{one.wording_id}", one.question_id, one.question)
            for one in examples
        ]
        super().__init__(config, tokenizer, asked, default_system=SYSTEM)

    def record(self, example: NonsenseExample, shared: dict[str, Any]) -> Record:
        """The record of an answer."""
        names = ("question", "domain", "name", "made_of", "name_group", "wording_id", "is_invented")
        return NonsenseEntitiesRecord(**shared, **{name: getattr(example, name) for name in names})


def judged_of(record: NonsenseEntitiesRecord) -> Judged:
    """What a judge is given of a record."""
    return Judged(record.key, record.question, [], record.generated_answer, record.name)


EVALUATION = Evaluation(NAME, "existence", judged_of, is_invented=lambda record: record.is_invented)
"""How answers are judged."""


def judge_answers(config: NonsenseConfig) -> int:
    """The stage `evaluate`; the exit code."""
    return evaluate(config, EVALUATION, judge=config.judge, client=config.client)


STAGES = {"questions": write_questions, "evaluate": judge_answers}
"""The stages besides running the model."""
BUILDER = NonsenseBuilder()
