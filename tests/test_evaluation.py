"""Evaluation: labels beside a dataset that is never touched, judged once, going on after a crash; and its exports."""

import json
import shutil
from datetime import datetime
from pathlib import Path

import msgspec
import pytest

from builders.judging.config import JudgeConfig, answers_layout
from builders.judging.evaluation import Evaluation, evaluate, output_folder
from builders.judging.judges import Judged, RuleJudge, set_name
from builders.judging.prompts import ABSTENTION
from builders.trivia_qa.record import TriviaQARecord
from builders.trivia_qa.task import TriviaQAConfig
from tests.judges_for_tests import FakeClient, install
from tests.runs_for_tests import hashes, run_trivia, trivia_config
from tracekit import TraceStore, verify
from tracekit.clients.client import ClientConfig, Request
from tracekit.errors import ClientError, DatasetError
from tracekit.format.labels import label_sets, read_labels, read_summary
from tracekit.format.layout import Layout
from tracekit.model.prompts import sha256_text


def judged_of(record: TriviaQARecord) -> Judged:
    return Judged(record.key, record.question, record.ground_truth_answers, record.generated_answer)


EVALUATION = Evaluation("trivia_qa", "answers", judged_of)


def config_for(folder: Path, **output: object) -> TriviaQAConfig:
    return trivia_config(Path("demo"), output={"out": str(folder), **output})


def judge_by(folder: Path, judge: str = "rules", **output: object) -> int:
    return evaluate(config_for(folder, **output), EVALUATION, judge=JudgeConfig(judge=judge), client=ClientConfig())


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def label_of(request: Request) -> str:
    """A judge with an opinion on every text, the same each time."""
    text = request.messages[-1].content
    if text.startswith(ABSTENTION.instruction):
        return json.dumps({"abstains": len(text) % 3 == 0})
    return json.dumps({"verdict": "correct" if len(text) % 2 else "incorrect"})


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rules_label_every_answer_and_nothing_of_the_dataset_changes(folder: Path):
    before = hashes(folder)
    assert judge_by(folder) == 0
    after = hashes(folder)
    assert {path: after[path] for path in before} == before
    name = set_name(RuleJudge())
    assert sorted(after.keys() - before.keys()) == [
        f"labels/trivia_qa/{name}.json",
        f"labels/trivia_qa/{name}.jsonl",
        "output/trivia_qa/tiny/eval_results.json",
        "output/trivia_qa/tiny/generation.jsonl",
        "output/trivia_qa/tiny/raw_eval_res.jsonl",
    ]
    assert verify(folder).problems == []
    labels = read_labels(Layout(folder, "trivia_qa").labels(name))
    with TraceStore(str(folder)) as store:
        assert [label.key for label in labels] == store.keys
        for label, sample in zip(labels, store, strict=True):
            assert isinstance(sample.record, TriviaQARecord)
            assert label == RuleJudge().label(judged_of(sample.record))


def test_the_same_judge_again_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]):
    judge_by(folder)
    before = hashes(folder)
    capsys.readouterr()
    assert judge_by(folder) == 0
    assert hashes(folder) == before
    said = capsys.readouterr().out
    assert "nothing to judge: rules has labelled all 12 answers" in said
    assert "refusal_rate" in said


def test_another_judge_adds_a_set_and_leaves_everything_else(folder: Path, monkeypatch: pytest.MonkeyPatch):
    judge_by(folder)
    before = {path: digest for path, digest in hashes(folder).items() if not path.startswith("output/")}
    client = FakeClient(label_of)
    calls = install(monkeypatch, client)
    assert judge_by(folder, "org/judge") == 0
    after = hashes(folder)
    assert {path: after[path] for path in before} == before
    layout = Layout(folder, "trivia_qa")
    assert len(label_sets(layout)) == 2
    cache = f"judge-{sha256_text('org/judge')[:8]}.jsonl"  # two judges whose names end alike have a file each
    assert calls[0]["cache"] == folder / "output/trivia_qa/cache" / cache
    num_asked = len(client.asked)
    assert judge_by(folder, "org/judge") == 0
    assert len(client.asked) == num_asked, "a second run asks nothing"
    raw = lines_of(folder / "output/trivia_qa/tiny/raw_eval_res.jsonl")
    assert all(line["judge"] == client.name and line["raw_outputs"] for line in raw)
    assert verify(folder).problems == []


