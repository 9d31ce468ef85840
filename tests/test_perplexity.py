"""Sliding-window perplexity, against a plain loop over transformers and the windows of builders.next_token."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from builders.degradation.perplexity import text_perplexity, token_perplexity
from builders.next_token.windows import cut
from tests.tiny_models import model_info, tiny_model, token_ids, traced
from tracekit.config import CaptureConfig, ModelConfig
from tracekit.errors import ConfigError, SourceError
from tracekit.model.capture import Text, capture
from tracekit.model.models import load_model, load_tokenizer
from tracekit.model.models import model_info as info_of
from tracekit.model.traced import TracedModel

IDS = token_ids(50)
WINDOWS = [(50, 50), (64, 16), (16, 16), (16, 5), (16, 1), (12, 11), (2, 1), (10, 10), (49, 49)]


def by_transformers(model: Any, ids: list[int], max_length: int, stride: int) -> tuple[float, int]:
    """Mean loss and number of scored tokens, by transformers' own loss of labels."""
    total, num_scored, end = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        num_new = min(start + max_length, len(ids)) - end
        end = min(start + max_length, len(ids))
        inputs = torch.tensor([ids[start:end]])
        labels = inputs.clone()
        labels[:, :-num_new] = -100
        num_labels = int((labels[:, 1:] != -100).sum())
        if num_labels:
            with torch.no_grad():
                total += model(inputs, labels=labels).loss.item() * num_labels
        num_scored += num_labels
        if end == len(ids):
            return total / num_scored, num_scored
    raise AssertionError("unreachable")


@pytest.mark.parametrize(("max_length", "stride"), WINDOWS)
def test_it_is_that_of_a_plain_loop(max_length: int, stride: int) -> None:
    loss, num_scored = by_transformers(tiny_model("llama"), IDS, max_length, stride)
    found = token_perplexity(traced("llama", sites=()), IDS, max_length=max_length, stride=stride)
    assert found.num_scored == num_scored
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize(("max_length", "stride"), WINDOWS)
def test_it_is_that_of_next_token(max_length: int, stride: int) -> None:
    """Mean over the windows' losses, each weighted with what it scores."""
    made = traced("llama", sites=())
    total, num_scored = 0.0, 0
    for start, stop, num_context in cut(len(IDS), max_length, stride):
        text = Text(IDS[start:stop], stop - start, scored_from=1)
        trace = capture(made, [text], CaptureConfig(sites=("none",)))[0]
        scored = trace.next_tokens.logprobs[max(num_context - 1, 0) :].astype(np.float64)
        total -= scored.sum()
        num_scored += len(scored)
    found = token_perplexity(made, IDS, max_length=max_length, stride=stride)
    assert found.num_scored == num_scored
    assert found.loss == pytest.approx(total / num_scored, rel=1e-6)


def test_batches_do_not_matter() -> None:
    made = traced("gpt2", sites=())
    alone = token_perplexity(made, IDS, max_length=16, stride=5)
    together = token_perplexity(made, IDS, max_length=16, stride=5, batch_size=4)
    assert together.num_scored == alone.num_scored == 49
    assert together.loss == pytest.approx(alone.loss, rel=1e-5)


def test_a_text_is_tokenised_whole(model: Path) -> None:
    config = ModelConfig(model=str(model), device="cpu")
    tokenizer = load_tokenizer(config)
    made = load_model(config, info_of(config, variant="base"), tokenizer, ())
    text = "Who wrote Romeo and Juliet? William Shakespeare wrote it in London."
    ids = tokenizer(text).input_ids
    assert text_perplexity(made, text, max_length=8, stride=4) == token_perplexity(made, ids, max_length=8, stride=4)


# ---------------------------------------------------------------- not finite


def spoilt(value: float, row: int) -> TracedModel:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[row] = value
    return TracedModel(model, None, model_info("llama"))


def test_nan_is_a_result() -> None:
    found = token_perplexity(spoilt(math.nan, 5), IDS, max_length=16, stride=16)
    assert math.isnan(found.perplexity)
    assert math.isnan(found.loss)
    assert found.num_scored == 46


def test_what_is_beyond_a_float_is_inf() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    found = token_perplexity(TracedModel(model, None, model_info("llama")), IDS, max_length=16, stride=16)
    assert found.perplexity == math.inf
    assert 709 < found.loss < math.inf


def test_a_token_of_probability_0_makes_it_inf() -> None:
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.tensor(IDS[4]), -math.inf)
    )
    found = token_perplexity(TracedModel(model, None, model_info("llama")), IDS, max_length=16, stride=16)
    assert (found.perplexity, found.loss) == (math.inf, math.inf)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(("max_length", "stride"), [(1, 1), (16, 0), (16, 17)])
def test_windows_that_leave_tokens_out_are_refused(max_length: int, stride: int) -> None:
    message = rf"^perplexity windows of {max_length} tokens, a stride of {stride}; expected at least 2 tokens"
    with pytest.raises(ConfigError, match=message):
        token_perplexity(traced("llama", sites=()), IDS, max_length=max_length, stride=stride)


def test_a_text_in_which_nothing_is_predicted_is_refused() -> None:
    with pytest.raises(SourceError, match=r"^a text of 1 tokens has no perplexity: nothing precedes its first token$"):
        token_perplexity(traced("llama", sites=()), IDS[:1], max_length=16, stride=16)
