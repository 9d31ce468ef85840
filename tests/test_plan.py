"""Planning: which examples share a batch and a shard."""

from pathlib import Path

import msgspec
import pytest

from tests.tasks_for_tests import TASKS
from tracekit.config import OutputConfig, RunConfig
from tracekit.format.manifest import Plan, SourceInfo
from tracekit.records import SCHEMA_VERSION, ModelInfo
from tracekit.run.plan import Devices, differences, make_plan, mismatch
from tracekit.task import Example

MODEL = ModelInfo(
    id="m", revision="r", variant="base", adapter=None, quantization=None, dtype="float32", attention="auto"
)


class Celled(Example, frozen=True, kw_only=True):
    """An example that says which cell it is of."""

    number: int

    @property
    def cell(self) -> int | None:
        return self.number


def planned(examples: list[Example], *, size: int, batch_size: int, lengths: list[int] | None = None) -> Plan:
    source = SourceInfo(
        id="s", revision="r", subset=None, split="validation", num_rows=9, num_used=len(examples), skipped=[]
    )
    return make_plan(
        name="t",
        task=TASKS["trivia_qa"],
        run={},
        config=RunConfig(output=OutputConfig(samples_per_shard=size)),
        model=MODEL,
        source=source,
        examples=examples,
        lengths=lengths or [1] * len(examples),
        batch_size=batch_size,
        devices=Devices("cpu", 1),
    )


def batch_sizes(plan: Plan) -> list[list[int]]:
    return [[len(batch) for batch in shard.batches] for shard in plan.shards]


def test_examples_without_cells_fill_shards_in_order_and_batches_by_length():
    plan = planned([Example(index=i) for i in range(7)], size=4, batch_size=3, lengths=[1, 9, 5, 5, 2, 3, 4])
    assert [shard.batches for shard in plan.shards] == [[[1, 2, 3], [0]], [[6, 5, 4]]]
    assert [shard.name for shard in plan.shards] == ["validation-00000", "validation-00001"]


def test_a_batch_is_of_one_cell_and_a_cell_of_one_shard():
    cells = [Celled(index=i, number=i // 100) for i in range(300)]
    assert batch_sizes(planned(cells, size=256, batch_size=40)) == [[40, 40, 20, 40, 40, 20], [40, 40, 20]]
    plan = planned(cells, size=256, batch_size=40, lengths=list(range(300)))
    for shard in plan.shards:
        for batch in shard.batches:
            assert len({index // 100 for index in batch}) == 1
            assert batch == sorted(batch, reverse=True)


@pytest.mark.parametrize("size", [30, 50])
def test_a_cell_larger_than_a_shard_is_cut(size: int):
    cells = [Celled(index=i, number=i // 70) for i in range(140)]
    plan = planned(cells, size=size, batch_size=20)
    assert [index for shard in plan.shards for batch in shard.batches for index in sorted(batch)] == list(range(140))
    assert all(sum(map(len, shard.batches)) <= size for shard in plan.shards)
    assert all(len({index // 70 for index in batch}) == 1 for shard in plan.shards for batch in shard.batches)


def test_a_folder_of_an_earlier_schema_is_not_added_to():
    plan = planned([Example(index=0)], size=1, batch_size=1)
    earlier = msgspec.structs.replace(plan, schema_version="1.1")
    found = differences(earlier, plan)
    assert found == {"schema_version": ("1.1", SCHEMA_VERSION)}
    assert "to add to it, use the tracekit that began it" in str(mismatch(Path("folder"), plan, found))


def test_a_folder_from_before_a_setting_was_there_goes_on_with_what_was_done_then():
    plan = planned([Example(index=0)], size=1, batch_size=1)
    now, none = (msgspec.structs.replace(plan, run={"capture": {"topk": 5, "numbers": n}}) for n in ("all", "none"))
    before = msgspec.structs.replace(plan, run={"capture": {"topk": 5}})
    assert differences(before, now) == {}
    assert differences(before, none) == {"run.capture.numbers": ("all", "none")}
    auto, forced = (
        msgspec.structs.replace(plan, run={"capture": {"topk": 5, "capture_from": c}}) for c in ("auto", "decoding")
    )
    assert differences(before, auto) == {}
    assert differences(before, forced) == {"run.capture.capture_from": ("auto", "decoding")}
