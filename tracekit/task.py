"""Task: everything that makes a dataset's task. One object, defined in the task's own module, found by its name.

    TASK = Task(name="capitals", title="Countries, and the capitals that the model named.", record=CapitalsRecord,
                examples=examples, ask=ask, judge=judge, outcome=answered(asked="country", correct="is_correct"))

An installed package registers its tasks under the entry point `tracekit.tasks`; a file of your own runs through
`tracekit.main(TASK)`. The library names no task: what reading needs of one is in `about`, and lies in every dataset.

A task either asks one question an example (`ask`, `judge`; tracekit.answering does the rest), or brings a `tracer` that
turns examples into samples by itself. Nothing here imports torch, and no task's module should: what does the work is
imported by the functions that a task holds, when they are called.
"""

import importlib
import importlib.util
import re
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import msgspec

from tracekit.config import AnswersConfig, GenerationConfig, PromptedConfig, RunConfig, ShotsConfig
from tracekit.console import say
from tracekit.declared import attribute_fault, told_plainly
from tracekit.errors import ConfigError, DatasetError, TracekitError
from tracekit.flags import flag_of, settings_of
from tracekit.format.layout import is_no_space
from tracekit.format.manifest import Manifest, Plan, SourceInfo, TaskReport, check_known
from tracekit.format.shards import sha256_file
from tracekit.records import About, Outcome, Record, RecordSchema, outcome_fault
from tracekit.records.schema import Field, Node

if TYPE_CHECKING:
    from tracekit.answering import Answered
    from tracekit.model.capture import Text, Trace
    from tracekit.model.choices import Choices, ChoiceTrace
    from tracekit.model.prompts import Exchange
    from tracekit.model.proof import Scored
    from tracekit.model.traced import Loads, TracedModel
    from tracekit.run.recheck import Replay

__all__ = [
    "Example",
    "Examples",
    "Overhead",
    "Place",
    "Task",
    "TaskRef",
    "TracedSample",
    "Tracer",
    "about_of",
    "check_name_is_free",
    "check_settings",
    "claim_fault",
    "find_task",
    "import_file",
    "is_file_of",
    "known_tasks",
    "lazy",
    "record_type_of",
    "task_in",
    "the_task",
]

GROUP = "tracekit.tasks"
"""Entry points that are tasks."""

ExampleT = TypeVar("ExampleT", bound="Example")
ConfigT = TypeVar("ConfigT", bound=RunConfig)
ItemT = TypeVar("ItemT")

_MAX_SAID = 300
_NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """One example of a source: what planning needs to know of it. Tasks add what is in it."""

    index: int
    """Row in the source, or another number that tells examples apart whatever `--offset` and `--limit` are."""
    example_id: str = ""
    """The source's own id, where it has one."""

    @property
    def key(self) -> str:
        """Key of its sample: unique in a configuration, also after a merge."""
        return f"{self.index:06d}"

    def answer_key(self, sample_index: int) -> str:
        """Key of one of its answers; the deterministic one, 0, has the example's own."""
        return f"{self.key}_{sample_index:03d}" if sample_index else self.key

    @property
    def question_id(self) -> str:
        """Shared by the examples that belong together."""
        return self.example_id or str(self.index)

    @property
    def cell(self) -> int | None:
        """Examples of different cells are never in one batch, and those of one are kept together; None: no cells."""
        return None

    @property
    def source_row(self) -> int:
        """Row in the source that it was made of."""
        return self.index

    @property
    def text(self) -> str:
        """Text of the source that stands whole in its prompt; its length is looked at before prompts are made."""
        return ""


class Examples(NamedTuple, Generic[ItemT]):
    """The examples of a run, and where they come from."""

    examples: Sequence[ItemT]
    """The examples, in the order of the source."""
    source: SourceInfo
    """The data, for the manifest."""


class Place(NamedTuple):
    """Where samples go in the dataset."""

    config: str
    """Name of the configuration."""
    shard: int
    """Number of the shard."""
    first_index: int
    """Place of the first of them in its shard."""
    from_decoding: bool = False
    """Whether answers are captured while they are decoded, where that is proven of the model."""


class Overhead(NamedTuple):
    """Seconds that go into a run whatever the number of samples in a cell."""

    spent: float = 0.0
    """Those of the traces so far."""
    expected: float = 0.0
    """Those of a whole run."""
    what: str = ""
    """What they go into, in words."""


class TracedSample(NamedTuple):
    """One sample, ready to be written."""

    record: Record
    text: "Text | Choices"
    trace: "Trace | ChoiceTrace"
    scored: "Sequence[Scored]" = ()
    """Continuations of the text that were scored in passes of their own."""


