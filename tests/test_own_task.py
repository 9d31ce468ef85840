"""A task outside this repository: the file of builders/README.md, saved and run by itself, and what is refused."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.hub_for_tests import TestHub
from tests.processes_for_tests import run as run_python
from tests.publishing_for_tests import REPO, tell
from tests.runs_for_tests import hashes, log_lines
from tests.sample_records import trivia_record
from tracekit import (
    AnsweredRecord,
    AnswersConfig,
    Example,
    Examples,
    Exchange,
    Outcome,
    RunConfig,
    ShotsConfig,
    SourceInfo,
    Task,
    TraceStore,
    answered,
    verify,
)
from tracekit.answering import AnsweringTracer
from tracekit.card.readme import card_template
from tracekit.cluster.worker import NodeJob, NodeWorker
from tracekit.config import CaptureConfig, ModelConfig, SamplesConfig
from tracekit.errors import ConfigError, DatasetError, SourceError, TracekitError
from tracekit.flags import flag_words, settings_of
from tracekit.format.layout import Layout
from tracekit.format.manifest import read_plan
from tracekit.format.shards import sha256_file
from tracekit.model.models import load_tokenizer
from tracekit.ranks import Rank
from tracekit.run.encode import batch_of
from tracekit.run.runner import execute
from tracekit.task import TaskRef, TracedSample, import_file

ROOT = Path(__file__).parent.parent
README = (ROOT / "builders/README.md").read_text(encoding="utf-8")
(BLOCK,) = re.findall(r"## Your own task\n.*?```python capitals\.py\n(.*?)```", README, re.DOTALL)
SMALL = "--limit 4 --num-beams 1 --max-new-tokens 3 --samples-per-shard 2 --batch-size 1 --num-replays 1 --device cpu"
EVERY = (
    "--limit 4 --offset 1 --split test --on-bad-row skip --system Short. --prompt-form question --bos never "
    "--template-date 2020-02-02 --template-kwargs a=1 --chat-template none --num-beams 2 --max-new-tokens 3 "
    "--num-samples 2 --trace-samples --temperature 0.9 --top-p 0.9 --top-k 20 --sites hidden attn topk --layers 0 -1 "
    "--tokens answer --store-dtype bfloat16 --topk 3 --num-replays 1 --samples-per-shard 2 --batch-size 2 --seed 7 "
    "--dataset-config mine --device cpu --dtype float32"
)


def python(*words: str, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [environment.pop("PYTHONPATH", "")])])
    return run_python(*words, cwd=cwd, env=environment | {"PYTHONPATH": path}, check=check)


def made(folder: Path) -> dict[str, str]:
    return {path: digest for path, digest in hashes(folder).items() if path.startswith(("data/", "records/"))}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with capitals.py, and one dataset of it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "capitals.py").write_text(BLOCK, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(workplace: Path, model: Path) -> Path:
    """The dataset of one process."""
    python("capitals.py", "--model", str(model), *SMALL.split(), "--out", "traces/capitals", cwd=workplace)
    return workplace / "traces/capitals"


def test_the_file_is_short():
    assert len(BLOCK.splitlines()) < 50
    assert max(map(len, BLOCK.splitlines())) <= 120


_LINES = """
import json, pathlib, runpy, sys
for words in json.loads(sys.argv[1]):
    if words[0] == "rm":
        for path in words[1:]:
            pathlib.Path(path).unlink()
        continue
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0, words
"""
"""Several command lines in one process."""


def test_it_takes_every_common_flag_and_resumes_to_the_same_bytes(workplace: Path, model: Path):
    words = ["capitals.py", "--model", str(model), *EVERY.split(), "--out"]
    lost = ["rm", "traces/every/data/mine/test-00001.tar", "traces/every/manifest.json"]
    lines = [
        ["capitals.py", "--help"],
        [*words, "dry", "--dry-run"],
        [*words, "traces/whole"],
        [*words, "traces/every"],
    ]
    lines += [lost, [*words, "traces/every"], [*words, "traces/every"]]
    done = python("-c", _LINES, json.dumps(lines), cwd=workplace)
    flags = {word for word in flag_words(settings_of(AnswersConfig())) if word.startswith("--")}
    assert {flag for flag in flags if flag.replace("--no-", "--") not in done.stdout} == set()
    assert "examples        4\n" in done.stdout
    assert not (workplace / "dry").exists()
    assert "nothing to do" in done.stderr
    folder = workplace / "traces/every"
    with TraceStore(folder) as store:
        assert store.keys == [f"{number:06d}{drawn}" for number in range(1, 5) for drawn in ("", "_001")]
        assert store.record("000001").prompt.startswith("Short.\n")
    assert hashes(folder) == hashes(workplace / "traces/whole")
    assert [line["shard"] for line in log_lines(folder, "mine")] == ["test-00000", "test-00001", "test-00001"]


def test_it_is_read_and_published_where_its_module_is_not(run: Path, xet_hub: TestHub, tmp_path: Path):
    show = ["show", run]
    lines = [["verify", run], show, [*show, "--key", "000001"], [*show, "--stats"], [*show, "--json"]]
    told = tell(xet_hub, *lines, ["publish", run, REPO, "--version", "v1.0.0", "--dry-run"])
    assert [one.code for one in told] == [0] * 6, told
    verified, shown, one, stats, described, published = [one.out for one in told]
    assert verified.startswith("ok: 4 samples")
    assert "Bolivia" in shown
    assert "(accepted: Sucre" in shown
    assert re.search(r'gold_answers +\["Sucre", "La Paz"\]', one)
    assert re.search(r"accuracy +[\d.]+ +of 4 judged answers", stats)
    assert json.loads(described)["task"] == "capitals"
    assert "nothing was sent" in published
    card = (run / "README.md").read_text(encoding="utf-8")
    for said in ("Countries, and the capitals that the model named.", "| accuracy |", "python capitals.py", "Accepted"):
        assert said in card, said


def test_its_records_are_typed_by_its_schema(run: Path):
    assert "capitals" not in sys.modules
    with TraceStore(run) as store:
        record: Any = store.record("000001")
        outcome = store.about.outcome
    assert (record.country, record.gold_answers, record.samples) == ("Bolivia", ["Sucre", "La Paz"], [])
    assert isinstance(record.is_correct, bool)
    assert (outcome.asked, outcome.gold, outcome.correct) == ("country", "gold_answers", "is_correct")
    types = {field.name: field.type for field in msgspec.structs.fields(type(record))}
    assert (types["country"], types["gold_answers"], types["beam_score"]) == (str, list[str], float | None)


def test_a_file_that_was_changed_is_refused_by_its_name(run: Path, workplace: Path, model: Path, tmp_path: Path):
    assert read_plan(Layout(run, "capitals")).code == f"capitals.py@sha256:{sha256_file(workplace / 'capitals.py')}"
    before = hashes(run)
    (tmp_path / "capitals.py").write_text(BLOCK.replace("capital of", "largest city of"))
    words = ["capitals.py", "--model", str(model), *SMALL.split(), "--out", str(run)]
    done = python(*words, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "code: 'capitals.py@sha256:" in done.stderr
    assert "changed or renamed since" in done.stderr
    assert hashes(run) == before


def packaged(folder: Path, package: str, module: str, code: str) -> None:
    """A package, as pip installs one, that registers the task `capitals`."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[tracekit.tasks]\ncapitals = {module}:TASK\n")
    file = folder / f"{module.replace('.', '/')}.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(code, encoding="utf-8")


