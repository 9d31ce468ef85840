"""Nonsense entities: three stages, each alone, resumed, dry, and without the one before; and what the records hold."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from builders.judging.config import JudgeConfig
from builders.judging.prompts import EXISTENCE
from builders.nonsense_entities.config import NamesConfig, NonsenseConfig
from builders.nonsense_entities.prompts import WORDINGS
from builders.nonsense_entities.record import NonsenseEntitiesRecord
from builders.nonsense_entities.task import TASK
from tests.judges_for_tests import FakeClient, install
from tests.runs_for_tests import hashes
from tracekit import TraceStore, verify
from tracekit.cli import run_task
from tracekit.clients.client import Request
from tracekit.format.labels import label_sets, read_summary
from tracekit.format.layout import Layout

SMALL = ["--num-names", "2", "--num-wordings", "2", "--controls", "1", "--max-new-tokens", "4", "--sites", "hidden"]
SMALL += ["--layers", "1", "--tokens", "last", "--num-replays", "0", "--device", "cpu"]


def run(out: Path, model: Path, *flags: str) -> int:
    """The command, in this process; its exit code."""
    arguments = ["--model", str(model), "--out", str(out), *SMALL, *flags]
    with pytest.raises(SystemExit) as ended:
        run_task(TASK, arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that went through all stages. Not to be changed."""
    folder = tmp_path_factory.mktemp("nonsense") / "run"
    assert run(folder, model) == 0
    return folder


def test_all_stages_leave_questions_answers_labels_and_rates(made: Path):
    assert verify(made).problems == []
    questions = lines_of(made / "questions/nonsense_entities.jsonl")
    how = json.loads((made / "questions/nonsense_entities.json").read_text())
    assert len(questions) == how["num_questions"] == 3 * 3 * 2
    assert how["kept"] == {"animals": 2, "plants": 2, "medicines": 2}
    assert all("@sha256:" in text for text in how["lists"].values())
    results = json.loads((made / "output/nonsense_entities/tiny/eval_results.json").read_text())
    assert results["command"] == "python -m builders.nonsense_entities --stages evaluate --device cpu"
    rates = {(rate["name"], rate["group"]): rate for rate in results["rates"]}
    none = {"num": 0}  # of a domain whose answers all speak of something else
    of_domains = [rates.get(("false_acceptance_rate", f"domain={domain}"), none)["num"] for domain in WORDINGS]
    assert all(num <= 4 for num in of_domains)
    assert rates["false_acceptance_rate", None]["num"] == sum(of_domains)
    assert rates["false_rejection_rate", None]["num"] <= 6
    assert rates["unverifiable_rate", None]["num"] == len(questions)
    num_judged = rates["false_acceptance_rate", None]["num"] + rates["false_rejection_rate", None]["num"]
    assert rates["unverifiable_rate", None]["count"] == len(questions) - num_judged


def test_records_hold_the_question_and_what_the_name_is_made_of(made: Path):
    questions = lines_of(made / "questions/nonsense_entities.jsonl")
    with TraceStore(str(made)) as store:
        assert len(store) == len(questions)
        for index, question in enumerate(questions):
            record = store[f"{index:06d}"].record
            assert isinstance(record, NonsenseEntitiesRecord)
            assert {name: getattr(record, name) for name in question} == question
            assert record.question in record.prompt
            assert record.name in record.question
            assert store.by_prompt(record.question)
            assert record.question == WORDINGS[record.domain][record.wording_id].format(name=record.name)
        train, test = store.split(seed=0)
        sides = [{store[key].record.question_id for key in keys} for keys in (train, test)]
        assert not sides[0] & sides[1]


def test_any_limit_is_even_over_domains_and_wordings(tmp_path: Path, model: Path):
    assert run(tmp_path / "run", model, "--stages", "questions", "--num-names", "12", "--num-wordings", "12") == 0
    questions = lines_of(tmp_path / "run/questions/nonsense_entities.jsonl")
    assert len(questions) == 3 * 13 * 12
    first = questions[: 3 * 12]
    assert [question["domain"] for question in first[:3]] == list(WORDINGS)
    assert all(len({q["wording_id"] for q in first if q["domain"] == domain}) == 12 for domain in WORDINGS)
    assert len({(q["question_id"], q["wording_id"]) for q in questions}) == len(questions)


def test_the_same_command_again_changes_nothing(made: Path, model: Path, capsys: pytest.CaptureFixture[str]):
    before = hashes(made)
    assert run(made, model) == 0
    assert hashes(made) == before
    said = capsys.readouterr()
    assert "nothing to do: the 18 questions" in said.out
    assert "nothing to do: nonsense_entities is complete" in said.err
    assert "nothing to judge" in said.out


