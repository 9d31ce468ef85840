"""The command of a dataset makes the same plan again, for every builder and however the run was started."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from builders.kit.columns import QuestionSource
from builders.trivia_qa.task import TASK as TRIVIA_QA
from builders.trivia_qa.task import TriviaQAConfig
from tests.judges_for_tests import FakeClient, install
from tests.tasks_for_tests import TASKS
from tests.test_finetune_csqa import save_encoder
from tests.test_wiki_qa import writer
from tracekit.cli import main, run_task
from tracekit.config import RunConfig, ShotsConfig, check
from tracekit.errors import ConfigError
from tracekit.flags import settings_of
from tracekit.format.layout import Layout, config_names
from tracekit.format.manifest import Manifest, Plan, read_plan, read_struct
from tracekit.format.shards import sha256_file
from tracekit.run.command import asked, command_line, with_out
from tracekit.run.merge import merge

BUILDERS = Path(__file__).parent.parent / "builders"


QUESTION_FLAGS = re.findall(
    r"--\S+",
    "--source --limit --min-section-tokens --max-section-tokens --num-questions --question-model --concurrency --model "
    "--device --num-names --num-wordings --controls --seed --species",
)
"""Flags that the stage `questions` reads."""


class Case(NamedTuple):
    """How a builder is run here."""

    flags: str
    """Several flags that are not at their defaults."""
    file: tuple[str, str] | None
    """A flag, and a file of the builders that it gets under a name with a space."""


CASES = {
    "trivia_qa": Case(
        "--limit 3 --max-new-tokens 3 --num-samples 2 --top-p 0.9 --system='-a \"b\" $c'",
        ("--source", "trivia_qa/trivia_qa.jsonl"),
    ),
    "csqa": Case("--limit 3 --max-seq-len 300 --offset 1 --num-shots 1", ("--source", "kit/csqa.jsonl")),
    "csqa_mcq": Case("--limit 3 --max-seq-len 40 --store-dtype bfloat16", ("--source", "kit/csqa.jsonl")),
    "next_token": Case(
        "--kind wikitext2 --max-seq-len 16 --stride 12 --limit 6", ("--source", "next_token/next_token_wikitext.txt")
    ),
    "introspection": Case(
        "--limit 2 --bin-edges 0 50 90 100 --shuffle-options --max-new-tokens 2",
        ("--source", "introspection/introspection.jsonl"),
    ),
    "degradation": Case("--config iq_it_ablation --limit 2 --groups q mlp:0-1 --levels 0 0.5 --max-new-tokens 2", None),
    "wiki_qa": Case(
        "--limit 3 --min-section-tokens 100 --max-section-tokens 4000 --num-questions 2 --num-beams 2 "
        "--max-new-tokens 3 --question-model openai:writer --concurrency 2",
        ("--source", "wiki_qa/wiki_articles.jsonl"),
    ),
    "nonsense_entities": Case(
        "--num-names 2 --num-wordings 1 --controls 1 --limit 5 --max-new-tokens 2 --seed 9",
        ("--species", "nonsense_entities/nonsense_animals.tsv"),
    ),
    "replay": Case("--limit 3 --template-date 2020-02-02 --no-merge-adapter", ("--source", "replay/replay.jsonl")),
}
SHARED = "--sites hidden --layers 0 -1 --num-replays 1 --samples-per-shard 2 --device cpu"


class Started(NamedTuple):
    """A builder that was run."""

    name: str
    files: dict[str, Path]
    """Local files and models by the names that commands give them."""
    words: list[str]

    def run(self, words: list[str], out: Path | None = None) -> None:
        """Run it by the words of a command line."""
        where = [] if out is None else ["--out", str(out)]
        with pytest.raises(SystemExit) as ended:
            run_task(TASKS[self.name], [*words, *where])
        assert ended.value.code == 0

    def given_back(self, words: list[str]) -> list[str]:
        """A command's words with local files and models in place of their names."""
        found = []
        for word in words:
            name = word.partition("@sha256:")[0]
            found.append(str(self.files[name]) if name in self.files else word)
        return found

    def assert_remade(self, folder: Path, again: Path) -> None:
        """Every configuration's command, run in an empty folder, makes its plan."""
        for config in config_names(folder):
            plan = read_plan(Layout(folder, config))
            is_grown = bool(plan.grown)
            assert str(folder.parent) not in plan.command
            assert command_of_card(folder, config) == plan.command
            for number, line in enumerate(split(plan.command)):
                assert line[:3] == ["python", "-m", f"builders.{self.name}"]
                self.run(self.given_back(line[3:]), again / config)
                assert number < 2
            assert aims(read_plan(Layout(again / config, config)), is_grown) == aims(plan, is_grown)