def test_failures_are_counted_and_never_guessed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch, FakeClient(lambda request: "no idea what you mean"))
    judge_by(folder, "org/judge")
    layout = Layout(folder, "trivia_qa")
    (name,) = label_sets(layout)
    summary = read_summary(layout, name)
    labels = read_labels(layout.labels(name))
    num_empty = sum(label.verdict == "unverifiable" for label in labels)
    assert summary.num_failures == 12 - num_empty > 0
    assert all(label.failure for label in labels if label.verdict is None)
    results = json.loads((folder / "output/trivia_qa/tiny/eval_results.json").read_text())
    assert results == msgspec.to_builtins(summary)
    assert [rate["value"] for rate in results["rates"] if rate["name"] == "hallucination_rate"] == [None]


@pytest.mark.parametrize(("classes", "is_warned"), [(("correct",), True), (("correct", "incorrect"), False)])
def test_labels_of_one_class_are_warned_about(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    classes: tuple[str, ...],
    is_warned: bool,
):
    kinds = iter(classes * 12)
    label_of_rules = RuleJudge().label
    monkeypatch.setattr(
        RuleJudge, "label", lambda self, one: msgspec.structs.replace(label_of_rules(one), verdict=next(kinds))
    )
    judge_by(folder)
    assert ("warning: all 12 verdicts are 'correct'" in capsys.readouterr().err) == is_warned


def test_a_crash_in_the_middle_loses_nothing_and_leaves_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("builders.judging.judges._CHUNK", 4)
    whole = folder.with_name("whole")
    shutil.copytree(folder, whole)
    client = FakeClient(label_of)
    install(monkeypatch, client)
    judge_by(whole, "org/judge")
    first = client.asked.copy()

    def fail(request: Request) -> str:
        if len(broken.asked) > 8:
            raise ClientError("no connection")
        return label_of(request)

    broken = FakeClient(fail)
    install(monkeypatch, broken)
    with pytest.raises(ClientError):
        judge_by(folder, "org/judge")
    layout = Layout(folder, "trivia_qa")
    (name,) = label_sets(layout)
    path = layout.labels(name)
    num_kept = len(read_labels(path))
    assert 4 <= num_kept < 12
    path.write_bytes(path.read_bytes() + b'{"key": "0000')  # cut by kill -9
    again = FakeClient(label_of)
    install(monkeypatch, again)
    judge_by(folder, "org/judge")
    assert len(again.asked) < len(first)
    ours, theirs = (
        {path: digest for path, digest in hashes(one).items() if path.startswith("labels/")} for one in (folder, whole)
    )
    assert ours == theirs


def test_an_open_dataset_is_judged_as_far_as_it_goes_and_later_the_rest(folder: Path, capsys):
    layout = Layout(folder, "trivia_qa")
    name = set_name(RuleJudge())
    put_away = {path: path.read_bytes() for path in (layout.manifest, layout.sidecar("validation-00002"))}
    for path in put_away:
        path.unlink()
    judge_by(folder)
    assert len(read_labels(layout.labels(name))) == 10
    assert read_summary(layout, name).is_open
    assert "not finished" in capsys.readouterr().out
    for path, data in put_away.items():
        path.write_bytes(data)
    judge_by(folder)
    assert len(read_labels(layout.labels(name))) == 12
    assert not read_summary(layout, name).is_open