_TYPE = "import sys; from tracekit import TraceStore; print(type(TraceStore(sys.argv[1])[0].record).__module__)"


def test_an_installed_package_gives_the_type_of_its_records(run: Path, tmp_path: Path):
    packaged(tmp_path / "site", "geography", "capitals_of_countries", BLOCK)
    said = python("-c", _TYPE, str(run), cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert (said.stdout, said.stderr) == ("capitals_of_countries\n", "")


@pytest.mark.parametrize(
    ("line", "fault"), [("import nothing_of_this_name", "nothing_of_this_name"), ("exit(3)", "SystemExit: 3")]
)
def test_a_package_that_cannot_be_imported_is_read_by_the_schema_with_a_warning(
    run: Path, tmp_path: Path, line: str, fault: str
):
    packaged(tmp_path / "site", "geography", "broken_capitals", f"print('loud')\n{line}\n{BLOCK}")
    said = python("-m", "tracekit.cli", "show", str(run), cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert "Bolivia" in said.stdout
    assert "loud" not in said.stdout
    (warning,) = [line for line in said.stderr.splitlines() if "warning" in line]
    for word in ("'capitals'", "broken_capitals:TASK", fault):
        assert word in warning


@pytest.mark.parametrize(
    ("words", "line"),
    [(["-m", "my_package.capitals"], "from . import places"), (["site/my_package/capitals.py"], "")],
    ids=["module", "path"],
)
@pytest.mark.parametrize("has_main", [True, False])
def test_an_installed_task_runs_by_its_module_and_by_its_path(
    tmp_path: Path, words: list[str], line: str, *, has_main: bool
):
    packaged(tmp_path / "site", "my_package", "my_package.capitals", f"{line}\n{BLOCK}")
    for name in ("__init__", "places", *(["__main__"] if has_main else [])):
        (tmp_path / f"site/my_package/{name}.py").write_text("")
    said = python(*words, "--help", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert said.stdout.startswith("usage: python -m my_package.capitals ")


def test_the_command_of_a_task_in_a_package_runs_its_module(tmp_path: Path, model: Path):
    packaged(tmp_path / "site", "my_package", "my_package.capitals", f"from . import places\n{BLOCK}")
    (tmp_path / "site/my_package/places.py").write_text("")
    words = ["-m", "my_package.capitals", "--model", str(model), *SMALL.split(), "--out", "run"]
    python(*words, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    plan = read_plan(Layout(tmp_path / "run", "capitals"))
    assert plan.command.startswith("python -m my_package.capitals ")
    assert plan.code is None


@pytest.mark.parametrize("modules", [("capitals_old", "capitals_new"), ("capitals_old", "capitals_old")])
def test_two_packages_with_a_task_of_one_name_are_refused(run: Path, tmp_path: Path, modules: tuple[str, str]):
    for package, module in zip(("geography", "history"), modules, strict=True):
        packaged(tmp_path / "site", package, module, BLOCK)
    said = python("-m", "tracekit.cli", "show", str(run), cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"), check=False)
    assert said.returncode == 1
    for word in ("'capitals'", f"geography ({modules[0]}:TASK)", f"history ({modules[1]}:TASK)"):
        assert word in said.stderr
    said = python("-m", "tracekit.cli", "verify", str(run), cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert said.stdout.startswith("ok: ")
    assert "warning: the task 'capitals' is registered more than once, by geography" in said.stderr


def test_a_name_that_one_package_registers_twice_is_refused(run: Path, tmp_path: Path):
    packaged(tmp_path / "site", "geography", "capitals_old", BLOCK)
    with (tmp_path / "site/geography-1.0.dist-info/entry_points.txt").open("a") as file:
        file.write("capitals = capitals_new:TASK\n")
    said = python("-m", "tracekit.cli", "show", str(run), cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"), check=False)
    assert said.returncode == 1
    assert "by geography (capitals_new:TASK) and geography (capitals_old:TASK)" in said.stderr


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("capitals.py", BLOCK.replace('"capitals"', '"csqa"'), "'csqa' of .*capitals.py.*builders.csqa.task:TASK"),
        ("my-capitals.py", BLOCK, "my-capitals.py: rename the file; 'my-capitals'"),
        (
            "capitals.py",
            BLOCK.replace("gold_answers: list[str]", "gold_answers: dict[str, str]"),
            r"CapitalsRecord\.gold_answers: type dict",
        ),
    ],
)
def test_a_file_that_would_not_do_says_so(tmp_path: Path, name: str, code: str, said: str):
    (tmp_path / name).write_text(code)
    done = python(name, "--model", "./nowhere", "--out", "run", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert re.search(said, done.stderr), done.stderr
    assert not (tmp_path / "run").exists()


class SomeRecord(AnsweredRecord, tag="some"):
    """A record of a task that asks."""

    is_right: bool
    """Whether the answer is right."""


class DictRecord(AnsweredRecord, tag="some"):
    """A record that no table holds."""

    counts: dict[str, int]
    """A map with keys that depend on the data."""


class SetRecord(AnsweredRecord, tag="some"):
    """A record of a type without an order."""

    words: list[set[str]]
    """Words."""


class ComplexRecord(AnsweredRecord, tag="some"):
    """A record of a type that JSON does not have."""

    wave: complex
    """A number."""


class TakenRecord(AnsweredRecord, tag="some"):
    """A record with a field that every record has."""

    tokens: int  # type: ignore[assignment]
    """A number."""


class ScoredRecord(SomeRecord, tag="some"):
    """A record with a score."""

    score: float = 0.0
    """A number."""


class TextBin(msgspec.Struct):
    """A bin whose edges are texts."""

    label: str
    low: str
    high: str
    midpoint: float


class BinsRecord(SomeRecord, tag="some"):
    """A record with such bins."""

    bins: list[TextBin] = []  # noqa: RUF012 - msgspec copies it
    """Bins."""


class NoDefaultConfig(AnswersConfig, frozen=True, kw_only=True):
    """A setting without a default."""

    strictness: int
    """How strict."""


class PlainConfig(RunConfig, frozen=True, kw_only=True):
    """Settings without prompts and answers."""


class HelpConfig(AnswersConfig, frozen=True, kw_only=True):
    """A setting with the flag of every command."""

    help: str = ""
    """A text."""


class TwiceConfig(AnswersConfig, frozen=True, kw_only=True):
    """A setting with the flag of another."""

    limit: int = 1
    """A number."""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"system": 3}, "'some': system=3 has to be a text"),
        ({"name": 3}, "task 3: name=3 has to be a text"),
        ({"judge": None}, "'some': judge=None has to be a function"),
        ({"shots": [Exchange("1 + 1?", "2")]}, r"'some': shots=\[Exchange\(.* has to be a function"),
        ({"record": BinsRecord, "outcome": Outcome(bins="bins")}, "'some'.*'bins' .bins.*list of {label, low, high"),
        ({"record": TakenRecord}, r"'some'.*TakenRecord\.tokens .*another name"),
        ({"record": ScoredRecord, "outcome": answered(correct="score")}, "'some'.*'score' \(correct\).*boolean"),
        ({"config": int}, "'some'.*config=<class 'int'> has to be a class that inherits from RunConfig"),
        ({"config": PlainConfig}, "'some' has `ask`, and PlainConfig no settings of prompts.*tracekit.AnswersConfig"),
        ({"config": HelpConfig}, "'some'.*HelpConfig has two settings for --help; rename"),
        ({"title": " "}, "'some': title=' ' has to say"),
        ({"replay": 5}, "'some': replay=5 has to be a function or None"),
        ({"stages": [1]}, r"'some': stages=\[1\] has to be a dictionary, each value a function"),
        ({"stages": {"one": 1}}, "'some': stages={'one': 1} has to be a dictionary, each value a function"),
        ({"exports": None}, "'some': exports=None has to be a dictionary"),
        ({"configs": {"one": 1}}, "'some': configs=.* each value a RunConfig"),
        ({"card": 5}, "'some': card=5 has to be a Path or a text or None"),
        ({"record": None}, "'some': record=None has to be a class that inherits from Record"),
        ({"are_values_finite": 1}, "'some': are_values_finite=1 has to be True or False"),
        ({"outcome": None}, "'some': outcome=None has to be a Outcome"),
        ({"outcome": Outcome(correct=5)}, r"'some': its outcome.*Expected `str | null`, got `int` - at `\$\.correct`"),
        ({"outcome": Outcome(means=[5])}, r"'some': its outcome.*at `\$\.means\[0\]`"),
        ({"config": NoDefaultConfig}, "'some'.*NoDefaultConfig needs a default.*'strictness'"),
        ({"config": TwiceConfig}, "'some'.*TwiceConfig has two settings for --limit; rename"),
        ({"shots": lambda config: []}, "'some' has `shots`, and AnswersConfig no --num-shots.*ShotsConfig"),
        ({"record": DictRecord}, r"^DictRecord\.counts: type dict.* is not supported"),
        ({"record": SetRecord}, r"^SetRecord\.words: set.*use a list"),
        ({"record": ComplexRecord}, r"^ComplexRecord\.wave: type .*complex.* is not supported; records have"),
        ({"name": "other"}, "'other'.*SomeRecord has the tag 'some'.*tag='other'"),
        ({"outcome": answered(correct="is_correct")}, "'some'.*'is_correct'.*no field of SomeRecord.*is_right"),
        ({"outcome": Outcome(same=["nothing"])}, "'nothing'.*no field of SomeRecord"),
        ({"outcome": Outcome(occasions=["model.weight"])}, "'model.weight'.*no field of SomeRecord"),
        ({"outcome": Outcome(answer="model.id")}, "'model.id'.*no field of SomeRecord"),
        ({"outcome": answered(correct="prompt")}, "'prompt' .correct.*another type than boolean"),
        ({"outcome": Outcome(options="spans")}, "'spans' .options.*list of {label, text}"),
        ({"ask": None}, "'some' needs either `ask` or `tracer`"),
        ({"name": "a task"}, "'a task'.*letters, digits"),
    ],
)
def test_a_task_that_would_not_do_is_refused_when_it_is_defined(changes: dict[str, Any], said: str):
    assert some_task().module == __name__
    with pytest.raises(ConfigError, match=said):
        some_task(**changes)


def record_with(kind: Any, **settings: Any) -> Any:
    """A record type with one more field."""
    bases = (SomeRecord,)
    return msgspec.defstruct("Own", [("own", kind)], bases=bases, tag="some", kw_only=True, frozen=True, **settings)


EMPTY = msgspec.defstruct("Empty", [])
SPAN, OTHER_SPAN = (msgspec.defstruct("Span", [("start", kind)]) for kind in (int, str))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (record_with(EMPTY), r"Own\.own: Empty has no field"),
        (record_with(list[msgspec.defstruct("Holder", [("inner", EMPTY | None)])]), r"Own\.own: Empty has no field"),
        (record_with(msgspec.defstruct("Two", [("a", SPAN), ("b", OTHER_SPAN)])), r"Own\.own: .*two Structs Span"),
        (record_with(SPAN), "two Structs Span; rename one"),  # each record has one
        (record_with(int | msgspec.UnsetType), r"Own\.own: type .*UnsetType.* is not supported"),
        (record_with(list[datetime]), r"Own\.own: type .*datetime.* is not supported"),
        (record_with(Enum("Colour", {"RED": "red"})), r"Own\.own: type .*Colour.* is not supported"),
        (record_with(msgspec.defstruct("Named", [("my_a", int)], rename="camel")), r"my_a is stored as 'myA'"),
        *(
            (record_with(int, **{name: value}), rf"^Own: Own is defined with {name}={value}; leave it out")
            for name, value in [("omit_defaults", True), ("forbid_unknown_fields", True), ("array_like", True)]
        ),
        *(
            (record_with(msgspec.defstruct("Inner", [("a", int)], **{name: value})), rf"own: Inner .*{name}={value}")
            for name, value in [("omit_defaults", True), ("forbid_unknown_fields", True), ("eq", False)]
        ),
    ],
)
def test_a_type_that_no_table_holds_or_that_is_not_read_as_it_is_written_is_refused(record: Any, said: str):
    with pytest.raises(ConfigError, match=said):
        some_task(record=record)


