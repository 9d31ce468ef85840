"""Capture while decoding: what the steps of generation give is what a lone pass over the whole text gives."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Llama4TextConfig, LlamaConfig, MistralConfig

from builders.trivia_qa.task import TASK as TRIVIA_QA
from tests.runs_for_tests import hashes, run_trivia
from tests.tiny_checkpoint import save_tiny_checkpoint
from tests.tiny_models import VOCAB_SIZE, few_first, proven, sites_of, token_ids, traced
from tracekit import TraceStore
from tracekit.analysis.diff import diff
from tracekit.config import AnswerCaptureConfig, CaptureConfig, DrawConfig, GenerationConfig
from tracekit.errors import CaptureError, ModelError, PlanMismatchError
from tracekit.format.layout import Layout
from tracekit.format.manifest import read_manifest, read_plan
from tracekit.model import decoding
from tracekit.model.capture import capture
from tracekit.model.decoding import AnswerTrace, ToAnswer, answer_several, answer_traced
from tracekit.model.generation import answer_once
from tracekit.model.proof import choose_capture, prove_decoding, replay
from tracekit.model.traced import TracedModel, tolerance_of

FAMILIES = ("gpt2", "opt", "llama", "bloom", "falcon", "mistral", "gemma2", "gpt_oss")
PROMPTS = (token_ids(12), token_ids(5, start=3), token_ids(20, start=9), token_ids(1, start=4))
NUM_NEW = 9
GREEDY = GenerationConfig(num_beams=1, max_new_tokens=NUM_NEW)


def ready(name: str) -> TracedModel:
    """A tiny model that has proven its decoding."""
    made = traced(name)
    assert prove_decoding(made).fault is None, made.decoding
    return made


def answered(
    made: TracedModel, prompts: Sequence[list[int]], settings: CaptureConfig, config: GenerationConfig = GREEDY
) -> list[AnswerTrace]:
    seeds = [f"seed {n}" for n in range(len(prompts))] if isinstance(config, DrawConfig) else [None] * len(prompts)
    asked = [ToAnswer(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    return answer_traced(made, asked, config, settings, from_decoding=True)


def assert_as_alone(
    made: TracedModel, answers: Sequence[AnswerTrace], settings: CaptureConfig, *, captured_from: str = "decoding"
) -> None:
    """Every tensor and number is that of a lone pass over prompt and answer."""
    for one in answers:
        assert one.trace.captured_from == captured_from
        alone = capture(made, [one.text], settings)[0]
        assert one.trace.specs == alone.specs
        for name, expected in alone.tensors.items():
            np.testing.assert_allclose(one.trace.tensors[name], expected, rtol=1e-4, atol=2e-5, err_msg=name)
        for name, mine, expected in zip(
            alone.next_tokens._fields, one.trace.next_tokens, alone.next_tokens, strict=True
        ):
            np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=2e-5, err_msg=name)


def end_of(made: TracedModel, answers: Sequence[AnswerTrace]) -> None:
    """Have the model end with a token that ends some answers early and not all."""
    firsts = [{token: one.generated.token_ids.index(token) for token in one.generated.token_ids} for one in answers]
    tokens = {token for first in firsts for token in first}
    made.model.generation_config.eos_token_id = [max(tokens, key=lambda t: len({f.get(t, NUM_NEW) for f in firsts}))]


@pytest.mark.parametrize("name", few_first(FAMILIES))
def test_every_site_is_that_of_a_lone_pass(name: str):
    made, settings = ready(name), CaptureConfig(sites=(*sites_of(name), "topk"))
    assert_as_alone(made, answered(made, PROMPTS, settings), settings)


@pytest.mark.parametrize("name", few_first(("llama", "gpt2", "gemma2", "bloom")))
def test_answers_that_end_early_are_captured_to_their_end(name: str):
    made, settings = ready(name), CaptureConfig(sites=("hidden_states", "attentions", "keys", "topk"))
    before = made.model.generation_config.eos_token_id
    try:
        end_of(made, answered(made, PROMPTS, settings))
        answers = answered(made, PROMPTS, settings)
        plain = answer_once(made, list(PROMPTS), GREEDY, None)
    finally:
        made.model.generation_config.eos_token_id = before
    assert [one.generated for one in answers] == plain
    assert len({len(one.generated.token_ids) for one in answers}) > 1
    assert {one.generated.finish_reason for one in answers} >= {"stop"}
    assert_as_alone(made, answers, settings)


@pytest.mark.parametrize("tokens", ["all", "prompt", "answer", "last"])
@pytest.mark.parametrize("layers", [("all",), ("1",), ("-1",)])
def test_positions_and_layers_are_kept_as_asked(tokens: Any, layers: tuple[str, ...]):
    made = ready("llama")
    settings = CaptureConfig(sites=("hidden_states", "attentions", "queries", "topk"), tokens=tokens, layers=layers)
    assert_as_alone(made, answered(made, PROMPTS, settings), settings)


def test_no_site_leaves_the_answers_numbers():
    made, settings = ready("llama"), CaptureConfig(sites=("none",))
    answers = answered(made, PROMPTS, settings)
    assert all(len(one.trace.next_tokens.logprobs) == NUM_NEW and not one.trace.tensors for one in answers)
    assert_as_alone(made, answers, settings)


def test_drawn_answers_are_those_of_plain_generation_whatever_their_batch():
    made, settings = ready("llama"), CaptureConfig(sites=("hidden_states",))
    config = DrawConfig(max_new_tokens=NUM_NEW, temperature=1.3, top_k=20)
    answers = answered(made, PROMPTS, settings, config)
    assert_as_alone(made, answers, settings)
    seeds = [f"seed {n}" for n in range(len(PROMPTS))]
    assert [one.generated for one in answers] == answer_once(made, list(PROMPTS), config, seeds)
    lone = answer_traced(made, [ToAnswer(PROMPTS[2], seeds[2])], config, settings, from_decoding=True)
    assert lone[0].generated == answers[2].generated


def test_tokens_that_are_asked_for_have_their_logits_in_the_place_of_the_first_answer_token():
    made, settings = ready("gpt2"), CaptureConfig(sites=("none",))
    asked = [ToAnswer(prompt, asked_ids=(3, 5 + n)) for n, prompt in enumerate(PROMPTS)]
    answers = answer_traced(made, asked, GREEDY, settings, from_decoding=True)
    assert all(len(one.trace.next_tokens.asked_logits) == 2 for one in answers)
    assert_as_alone(made, answers, settings)


LONGER = PROMPTS[:3]
"""Prompts of more than a token, which can be read without their last."""


@pytest.mark.parametrize("name", few_first(("llama", "gpt2", "gemma2", "bloom", "mistral", "gpt_oss")))
def test_beams_search_over_prompts_that_are_read_once(name: str, monkeypatch: pytest.MonkeyPatch):
    made, settings = ready(name), CaptureConfig(sites=(*sites_of(name), "topk"))
    config = GenerationConfig(num_beams=4, max_new_tokens=NUM_NEW)
    plain = answer_once(made, list(LONGER), config, None)
    monkeypatch.setattr(decoding, "_in_a_pass", None)
    answers = answered(made, LONGER, settings, config)
    assert [one.generated for one in answers] == plain
    assert_as_alone(made, answers, settings, captured_from="pass")


@pytest.mark.parametrize("are_traced", [True, False])
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", few_first(("llama", "gpt2", "mistral", "gpt_oss")))
def test_several_answers_to_a_prompt_are_those_of_runs_of_their_own(name: str, num_beams: int, are_traced: bool):
    made, settings = ready(name), CaptureConfig(sites=("hidden_states", "attentions", "keys", "topk"))
    config = DrawConfig(num_beams=num_beams, max_new_tokens=NUM_NEW, temperature=1.2, top_k=30)
    seeds = [[f"{row} {number}" for number in range(3)] for row in range(len(LONGER))]
    asked = [ToAnswer(prompt) for prompt in LONGER]
    together, apart = (
        answer_several(made, asked, seeds, config, settings, are_traced=are_traced, from_decoding=from_decoding)
        for from_decoding in (True, False)
    )
    for mine, others in zip(together, apart, strict=True):
        assert [one.generated for one in mine] == [one.generated for one in others]
        first, *drawn = mine
        assert_as_alone(made, [first], settings, captured_from="decoding" if num_beams == 1 else "pass")
        assert_as_alone(made, drawn, settings if are_traced else CaptureConfig(sites=("none",)))


def test_a_prompt_of_one_token_is_not_read_without_its_last():
    made, settings = ready("llama"), CaptureConfig(sites=("hidden_states",))
    answers = answered(made, PROMPTS, settings, GenerationConfig(num_beams=3, max_new_tokens=NUM_NEW))
    assert_as_alone(made, answers, settings, captured_from="pass")


def test_what_replays_otherwise_is_refused_and_the_pass_named():
    made, settings = ready("llama"), CaptureConfig(sites=("hidden_states",))
    one = answered(made, PROMPTS[:1], settings)[0]
    one.trace.tensors["hidden_states"][1] += 1
    with pytest.raises(CaptureError, match="Try --capture-from pass"):
        replay(made, "key", one.text, one.trace, settings)


def test_a_batch_of_one_and_one_new_token():
    made, settings = ready("llama"), CaptureConfig(sites=("hidden_states", "attentions", "values"))
    answers = answered(made, PROMPTS[:1], settings, GenerationConfig(num_beams=1, max_new_tokens=1))
    assert len(answers[0].generated.token_ids) == 1
    assert_as_alone(made, answers, settings)


def test_hooks_are_taken_off_though_generation_fails(monkeypatch: pytest.MonkeyPatch):
    made, settings = ready("llama"), CaptureConfig(sites=("hidden_states", "attentions"))

    def broken(*given: Any, **named: Any) -> None:
        raise RuntimeError("broken")

    def hooks() -> list[Any]:
        return [[*module._forward_hooks, *module._forward_pre_hooks] for module in made.model.modules()]

    answered(made, PROMPTS, settings)  # transformers leaves hooks of its own
    before = hooks()
    monkeypatch.setattr(decoding, "generate", broken)
    with pytest.raises(RuntimeError, match="broken"):
        answered(made, PROMPTS, settings)
    assert hooks() == before
    assert made.model.config._attn_implementation == "sdpa"


def windowed(window: int) -> Any:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=window, max_position_embeddings=2048, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("window", [3, 8, 40])
def test_a_window_that_is_proven_may_be_passed(window: int):
    made = proven(windowed(window), "mistral")
    rule = prove_decoding(made)
    assert (rule.fault, rule.limit) == (None, None)
    settings = CaptureConfig(sites=("hidden_states", "attentions", "keys"))
    prompts = [token_ids(length) for length in (window - 1, window + 7, window * 2)]
    assert_as_alone(made, answered(made, prompts, settings), settings)


def test_a_text_beyond_a_window_that_is_not_proven_is_captured_in_a_pass():
    made = proven(windowed(300), "mistral")
    assert prove_decoding(made).limit == 300
    settings = CaptureConfig(sites=("hidden_states",))
    for length, captured_from in ((300 - NUM_NEW, "decoding"), (300 - NUM_NEW + 1, "pass")):
        answers = answered(made, [token_ids(length), token_ids(4)], settings)
        assert {one.trace.captured_from for one in answers} == {captured_from}


def test_attention_that_sharpens_with_the_place_in_a_padded_row_is_decoded_by_length():
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_local_experts=2, no_rope_layers=[1, 0],
        floor_scale=20, attn_scale=2.0, attention_chunk_size=1000, pad_token_id=0, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    sites = ("hidden_states", "queries")
    made, settings = proven(model, "llama", sites), CaptureConfig(sites=sites)
    assert prove_decoding(made).by_length
    assert_as_alone(made, answered(made, [token_ids(n) for n in (50, 4, 27, 4)], settings), settings)


def test_a_model_whose_steps_differ_takes_the_pass_or_is_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()

    def late(module: Any, args: Any, output: Tensor) -> Tensor | None:
        return output * 1.01 if output.shape[1] == 1 else None

    made = proven(model, "llama")
    made.model.model.layers[1].mlp.register_forward_hook(late)
    assert choose_capture(made, "auto") == "pass"
    assert "captured in a pass of their own" in capfd.readouterr().err
    with pytest.raises(ModelError, match=r"--capture-from decoding: .* is .* off a pass.*--capture-from pass"):
        choose_capture(made, "decoding")
    assert choose_capture(made, "pass") == "pass"


def test_rows_that_influence_one_another_take_the_pass():
    made = proven(windowed(8), "mistral")
    made.is_row_coupled = True
    rule = prove_decoding(made)
    assert "influence one another" in str(rule.fault)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def run(out: Path, checkpoint: Path, capture_from: Any, **output: Any) -> Any:
    return run_trivia(
        out,
        checkpoint,
        generation={"num_beams": 1, "max_new_tokens": 6},
        capture=AnswerCaptureConfig(sites=("hidden_states",), capture_from=capture_from),
        output=output,
    )


@pytest.mark.parametrize(("asked", "found"), [("auto", "decoding"), ("decoding", "decoding"), ("pass", "pass")])
def test_plan_records_and_manifest_say_how_it_was_captured(checkpoint: Path, tmp_path: Path, asked: str, found: str):
    out = tmp_path / "run"
    run(out, checkpoint, asked)
    layout = Layout(out, TRIVIA_QA.name)
    manifest = read_manifest(layout)
    num_samples = sum(split.num_samples for split in manifest.splits)
    assert read_plan(layout).captured_from == found
    assert manifest.num_from_decoding == (num_samples if found == "decoding" else 0)
    assert {sample.record.captured_from for sample in TraceStore(str(out))} == {found}
    is_said = "while it wrote the answers" in (out / "README.md").read_text("utf-8")
    assert is_said is (found == "decoding")


def test_a_folder_goes_on_as_it_was_begun(checkpoint: Path, tmp_path: Path):
    run(tmp_path / "run", checkpoint, "pass")
    with pytest.raises(PlanMismatchError, match="capture_from: 'pass' there, 'auto' now"):
        run(tmp_path / "run", checkpoint, "auto")
    run(tmp_path / "other", checkpoint, "pass")
    assert hashes(tmp_path / "other") == hashes(tmp_path / "run")


def test_half_precision_rounds_steps_and_passes_apart_and_full_precision_does_not():
    info = traced("llama").info
    assert tolerance_of(info, captured_from="decoding") == tolerance_of(info)
    half = msgspec.structs.replace(info, dtype="bfloat16")
    assert tolerance_of(half, captured_from="decoding").max_rel_error == 2 * tolerance_of(half).max_rel_error


def test_a_difference_says_that_its_sides_were_captured_in_other_ways(checkpoint: Path, tmp_path: Path):
    for name in ("decoding", "pass"):
        run(tmp_path / name, checkpoint, name)
    (found,) = diff(str(tmp_path / "decoding"), str(tmp_path / "pass")).configs
    assert any(re.search("decoding in a .*pass in b.*rounding", note) for note in found.notes)
    (same,) = diff(str(tmp_path / "pass"), str(tmp_path / "pass")).configs
    assert not any("captured" in note for note in same.notes)