class Tracer(Generic[ExampleT]):
    """A task at work on one configuration. A task that does more than ask inherits from it."""

    variant: str
    """`chat` or `base`."""
    loads: "Loads" = "lm"
    """As what the model is loaded."""
    batch_size: int | None = None
    """Examples a batch, where the task settles it; None leaves it to `--batch-size` and the device."""
    at_once: int | None = None
    """Most examples of a batch that run at once, where the task settles it; a shard begins with so many."""
    max_positions: int | None = None
    """Most positions of an example, where the task allows fewer than the model."""
    answers: bool = False
    """Whether it has the model write answers, and takes `Place.from_decoding` into account."""

    def length(self, example: ExampleT) -> int:
        """Tokens of an example before anything is generated: batches are made of examples of like length."""
        raise NotImplementedError

    def num_positions(self, example: ExampleT) -> int:
        """Positions that the longest sequence of an example takes, generated tokens included."""
        raise NotImplementedError

    def trace(self, traced: "TracedModel", examples: Sequence[ExampleT], place: Place) -> list[TracedSample]:
        """Run a batch of examples through the model; samples stand in the order of the examples."""
        raise NotImplementedError

    def check_memory(self, traced: "TracedModel", examples: Sequence[ExampleT]) -> None:
        """Look at the device before a batch; what is done is written.

        Raises:
            MemoryPressureError: memory is nearly full.
        """

    def next_size(self, size: int, done: Sequence[ExampleT], following: Sequence[ExampleT]) -> int:
        """Most examples that run at once in the batch that follows another in its shard; as many as now by default.
        The journal notes what this returns, so that a resumed run does the same."""
        return size

    def overhead(self, examples: Sequence[ExampleT]) -> Overhead:
        """What traces do once a cell, by what those so far took; `examples` are those of the whole run."""
        return Overhead()

    def close(self) -> None:
        """The run is over, or has failed: leave the model as it was."""


def lazy(where: str) -> Callable[..., Any]:
    """The function or type `module:name` as a function that imports it when it is called."""
    module, _, name = where.partition(":")
    return lambda *given, **named: getattr(importlib.import_module(module), name)(*given, **named)


def _one_part(config: ConfigT) -> Sequence[ConfigT]:
    return [config]


