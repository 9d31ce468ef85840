"""What shapes the bytes of a shard is its plan and its journal: however often a run dies, and whatever else its process
has done, parts of batches, replays and bytes are those of a run that nothing disturbed."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import builders.degradation.tracer as degradation
from builders.degradation.task import TASK as DEGRADATION
from builders.trivia_qa.task import TASK as TRIVIA_QA
from tests.runs_for_tests import hashes, log_lines, trivia_config
from tests.test_degradation import Memory, config_for
from tests.tiny_checkpoint import save_tiny_checkpoint
from tracekit.answering import AnsweringTracer
from tracekit.errors import CaptureError
from tracekit.format.layout import Layout
from tracekit.format.manifest import read_plan
from tracekit.format.shards import ShardWriter
from tracekit.model.capture import Text
from tracekit.model.lengths import groups_within
from tracekit.run.engine import LocalEngine
from tracekit.run.padding import padded, to_replay
from tracekit.run.runner import Ended, execute

Run = Callable[[Path], Ended]


class KilledError(BaseException):
    """In the place of `kill -9`: nothing catches it."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", chat=True)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five prompts of very different lengths."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": "Say it. " * number, "id": f"p{number}"} for number in (1, 2, 4, 7, 12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextmanager
def no_room_for(most: int, task: Any) -> Iterator[None]:
    """A device that pretends to hold so many examples at once."""
    own = task.trace

    def trace(self: Any, traced: Any, examples: Any, place: Any) -> Any:
        if len(examples) > most and place.config:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(self, traced, examples, place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "trace", trace)
        yield


@contextmanager
def killed(when: str, *, after: int) -> Iterator[None]:
    """The process dies at the end of a batch: just before it is written, just after, or once its memory ran out."""
    append, note, count = ShardWriter.append, ShardWriter.note_size, 0

    def step() -> None:
        nonlocal count
        count += 1
        if count > after:
            raise KilledError

    def append_or_die(self: Any, *args: Any, **kwargs: Any) -> None:
        if when == "before":
            step()
        append(self, *args, **kwargs)
        if when == "after":
            step()

    def note_or_die(self: Any, *args: Any, **kwargs: Any) -> None:
        note(self, *args, **kwargs)
        if when == "noted":
            step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWriter, "append", append_or_die)
        patch.setattr(ShardWriter, "note_size", note_or_die)
        yield


def run_with_kills(run: Run, out: Path, when: str) -> int:
    """Run until it is done: every process does one batch more than the last one, and dies."""
    for number in range(40):
        try:
            with killed(when, after=0 if when == "after" else 1):
                run(out)
            return number
        except KilledError:
            continue
    raise AssertionError("never done")


def parts_of(out: Path, config: str) -> dict[tuple[str, int], tuple[int, ...]]:
    """Parts of every batch that the run log tells of: a process may die before it says so."""
    return {(line["shard"], line["batch"]): tuple(line["parts"]) for line in log_lines(out, config)}


@pytest.mark.parametrize("when", ["before", "after", "noted"])
@pytest.mark.parametrize(("most", "asked", "share"), [(2, 4, 0.1), (5, 1, 0.1), (2, "auto", 0.5)])
def test_damaged_runs_that_die_at_every_batch_have_the_same_bytes(
    checkpoint: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    asked: int | str,
    share: float,
    when: str,
):
    monkeypatch.setattr(degradation, "memory_reader", Memory(share).reader)
    config = config_for(
        checkpoint,
        prompts,
        groups=("mlp",),
        levels=(0, 0.1, 0.2),
        n_rep=1,
        generation={"max_new_tokens": 2},
        output={"batch_size": asked, "samples_per_shard": 10},
    )
    engine = LocalEngine()

    def run(out: Path) -> Ended:
        return execute(DEGRADATION, config, out, engine=engine)

    with no_room_for(most, degradation.DegradationTracer):
        run(tmp_path / "whole")
        assert run_with_kills(run, tmp_path / "killed", when) > 0 or when == "noted"
    whole = parts_of(tmp_path / "whole", "degradation")
    assert parts_of(tmp_path / "killed", "degradation").items() <= whole.items()
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("when", ["before", "after", "noted"])
def test_runs_of_answers_that_die_at_every_batch_have_the_same_bytes(checkpoint: Path, tmp_path: Path, when: str):
    config = trivia_config(
        checkpoint, source={"limit": 11}, capture={"num_replays": 2}, output={"samples_per_shard": 8, "batch_size": 4}
    )
    engine = LocalEngine()

    def run(out: Path) -> Ended:
        return execute(TRIVIA_QA, config, out, engine=engine)

    with no_room_for(3, AnsweringTracer):
        run(tmp_path / "whole")
        assert run_with_kills(run, tmp_path / "killed", when) > 0
    assert {*parts_of(tmp_path / "whole", "trivia_qa").values()} == {(2, 2), (3,)}
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