def test_a_label_of_another_answer_does_not_count(folder: Path):
    judge_by(folder)
    layout = Layout(folder, "trivia_qa")
    path = layout.labels(set_name(RuleJudge()))
    right = path.read_bytes()
    first, *others = read_labels(path)
    stale = msgspec.structs.replace(first, judged_sha256="0" * 64, verdict="correct")
    path.write_bytes(b"".join(msgspec.json.encode(label) + b"\n" for label in [stale, *others]))
    judge_by(folder)
    assert path.read_bytes() == right


def test_generations_carry_prompt_model_settings_and_the_time_of_their_batch(folder: Path):
    judge_by(folder)
    rows = lines_of(folder / "output/trivia_qa/tiny/generation.jsonl")
    logged = {(line["shard"], line["batch"]): line["time"] for line in lines_of(folder / "logs/trivia_qa.jsonl")}
    plan = json.loads((folder / "plans/trivia_qa.json").read_text())
    times = {
        f"{index:06d}": logged[shard["name"], number]
        for shard in plan["shards"]
        for number, batch in enumerate(shard["batches"])
        for index in batch
    }
    with TraceStore(str(folder)) as store:
        assert [row["key"] for row in rows] == store.keys
        for row, sample in zip(rows, store, strict=True):
            assert isinstance(sample.record, TriviaQARecord)
            assert row["prompt"] == sample.record.prompt
            assert row["generation"] == sample.record.generated_answer
            assert row["model"] == "tiny"
            assert row["timestamp"] == times[sample.key]
            assert datetime.fromisoformat(str(row["timestamp"])).tzinfo is not None
            assert row["settings"] == {**msgspec.to_builtins(sample.record.generation), "seed": 41}


def test_generations_have_no_time_where_the_log_is_gone(folder: Path):
    shutil.rmtree(folder / "logs")
    judge_by(folder)
    assert {row["timestamp"] for row in lines_of(folder / "output/trivia_qa/tiny/generation.jsonl")} == {None}


def test_several_samples_of_a_question_have_the_time_of_its_batch(model: Path, tmp_path: Path):
    settings = {"num_samples": 2, "trace_samples": True}
    run_trivia(tmp_path / "run", model, source={"limit": 3}, generation=settings)
    with (tmp_path / "run/logs/trivia_qa.jsonl").open("a") as file:
        file.write('{"time": "cut')
    judge_by(tmp_path / "run")
    rows = lines_of(tmp_path / "run/output/trivia_qa/tiny/generation.jsonl")
    assert len(rows) == 6
    assert all(row["timestamp"] for row in rows)


def test_the_folder_of_exports_is_named_for_the_model_and_stays_inside(folder: Path):
    layout = answers_layout(config_for(folder), "trivia_qa")
    plan = json.loads(layout.plan.read_text())
    for identity, name in (("org/name-1.5", "org__name-1.5"), ("../../x", "__..__x"), ("..", "model")):
        plan["model"]["id"] = identity
        layout.plan.write_text(json.dumps(plan))
        assert output_folder(layout) == folder / "output/trivia_qa" / name


def test_a_dry_run_says_what_would_be_judged_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]):
    before = hashes(folder)
    assert judge_by(folder, dry_run=True) == 0
    assert "would judge     12 answers of trivia_qa by rules" in capsys.readouterr().out
    assert judge_by(folder / "nowhere", dry_run=True) == 0
    assert "none yet" in capsys.readouterr().out
    assert hashes(folder) == before


def test_without_answers_the_command_that_makes_them_is_named(tmp_path: Path):
    with pytest.raises(DatasetError, match=r"python -m builders\.trivia_qa --stages answers --out"):
        judge_by(tmp_path)


def test_answers_made_anew_have_no_labels_of_the_old_ones(folder: Path, model: Path):
    judge_by(folder)
    assert label_sets(Layout(folder, "trivia_qa"))
    run_trivia(folder, model, output={"force_run": True})
    assert not label_sets(Layout(folder, "trivia_qa"))
    assert verify(folder).problems == []