@dataclass(frozen=True, kw_only=True, eq=False)
class Task(Generic[ConfigT, ExampleT]):
    """A dataset's task.

    Raises:
        ConfigError: the name, the record or the settings are of no use; an outcome names a field that the record does
            not have; a field has a type that a table cannot hold; there is neither `ask` nor `tracer`.
    """

    name: str
    """Name of the task: of its configuration in a dataset, and the tag of its records."""
    title: str
    """What a sample is, in a sentence; stands on the card."""
    record: type[Record]
    """The record type, each field with its docstring."""
    examples: "Callable[[ConfigT], Examples[ExampleT] | Sequence[ExampleT]]"
    """The examples of a configuration. A plain list is cut by `--offset` and `--limit`."""
    config: type[ConfigT] = AnswersConfig  # type: ignore[assignment]
    """Its settings; each is a flag."""
    outcome: Outcome = field(default_factory=Outcome)
    """Which fields of the record say what: stats, diff, figures and cards go by it alone."""
    category: str | None = None
    """The Hub's name for tasks of this kind, as `question-answering`."""
    ask: "Callable[[ExampleT, ConfigT], str] | None" = None
    """What the user says to the model about an example."""
    judge: "Callable[[ExampleT, Answered, ConfigT], dict[str, Any]]" = lambda example, answer, config: {}
    """The record's own fields, of an answer."""
    system: str = ""
    """The system text, where a run names none."""
    shots: "Callable[[ConfigT], Sequence[Exchange]] | None" = None
    """Solved examples for `--num-shots`; the one that asks the same is never shown."""
    tracer: "Callable[[ConfigT, Any, Sequence[ExampleT]], Tracer[ExampleT]] | None" = None
    """In place of `ask` and `judge`: opens the task for a configuration, a tokenizer and the examples."""
    are_values_finite: bool = True
    """False where the model may give values that are not finite, and the records count them."""
    replay: "Callable[[], Replay] | None" = None
    """How a stored sample is run again, where that is not by its token ids alone."""
    configs: Mapping[str, ConfigT] = field(default_factory=dict)
    """Configurations that `--config` knows by name."""
    parts: Callable[[ConfigT], Sequence[ConfigT]] = _one_part
    """The configurations that one is run as, one after the other into the same folder."""
    stages: Mapping[str, Callable[[ConfigT], int]] = field(default_factory=dict)
    """What `--stages` does besides running the model, by name: called with the configuration, whose `output.out` is
    set; returns an exit code. Of a configuration without a field `stages` there are none."""
    can_estimate: Callable[[ConfigT], bool] = lambda config: True
    """Whether a dry run can measure already; not where an earlier stage has to write the examples first."""
    card: Path | str | None = None
    """Template of the card's part about a configuration: a file, or the name of one in cards/; by default the title
    stands there. The manifest keeps the text."""
    report: "Callable[[Iterable[Any]], TaskReport] | None" = None
    """What `tracekit show --stats` says besides: called with all records when a run is finished. The manifest keeps
    it."""
    exports: "Mapping[str, Callable[..., Path]]" = field(default_factory=dict)
    """What `tracekit export --format` writes, by name: called with the folder, `config` and `num_samples`."""
    module: str = field(init=False)
    """Name of the module that defines it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "module", _defined_in())
        try:
            self._check()
        except ConfigError as error:
            told_plainly(error)
            raise

    def _check(self) -> None:
        if fault := attribute_fault(self):
            raise ConfigError(f"task {self.name!r}: {fault}")
        if not self.title.strip():
            raise ConfigError(f"task {self.name!r}: title={self.title!r} has to say what a sample is")
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"task {self.name!r}: expected a name of letters, digits and '_'")
        if self.record.__struct_config__.tag != self.name:
            raise ConfigError(
                f"task {self.name!r}: its record {self.record.__name__} has the tag "
                f"{self.record.__struct_config__.tag!r}; define it with tag={self.name!r}"
            )
        if (self.ask is None) == (self.tracer is None):
            raise ConfigError(f"task {self.name!r} needs either `ask` or `tracer`")
        self._check_config()
        own = [name for one in self.record.__mro__ if one not in Record.__mro__ for name in one.__annotations__]
        if taken := [name for name in own if name in Record.__struct_fields__]:
            raise ConfigError(
                f"task {self.name!r}: {self.record.__name__}.{taken[0]} has the name of a field that every record has; "
                "give it another name"
            )
        try:
            msgspec.convert(msgspec.to_builtins(self.outcome), Outcome)
        except (TypeError, msgspec.ValidationError) as error:
            raise ConfigError(f"task {self.name!r}: its outcome has another type: {error}") from error
        if fault := outcome_fault(self.outcome, RecordSchema.of(self.record)):
            raise ConfigError(f"task {self.name!r}: its outcome {fault}")

    def _check_config(self) -> None:
        """Look at the settings, each of which is a flag."""
        name = self.config.__name__
        try:
            default = self.config()
        except TypeError as error:
            raise ConfigError(f"task {self.name!r}: each setting of {name} needs a default: {error}") from error
        flags = ["--config", "--help", *(flag_of(path) for path in settings_of(default))]
        if twice := [flag for flag in flags if flags.count(flag) > 1]:
            raise ConfigError(f"task {self.name!r}: {name} has two settings for {twice[0]}; rename its own")
        has_answers = isinstance(getattr(default, "generation", None), GenerationConfig)
        if self.ask is not None and not (has_answers and isinstance(default, PromptedConfig)):
            raise ConfigError(
                f"task {self.name!r} has `ask`, and {name} no settings of prompts and answers; inherit from "
                "tracekit.AnswersConfig"
            )
        if self.shots is not None and not isinstance(getattr(default, "prompt", None), ShotsConfig):
            raise ConfigError(
                f"task {self.name!r} has `shots`, and {name} no --num-shots; give it the field "
                "`prompt: tracekit.ShotsConfig = tracekit.ShotsConfig()`"
            )

    def call(self, role: str, *given: Any) -> Any:
        """What one of its functions gives, `ask` for example; what a generator yields is a list.

        Raises:
            ConfigError: it raised; the message names the function, the example and the line.
            Exception: it raised what others deal with: a TracekitError, a package that is not installed, memory or a
                disk that is full, a reader that left.
        """
        try:
            result = getattr(self, role)(*given)
            if isinstance(result, Examples):
                return result._replace(examples=list(result.examples))
            return list(result) if isinstance(result, Iterator) else result
        except (TracekitError, ModuleNotFoundError, BrokenPipeError):
            raise
        except Exception as error:
            memory = sys.modules.get("tracekit.model.memory")  # where it is not loaded, no model is
            is_full = isinstance(error, OSError) and is_no_space(error)
            if is_full or isinstance(error, MemoryError) or (memory is not None and memory.is_out_of_memory(error)):
                raise
            example = "".join(f" of the example {one.key}" for one in given if isinstance(one, Example))
            steps = [one for one in traceback.extract_tb(error.__traceback__) if one.filename != __file__]
            own = [one for one in steps if one.filename == steps[0].filename]
            where = f"it is called with {', '.join(type(one).__name__ for one in given)}"
            where = f"{Path(own[-1].filename).name}, line {own[-1].lineno}" if own else where
            raise ConfigError(
                f"task {self.name!r}: `{role}`{example} raised {type(error).__name__}: {_said(error)} ({where})"
            ) from error

    @property
    def about(self) -> About:
        """What reading needs to know of it."""
        return About(
            title=self.title,
            category=self.category,
            outcome=self.outcome,
            are_values_finite=self.are_values_finite,
        )

    @property
    def file(self) -> Path | None:
        """The file of a task that is one file, in no package; None of one in a package."""
        module = sys.modules[self.module]
        return None if "." in self.module or not module.__file__ else Path(module.__file__)

    @property
    def command(self) -> str:
        """What runs it, without flags: `python -m builders.capitals` of a package with a `__main__`,
        `python -m my_package.capitals` of a module that is run itself, `python capitals.py`."""
        package, _, name = self.module.rpartition(".")
        if not package:
            return f"python {self.module}.py"
        main = getattr(sys.modules["__main__"], "__file__", None)
        is_module = main is not None and is_file_of(self.module, Path(main))
        if name != "__main__" and (is_module or importlib.util.find_spec(f"{package}.__main__") is None):
            package = self.module
        return f"python -m {package}"


def _said(error: Exception) -> str:
    """What an exception says, on one line."""
    try:
        said = " ".join(str(error).split())
    except Exception as other:  # noqa: BLE001 - a stranger's exception may fail in any way
        return f"(its message raised {type(other).__name__})"
    return said[:_MAX_SAID] + " ..." * (len(said) > _MAX_SAID)


def _defined_in() -> str:
    """Name of the module in which a task is made, as namedtuple and Enum find it; `dataclasses.replace` makes none."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") in (__name__, "dataclasses", "typing"):
        frame = frame.f_back
    return frame.f_globals.get("__name__", "__main__")


