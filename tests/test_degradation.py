"""The degradation builder: the grid, damage against plain transformers, batches, memory, what is not finite."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import builders.degradation.tracer as degradation
import tracekit.run.worker as worker_module
from builders.degradation.configs import CONFIGS, LEVELS, DegradationConfig, get_config
from builders.degradation.damage import METHODS
from builders.degradation.export import export_degradation
from builders.degradation.task import TASK as DEGRADATION
from builders.degradation.task import gives
from builders.kit.columns import PromptSource
from tests import given_answers
from tests.runs_for_tests import hashes, log_lines, run_trivia
from tests.tiny_checkpoint import save_tiny_checkpoint, save_tiny_gpt2
from tracekit import TraceStore, verify
from tracekit.cli import _print_estimate, main, run_task
from tracekit.config import CaptureConfig, DrawConfig, ModelConfig, OutputConfig, PromptConfig
from tracekit.errors import CaptureError, ConfigError, DtypeOverflowError, MemoryPressureError, SourceError
from tracekit.format.layout import Layout
from tracekit.format.manifest import read_plan
from tracekit.model.memory import MemoryReader
from tracekit.run.engine import LocalEngine
from tracekit.run.recheck import replay_stored
from tracekit.run.runner import Ended, execute

PROMPTS = [
    {"prompt": "Say one word.", "id": "p0", "kind": "short"},
    {"prompt": "What is the capital of France? The name only, please, and nothing else at all.", "answer": "Paris"},
    {"prompt": "Why?", "id": "p2"},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", chat=True)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return path


def config_for(checkpoint: Path, prompts: Path | str, /, **changes: Any) -> DegradationConfig:
    parts = {
        "model": ModelConfig(model=str(checkpoint), device="cpu"),
        "source": PromptSource(source=str(prompts)),
        "prompt": PromptConfig(),
        "generation": DrawConfig(num_beams=1, max_new_tokens=5),
        "capture": CaptureConfig(sites=("hidden_states",), num_replays=1),
        "output": OutputConfig(samples_per_shard=12),
    }
    settings = {"groups": ("attn", "mlp"), "levels": (0, 0.5), "n_rep": 2, "do_sample": False}
    settings |= {name: value for name, value in changes.items() if name not in parts}
    changed: dict[str, Any] = {
        name: msgspec.structs.replace(part, **changes.get(name, {})) for name, part in parts.items()
    }
    return DegradationConfig(**changed, **settings)  # pyright: ignore[reportArgumentType]


def run(out: Path, checkpoint: Path, prompts: Path | str, /, **changes: Any) -> Ended:
    return execute(DEGRADATION, config_for(checkpoint, prompts, **changes), out)


class Memory:
    """Readings of a device, as a test wants them."""

    def __init__(self, *shares: float) -> None:
        self.shares = list(shares)

    def reader(self, device: torch.device) -> MemoryReader:
        return MemoryReader(
            "memory", lambda: self.shares.pop(0) if len(self.shares) > 1 else self.shares[0], lambda: None
        )


@pytest.fixture(scope="module", params=METHODS)
def made(
    request: pytest.FixtureRequest, checkpoint: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> TraceStore:
    folder = tmp_path_factory.mktemp("run") / request.param
    outcome = run(folder, checkpoint, prompts, method=request.param)
    assert outcome.manifest is not None
    assert verify(folder).problems == []
    return TraceStore(str(folder))


def damaged_by_hand(checkpoint: Path, record: Any) -> Any:
    """Plain transformers with the damage that a record tells of, done weight by weight."""
    from builders.degradation.damage import Damaged
    from builders.degradation.weight_groups import find_group
    from tracekit.model.anatomy import examine

    plain = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    anatomy = examine(plain, lambda: plain(torch.tensor([[1, 2, 3]])))
    damage = record.damage
    kept = Damaged(find_group(plain, anatomy, damage.group))
    kept.__enter__()
    kept.apply(damage.method, level=damage.level, seed=damage.seed)
    return plain


def test_every_point_of_the_grid_is_a_sample(made: TraceStore):
    points = [(r.damage.group, r.damage.level, r.repeat, r.prompt_id) for r in (s.record for s in made)]
    wanted = [
        (group, level, repeat, name)
        for group in ("attn", "mlp")
        for level in (0.0, 0.5)
        for repeat in (0, 1)
        for name in ("p0", "1", "p2")
    ]
    assert sorted(points) == sorted(wanted)
    assert points[0][1:3] == (0.0, 0)
    assert "attn_0p5_001_000002" in made.keys
    record = made.record("attn_0p5_001_000002")
    assert (record.question_id, record.prompt_kind, record.damage.seed) == ("p2", "other", 1)
    assert (record.config_name, record.level_index) == ("custom", 1)


def test_outputs_and_states_are_those_of_a_damaged_plain_model(made: TraceStore, checkpoint: Path):
    moved = 0
    for sample in made:
        record = sample.record
        plain = damaged_by_hand(checkpoint, record)
        ids = torch.tensor([record.token_ids])
        prompt = ids[:, : record.prompt_length]
        with torch.no_grad():
            generated = plain.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=2)
            output = plain(ids, output_hidden_states=True)
        assert generated[0].tolist() == record.token_ids
        np.testing.assert_allclose(
            sample.hidden_states(), torch.stack(output.hidden_states)[:, 0].numpy(), atol=1e-3, rtol=1e-3
        )
        logprobs = output.logits[0].log_softmax(-1)
        answer = range(record.prompt_length, len(record.token_ids))
        np.testing.assert_allclose(
            record.token_logprobs, [logprobs[t - 1, record.token_ids[t]].item() for t in answer], atol=1e-3
        )
        before = made.record(sample.key.replace("0p5", "0"))
        moved += record.token_ids != before.token_ids
        if record.damage.level == 0:
            assert (record.damage.share_changed, record.damage.relative_change) == (0.0, 0.0)
        else:
            assert record.damage.share_changed > 0.2
            assert record.damage.relative_change > 0.1
    assert moved, "no damage changed any text"


def test_level_zero_is_the_model_itself_in_every_group(made: TraceStore, checkpoint: Path):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    for group in ("attn", "mlp"):
        for repeat in range(2):
            sample = made[f"{group}_0_{repeat:03d}_000001"]
            with torch.no_grad():
                hidden = plain(torch.tensor([sample.record.token_ids]), output_hidden_states=True).hidden_states
            np.testing.assert_allclose(sample.hidden_states(layer=2), hidden[2][0].numpy(), atol=1e-4)


def test_an_expected_answer_is_judged_and_a_missing_one_is_not(
    checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("It is Paris.", add_special_tokens=False).input_ids
    monkeypatch.setattr(degradation, "answer_traced", given_answers.saying(ids))
    run(tmp_path / "run", checkpoint, prompts, groups=("mlp",), n_rep=1, generation={"max_new_tokens": 30})
    store = TraceStore(str(tmp_path / "run"))
    assert [store.record(f"mlp_0_000_00000{i}").is_correct for i in range(3)] == [None, True, None]
    assert store.record("mlp_0_000_000001").generated_answer == "It is Paris."


def test_the_model_is_whole_again_after_a_run_and_after_an_error(
    checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    engine = LocalEngine()
    execute(DEGRADATION, config_for(checkpoint, prompts), tmp_path / "run", engine=engine)
    model = engine.loader._traced.model  # type: ignore[union-attr]
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)

    def same() -> bool:
        pairs = zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    assert same()
    own, calls = degradation.answer_traced, []

    def fail_late(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise CaptureError("broken")
        return own(*args, **kwargs)

    monkeypatch.setattr(degradation, "answer_traced", fail_late)
    with pytest.raises(CaptureError, match="broken"):
        execute(DEGRADATION, config_for(checkpoint, prompts), tmp_path / "other", engine=engine)
    assert same()


def test_a_text_does_not_depend_on_its_batch(
    checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(degradation, "memory_reader", Memory(0.5).reader)
    for sampled in (False, True):
        for size in (1, 3):
            folder = tmp_path / f"{sampled}{size}"
            run(folder, checkpoint, prompts, groups=("mlp",), do_sample=sampled, output={"batch_size": size})
        one, three = (TraceStore(str(tmp_path / f"{sampled}{size}")) for size in (1, 3))
        assert [s.record.token_ids for s in one] == [s.record.token_ids for s in three]
        assert {tuple(line["parts"]) for line in log_lines(tmp_path / f"{sampled}1", "degradation")} == {(1, 1, 1)}
        assert {tuple(line["parts"]) for line in log_lines(tmp_path / f"{sampled}3", "degradation")} == {(3,)}


def test_draws_differ_by_repeat_and_not_by_level(checkpoint: Path, prompts: Path, tmp_path: Path):
    run(tmp_path / "run", checkpoint, prompts, do_sample=True, generation={"max_new_tokens": 12}, groups=("mlp",))
    store = TraceStore(str(tmp_path / "run"))
    texts = {key: store.record(key).generated_token_ids for key in store.keys}
    assert any(texts[f"mlp_0_000_00000{i}"] != texts[f"mlp_0_001_00000{i}"] for i in range(3))
    run(tmp_path / "again", checkpoint, prompts, do_sample=True, generation={"max_new_tokens": 12}, groups=("attn",))
    again = TraceStore(str(tmp_path / "again"))
    assert all(
        again.record(f"attn_0_001_00000{i}").generated_token_ids == texts[f"mlp_0_001_00000{i}"] for i in range(3)
    )


def test_a_hundred_prompts_make_batches_of_40_40_and_20(checkpoint: Path, tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(100)))
    run(
        tmp_path / "run",
        checkpoint,
        path,
        groups=("mlp",),
        n_rep=1,
        generation={"max_new_tokens": 1},
        capture={"sites": ("none",)},
        output={"samples_per_shard": 256},
    )
    plan = read_plan(Layout(tmp_path / "run", "degradation"))
    assert [[len(batch) for batch in shard.batches] for shard in plan.shards] == [[40, 40, 20, 40, 40, 20]]
    assert len(TraceStore(str(tmp_path / "run"))) == 200


def test_parts_grow_between_levels_where_memory_is_plentiful_and_are_journalled(
    checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(degradation, "memory_reader", Memory(0.1).reader)
    run(tmp_path / "run", checkpoint, prompts, groups=("mlp",), output={"batch_size": 1})
    parts = [line["parts"] for line in log_lines(tmp_path / "run", "degradation")]
    assert parts == [[1, 1, 1], [1, 1, 1], [2, 1], [2, 1]]


def test_memory_that_runs_out_halves_the_batch_for_the_level(
    checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(degradation, "memory_reader", Memory(0.5).reader)
    own = degradation.answer_traced

    def small(traced: Any, texts: Any, *args: Any, **kwargs: Any) -> Any:
        if len(texts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(traced, texts, *args, **kwargs)

    monkeypatch.setattr(degradation, "answer_traced", small)
    run(tmp_path / "run", checkpoint, prompts, groups=("mlp",))
    assert [line["parts"] for line in log_lines(tmp_path / "run", "degradation")] == [[1, 1, 1]] * 4


def test_memory_that_is_nearly_full_stops_the_run_and_loses_nothing(
    checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run(tmp_path / "whole", checkpoint, prompts)
    monkeypatch.setattr(degradation, "memory_reader", Memory(0.5, 0.5, 0.5, 0.97).reader)
    with pytest.raises(MemoryPressureError, match=r"above 95%.*run the same command again"):
        run(tmp_path / "run", checkpoint, prompts)
    done = len(log_lines(tmp_path / "run", "degradation"))
    assert 0 < done < 8
    monkeypatch.setattr(degradation, "memory_reader", Memory(0.5).reader)
    run(tmp_path / "run", checkpoint, prompts)
    assert len(log_lines(tmp_path / "run", "degradation")) == 8, "a finished batch was computed again"
    assert hashes(tmp_path / "run") == hashes(tmp_path / "whole")


def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run(tmp_path / "whole", checkpoint, prompts, do_sample=True)
    append, calls = worker_module.ShardWriter.append, []

    def stop_after_three(self: Any, *args: Any, **kwargs: Any) -> None:
        append(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(worker_module.ShardWriter, "append", stop_after_three)
    assert run(tmp_path / "run", checkpoint, prompts, do_sample=True).interrupted
    assert not run(tmp_path / "run", checkpoint, prompts, do_sample=True).interrupted
    assert hashes(tmp_path / "run") == hashes(tmp_path / "whole")


def test_values_that_are_not_finite_are_stored_counted_and_replayed(checkpoint: Path, prompts: Path, tmp_path: Path):
    run(
        tmp_path / "run",
        save_tiny_checkpoint(tmp_path / "half", chat=True, dtype="float16"),
        prompts,
        groups=("mlp",),
        levels=(0, 1e6),
        n_rep=1,
    )
    store = TraceStore(str(tmp_path / "run"))
    assert verify(tmp_path / "run").problems == []
    for sample in store:
        record = sample.record
        bad = int((~np.isfinite(sample.hidden_states().astype(np.float32))).sum())
        assert record.num_nonfinite_values == bad
        assert (bad > 0) == (record.damage.level > 0)
        assert record.num_nonfinite_tokens == sum(value is None for value in record.token_logprobs)
    replayed = replay_stored(
        Layout(tmp_path / "run", "degradation"), 4, model=str(tmp_path / "half"), adapter=None, device="cpu"
    )
    assert replayed.num_replayed == 4


def test_values_beyond_the_stored_dtype_are_inf_and_counted_and_no_reason_to_stop(
    checkpoint: Path, prompts: Path, tmp_path: Path
):
    run(
        tmp_path / "run",
        checkpoint,
        prompts,
        groups=("mlp",),
        levels=(0, 1e4),
        n_rep=1,
        capture={"store_dtype": "float16"},
    )
    assert verify(tmp_path / "run").problems == []
    store = TraceStore(str(tmp_path / "run"))
    for sample in store:
        record, states = sample.record, sample.hidden_states().astype(np.float32)
        assert not np.isnan(states).any()
        assert record.num_overflowed_values == record.num_nonfinite_values == int(np.isinf(states).sum())
        assert (record.num_overflowed_values > 0) == (record.damage.level > 0)
    manifest = (tmp_path / "run/manifests/degradation.json").read_text()
    assert "every value is finite, or counted in its record" in manifest
    layout = Layout(tmp_path / "run", "degradation")
    assert replay_stored(layout, 6, model=str(checkpoint), adapter=None, device="cpu").num_replayed == 6


def test_an_undamaged_value_beyond_the_stored_dtype_stops_the_run(prompts: Path, tmp_path: Path):
    checkpoint = save_tiny_checkpoint(tmp_path / "loud", chat=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3].mul_(1e8)
    model.save_pretrained(checkpoint)
    with pytest.raises(DtypeOverflowError, match="does not fit"):
        run(tmp_path / "run", checkpoint, prompts, levels=(0,), capture={"store_dtype": "float16"})


def test_a_replay_rebuilds_the_damage(made: TraceStore, checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    layout = Layout(Path(made.info().paths[0]), "degradation")
    assert replay_stored(layout, 5, model=str(checkpoint), adapter=None, device="cpu").num_replayed == 5
    own = TraceStore.record

    def altered(self: TraceStore, key: str) -> Any:
        record: Any = own(self, key)
        changed = msgspec.structs.replace(record.damage, level=0.9, seed=7)
        return msgspec.structs.replace(record, damage=changed)

    monkeypatch.setattr(TraceStore, "record", altered)
    with pytest.raises(CaptureError, match="differs from a lone eager run"):
        replay_stored(layout, 2, model=str(checkpoint), adapter=None, device="cpu")


def test_a_dry_run_counts_perplexity_once_a_level_and_damage_once_a_repeat(
    checkpoint: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    seconds = {"now": 0.0}
    own_apply, own_perplexity = degradation.Damaged.apply, degradation.text_perplexity
    own_capture = degradation.answer_traced

    def slow(call: Any, cost: float) -> Any:
        def slowed(*args: Any, **kwargs: Any) -> Any:
            seconds["now"] += cost
            return call(*args, **kwargs)

        return slowed

    monkeypatch.setattr("time.monotonic", lambda: seconds["now"])
    monkeypatch.setattr(degradation.Damaged, "apply", slow(own_apply, 10.0))
    monkeypatch.setattr(degradation, "text_perplexity", slow(own_perplexity, 1000.0))
    monkeypatch.setattr(degradation, "answer_traced", slow(own_capture, 4.0))
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    for given, num_damaged, num_levels in ((None, 8, 0), (str(text), 12, 4)):
        outcome = run(tmp_path / "run", checkpoint, prompts, perplexity_text=given, output={"dry_run": True})
        assert outcome.estimate is not None
        fixed = num_damaged * 10 + num_levels * 1000
        assert outcome.estimate.overhead_seconds == fixed
        assert outcome.estimate.seconds == fixed + 4 / 2 * 24  # two groups, levels, repeats; three prompts
        named = f", perplexity x {num_levels}" if num_levels else ""
        assert outcome.estimate.overhead == f"damage x {num_damaged}{named}"
    _print_estimate(outcome, tmp_path / "run")
    assert "of it: damage x 12, perplexity x 4)" in capsys.readouterr().out


def test_perplexity_is_that_of_the_level(checkpoint: Path, prompts: Path, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    run(tmp_path / "run", checkpoint, prompts, perplexity_text=str(text), groups=("mlp",))
    store = TraceStore(str(tmp_path / "run"))
    found = {(s.record.damage.level, s.record.perplexity) for s in store}
    assert len(found) == 2
    assert all(s.record.is_perplexity_finite for s in store)
    plain = damaged_by_hand(checkpoint, store.record("mlp_0p5_000_000000"))
    ids = AutoTokenizer.from_pretrained(checkpoint)(text.read_text(), return_tensors="pt").input_ids
    with torch.no_grad():
        loss = plain(ids, labels=ids).loss.item()
    assert dict(found)[0.5] == pytest.approx(np.exp(loss), rel=1e-3)
    written = (tmp_path / "run/manifests/degradation.json").read_text()
    assert str(tmp_path) not in written
    assert '"perplexity_text":"text.txt@sha256:' in written.replace(" ", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": (0, -0.1)}, r"level -0\.1 of mult_gauss - at `\$\.levels\[1\]`"),
        ({"levels": (0, 2), "method": "ablation"}, r"level 2\.0 of ablation - at `\$\.levels\[1\]`"),
        ({"levels": (0.1, 0.1)}, r"at `\$\.levels`; expected one or more, each once"),
        ({"groups": ()}, r"at `\$\.groups`"),
        ({"groups": ("brain",)}, r"group 'brain' - at `\$\.groups\[0\]`; expected one of attn"),
        ({"groups": ("mlp:9",)}, r"layer"),
        ({"model": {"quantize": "int8"}}, r"\'int8\' - at `\$\.model\.quantize`"),
        ({"perplexity_text": "nowhere.txt"}, r"nowhere\.txt"),
    ],
)
def test_a_bad_value_is_refused_with_its_path(
    checkpoint: Path, prompts: Path, tmp_path: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", checkpoint, prompts, **changes)
    assert not (tmp_path / "run" / "data").exists()


def test_levels_that_are_nearly_the_same_have_keys_of_their_own(checkpoint: Path, prompts: Path, tmp_path: Path):
    run(tmp_path / "run", checkpoint, prompts, levels=(0.1234567, 0.1234568, 1e-5), groups=("mlp:-1", "mlp:0-1"))
    assert verify(tmp_path / "run").problems == []
    store = TraceStore(str(tmp_path / "run"))
    assert len(set(store.keys)) == len(store) == 2 * 3 * 2 * 3
    assert {"mlp_m1_0p1234567_000_000000", "mlp_0to1_1em05_001_000002"} <= set(store.keys)


def test_a_group_that_the_model_does_not_have_stops_the_run_before_anything_is_written(
    checkpoint: Path, prompts: Path, tmp_path: Path
):
    with pytest.raises(ConfigError, match="layer '9'"):
        run(tmp_path / "run", checkpoint, prompts, groups=("attn", "mlp:9"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("answer", "wanted", "is_given"),
    [
        ("It is Paris.", "Paris", True),
        ("parisian", "Paris", False),
        ("The answer is 10.2", "2", False),
        ("12", "2", False),
        ("It is 2.", "2", True),
        ("2,5", "2", False),
        ("a", "a", True),
        ("A.", "a", True),
        ("The letter a.", "a", True),
        ('It is the letter "a".', "a", True),
        ("It is a mystery", "a", False),
        ("Leo  Tolstoy", "Leo Tolstoy", False),
        ("war by Leo Tolstoy!", "Leo Tolstoy", True),
    ],
)
def test_an_answer_gives_what_was_expected_in_its_own_words(answer: str, wanted: str, is_given: bool):
    assert gives(answer, wanted) is is_given


def test_free_text_goes_on_over_its_lines(
    checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = save_tiny_checkpoint(tmp_path / "plain")
    ids = AutoTokenizer.from_pretrained(plain)("One.\nTwo.\n\nThree", add_special_tokens=False).input_ids
    monkeypatch.setattr(degradation, "answer_traced", given_answers.saying(ids))
    run(tmp_path / "run", plain, prompts, groups=("mlp",), n_rep=1, generation={"max_new_tokens": 40})
    for sample in TraceStore(str(tmp_path / "run")):
        assert sample.record.generated_answer == "One.\nTwo.\n\nThree"
        assert sample.record.is_truncated


def test_a_bare_text_is_continued(checkpoint: Path, prompts: Path, tmp_path: Path):
    run(tmp_path / "run", checkpoint, prompts, groups=("mlp",), n_rep=1, prompt={"prompt_form": "plain"})
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    record = TraceStore(str(tmp_path / "run")).record("mlp_0_000_000000")
    ids = tokenizer("Say one word.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert plain.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=2)[0].tolist() == record.token_ids
    assert (record.prompt, record.prompt_length) == ("Say one word.", ids.shape[1])
    assert record.generated_text == tokenizer.decode(record.token_ids)


def test_perplexity_of_a_model_with_few_positions(prompts: Path, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    small = save_tiny_gpt2(tmp_path / "small", num_positions=200)
    run(tmp_path / "run", small, prompts, perplexity_text=str(text), groups=("q",), n_rep=1)
    assert all(sample.record.perplexity > 1 for sample in TraceStore(str(tmp_path / "run")))


def test_the_card_says_how_answers_were_drawn(checkpoint: Path, prompts: Path, tmp_path: Path):
    run(
        tmp_path / "run",
        checkpoint,
        prompts,
        do_sample=True,
        groups=("mlp",),
        generation={"temperature": 0.5, "top_k": 7},
    )
    card = (tmp_path / "run/README.md").read_text()
    assert "Answers: sampled at temperature 0.5, top_p 1, top_k 7, at most 5 new tokens." in card


def test_a_prompt_that_does_not_fit_is_a_bad_row(checkpoint: Path, prompts: Path, tmp_path: Path):
    with pytest.raises(SourceError, match=r"the limit is 60"):
        run(tmp_path / "run", checkpoint, prompts, max_seq_len=60)
    run(tmp_path / "run", checkpoint, prompts, max_seq_len=60, source={"on_bad_row": "skip"})
    assert {s.record.prompt_id for s in TraceStore(str(tmp_path / "run"))} == {"p0", "p2"}
    source = read_plan(Layout(tmp_path / "run", "degradation")).source
    assert (source.num_rows, source.num_used, len(source.skipped)) == (3, 2, 1)


def test_named_configurations_are_typed_and_cover_every_method(checkpoint: Path, tmp_path: Path):
    for name in ("dreams_it", "iq_it"):
        assert get_config(name).method == "mult_gauss"
        for method in METHODS:
            config = get_config(f"{name}_{method}")
            assert config.all_levels == LEVELS[method]
            assert config.source == get_config(name).source
    assert set(CONFIGS) >= {"dreams_it", "iq_it_uni_quant"}
    with pytest.raises(ConfigError, match=r"no configuration 'dreams'; expected one of dreams_it"):
        get_config("dreams")
    assert [get_config("iq_it").batch_size(n) for n in (5, 40, 100)] == [5, 40, 40]
    replaced = msgspec.structs.replace(get_config("iq_it"), n_rep=5)
    assert (replaced.n_rep, get_config("iq_it").n_rep) == (5, 1)


def test_the_command_line_takes_a_name_and_flags_over_it(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--config", "iq_it", "--model", str(checkpoint), "--method", "ablation", "--limit", "2"]
    arguments += ["--groups", "q", "mlp:0-1", "--n-rep", "2", "--max-new-tokens", "3", "--dry-run"]
    with pytest.raises(SystemExit) as ended:
        run_task(DEGRADATION, [*arguments, "--out", str(tmp_path / "run")])
    assert ended.value.code == 0
    assert f"examples        {2 * len(LEVELS['ablation']) * 2 * 2}\n" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        run_task(DEGRADATION, ["--config", "iq"])
    assert "--config 'iq': no such file, and no name of dreams_it" in capsys.readouterr().err


EXPORTED = [
    "timestamp",
    "model_name",
    "prompt_group",
    "prompt_id",
    "prompt_text",
    "output",
    "std_dev",
    "repeat_index",
    "temperature",
    "do_sample",
    "param_group_name",
    "seed",
    "duration",
    "tokens",
    "degradation_method",
    "usar_4bit",
    "experiment_id",
    "config_name",
    "model_variant",
    "tokens_in",
    "tokens_out",
    "level_value",
    "level_index",
    "batch_size_effective",
    "device",
    "dtype",
    "load_4bit",
    "restore_strategy",
    "gen_params",
    "image_used",
    "image_filename",
    "vram_usage_percent",
    "perplexity",
]


def test_an_export_has_every_field_of_the_scripts(made: TraceStore, capsys: pytest.CaptureFixture[str]):
    folder = Path(made.info().paths[0])
    assert main(["export", str(folder), "--format", "degradation-json"]) == 0
    (path,) = (folder / "exports").glob("outputs_*.json")
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == f"outputs_{rows[0]['degradation_method']}_tiny_custom.json"
    assert len(rows) == len(made) == 24
    for row, sample in zip(rows, made, strict=True):
        record = sample.record
        assert sorted(row) == sorted(EXPORTED)
        assert (row["prompt_id"], row["level_value"], row["repeat_index"]) == (
            record.prompt_id,
            record.damage.level,
            record.repeat,
        )
        assert row["output"] == record.generated_answer
        assert row["tokens"] == row["tokens_out"] == len(record.generated_token_ids)
        assert row["tokens_in"] == len(record.token_ids) - len(record.generated_token_ids)
        assert row["experiment_id"] == f"{record.damage.method}|tiny|custom"
        assert row["batch_size_effective"] == 3
        assert (row["device"], row["model_variant"], row["load_4bit"]) == ("cpu", "it", False)
        assert row["duration"] >= 0
        assert row["timestamp"][:2] == "20"
        assert row["std_dev"] == record.damage.level
    assert verify(folder).problems == []


def test_an_export_may_be_a_sample_and_does_without_the_log(
    checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(degradation, "memory_reader", Memory(0.5).reader)
    run(tmp_path / "run", checkpoint, prompts, output={"batch_size": 2})
    lines = (tmp_path / "run/logs/degradation.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/logs/degradation.jsonl").write_text("".join(lines[1:]))
    rows = json.loads(export_degradation(tmp_path / "run").read_text())
    assert [row["batch_size_effective"] for row in rows] == [None] * 3 + [2, 2, 1] * 7
    assert all(row["device"] is None for row in rows[:3])
    some = json.loads(export_degradation(tmp_path / "run", num_samples=5).read_text())
    assert len(some) == 5
    assert all(row in rows for row in some)


def test_an_export_of_something_else_is_refused(checkpoint: Path, tmp_path: Path):
    run_trivia(tmp_path / "run", checkpoint)
    with pytest.raises(ConfigError, match="this is trivia_qa"):
        export_degradation(tmp_path / "run")