def some_task(**changes: Any) -> Task[Any, Any]:
    settings: dict[str, Any] = {
        "name": "some",
        "title": "Something.",
        "record": SomeRecord,
        "examples": lambda config: [],
        "ask": lambda example, config: "?",
        "outcome": answered(correct="is_right"),
    }
    return Task(**settings | changes)


def helped(example: Example, config: Any) -> str:
    return json.loads(example.text)


@pytest.mark.parametrize(
    ("function", "given", "said"),
    [
        ("ask", lambda example, config: {}["x"], r"`ask` of the example 000007 raised KeyError: 'x' \(test_own_task"),
        (
            "ask",
            lambda example: "?",
            r"`ask` .*000007 raised TypeError: .*2 were given \(it is called with Example, Answers",
        ),
        ("ask", helped, r"`ask` .* raised JSONDecodeError: .*\(test_own_task.py, line \d+\)"),
        ("examples", lambda config: config.no_such, "`examples` raised AttributeError: .*no_such"),
        ("examples", lambda config: (1 / zero for zero in [0]), "`examples` raised ZeroDivisionError"),
        ("report", lambda store: 1 / 0, "`report` raised ZeroDivisionError"),
    ],
)
def test_what_a_function_of_a_task_raises_names_task_function_example_and_line(function: str, given: Any, said: str):
    task = some_task(**{function: given})
    arguments = (Example(index=7), AnswersConfig()) if function == "ask" else (AnswersConfig(),)
    with pytest.raises(ConfigError, match=f"^task 'some': {said}") as caught:
        task.call(function, *arguments)
    assert caught.value.__cause__ is not None


