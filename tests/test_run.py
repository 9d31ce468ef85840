"""A run: same bytes, resume, halving, signals, full disks, plans that do not match."""

import errno
import os
import shutil
import signal
from pathlib import Path

import msgspec
import pytest

import tracekit.run.planner
from tests.runs_for_tests import hashes, log_lines, run_trivia
from tests.tiny_checkpoint import save_tiny_checkpoint
from tracekit import TraceStore, verify
from tracekit.answering import AnsweringTracer
from tracekit.errors import CaptureError, NoSpaceError, PlanMismatchError, ShardLockedError, SourceError
from tracekit.format.layout import Layout
from tracekit.format.manifest import read_plan
from tracekit.format.shards import ShardWriter
from tracekit.model.capture import Trace


class StoppedError(Exception):
    """Stands for a process that dies."""


def die_at_batch(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Have the number-th call of `trace` raise."""
    calls = 0
    original = AnsweringTracer.trace

    def trace(self, traced, examples, place):
        nonlocal calls
        calls += 1
        if calls == number:
            raise StoppedError
        return original(self, traced, examples, place)

    monkeypatch.setattr(AnsweringTracer, "trace", trace)


def test_a_run_leaves_a_dataset_that_verifies(finished: Path):
    report = verify(finished)
    assert (report.problems, report.num_samples, report.open_configs) == ([], 12, [])


def test_the_same_run_twice_gives_the_same_bytes(finished: Path, model: Path, tmp_path: Path):
    run_trivia(tmp_path / "again", model)
    assert hashes(tmp_path / "again") == hashes(finished)


def test_a_complete_run_does_nothing_again(finished: Path, model: Path):
    before, lines = hashes(finished), len(log_lines(finished))
    outcome = run_trivia(finished, model)
    assert outcome.was_complete
    assert hashes(finished) == before
    assert len(log_lines(finished)) == lines


@pytest.mark.parametrize("batch", [2, 3, 4, 6, 7])
def test_a_run_that_died_goes_on_and_ends_with_the_same_bytes(
    finished: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        die_at_batch(patch, batch)
        with pytest.raises(StoppedError):
            run_trivia(out, model)
    done = len(log_lines(out))
    run_trivia(out, model)
    assert hashes(out) == hashes(finished)
    assert len(log_lines(out)) == len(log_lines(finished)), "a finished batch was computed again"
    assert done == max(0, batch - 2)  # the first call measures


def test_a_tail_that_the_journal_does_not_know_is_cut_off(
    finished: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        die_at_batch(patch, 4)
        with pytest.raises(StoppedError):
            run_trivia(out, model)
    (partial,) = out.glob("data/trivia_qa/*.tar.partial")
    with partial.open("ab") as file:
        file.write(b"half a batch")
    (journal,) = out.glob("data/trivia_qa/*.journal.partial")
    with journal.open("ab") as file:
        file.write(b'{"batch": 9, "en')
    run_trivia(out, model)
    assert hashes(out) == hashes(finished)


def test_a_crash_between_rename_and_sidecar_is_mended(finished: Path, model: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "run"

    def die(path, data):
        if path.parent.parent.name == "sidecars":
            raise StoppedError
        original(path, data)

    import tracekit.format.shards

    original = tracekit.format.shards.write_atomic
    with monkeypatch.context() as patch:
        patch.setattr(tracekit.format.shards, "write_atomic", die)
        with pytest.raises(StoppedError):
            run_trivia(out, model)
    run_trivia(out, model)
    assert hashes(out) == hashes(finished)


@pytest.mark.parametrize("last", ["README.md", "manifests/trivia_qa.json", "records/trivia_qa/validation.tar"])
def test_a_crash_while_finishing_is_mended_without_loading_the_model(
    finished: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    for name in ("manifest.json", "README.md", "manifests/trivia_qa.json", "records/trivia_qa/validation.tar"):
        (out / name).unlink()
        if name == last:
            break
    monkeypatch.setattr("tracekit.run.worker.load_model", lambda *arguments: pytest.fail("the model was loaded"))
    run_trivia(out, model)
    assert hashes(out) == hashes(finished)


def test_a_batch_that_runs_out_of_memory_is_halved_and_a_resume_repeats_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "run"
    original = AnsweringTracer.trace
    state = {"tight": True, "calls": 0}

    def trace(self, traced, examples, place):
        state["calls"] += 1
        if len(examples) > 2 and place.config:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        if state["calls"] == 5 and state["tight"]:
            raise StoppedError
        return original(self, traced, examples, place)

    monkeypatch.setattr(AnsweringTracer, "trace", trace)
    sizes = {"output": {"batch_size": 5}}
    with pytest.raises(StoppedError):
        run_trivia(out, model, **sizes)
    state["tight"] = False
    run_trivia(out, model, **sizes)
    assert [line["parts"] for line in log_lines(out)] == [[2, 2, 1], [2, 2, 1], [2]]
    assert verify(out).problems == []
    assert len(TraceStore(str(out))) == 12


def test_running_out_of_memory_with_one_example_is_an_error(model: Path, tmp_path: Path, monkeypatch):
    original = AnsweringTracer.trace

    def trace(self, traced, examples, place):
        if place.config:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return original(self, traced, examples, place)

    monkeypatch.setattr(AnsweringTracer, "trace", trace)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_trivia(tmp_path / "run", model)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_batch_and_the_run_goes_on_later(
    finished: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
):
    out = tmp_path / "run"
    original = AnsweringTracer.trace

    def trace(self, traced, examples, place):
        if place.config and place.shard == 1:
            os.kill(os.getpid(), number)
        return original(self, traced, examples, place)

    with monkeypatch.context() as patch:
        patch.setattr(AnsweringTracer, "trace", trace)
        outcome = run_trivia(out, model)
    assert outcome.interrupted
    assert outcome.manifest is None
    assert len(log_lines(out)) == 4
    assert verify(out).open_configs == ["trivia_qa"]
    run_trivia(out, model)
    assert hashes(out) == hashes(finished)


def test_a_disk_that_fills_up_loses_nothing(finished: Path, model: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "run"
    original = ShardWriter._write

    def full(self, buffers):
        if self.num_samples >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, buffers)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_write", full)
        with pytest.raises(NoSpaceError, match=r"the disk is full while writing .*run the same command again"):
            run_trivia(out, model)
    run_trivia(out, model)
    assert hashes(out) == hashes(finished)


def test_a_run_that_would_not_fit_says_so_before_it_starts(model: Path, tmp_path: Path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(NoSpaceError, match=r"needs about .* MB"):
        run_trivia(tmp_path / "run", model)
    assert not (tmp_path / "run").exists()


def test_another_configuration_in_the_same_folder_is_refused_with_the_difference(finished: Path, model: Path):
    with pytest.raises(PlanMismatchError, match=r"run\.generation\.max_new_tokens: 6 there, 7 now"):
        run_trivia(finished, model, generation={"max_new_tokens": 7})


def test_another_model_in_the_same_folder_is_refused(finished: Path, tmp_path: Path):
    other = save_tiny_checkpoint(tmp_path / "tiny", seed=1)
    with pytest.raises(PlanMismatchError, match=r"model\.revision"):
        run_trivia(finished, other)


def test_a_second_configuration_lives_beside_the_first(model: Path, tmp_path: Path):
    run_trivia(tmp_path / "run", model, source={"limit": 3})
    run_trivia(tmp_path / "run", model, source={"limit": 2}, output={"dataset_config": "other"})
    assert verify(tmp_path / "run").problems == []
    assert len(TraceStore(str(tmp_path / "run"), config="other")) == 2


def test_two_processes_do_not_write_one_shard(finished: Path, model: Path, tmp_path: Path):
    layout = Layout(tmp_path / "run", "trivia_qa")
    name = read_plan(Layout(finished, "trivia_qa")).shards[0].name
    with (
        ShardWriter(layout, name, 0),
        pytest.raises(ShardLockedError, match="another process"),
        ShardWriter(layout, name, 0),
    ):
        pass


def test_a_dry_run_prints_a_plan_and_writes_nothing(model: Path, tmp_path: Path):
    outcome = run_trivia(tmp_path / "run", model, output={"dry_run": True})
    assert outcome.estimate is not None
    assert (outcome.estimate.num_examples, outcome.estimate.num_shards) == (12, 3)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_reckons_the_size_closely(finished: Path, model: Path, tmp_path: Path):
    estimate = run_trivia(tmp_path / "run", model, output={"dry_run": True}).estimate
    actual = sum(path.stat().st_size for path in finished.glob("data/*/*.tar"))
    assert estimate is not None
    assert estimate.total_bytes == pytest.approx(actual, rel=0.25)


def test_a_replay_past_the_tolerance_stops_the_run_and_nothing_is_written(model: Path, tmp_path: Path, monkeypatch):
    original = AnsweringTracer.trace

    def trace(self, traced, examples, place):
        samples = original(self, traced, examples, place)
        return [sample._replace(trace=_altered(sample.trace)) for sample in samples]

    monkeypatch.setattr(AnsweringTracer, "trace", trace)
    with pytest.raises(CaptureError, match=r"sample 0000\d\d: hidden_states differs from a lone eager run"):
        run_trivia(tmp_path / "run", model)
    assert list((tmp_path / "run").glob("data/trivia_qa/*.tar")) == []
    assert log_lines(tmp_path / "run") == []


def _altered(trace: Trace) -> Trace:
    hidden = trace.tensors["hidden_states"].copy()
    hidden[-1, 0, 0] += 5
    return trace._replace(tensors={**trace.tensors, "hidden_states": hidden})


def test_a_folder_that_holds_something_else_is_not_touched(model: Path, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(ValueError, match="is not a tracekit dataset"):
        run_trivia(tmp_path, model)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_empty_source_is_an_error(model: Path, tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(SourceError):
        run_trivia(tmp_path / "run", model, source={"source": str(tmp_path / "empty.jsonl")})


def test_no_path_and_no_clock_of_this_machine_is_in_the_dataset(finished: Path, model: Path):
    needles = [str(model.parent).encode(), str(finished.parent).encode()]
    for path in finished.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not any(needle in data for needle in needles), path


def test_batches_hold_like_lengths_longest_first(finished: Path):
    plan = read_plan(Layout(finished, "trivia_qa"))
    store = TraceStore(str(finished))
    for shard in plan.shards:
        lengths = [store.record(f"{row:06d}").prompt_length for batch in shard.batches for row in batch]
        assert lengths == sorted(lengths, reverse=True)


def test_records_of_the_plan_survive_a_round_trip(finished: Path):
    plan = read_plan(Layout(finished, "trivia_qa"))
    assert msgspec.json.decode(msgspec.json.encode(plan), type=type(plan)) == plan


def test_a_shard_that_was_deleted_is_made_again(finished: Path, model: Path, tmp_path: Path):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    (out / "data/trivia_qa/validation-00001.tar").unlink()
    run_trivia(out, model)
    assert hashes(out) == hashes(finished)


def test_a_dataset_without_sidecars_as_one_downloads_it_is_complete(finished: Path, model: Path, tmp_path: Path):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(out / "sidecars")
    assert run_trivia(out, model).was_complete


def test_a_plan_that_was_edited_is_refused(finished: Path, model: Path, tmp_path: Path):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    plan = read_plan(Layout(out, "trivia_qa"))
    plan.shards[0].batches[0].pop()
    (out / "plans/trivia_qa.json").write_bytes(msgspec.json.encode(plan))
    with pytest.raises(PlanMismatchError, match="was it edited"):
        run_trivia(out, model)


def test_another_process_that_plans_first_wins(finished: Path, model: Path, tmp_path: Path, monkeypatch):
    original = tracekit.run.planner.create_once

    def second(path: Path, data: bytes) -> bool:
        original(path, (finished / "plans/trivia_qa.json").read_bytes())
        return original(path, data)

    monkeypatch.setattr(tracekit.run.planner, "create_once", second)
    with pytest.raises(PlanMismatchError, match="max_new_tokens: 6 there, 7 now"):
        run_trivia(tmp_path / "run", model, generation={"max_new_tokens": 7})


def test_a_shard_finished_by_another_process_is_left_alone(finished: Path, tmp_path: Path):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    with ShardWriter(Layout(out, "trivia_qa"), "validation-00001", 1) as writer:
        assert writer.is_done
    assert hashes(out) == hashes(finished)


def test_a_journal_torn_in_the_middle_goes_back_to_the_last_whole_batch(
    finished: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        die_at_batch(patch, 4)
        with pytest.raises(StoppedError):
            run_trivia(out, model)
    (journal,) = out.glob("data/trivia_qa/*.journal.partial")
    first, second = journal.read_bytes().splitlines()
    journal.write_bytes(first + b"\n" + second[:9] + second + b"\n")
    run_trivia(out, model)
    assert hashes(out) == hashes(finished)


def test_an_out_that_is_a_file_is_refused(model: Path, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match="is a file; give a folder"):
            run_trivia(out, model)


def test_a_forced_run_computes_everything_anew_and_to_the_same_bytes(model: Path, tmp_path: Path):
    run_trivia(tmp_path / "run", model)
    before, count = hashes(tmp_path / "run"), len(log_lines(tmp_path / "run"))
    outcome = run_trivia(tmp_path / "run", model, output={"force_run": True})
    assert not outcome.was_complete
    assert len(log_lines(tmp_path / "run")) == 2 * count
    assert hashes(tmp_path / "run") == before
    assert run_trivia(tmp_path / "run", model).was_complete


def test_force_does_not_delete_another_run(model: Path, tmp_path: Path):
    run_trivia(tmp_path / "run", model)
    before = hashes(tmp_path / "run")
    with pytest.raises(PlanMismatchError):
        run_trivia(tmp_path / "run", model, generation={"max_new_tokens": 7}, output={"force_run": True})
    assert hashes(tmp_path / "run") == before


def test_what_was_said_is_in_the_log_and_no_generated_text_is(model: Path, tmp_path: Path):
    run_trivia(tmp_path / "run", model)
    run_trivia(tmp_path / "run", model)
    text = (tmp_path / "run/logs/trivia_qa.log").read_text(encoding="utf-8")
    lines = [line.partition(" ")[2] for line in text.splitlines()]
    assert lines[:2] == ["reading sample", "loading tiny"]
    assert lines.count("reading sample") == 2
    for sample in TraceStore(str(tmp_path / "run")):
        assert sample.record.generated_text not in text


def test_an_error_is_in_the_log_of_a_run_that_was_begun(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "tracekit.run.encode.encode_record", lambda record: (_ for _ in ()).throw(CaptureError("it broke"))
    )
    with pytest.raises(CaptureError):
        run_trivia(tmp_path / "none", model)
    assert not (tmp_path / "none").exists()
    monkeypatch.undo()
    run_trivia(tmp_path / "run", model)
    monkeypatch.setattr(
        "tracekit.run.encode.encode_record", lambda record: (_ for _ in ()).throw(CaptureError("it broke"))
    )
    with pytest.raises(CaptureError):
        run_trivia(tmp_path / "run", model, output={"force_run": True})
    assert "error: it broke" in (tmp_path / "run/logs/trivia_qa.log").read_text(encoding="utf-8")
