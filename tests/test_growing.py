"""Growing: more is asked for than a folder holds; what is stored keeps every byte, and only what is new is computed."""

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import builders.degradation.tracer as degradation
import tracekit.run.engine as engine_module
import tracekit.run.planner as planner_module
import tracekit.run.runner as run_module
import tracekit.run.worker as worker_module
from builders.degradation.configs import DegradationConfig
from builders.degradation.export import export_degradation
from builders.degradation.task import TASK as DEGRADATION
from builders.kit.columns import PromptSource
from tests.processes_for_tests import run as python
from tests.runs_for_tests import hashes, log_lines, run_trivia
from tests.test_degradation import PROMPTS, Memory, config_for
from tests.tiny_checkpoint import save_tiny_checkpoint
from tracekit import TraceStore, load_dataset, verify
from tracekit.cli import run_task
from tracekit.config import ModelConfig
from tracekit.errors import DatasetError, MemoryPressureError, PlanMismatchError
from tracekit.format.layout import Layout
from tracekit.format.manifest import Plan, read_plan
from tracekit.publish.snapshot import read_local
from tracekit.run.command import growth_note
from tracekit.run.finish import is_finished
from tracekit.run.merge import merge
from tracekit.run.runner import Ended, execute

ROOT = Path(__file__).parent.parent
SMALL: dict[str, Any] = {"groups": ("mlp",), "levels": (0, 0.5), "n_rep": 1, "source": {"limit": 2}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", chat=True)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return path


@pytest.fixture(scope="module")
def small(checkpoint: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished grid of one group, two levels, two prompts."""
    folder = tmp_path_factory.mktemp("small") / "run"
    run(folder, checkpoint, prompts)
    return folder


def run(out: Path, checkpoint: Path, prompts: Path, /, **changes: Any) -> Ended:
    return execute(DEGRADATION, config_for(checkpoint, prompts, **(SMALL | changes)), out)


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def stored(folder: Path) -> dict[str, str]:
    """Hashes of shards and sidecars."""
    return {name: value for name, value in hashes(folder).items() if name.startswith(("data/", "sidecars/"))}


def points(folder: Path) -> set[tuple[str, float, int, str]]:
    with TraceStore(str(folder)) as store:
        return {(r.damage.group, r.damage.level, r.repeat, r.prompt_id) for r in (sample.record for sample in store)}


def plan_of(folder: Path) -> Plan:
    return read_plan(Layout(folder, "degradation"))


@pytest.mark.parametrize(
    ("more", "num_new"),
    [
        ({"levels": (0, 0.25, 0.5)}, 2),
        ({"groups": ("attn", "mlp")}, 4),
        ({"n_rep": 3}, 8),
        ({"source": {"limit": None}}, 2),
        ({"levels": (1, 0.5, 0), "groups": ("attn", "mlp"), "n_rep": 2, "source": {"limit": 3}}, 32),
    ],
)
def test_a_finished_grid_grows_and_what_it_held_keeps_every_byte(
    small: Path, checkpoint: Path, prompts: Path, tmp_path: Path, more: dict[str, Any], num_new: int
):
    out = copied(small, tmp_path / "run")
    before, num_lines = stored(out), len(log_lines(out, "degradation"))
    outcome = run(out, checkpoint, prompts, **more)
    assert outcome.manifest is not None
    assert not outcome.was_complete
    assert before.items() <= stored(out).items()
    computed = log_lines(out, "degradation")[num_lines:]
    assert sum(line["num_samples"] for line in computed) == num_new
    assert verify(out).problems == []
    run(tmp_path / "whole", checkpoint, prompts, **more)
    assert points(out) == points(tmp_path / "whole")
    with TraceStore(str(out)) as grown, TraceStore(str(tmp_path / "whole")) as whole:
        assert len(grown) == len(whole) == 4 + num_new
        for key in whole.keys:
            mine, other = (store.record(key) for store in (grown, whole))
            assert (mine.damage, mine.token_ids, mine.prompt) == (other.damage, other.token_ids, other.prompt)
            np.testing.assert_allclose(grown.hidden_states(key), whole.hidden_states(key), atol=1e-4, rtol=1e-4)
    assert run(out, checkpoint, prompts, **more).was_complete


def test_a_grid_that_is_not_finished_grows(checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch):
    append = worker_module.ShardWriter.append

    def stop(self: Any, *args: Any, **kwargs: Any) -> None:
        append(self, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(worker_module.ShardWriter, "append", stop)
        assert run(tmp_path / "run", checkpoint, prompts).interrupted
    assert len(log_lines(tmp_path / "run", "degradation")) == 1
    run(tmp_path / "run", checkpoint, prompts, levels=(0, 0.5, 0.75))
    assert len(log_lines(tmp_path / "run", "degradation")) == 3, "a finished batch was computed again"
    run(tmp_path / "other", checkpoint, prompts)
    run(tmp_path / "other", checkpoint, prompts, levels=(0, 0.5, 0.75))
    assert hashes(tmp_path / "run") == hashes(tmp_path / "other")


def test_it_grows_again_and_its_plan_says_how(small: Path, checkpoint: Path, prompts: Path, tmp_path: Path):
    out = copied(small, tmp_path / "run")
    run(out, checkpoint, prompts, levels=(0, 0.5, 0.75))
    run(out, checkpoint, prompts, levels=(0, 0.5, 0.75), n_rep=2)
    plan = plan_of(out)
    assert [step.num_shards for step in plan.grown] == [1, 2]
    assert [shard.number for shard in plan.shards] == [0, 1, 2]
    assert plan.shards[:1] == plan_of(small).shards
    assert plan.grown[0].command == plan_of(small).command
    assert "--levels 0.0 0.5 0.75 --n-rep 2" in plan.command
    assert run(out, checkpoint, prompts, levels=(0, 0.5, 0.75), n_rep=2).was_complete


def test_the_number_of_a_level_stays_when_others_come_between(
    small: Path, checkpoint: Path, prompts: Path, tmp_path: Path
):
    out = copied(small, tmp_path / "run")
    run(out, checkpoint, prompts, levels=(0, 0.25, 0.5))
    with TraceStore(str(out)) as store:
        assert {(s.record.damage.level, s.record.level_index) for s in store} == {(0, 0), (0.5, 1), (0.25, 2)}
    assert plan_of(out).run["levels"] == [0, 0.5, 0.25]
    for levels in ((0, 0.25, 0.5), (0.5, 0.25, 0)):
        assert run(out, checkpoint, prompts, levels=levels).was_complete
    rows = json.loads(export_degradation(out).read_text())
    assert {(row["level_value"], row["level_index"]) for row in rows} == {(0, 0), (0.25, 1), (0.5, 2)}


def test_levels_of_the_method_grow_like_given_ones(checkpoint: Path, prompts: Path, tmp_path: Path):
    run(tmp_path / "run", checkpoint, prompts, levels=(), source={"limit": 1})
    before = stored(tmp_path / "run")
    run(tmp_path / "run", checkpoint, prompts, levels=(0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5), source={"limit": 1})
    assert before.items() <= stored(tmp_path / "run").items()
    with TraceStore(str(tmp_path / "run")) as store:
        assert sorted(s.record.level_index for s in store) == list(range(7))
        assert store.record("mlp_0p05_000_000000").level_index == 6


def test_a_finished_folder_that_holds_more_has_nothing_to_do(
    small: Path, checkpoint: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = copied(small, tmp_path / "run")
    before = hashes(out)
    for less in ({"levels": (0.5,)}, {"source": {"limit": 1}}, {"levels": (0,), "source": {"limit": 1}}):
        outcome = run(out, checkpoint, prompts, **less)
        assert outcome.was_complete
        assert "holds all that is asked for, and more" in capsys.readouterr().err
    assert hashes(out) == before
    with pytest.raises(PlanMismatchError, match="--force-run would delete all of it"):
        run(out, checkpoint, prompts, levels=(0.5,), output={"force_run": True})
    assert hashes(out) == before


def test_less_than_an_unfinished_folder_was_begun_with_is_refused_with_its_command(
    small: Path, checkpoint: Path, prompts: Path, tmp_path: Path
):
    out = copied(small, tmp_path / "run")
    (out / "sidecars/degradation/validation-00000.json").unlink()
    (out / "data/degradation/validation-00000.tar").unlink()
    (out / "manifests/degradation.json").unlink()
    with pytest.raises(PlanMismatchError) as caught:
        run(out, checkpoint, prompts, levels=(0.5,))
    assert "run.levels: [0.0, 0.5] there, [0.5] now" in str(caught.value)
    assert "python -m builders.degradation" in str(caught.value)


def test_what_leaves_out_samples_that_are_there_is_refused(small: Path, checkpoint: Path, prompts: Path):
    before = hashes(small)
    with pytest.raises(PlanMismatchError) as caught:
        run(small, checkpoint, prompts, levels=(0, 0.75))
    assert "2 examples of 'degradation' that this run leaves out" in str(caught.value)
    assert "run.levels: [0.0, 0.5] there, [0.0, 0.75] now" in str(caught.value)
    assert hashes(small) == before


@pytest.mark.parametrize("other", [{"seed_base": 7}, {"source": {"offset": 1, "limit": 2}}, {"method": "ablation"}])
def test_what_does_not_grow_is_refused_beside_what_does(
    small: Path, checkpoint: Path, prompts: Path, other: dict[str, Any]
):
    with pytest.raises(PlanMismatchError) as caught:
        run(small, checkpoint, prompts, **({"levels": (0, 0.5, 0.75)} | other))
    assert "was begun with another plan" in str(caught.value)
    assert "run.levels" not in str(caught.value)


def test_a_grown_plan_that_was_edited_is_refused(small: Path, checkpoint: Path, prompts: Path, tmp_path: Path):
    out = copied(small, tmp_path / "run")
    run(out, checkpoint, prompts, n_rep=2)
    whole = plan_of(out)
    for batch in ([], [*whole.shards[1].batches[0], whole.shards[0].batches[0][0]]):
        plan = plan_of(out)
        plan.shards[1].batches[0][:] = batch
        (out / "plans/degradation.json").write_bytes(msgspec.json.encode(plan))
        with pytest.raises(PlanMismatchError, match="was it edited"):
            run(out, checkpoint, prompts, n_rep=2)
        (out / "plans/degradation.json").write_bytes(msgspec.json.encode(whole))


def test_a_dry_run_counts_what_is_new_and_writes_nothing(
    small: Path, checkpoint: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
):
    before = hashes(small)
    arguments = ["--model", str(checkpoint), "--source", str(prompts), "--device", "cpu", "--limit", "2"]
    arguments += ["--groups", "mlp", "--levels", "0", "0.5", "0.75", "--no-do-sample", "--max-new-tokens", "5"]
    arguments += ["--sites", "hidden_states", "--num-replays", "1", "--samples-per-shard", "12", "--temperature", "1"]
    arguments += ["--top-p", "1", "--top-k", "0", "--out", str(small), "--dry-run"]
    with pytest.raises(SystemExit) as ended:
        run_task(DEGRADATION, arguments)
    assert ended.value.code == 0
    assert "examples        2 more; 4 are there\n" in capsys.readouterr().out
    assert hashes(small) == before


def test_a_downloaded_dataset_does_not_grow(small: Path, checkpoint: Path, prompts: Path, tmp_path: Path):
    out = copied(small, tmp_path / "run")
    shutil.rmtree(out / "sidecars")
    before = hashes(out)
    with pytest.raises(DatasetError, match="cannot grow"):
        run(out, checkpoint, prompts, n_rep=2)
    assert hashes(out) == before


def test_a_configuration_that_grows_beside_another_keeps_its_place(
    small: Path, checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = copied(small, tmp_path / "run")
    run(out, checkpoint, prompts, output={"dataset_config": "another"})
    with monkeypatch.context() as patch:
        patch.setattr(engine_module.LocalWork, "shards", lambda self, plan, on_shard: True)
        assert run(out, checkpoint, prompts, n_rep=2).interrupted
    report = verify(out)
    assert (report.problems, report.open_configs) == ([], [])
    run(out, checkpoint, prompts, n_rep=2)
    index = json.loads((out / "manifest.json").read_text())
    assert [(entry["name"], entry["num_samples"]) for entry in index["configs"]] == [("degradation", 8), ("another", 4)]


def test_another_process_that_grew_it_first_wins(
    small: Path, checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    same, other = copied(small, tmp_path / "same"), copied(small, tmp_path / "other")
    replace = planner_module._replace
    for out, levels in ((same, (0, 0.5, 0.75)), (other, (0, 0.5, 0.9))):

        def second(layout: Layout, plan: Plan, fresh: Plan, out: Path = out, levels: Any = levels) -> bool:
            monkeypatch.setattr(planner_module, "_replace", replace)
            assert run(out, checkpoint, prompts, levels=levels).manifest is not None
            return replace(layout, plan, fresh)

        monkeypatch.setattr(planner_module, "_replace", second)
        if out is same:
            assert run(out, checkpoint, prompts, levels=(0, 0.5, 0.75)).manifest is not None
        else:
            with pytest.raises(PlanMismatchError, match="leaves out"):
                run(out, checkpoint, prompts, levels=(0, 0.5, 0.75))
        assert verify(out).problems == []
        assert len(points(out)) == 6


def test_a_run_whose_plan_grew_meanwhile_leaves_the_finishing_to_the_other(
    small: Path, checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    grown = copied(small, tmp_path / "grown")
    run(grown, checkpoint, prompts, n_rep=2)
    finish = run_module.finish_planned

    def late(layout: Layout, plan: Plan, task: Any) -> Any:
        (layout.plan).write_bytes((grown / "plans/degradation.json").read_bytes())
        return finish(layout, plan, task)

    monkeypatch.setattr(run_module, "finish_planned", late)
    outcome = run(tmp_path / "run", checkpoint, prompts)
    assert (outcome.manifest, outcome.interrupted) == (None, True)
    monkeypatch.setattr(run_module, "finish_planned", finish)
    run(tmp_path / "run", checkpoint, prompts, n_rep=2)
    assert stored(tmp_path / "run") == stored(grown)


def test_slices_that_grew_are_merged_in_the_order_of_the_source(checkpoint: Path, prompts: Path, tmp_path: Path):
    for offset in (0, 1, 2):
        for levels in ((0,), (0, 0.5)):
            run(tmp_path / f"{offset}", checkpoint, prompts, levels=levels, source={"offset": offset, "limit": 1})
    merge([tmp_path / name for name in ("2", "0", "1")], tmp_path / "merged")
    assert verify(tmp_path / "merged").problems == []
    assert plan_of(tmp_path / "merged").grown == []
    with TraceStore(str(tmp_path / "merged")) as store:
        assert [key[-1] for key in store.keys] == ["0", "0", "1", "1", "2", "2"]


def test_questions_grow_by_their_limit_alone(checkpoint: Path, tmp_path: Path):
    run_trivia(tmp_path / "run", checkpoint, source={"limit": 7})
    before = stored(tmp_path / "run")
    with pytest.raises(PlanMismatchError, match=r"source\.offset: 0 there, 1 now"):
        run_trivia(tmp_path / "run", checkpoint, source={"limit": 12, "offset": 1})
    assert run_trivia(tmp_path / "run", checkpoint, source={"limit": 3}).was_complete
    run_trivia(tmp_path / "run", checkpoint, source={"limit": 12})
    assert before.items() <= stored(tmp_path / "run").items()
    assert verify(tmp_path / "run").problems == []
    run_trivia(tmp_path / "whole", checkpoint)
    with TraceStore(str(tmp_path / "run")) as grown, TraceStore(str(tmp_path / "whole")) as whole:
        assert sorted(grown.keys) == sorted(whole.keys)
        for key in whole.keys:
            assert grown.record(key).token_ids == whole.record(key).token_ids


def test_a_smaller_batch_size_goes_on_in_parts_and_a_larger_one_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(engine_module.LocalWork, "shards", lambda self, plan, on_shard: True)
        run_trivia(tmp_path / "run", checkpoint, output={"batch_size": 4})
    with pytest.raises(PlanMismatchError, match="batch_size: 4 there, 5 now"):
        run_trivia(tmp_path / "run", checkpoint, output={"batch_size": 5})
    run_trivia(tmp_path / "run", checkpoint, output={"batch_size": 3})
    assert [line["parts"] for line in log_lines(tmp_path / "run")] == [[3, 1], [1], [3, 1], [1], [2]]
    plan = read_plan(Layout(tmp_path / "run", "trivia_qa"))
    assert (plan.batch_size, plan.run["output"]["batch_size"]) == (4, 4)
    run_trivia(tmp_path / "run", checkpoint, source={"limit": 14}, output={"batch_size": 1})
    plan = read_plan(Layout(tmp_path / "run", "trivia_qa"))
    assert (plan.batch_size, plan.run["output"]["batch_size"]) == (4, 4)
    assert [len(batch) for batch in plan.shards[-1].batches] == [1, 1]


@pytest.mark.parametrize("smaller", [{"output": {"batch_size": 1}}, {"max_batch_size": 1}])
def test_a_run_that_memory_stopped_goes_on_with_a_smaller_batch(
    checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smaller: dict[str, Any]
):
    monkeypatch.setattr(degradation, "memory_reader", Memory(0.5, 0.97).reader)
    with pytest.raises(MemoryPressureError, match="--batch-size"):
        run(tmp_path / "run", checkpoint, prompts)
    monkeypatch.setattr(degradation, "memory_reader", Memory(0.5).reader)
    run(tmp_path / "run", checkpoint, prompts, **smaller)
    assert [line["parts"] for line in log_lines(tmp_path / "run", "degradation")] == [[2], [1, 1]]
    with pytest.raises(PlanMismatchError, match="max_batch_size: 40 there, 41 now"):
        run(tmp_path / "run", checkpoint, prompts, max_batch_size=41)


def test_a_restart_begins_with_the_parts_that_memory_held(
    checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(degradation, "memory_reader", Memory(0.5).reader)
    own, sizes = degradation.answer_traced, []
    append = worker_module.ShardWriter.append

    def tight(traced: Any, texts: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(texts))
        if len(texts) > 1:
            raise MemoryError
        return own(traced, texts, *args, **kwargs)

    def stop(self: Any, *args: Any, **kwargs: Any) -> None:
        append(self, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(degradation, "answer_traced", tight)
        patch.setattr(worker_module.Worker, "estimate", lambda *args: worker_module.Estimate(1, 1, 1, 1, 1, 1.0, 1))
        patch.setattr(worker_module.ShardWriter, "append", stop)
        assert run(tmp_path / "run", checkpoint, prompts).interrupted
        assert sizes == [2, 1, 1]
        sizes.clear()
        patch.setattr(worker_module.ShardWriter, "append", append)
        run(tmp_path / "run", checkpoint, prompts)
        assert sizes == [1, 1], "the restart tried what memory did not hold"
    assert [line["parts"] for line in log_lines(tmp_path / "run", "degradation")] == [[1, 1], [1, 1]]


def test_a_restart_with_another_batch_size_begins_with_that(
    checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(degradation, "memory_reader", Memory(0.5).reader)
    run(tmp_path / "run", checkpoint, prompts)
    run(tmp_path / "run", checkpoint, prompts, n_rep=2, output={"batch_size": 1})
    run(tmp_path / "run", checkpoint, prompts, n_rep=3)
    assert [line["parts"] for line in log_lines(tmp_path / "run", "degradation")][2:] == [[1, 1]] * 2 + [[2]] * 2


def test_a_grid_of_a_trained_model_grows(shared: Path, tmp_path: Path):
    config = DegradationConfig(
        model=ModelConfig(model=str(shared / "models/stories260K-hf"), device="cpu"),
        source=PromptSource(source="dreams", limit=2),
        groups=("mlp",),
        levels=(0.0,),
    )
    config = msgspec.structs.replace(
        config,
        generation=msgspec.structs.replace(config.generation, max_new_tokens=8),
        prompt=msgspec.structs.replace(config.prompt, prompt_form="plain"),
    )
    execute(DEGRADATION, config, tmp_path / "run")
    before = stored(tmp_path / "run")
    execute(DEGRADATION, msgspec.structs.replace(config, levels=(0.0, 0.5)), tmp_path / "run")
    assert before.items() <= stored(tmp_path / "run").items()
    assert verify(tmp_path / "run").problems == []
    with TraceStore(str(tmp_path / "run")) as store:
        whole, damaged = (store.record(f"mlp_{level}_000_000001") for level in ("0", "0p5"))
    assert whole.prompt == damaged.prompt == whole.prompt_text
    assert whole.generated_text != damaged.generated_text


class Killed(BaseException):
    """What ends a run at once."""


def killed_at(step: int, patch: pytest.MonkeyPatch, out: Path, *of: Path, **changes: Any) -> bool:
    """Run until something is made durable for the `step`-th time; whether the run got that far."""
    own, left = os.fsync, [step]

    def dying(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        own(descriptor)

    with patch.context() as patched:
        patched.setattr(os, "fsync", dying)
        try:
            run(out, *of, **changes)
        except Killed:
            return True
    return False


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        ({"levels": (0, 0.25, 0.5)}, range(1, 13)),
        ({"source": {"limit": 3}}, (2, 6)),
        ({"n_rep": 2, "groups": ("attn", "mlp")}, (3, 9)),
    ],
)
def test_the_finished_part_stays_what_it_is_wherever_growth_is_killed(
    small: Path,
    checkpoint: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, Any],
    steps: Sequence[int],
):
    run(copied(small, tmp_path / "whole"), checkpoint, prompts, **more)
    before, num_finishing = hashes(small), 0
    for step in steps:
        out = copied(small, tmp_path / f"{step}")
        assert killed_at(step, monkeypatch, out, checkpoint, prompts, **more)
        if is_finished(Layout(out, "degradation")):
            assert before.items() <= hashes(out).items()
            assert (verify(out).problems, verify(out).open_configs) == ([], [])
            assert points(out) == points(small)
            assert len(load_dataset(str(out), split="validation")) == 4
            assert read_local(out).large == read_local(small).large
            assert run(out, checkpoint, prompts).was_complete
            assert before.items() <= hashes(out).items()
        else:
            num_finishing += 1
            assert len(points(out)) > 4, "the new shards are all there, and are read"
        run(out, checkpoint, prompts, **more)
        assert hashes(out) == hashes(tmp_path / "whole")
        computed = [(line["shard"], line["batch"]) for line in log_lines(out, "degradation")]
        assert len(computed) == len(set(computed)), "a finished batch was computed again"
    assert len(steps) >= 2 * num_finishing


def test_a_growth_is_left_alone_and_replaced(
    checkpoint: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, few, num_calls = tmp_path / "run", {"output": {"samples_per_shard": 2}}, iter(range(100))
    run(out, checkpoint, prompts, **few)
    finished = copied(out, tmp_path / "direct")
    before = hashes(out)

    def stopped(more: dict[str, Any], num_batches: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            own = worker_module.ShardWriter.append

            def stop(self: Any, *args: Any, **kwargs: Any) -> None:
                own(self, *args, **kwargs)
                if next(num_calls) + 1 >= num_batches:
                    os.kill(os.getpid(), signal.SIGINT)

            patch.setattr(worker_module.ShardWriter, "append", stop)
            assert run(out, checkpoint, prompts, **more).interrupted

    stopped({"levels": (0, 0.5, 0.6, 0.7, 0.8), **few}, 2)
    assert "6 more examples are planned, 4 of them" in str(growth_note(Layout(out, "degradation")))
    assert run(out, checkpoint, prompts, **few).was_complete
    assert "6 more examples are planned" in capsys.readouterr().err
    with pytest.raises(PlanMismatchError, match="--force-run would delete all of it"):
        run(out, checkpoint, prompts, output={"force_run": True, "samples_per_shard": 2})
    assert before.items() <= hashes(out).items()
    run(out, checkpoint, prompts, levels=(0, 0.5, 0.9), **few)
    assert "4 samples of another growth" in capsys.readouterr().err
    assert growth_note(Layout(out, "degradation")) is None
    run(finished, checkpoint, prompts, levels=(0, 0.5, 0.9), **few)
    assert hashes(out) == hashes(finished)


def test_a_growth_that_grows_keeps_what_it_computed(
    small: Path, checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = copied(small, tmp_path / "run")
    assert killed_at(12, monkeypatch, out, checkpoint, prompts, levels=(0, 0.5, 0.25))
    num_lines = len(log_lines(out, "degradation"))
    run(out, checkpoint, prompts, levels=(0, 0.5, 0.25), n_rep=2)
    computed = log_lines(out, "degradation")[num_lines:]
    assert sum(line["num_samples"] for line in computed) == 6, "a finished batch was computed again"
    assert [step.num_shards for step in plan_of(out).grown] == [1, 2]


# A child kills itself when something is about to be made durable: after so many of such steps, wherever that is.
_SCRIPT = """
import os, random, shutil, signal, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.test_growing import run

def attempt(out, num_steps):
    child = os.fork()
    if child == 0:
        own, left = os.fsync, [num_steps]
        def dying(descriptor):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            own(descriptor)
        os.fsync = dying
        try:
            run(out, model, prompts, n_rep=2, levels=(0, 0.5, 0.25), groups=("mlp", "attn"))
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

model, prompts, root = map(Path, sys.argv[1:])
run(root / "small", model, prompts)
shutil.copytree(root / "small", root / "whole")
assert attempt(root / "whole", -1) == 0
draw, kills = random.Random(2), 0
for number in range(6):
    shutil.copytree(root / "small", root / f"killed{number}")
    # the plan is replaced by the first two steps; after that anywhere
    for num_steps in [1 + number % 3, 1 + number % 2, *(draw.randint(1, 30) for _ in range(5)), -1]:
        code = attempt(root / f"killed{number}", num_steps)
        assert code in (0, -9), code
        kills += code == -9
        if code == 0:
            break
    assert code == 0
print(kills)
"""


def test_kill_9_while_it_grows(checkpoint: Path, prompts: Path, tmp_path: Path):
    done = python("-c", _SCRIPT, checkpoint, prompts, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 15, "it was hardly ever killed"
    before = stored(tmp_path / "small")
    for folder in tmp_path.glob("killed*"):
        assert hashes(folder) == hashes(tmp_path / "whole")
        assert before.items() <= stored(folder).items()
        computed = [(line["shard"], line["batch"]) for line in log_lines(folder, "degradation")]
        assert len(computed) == len(set(computed)), "a finished batch was computed again"


_RACE = """
import os, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
import tracekit.run.planner as planner
from tests.test_growing import run
from tracekit.errors import PlanMismatchError, ShardLockedError

model, prompts, out = map(Path, sys.argv[1:4])
own, (read, write) = planner._replace, os.pipe()

def together(*args):
    os.write(ready[1], b"x")
    os.read(read, 1)  # all at once
    return own(*args)

planner._replace = together
ready = os.pipe()
children = []
for number in range(6):
    children.append(os.fork())
    if children[-1] == 0:
        level = 0.75 if number % 2 else 0.9
        try:
            run(out, model, prompts, levels=(0, 0.5, level))
            os._exit(0)
        except (PlanMismatchError, ShardLockedError) as error:
            os._exit(2 if isinstance(error, ShardLockedError) else 3)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
for _ in children:
    os.read(ready[0], 1)
os.write(write, b"x" * len(children))
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_processes_that_grow_it_at_once_agree_on_one_plan(small: Path, checkpoint: Path, prompts: Path, tmp_path: Path):
    out = copied(small, tmp_path / "run")
    done = python("-c", _RACE, checkpoint, prompts, out)
    codes = [int(code) for code in done.stdout.split()[-6:]]
    assert done.returncode == 0, done.stderr
    assert 0 in codes, done.stderr
    assert set(codes) <= {0, 2, 3}, done.stderr
    assert codes.count(3) == 3, "both plans were worked on"
    plan = plan_of(out)
    assert len(plan.grown) == 1
    assert run(out, checkpoint, prompts, levels=tuple(plan.run["levels"])).manifest is not None
    assert verify(out).problems == []
    assert len(points(out)) == 6