def test_a_shard_is_the_same_whatever_its_process_made_before(checkpoint: Path, prompts: Path, tmp_path: Path):
    """Memory that ran out in one shard is no reason for smaller parts in another: two workers may share them."""
    config = config_for(checkpoint, prompts, groups=("mlp",), n_rep=1, output={"samples_per_shard": 5})
    engine = LocalEngine()
    execute(DEGRADATION, config, tmp_path / "whole", engine=engine)
    first, second = (shard.name for shard in read_plan(Layout(tmp_path / "whole", "degradation")).shards)

    def tight(self: Any, traced: Any, examples: Any, place: Any) -> Any:
        if place.shard == 0 and len(examples) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(self, traced, examples, place)

    own = degradation.DegradationTracer.trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(degradation.DegradationTracer, "trace", tight)
        execute(DEGRADATION, config, tmp_path / "tight", engine=engine)
    assert parts_of(tmp_path / "tight", "degradation") == {(first, 0): (2, 2, 1), (second, 0): (5,)}
    layouts = [Layout(tmp_path / name, "degradation") for name in ("whole", "tight")]
    assert len({layout.shard(second).read_bytes() for layout in layouts}) == 1


def test_a_smaller_size_holds_for_as_long_as_the_same_is_asked_for(tmp_path: Path):
    layout = Layout(tmp_path, "c")
    with ShardWriter(layout, "train-00000", 0) as writer:
        assert writer.size(8) == 8
        writer.note_size(2, asked=8)
        writer.append([])
    with ShardWriter(layout, "train-00000", 0) as writer:
        assert (writer.num_batches, writer.size(8), writer.size(4), writer.size(16)) == (1, 2, 4, 16)
        writer.append([], size=(4, 8), padding=7)
        assert (writer.size(8), writer.padding) == (4, 7)
        writer.append([], padding=3)
    with ShardWriter(layout, "train-00000", 0) as writer:
        assert (writer.num_batches, writer.size(8), writer.padding) == (3, 4, 7)


def test_what_replays_showed_is_added_up_over_a_resume(checkpoint: Path, tmp_path: Path):
    config = trivia_config(checkpoint, source={"limit": 9}, output={"samples_per_shard": 9, "batch_size": 3})
    whole = execute(TRIVIA_QA, config, tmp_path / "whole")
    assert run_with_kills(lambda out: execute(TRIVIA_QA, config, out), tmp_path / "killed", "after") == 3
    killed_manifest = execute(TRIVIA_QA, config, tmp_path / "killed").manifest
    assert whole.manifest is not None
    assert whole.manifest.verification.num_replayed >= 2
    assert killed_manifest == whole.manifest


@pytest.mark.parametrize("wrong", [0, 1, 2, 3])
def test_a_wrong_row_is_found_where_rows_are_replayed(checkpoint: Path, tmp_path: Path, wrong: int):
    """The first batch, the last, and the one with the most padded row of the shard; of the other one, nothing."""
    path = tmp_path / "questions.jsonl"
    rows = [{"question": "so " * number, "answers": ["x"]} for number in (60, 56, 54, 51, 50, 10, 9, 8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = trivia_config(
        checkpoint,
        source={"source": str(path), "limit": 8},
        generation={"max_new_tokens": 2},
        output={"samples_per_shard": 8, "batch_size": 2},
    )
    own, count = AnsweringTracer.trace, iter(range(99))

    def trace(self: Any, traced: Any, examples: Any, place: Any) -> Any:
        samples = own(self, traced, examples, place)
        if place.config and next(count) == wrong:
            shortest = min(samples, key=lambda sample: len(sample.text.token_ids))
            shortest.trace.tensors["hidden_states"][:] *= 1.5
        return samples

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnsweringTracer, "trace", trace)
        if wrong == 1:
            manifest = execute(TRIVIA_QA, config, tmp_path / "run").manifest
            assert manifest is not None
            assert manifest.verification.num_replayed == 3
        else:
            with pytest.raises(CaptureError, match="differs from a lone eager run"):
                execute(TRIVIA_QA, config, tmp_path / "run")


@given(
    batches=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=6),
    count=st.integers(1, 3),
    limit=st.sampled_from([None, 0, 12]),
)
def test_the_most_padded_row_of_every_shard_is_among_the_replayed(
    batches: list[list[int]], count: int, limit: int | None
):
    traced: Any = SimpleNamespace(groups=lambda lengths: groups_within(lengths, limit))
    replayed, so_far, most = 0, 0, 0
    for number, lengths in enumerate(batches):
        samples: Any = [
            SimpleNamespace(text=Text([1] * n, 1), record=SimpleNamespace(key=str(i))) for i, n in enumerate(lengths)
        ]
        batch = padded(traced, samples)
        assert all(one.padding == 0 for one in batch) or limit != 0
        is_outer = number in (0, len(batches) - 1)
        chosen = to_replay(batch, count, is_outer=is_outer, so_far=so_far)
        assert len(chosen) == min(count, len(lengths)) if is_outer else len(chosen) <= 1
        assert not to_replay(batch, 0, is_outer=is_outer, so_far=so_far)
        so_far = max([so_far, *(one.padding for one in chosen)])
        most = max([most, *(one.padding for one in batch)])
        replayed += len(chosen)
    assert so_far == most
    assert replayed >= 1