def test_stages_alone_give_the_same_as_all_at_once(made: Path, model: Path, tmp_path: Path):
    for stage in ("questions", "answers", "evaluate"):
        assert run(tmp_path / "run", model, "--stages", stage) == 0
    ours, theirs = hashes(tmp_path / "run"), hashes(made)
    timed = "output/nonsense_entities/tiny/generation.jsonl"
    assert {path: d for path, d in ours.items() if path != timed} == {p: d for p, d in theirs.items() if p != timed}


def test_who_judges_and_which_stages_are_run_is_not_part_of_the_dataset(made: Path):
    recorded = json.loads((made / "manifests/nonsense_entities.json").read_text())["run"]
    assert not {"stages", "names", "judge", "client"} & recorded.keys()


def test_a_stage_without_the_one_before_names_its_command(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(tmp_path / "run", model, "--stages", "answers") == 1
    said = capsys.readouterr().err
    assert f"python -m builders.nonsense_entities --stages questions --out {tmp_path / 'run'}" in said
    assert run(tmp_path / "run", model, "--stages", "evaluate") == 1
    assert "python -m builders.nonsense_entities --stages answers --out" in capsys.readouterr().err


def test_a_dry_run_of_every_stage_says_what_would_be_and_writes_nothing(
    made: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(tmp_path / "run", model, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "would ask       18 questions about 2 animals, 2 plants, 2 medicines" in said
    assert "examples        18" in said
    assert "would judge     the answers of nonsense_entities, of which there are none yet, by rules" in said
    assert not (tmp_path / "run").exists()
    before = hashes(made)
    assert run(made, model, "--dry-run", "--stages", "evaluate") == 0
    assert "would judge     18 answers" in capsys.readouterr().out
    assert hashes(made) == before


def test_other_questions_are_refused_with_the_difference(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "run"
    assert run(folder, model, "--stages", "questions") == 0
    before = hashes(folder)
    assert run(folder, model, "--stages", "questions", "--seed", "7") == 1
    assert "seed 41 there, 7 here" in capsys.readouterr().err
    assert hashes(folder) == before
    assert run(folder, model, "--stages", "questions", "--seed", "7", "--force-run") == 0
    assert hashes(folder) != before


def test_questions_that_are_being_answered_are_never_replaced(
    made: Path, model: Path, capsys: pytest.CaptureFixture[str]
):
    before = hashes(made)
    assert run(made, model, "--stages", "questions", "--seed", "7", "--force-run") == 1
    assert "for they are being answered" in capsys.readouterr().err
    assert hashes(made) == before


def test_a_model_judges_with_a_prompt_of_its_own(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = Path(shutil.copytree(made, tmp_path / "run"))

    def say(request: Request) -> str:
        text = request.messages[-1].content
        assert text.startswith(EXISTENCE.instruction)
        return json.dumps({"treats_as_real": "plants" in text or len(text) % 2 == 0})

    client = FakeClient(say)
    install(monkeypatch, client)
    config = NonsenseConfig(judge=JudgeConfig(judge="org/judge"))
    config = msgspec.structs.replace(config, output=msgspec.structs.replace(config.output, out=str(folder)))
    shards = {path: digest for path, digest in hashes(folder).items() if path.startswith(("data/", "manifests/"))}
    assert TASK.stages["evaluate"](config) == 0
    layout = Layout(folder, "nonsense_entities")
    (name,) = [one for one in label_sets(layout) if one.startswith("judge-")]
    assert read_summary(layout, name).judge == client.name
    assert len(label_sets(layout)) == 2
    after = hashes(folder)
    assert {path: after[path] for path in shards} == shards


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-wordings", "99"], "there are 12"),
        (["--num-names", "100000"], "lower --num-names"),
        (["--plants", "nowhere.json"], "give another --plants"),
    ],
)
def test_settings_without_meaning_are_refused(
    flags: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(tmp_path / "run", model, *flags) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--source", "--num-samples", "--num-shots"])
def test_settings_of_other_tasks_are_no_flags_here(
    flag: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(tmp_path / "run", model, flag, "3") == 2
    assert flag in capsys.readouterr().err


def test_lists_of_names_are_taken_from_files(model: Path, tmp_path: Path, shared: Path):
    path = shared / "data/names/medicine_drugs.json"
    assert run(tmp_path / "run", model, "--stages", "questions", "--medicines", str(path)) == 0
    how = json.loads((tmp_path / "run/questions/nonsense_entities.json").read_text())
    assert how["lists"]["medicines"].startswith("medicine_drugs.json@sha256:")
    assert NamesConfig(medicines=str(path)).files()["medicines"] == path