class MuteError(Exception):
    """An exception that cannot be told."""

    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MuteError(), r"raised MuteError: \(its message raised RuntimeError\) \(test_own"),
        (RuntimeError(5), r"raised RuntimeError: 5 \("),
        (ValueError("a\nb" * 1000), r"raised ValueError: a ba ba .{292} \.\.\. \(test_own_task"),
    ],
)
def test_whatever_a_function_of_a_task_raises_is_told_in_one_line(error: Exception, said: str):
    def judge(*given: Any) -> dict[str, Any]:
        raise error

    with pytest.raises(ConfigError, match=said) as caught:
        some_task(ask=judge, judge=judge).call("judge")
    assert str(caught.value).startswith("task 'some': `judge` raised")


def test_examples_that_come_one_by_one_are_a_list():
    source = SourceInfo(id="a", revision="b", subset=None, split="test", num_rows=2, num_used=2, skipped=[])
    task = some_task(examples=lambda config: Examples((Example(index=index) for index in range(2)), source))
    assert task.call("examples", None).examples == [Example(index=0), Example(index=1)]
    failing = some_task(examples=lambda config: Examples((1 / index for index in range(2)), source))
    with pytest.raises(ConfigError, match="`examples` raised ZeroDivisionError"):
        failing.call("examples", None)