@cache
def _entry_points(name: str) -> tuple[EntryPoint, ...]:
    """Entry points of this name, each of a package once."""
    found = {(one.dist.name if one.dist else "?", one.value): one for one in entry_points(group=GROUP, name=name)}
    return tuple(found[claim] for claim in sorted(found))


def claim_fault(name: str) -> str | None:
    """What is wrong where a name is registered for several tasks; None where it is not."""
    points = _entry_points(name)
    if len(points) < 2:
        return None
    claims = " and ".join(f"{one.dist.name if one.dist else '?'} ({one.value})" for one in points)
    return (
        f"the task {name!r} is registered more than once, by {claims}; uninstall the other package, or mend its entry "
        "points"
    )


def known_tasks() -> list[str]:
    """Names of the tasks that are installed, sorted."""
    return sorted({one.name for one in entry_points(group=GROUP)})


@cache
def find_task(name: str) -> Task[Any, Any] | None:
    """The installed task of a name; None where there is none, or where its module cannot be imported, which is said.

    Raises:
        ConfigError: the name is registered more than once.
    """
    if (fault := claim_fault(name)) is not None:
        raise ConfigError(fault)
    points = _entry_points(name)
    if not points:
        return None
    try:
        with redirect_stdout(sys.stderr):  # what a module prints on being imported is no part of an answer
            task = points[0].load()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a stranger's module may fail in any way, and reading goes without it
        say(f"warning: the task {name!r} cannot be imported from {points[0].value}: {type(error).__name__}: {error}")
        return None
    if not isinstance(task, Task) or task.name != name:
        say(f"warning: {points[0].value} is registered as the task {name!r}, and is not; it is ignored")
        return None
    return task


def the_task(name: str, *, where: object, to_do: str) -> Task[Any, Any]:
    """The installed task of a name, to go on with a dataset.

    Raises:
        DatasetError: it is not installed; `where` says what needs it, `to_do` what for.
    """
    task = find_task(name)
    if task is None:
        raise DatasetError(
            f"{where}: {to_do} needs the code of the task {name!r}, which is not installed; install the package that "
            f"defines it. Installed here: {', '.join(known_tasks())}"
        )
    return task


def check_settings(plan: Plan, *, where: object) -> None:
    """Refuse to continue a run with settings that the installed task does not know.

    Raises:
        DatasetError: it has one.
    """
    task = find_task(plan.task)
    if task is not None:
        check_known(msgspec.json.encode(plan.run), task.config(), where=f"{where} (`run`)")


