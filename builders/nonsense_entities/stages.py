"""The stages of nonsense_entities that run no tested model: questions are written, answers are judged."""

from typing import Any

import msgspec

from builders.judging.config import answers_layout
from builders.judging.evaluation import Evaluation, evaluate
from builders.judging.judges import Judged
from builders.kit.sources import SourceRow
from builders.nonsense_entities.config import NonsenseConfig
from builders.nonsense_entities.names import DOMAINS, SAMPLES, Name, draw_real, invent, known_names, read_names
from builders.nonsense_entities.prompts import WORDINGS
from builders.nonsense_entities.record import NonsenseEntitiesRecord
from tracekit.errors import UNREADABLE, ConfigError, DatasetError, SourceError
from tracekit.format.layout import Layout, read_whole, write_atomic
from tracekit.format.manifest import to_bytes
from tracekit.format.shards import sha256_file
from tracekit.model.prompts import sha256_text
from tracekit.run.command import stage_asked
from tracekit.task import Example

__all__ = [
    "EVALUATION",
    "NonsenseExample",
    "Questions",
    "judge_answers",
    "judged_of",
    "make_questions",
    "parse_row",
    "write_questions",
]

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

    question_id: str  # type: ignore[misc]
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


def parse_row(row: SourceRow) -> NonsenseExample:
    """A line of the questions as an example.

    Raises:
        SourceError: a field is missing or of another type.
    """
    try:
        found = msgspec.convert({**row.data, "index": row.index}, NonsenseExample)
        return msgspec.structs.replace(found, example_id=f"{found.question_id}-{found.wording_id}")
    except msgspec.ValidationError as error:
        raise SourceError(f"no question of this builder: {error}") from error


def write_questions(config: NonsenseConfig) -> int:
    """The stage `questions`; the exit code, 0.

    Raises:
        ConfigError: other questions are there.
    """
    _check_folder(config)
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
    return {
        field: value for field, value in msgspec.structs.asdict(example).items() if field not in ("index", "example_id")
    }


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


def _check_folder(config: NonsenseConfig) -> None:
    if config.output.out is None:
        raise ConfigError("stages need a folder - at `$.output.out`; give --out")


def judged_of(record: NonsenseEntitiesRecord) -> Judged:
    """What a judge is given of a record."""
    return Judged(record.key, record.question, [], record.generated_answer, record.name)


EVALUATION = Evaluation(NAME, "existence", judged_of, is_invented=lambda record: record.is_invented)
"""How answers are judged."""


def judge_answers(config: NonsenseConfig) -> int:
    """The stage `evaluate`; the exit code."""
    return evaluate(config, EVALUATION, judge=config.judge, client=config.client)