@pytest.mark.parametrize(
    "error",
    [
        SourceError("row 3"),
        ModuleNotFoundError("no torch", name="torch"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        OSError(errno.ENOSPC, "No space left on device"),
        BrokenPipeError(),
    ],
)
def test_what_others_deal_with_stays_as_a_task_raised_it(error: Exception):
    def examples(config: Any) -> list[Example]:
        raise error

    task = some_task(examples=examples)
    with pytest.raises(type(error)) as caught:
        task.call("examples", AnswersConfig())
    assert caught.value is error


class ShotsTaskConfig(AnswersConfig, frozen=True, kw_only=True):
    """Settings with solved examples."""

    prompt: ShotsConfig = ShotsConfig(num_shots=1, prompt_form="question")


@pytest.mark.parametrize(
    ("shots", "said"),
    [
        ([("1 + 1?", "2")], r"'some': `shots` gave \('1 \+ 1\?', '2'\); each has to be a tracekit.Exchange"),
        ([Exchange("?", "!")], "--num-shots 1: the task has 0 solved examples .*use --num-shots 0, or give .*more"),
    ],
)
def test_solved_examples_of_no_use_are_refused(model: Path, shots: list[Any], said: str):
    config = ShotsTaskConfig()
    task = some_task(config=ShotsTaskConfig, shots=lambda config: iter(shots))
    tokenizer = load_tokenizer(ModelConfig(model=str(model)))
    with pytest.raises(TracekitError, match=said):
        AnsweringTracer(task, config, tokenizer).prompt(Example(index=7))


def test_a_solved_example_of_another_question_is_shown(model: Path):
    task = some_task(config=ShotsTaskConfig, shots=lambda config: [Exchange("1 + 1?", "2")])
    tracer = AnsweringTracer(task, ShotsTaskConfig(), load_tokenizer(ModelConfig(model=str(model))))
    assert tracer.prompt(Example(index=7)).text.startswith("Question: 1 + 1?\nAnswer: 2\n")


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("capitals.md.j2", "card='capitals.md.j2' is no template of tracekit; give the Path"),
        (Path("nowhere.md.j2"), "card 'nowhere.md.j2' cannot be used: .*No such file"),
        (Path("open.md.j2"), "card 'open.md.j2', line 2 cannot be used: .*; mend it"),
        (Path("latin.md.j2"), "card 'latin.md.j2' cannot be used: .*utf-8"),
    ],
)
def test_a_card_of_no_use_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: Any, said: str):
    monkeypatch.chdir(tmp_path)
    Path("open.md.j2").write_text("# Title\n{% if %}\n")
    Path("latin.md.j2").write_bytes("größe".encode("latin-1"))
    with pytest.raises(ConfigError, match=f"^task 'some': .*{said}"):
        card_template(some_task(card=card))