def aims(plan: Plan, is_grown: bool) -> Any:
    """What a plan sets out to do; of one that grew, without how its rows were dealt out."""
    rows = sorted(row for shard in plan.shards for batch in shard.batches for row in batch)
    dealt = {"shards": [], "batch_size": 0, "grown": []} if is_grown else {}
    return msgspec.to_builtins(msgspec.structs.replace(plan, **dealt)), rows


def split(command: str) -> list[list[str]]:
    """The words of each line of a command."""
    found: list[list[str]] = []
    for word in shlex.split(command):
        if word in ("python", "tracekit"):
            found.append([])
        found[-1].append(word)
    return found


def command_of_card(folder: Path, config: str) -> str:
    """The command that the card shows for a configuration."""
    card = (folder / "README.md").read_text()
    part = card[card.index(f"## Configuration `{config}`") :]
    found = re.search(r"### How it was made.*?```bash\n(.*?)\n```", part, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture(params=CASES)
def started(
    request: pytest.FixtureRequest, model: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Started:
    name, case = request.param, CASES[request.param]
    install(monkeypatch, FakeClient(writer, name="writer@https://api.example"), where="builders.wiki_qa.stages")
    of_model = encoder if name == "csqa_mcq" else model
    words = [*shlex.split(case.flags), *shlex.split(SHARED), "--model", str(of_model)]
    if name == "csqa_mcq":
        words[words.index("hidden")] = "hidden_states"
    files = {of_model.name: of_model}
    if case.file is not None:
        flag, path = case.file
        file = tmp_path / f"my own {Path(path).name}"
        shutil.copy(BUILDERS / path, file)
        files[file.name] = file
        words += [flag, str(file)]
    return Started(name, files, words)


def test_the_command_of_the_card_makes_the_same_plan(started: Started, tmp_path: Path):
    started.run(started.words, tmp_path / "run")
    started.assert_remade(tmp_path / "run", tmp_path / "again")
    for config in config_names(tmp_path / "run"):
        command = read_plan(Layout(tmp_path / "run", config)).command
        flags = {word.partition("=")[0] for word in started.words if word.startswith("--")} - {"--config"}
        assert flags - set(re.findall(r"--[a-z0-9-]+", command)) <= {"--no-merge-adapter"}, "a flag is missing"


def test_a_configuration_file_gives_the_same_command(started: Started, tmp_path: Path):
    taken: list[RunConfig] = []
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("tracekit.cli._execute_stages", lambda task, config: taken.append(config) or 0)
    started.run(started.words)
    lines = []
    for path, value in sorted(settings_of(taken[0]).items(), key=lambda pair: "." in pair[0]):
        if value is not None and value != settings_of(TASKS[started.name].config())[path]:
            lines.append(f"{path} = {json.dumps(value)}")
    (tmp_path / "run.toml").write_text("\n".join(lines))
    started.run(["--config", str(tmp_path / "run.toml")])
    monkeypatch.undo()
    commands = [command_line(TASKS[started.name].command, config) for config in taken]
    assert commands[0] == commands[1]


@pytest.mark.parametrize("started", ["wiki_qa", "nonsense_entities"], indirect=True)
@pytest.mark.parametrize("are_seeds_two", [False, True])
def test_stages_run_one_by_one_have_one_command_where_one_says_it(
    started: Started, tmp_path: Path, are_seeds_two: bool
):
    """Each stage is given its own flags alone; two seeds need two commands."""
    every = split_flags(started.words)
    of_questions = {path: words for path, words in every.items() if path in QUESTION_FLAGS}
    of_answers = {
        path: words for path, words in every.items() if path not in QUESTION_FLAGS or path in ("--model", "--device")
    }
    if not are_seeds_two:
        of_answers |= {path: words for path, words in every.items() if path == "--seed"}
    elif started.name == "wiki_qa":
        of_answers["--seed"] = ["3"]
    for stage, flags in (("questions", of_questions), ("answers", of_answers), ("evaluate", {})):
        words = [word for flag, values in flags.items() for word in (flag, *values)]
        started.run([*words, "--stages", stage], tmp_path / "run")
    plan = read_plan(Layout(tmp_path / "run", started.name))
    assert len(split(plan.command)) == 1 + are_seeds_two
    started.assert_remade(tmp_path / "run", tmp_path / "again")


@pytest.mark.parametrize("started", ["trivia_qa", "degradation"], indirect=True)
def test_the_command_of_a_folder_that_grew_makes_all_of_it(started: Started, tmp_path: Path):
    for limit in ("2", "4"):
        started.run([*started.words, "--limit", limit], tmp_path / "run")
    assert read_plan(Layout(tmp_path / "run", started.name)).grown
    started.assert_remade(tmp_path / "run", tmp_path / "again")


@pytest.mark.parametrize("started", ["trivia_qa", "csqa", "replay"], indirect=True)
def test_the_commands_of_merged_runs_make_the_merged_plan(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for offset in ("0", "2", "4"):
        started.run([*started.words, "--limit", "2", "--offset", offset], tmp_path / offset)
    merge([tmp_path / "0", tmp_path / "2"], tmp_path / "first")
    merge([tmp_path / "first", tmp_path / "4"], tmp_path / "run")
    plan = read_plan(Layout(tmp_path / "run", started.name))
    *runs, last = split(plan.command)
    assert len(runs) == 3
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    for words in runs:
        started.run(started.given_back(words[3:]))
    assert main(last[1:]) == 0
    assert read_plan(Layout(Path("merged"), started.name)) == plan


def test_less_than_a_folder_was_begun_with_names_a_command_that_can_be_pasted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "my run"
    words = [
        "--model",
        str(model),
        "--source",
        "sample",
        "--num-beams",
        "1",
        "--max-new-tokens",
        "2",
        "--system",
        "a b",
    ]
    started = Started("trivia_qa", {"tiny": model}, words)
    started.run([*words, "--limit", "4", "--samples-per-shard", "2"], out)
    next(out.glob("data/*/*1.tar")).unlink()
    next(out.glob("sidecars/*/*1.json")).unlink()
    with pytest.raises(SystemExit):
        run_task(TRIVIA_QA, [*words, "--limit", "2", "--samples-per-shard", "2", "--out", str(out)])
    (command,) = re.findall(r"Run what it was begun with:\n +(.*)\n", capsys.readouterr().err)
    started.run(started.given_back(shlex.split(command)[3:]))
    assert len(read_struct(Layout(out, "trivia_qa").manifest, Manifest).shards) == 2


def test_a_file_that_a_command_names_by_its_hash_is_found_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "q", "answers": ["a"]}\n')
    config = TriviaQAConfig(source=QuestionSource(source=str(file)))
    name = asked(config)["source.source"]
    assert name == f"mine.jsonl@sha256:{sha256_file(file)}"
    named = TriviaQAConfig(source=QuestionSource(source=name))
    assert check(named).source.source == "mine.jsonl"
    file.write_text("other")
    with pytest.raises(ConfigError, match=r"mine\.jsonl@sha256.*'mine.jsonl' is another file; give the path"):
        check(named)
    file.unlink()
    with pytest.raises(ConfigError, match=r"source\.source`.*'mine.jsonl' is not here; give the path"):
        check(named)


def test_a_folder_is_added_to_every_run_that_names_none():
    assert with_out("python -m builders.a --x 'b c'\npython -m builders.a", "my out") == (
        "python -m builders.a --x 'b c' --out 'my out'\npython -m builders.a --out 'my out'"
    )
    merged = "python -m builders.a --out part-0\ntracekit merge part-0 part-1 --out merged"
    assert with_out(merged, "elsewhere") == merged


def split_flags(words: list[str]) -> dict[str, list[str]]:
    """Flags with their values."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            flag = found.setdefault(word, [])
        else:
            flag.append(word)
    return found


def test_a_margin_stands_before_a_run_and_not_inside_its_texts():
    command = command_line(
        "python -m builders.trivia_qa", TriviaQAConfig(prompt=ShotsConfig(system="one\n  two\n\n'three'"))
    )
    shown = with_out(f"{command}\n{command}", "a folder", margin="    ")
    assert [line[:10] for line in shown.splitlines()].count("    python") == 2
    words = shlex.split(shown)
    assert words.count("one\n  two\n\n'three'") == 2
    assert words.count("a folder") == 2