def record_type_of(name: str, schema: RecordSchema) -> type[Record]:
    """The type that records of a dataset are read as: the installed task's, where it reads records of this schema;
    else one that is made of the schema."""
    task = find_task(name)
    if task is None:
        return schema.record_type
    other = _other_field(RecordSchema.of(task.record).fields, schema.fields)
    if other is not None:
        say(f"warning: records of the task {name!r} here have another field {other!r} than the installed task's")
    return task.record if other is None else schema.record_type


def _other_field(own: Sequence[Field], stored: Sequence[Field]) -> str | None:
    """The first field that cannot be read as what is stored: of another type, or required and not there."""
    there = {one.name: one.node for one in stored}
    for one in own:
        if not _reads(one.node, there[one.name]) if one.name in there else one.is_required:
            return one.name
    return None


def _reads(own: Node, stored: Node) -> bool:
    """Whether a type takes what is stored: the same, null besides, or objects with other fields."""
    if own.kind != stored.kind or (stored.is_nullable and not own.is_nullable):
        return False
    if own.items is not None and stored.items is not None:
        return _reads(own.items, stored.items)
    return _other_field(own.fields, stored.fields) is None


def about_of(described: Manifest | Plan) -> About:
    """What reading needs to know of a configuration's task: as its manifest or plan says; of schema 1.x, which says
    nothing of it, as the installed task does."""
    if described.about is not None:
        return described.about
    task = find_task(described.task)
    return About() if task is None else task.about


def task_in(module: Any, name: str) -> Task[Any, Any]:
    """The task of a name that a module defines.

    Raises:
        ConfigError: it defines none.
    """
    tasks = [one for one in vars(module).values() if isinstance(one, Task) and one.module == module.__name__]
    found = [one for one in tasks if one.name == name]
    if not found:
        raise ConfigError(f"{module.__file__} defines no task {name!r}; assign it to a name of the module, as TASK")
    return found[0]


def check_name_is_free(task: Task[Any, Any]) -> None:
    """See that no package has a task of this name that is another one.

    Raises:
        ConfigError: one has.
    """
    others = [one for one in _entry_points(task.name) if one.value.partition(":")[0] != task.module]
    if others and find_task(task.name) is not task:
        raise ConfigError(
            f"the task {task.name!r} of {task.file or task.module} has the name of a task that is installed "
            f"({others[0].value}); give it another name, and its record the same tag"
        )


class TaskRef(NamedTuple):
    """A task as other processes find it."""

    name: str
    module: str
    file: str | None
    """The file that defines it, where it is one file."""
    sha256: str | None
    """Its SHA-256."""

    @classmethod
    def of(cls, task: Task[Any, Any]) -> "TaskRef":
        """How to find a task."""
        file = task.file
        return cls(task.name, task.module, *((None, None) if file is None else (str(file), sha256_file(file))))

    def found(self) -> Task[Any, Any]:
        """The task here.

        Raises:
            ConfigError: its file is not here, or is another one; its module defines no such task.
        """
        if self.file is None:
            return task_in(importlib.import_module(self.module), self.name)
        path = Path(self.file)
        if not path.is_file() or sha256_file(path) != self.sha256:
            fault = "is another one" if path.is_file() else "is not there"
            raise ConfigError(
                f"the task {self.name!r} is defined in {self.file}, which {fault} on {socket.gethostname()}; put "
                "the same file there on every node, or install it as a package"
            )
        return task_in(import_file(path), self.name)


def is_file_of(module: str, path: Path) -> bool:
    """Whether a module that is imported is made of a file."""
    file = sys.modules[module].__file__
    return file is not None and Path(file).resolve() == path.resolve()


def import_file(path: Path) -> Any:
    """Import a file as the module of its stem, so that its types are found by name in every process; once.

    Raises:
        ConfigError: its stem is no module's name, or is another module's.
    """
    given, stem, path = path.name, path.stem, path.resolve()
    if not stem.isidentifier():
        raise ConfigError(f"{given}: rename the file; {stem!r} is no name that Python can import")
    there = sys.modules.get(stem)
    if there is not None and Path(there.__file__ or "").resolve() == path:
        return there
    other = importlib.util.find_spec(stem) if there is None else there.__spec__
    if there is not None or (other is not None and Path(other.origin or "").resolve() != path):
        raise ConfigError(f"{given}: rename the file; Python has another module {stem!r}")
    spec = importlib.util.spec_from_file_location(stem, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = sys.modules[stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[stem]
        raise
    return module
