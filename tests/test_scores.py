"""Scores: log-probabilities, entropies and the most likely tokens of logits, against float64."""

import pytest
import torch

from tracekit.model.scores import score

VOCABULARIES = [7, 127, 128, 1000, 49_152, 50_257, 151_936]


@pytest.mark.parametrize("width", [1, 5, 20])
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("scale", [0.01, 3.0, 40.0])
def test_numbers_are_those_of_float64(vocab_size: int, width: int, scale: float):
    width = min(width, vocab_size)
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(9, vocab_size, generator=generator) * scale + 5
    targets = torch.randint(vocab_size, (9,), generator=generator)
    asked = torch.randint(vocab_size, (9, 3), generator=generator)
    found = score(logits, targets, asked, width)
    exact = logits.double().log_softmax(-1)
    assert torch.allclose(found.logprobs.double(), exact.gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=3e-6)
    assert torch.allclose(found.entropies.double(), torch.special.entr(exact.exp()).sum(-1), rtol=1e-6, atol=5e-6)
    assert torch.equal(logits.gather(1, found.best), logits.topk(width).values)
    assert torch.allclose(found.best_logprobs.double(), exact.topk(width).values, rtol=1e-6, atol=3e-6)
    assert torch.equal(found.asked_logits, logits.gather(1, asked))
    assert torch.allclose(found.asked_logprobs.double(), exact.gather(1, asked), rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("num_finite", [1, 3, 30])
def test_tokens_that_a_head_rules_out_count_for_nothing(num_finite: int):
    logits = torch.full((4, 1000), float("-inf"))
    logits[:, 990 - num_finite : 990] = torch.randn(4, num_finite)
    found = score(logits, torch.full((4,), -1), torch.zeros((4, 0), dtype=torch.long), 5)
    exact = logits.double().softmax(-1)
    assert torch.allclose(found.entropies.double(), torch.special.entr(exact).sum(-1), atol=1e-6)
    assert (found.best < 1000).all()
    finite = min(5, num_finite)
    assert torch.equal(found.best[:, :finite], logits.topk(finite).indices)
    assert torch.isneginf(found.best_logprobs[:, finite:]).all()
    assert torch.equal(found.logprobs, found.best_logprobs[:, 0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("width", [1, 5])
def test_a_row_that_is_not_finite_says_so_and_leaves_the_others(value: float, width: int):
    logits = torch.randn(3, 1000)
    logits[1, 400] = value
    found = score(logits, torch.zeros(3, dtype=torch.long), torch.zeros((3, 0), dtype=torch.long), width)
    assert torch.isfinite(found.entropies).tolist() == [True, False, True]
    assert torch.isfinite(found.logprobs).tolist() == [True, False, True]
    assert found.best[1, 0] == 400