@pytest.mark.parametrize(
    ("changed", "into", "said"),
    [
        ("index=index", "index=0", r"examples 0 and 1 have one key, '000000'; give each its own `index`"),
        ("index=index", "index=str(index)", r"example 0 is Country\(.*index='0'.*its `index` an int"),
        ("index=index", "index=bool(index)", "example 0 is Country.*index=False.*its `index` an int"),
        ("return [Country(", "return 3 or [Country(", "its example 0 is 3; each has to be a tracekit.Example"),
        ("return [Country(", "return [dict(", r"example 0 is \{'index': 0.*tracekit.Example"),
        ("return [Country(", "return None and [Country(", "0 examples, so --offset 0 leaves none"),
        ('return f"What', 'return " " or f"What', "`ask` of the example 000000 gave ' '; expected a text"),
        ('return f"What', 'return 3 and len(f"What', r"`ask` of the example 000000 gave \d+"),
    ],
)
def test_examples_and_questions_of_no_use_are_refused_before_the_model_runs(
    tmp_path: Path, model: Path, changed: str, into: str, said: str
):
    code = BLOCK.replace(changed, into)
    (tmp_path / "capitals.py").write_text(code.replace('country}?"', 'country}?")') if "len(f" in into else code)
    done = python("capitals.py", "--model", str(model), *SMALL.split(), "--out", "run", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert re.search(said, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("key", ["q1.json", "../../1", "é1", "k" * 81, "1\n", "a b", "", 1])
def test_a_key_that_no_sample_may_have_is_refused_before_the_model_runs(tmp_path: Path, key: Any):
    class Keyed(Example):
        key = property(lambda self: key)  # type: ignore[assignment]

    task = some_task(examples=lambda config: [Keyed(index=7)])
    with pytest.raises(SourceError, match=r"^some: its example 0 has the key .*; a key has 1 to 80 characters"):
        execute(task, AnswersConfig(), tmp_path / "run")
    traced: Any = TracedSample(trivia_record(key=key), None, None)  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match=r"^a record of trivia_qa has the key .*; a key has 1 to 80 characters"):
        batch_of([traced], CaptureConfig())


@pytest.mark.parametrize(
    ("changed", "into", "said"),
    [
        (
            '"is_correct": is_correct}',
            '"is_correct": __import__("numpy").True_}',
            r"'\d+': its field `is_correct` cannot be stored: .*numpy",
        ),
        (
            '{"country": example',
            '{"colour": 3, "country": example',
            r"\d+ gave 'colour', which is no field of Cap",
        ),
        ('"country": example.country, ', "", r"example \d+ gave no 'country'"),
        ("in answer.text", "in answer.txt", r"`judge` of the example \d+ raised AttributeError: .*\(capitals.py, line"),
        ('{"country": example', '{"key": "x", "country": example', "gave 'key', which the library fills in"),
        ('return {"country"', 'return None and {"country"', r"example \d+ gave None.*dictionary"),
        (
            '"is_correct": is_correct}',
            '"is_correct": "yes"}',
            r"'\d+'.*Expected `bool`.* in its field `is_correct`",
        ),
    ],
)
def test_judgements_of_no_use_are_refused_with_the_field(
    tmp_path: Path, model: Path, changed: str, into: str, said: str
):
    (tmp_path / "capitals.py").write_text(BLOCK.replace(changed, into))
    done = python("capitals.py", "--model", str(model), *SMALL.split(), "--out", "run", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert re.search(said, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_a_judgement_of_a_sampled_answer_is_checked_too(tmp_path: Path, model: Path):
    fewer = 'return {"country": "", "gold_answers": []} if answer.sample_index else {"country"'
    (tmp_path / "capitals.py").write_text(BLOCK.replace('return {"country"', fewer))
    words = ["capitals.py", "--model", str(model), *SMALL.split(), "--num-samples", "2", "--out", "run"]
    done = python(*words, cwd=tmp_path, check=False)
    assert re.search(r"error: .*`judge` of the example \d+ gave no 'is_correct'", done.stderr), done.stderr


def test_ranks_make_the_bytes_of_one_process(run: Path, workplace: Path, model: Path, tmp_path: Path):
    out = tmp_path / "run"
    words = ["capitals.py", "--model", str(model), *SMALL.split(), "--out", str(out)]
    ranks = [{"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": "2"} for number in "01"]
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda rank: python(*words, cwd=workplace, **rank), ranks))
    assert made(out) == made(run)
    assert {line["world_size"] for line in log_lines(out, "capitals")} == {2}
    assert verify(out).problems == []


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_workers_on_ray_make_the_bytes_of_one_process(run: Path, workplace: Path, model: Path, tmp_path: Path):
    pytest.importorskip("ray", reason="ray is not installed: pip install 'tracekit-llm[ray]'")
    out = tmp_path / "run"
    words = ["capitals.py", "--model", str(model), *SMALL.split(), "--out", str(out), "--engine", "ray"]
    python(*words, "--num-workers", "2", cwd=workplace)
    assert made(out) == made(run)
    assert verify(out).problems == []


@pytest.fixture
def capitals(workplace: Path) -> Iterator[Any]:
    """The file, imported as processes of a run import it."""
    yield import_file(workplace / "capitals.py")
    del sys.modules["capitals"]


@pytest.mark.parametrize("change", ["another", "missing"])
def test_a_worker_with_another_file_refuses_it_by_name(
    run: Path, workplace: Path, tmp_path: Path, change: str, capitals: Any
):
    file = Path(shutil.copy(workplace / "capitals.py", tmp_path))
    task = TaskRef.of(capitals.TASK)._replace(file=str(file))
    assert task.sha256 == sha256_file(file)
    if change == "another":
        file.write_text(BLOCK + "\n")
    else:
        file.unlink()
    job = NodeJob.of("1", task, AnswersConfig(), capitals.examples(None), read_plan(Layout(run, "capitals")).model)
    with pytest.raises(ConfigError, match=rf"'capitals' .*{re.escape(str(file))}, which is .*same file"):
        NodeWorker(Rank(0, 1, 0), str(tmp_path / "away")).open(job)


@pytest.mark.parametrize(
    ("changed", "into", "said"),
    [
        ('correct="is_correct")', 'correct="country")', "task 'capitals': its outcome names 'country' .correct."),
        ('correct="is_correct")', 'right="is_correct")', r"answered\(right=...\)"),
        ('country: str\n    """Name', 'country: set[str]\n    """Name', "CapitalsRecord.country: .*has no order"),
    ],
)
def test_a_definition_of_no_use_ends_in_one_line_that_names_the_file(
    tmp_path: Path, changed: str, into: str, said: str
):
    assert changed in BLOCK
    (tmp_path / "capitals.py").write_text(BLOCK.replace(changed, into))
    (tmp_path / "other.py").write_text("import capitals\n")
    for file in ("capitals.py", "other.py"):
        done = python(file, "--help", cwd=tmp_path, check=False)
        assert done.returncode == 1
        assert re.fullmatch(rf"error: \S*capitals.py, line \d+: .*{said}.*\n", done.stderr), done.stderr


def test_a_file_with_the_name_of_a_module_of_python_is_named(tmp_path: Path):
    (tmp_path / "capitals.py").write_text(BLOCK)
    for name in ("queue.py", "json.py"):
        (tmp_path / name).write_text("")
        done = python("capitals.py", "--help", cwd=tmp_path, check=False)
        assert done.returncode == 1
        assert done.stderr.endswith(f"{name}: rename the file; it hides Python's own module {name[:-3]!r}\n")
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("keys", "other"), [(("q", "q_001"), "the key of the example 1, 'q_001'"), (("k" * 78, "b"), "80 characters")]
)
def test_keys_of_sampled_answers_that_others_have_are_refused_before_the_model_runs(
    tmp_path: Path, keys: tuple[str, str], other: str
):
    class Keyed(Example):
        key = property(lambda self: keys[self.index])  # type: ignore[assignment]

    task = some_task(examples=lambda config: [Keyed(index=0), Keyed(index=1)])
    config = AnswersConfig(generation=SamplesConfig(num_samples=2, trace_samples=True))
    with pytest.raises(SourceError, match=f"^some: answer 1 of its example '{keys[0]}' .*{other}.*--trace-samples"):
        execute(task, config, tmp_path / "run")


def test_a_link_of_no_use_is_called_by_its_own_name(tmp_path: Path):
    (tmp_path / "capitals.py").write_text(BLOCK)
    (tmp_path / "my-capitals.py").symlink_to("capitals.py")
    done = python("my-capitals.py", "--help", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: my-capitals.py: rename the file; 'my-capitals'")
