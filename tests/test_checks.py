"""Checks of a pass: the same errors wherever values lie, and one look at them, however many layers there are."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretend_devices import Far, PretendDevices
from tests.tiny_models import sites_of, token_ids, traced
from tracekit.config import CaptureConfig
from tracekit.errors import CaptureError, DtypeOverflowError
from tracekit.model.capture import Text, capture
from tracekit.model.checks import AttentionRules, PassChecks

TEXTS = (Text(token_ids(20), 12), Text(token_ids(9, start=5), 4), Text(token_ids(31, start=7), 30))
REAL = [(0, 6), (0, 3)]
"""Tokens of two rows of 6 columns."""
KEPT = [(1, 6), (1, 3)]
"""All but the first are stored."""

Place = Callable[[Tensor], Tensor]


@pytest.fixture(params=["cpu", "cuda:1"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Puts a tensor on a device; the accelerator is pretended."""
    is_far = request.param != "cpu"
    with PretendDevices() if is_far else nullcontext():
        yield lambda value: Far(value, torch.device(request.param)) if is_far else value


def hidden() -> Tensor:
    return torch.linspace(-1, 1, 2 * 6 * 4).reshape(2, 6, 4)


def queries() -> Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 6 * 4).reshape(2, 3, 6, 4)


def attention() -> Tensor:
    """Of two rows and three heads: each token sees all that came before it alike."""
    probs = torch.ones(2, 3, 6, 6).tril()
    return probs / probs.sum(-1, keepdim=True)


def settle(site: str, value: Tensor, place: Place, *, kept: Any = KEPT, **rules: bool) -> None:
    """Two good layers, then a value."""
    checks = PassChecks(kept, REAL, AttentionRules(**{"is_causal": True, "rows_sum_to_one": True} | rules))
    good = {"attentions": attention, "queries": queries}.get(site, hidden)
    for layer in range(2):
        checks.add(site, layer, place(good()), torch.float16)
    checks.add(site, 7, place(value), torch.float16)
    checks.settle()
    checks.settle()


def changed(value: Tensor, where: tuple[int, ...], to: float) -> Tensor:
    value[where] = to
    return value


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("site", "value", "kept", "dropped"),
    [
        ("hidden_states", hidden, [(0, 5, 2), (1, 1, 0), (1, 2, 3)], [(0, 0, 0), (1, 3, 1), (1, 5, 3)]),
        ("queries", queries, [(0, 2, 5, 2), (1, 0, 1, 0)], [(0, 1, 0, 0), (1, 2, 3, 1)]),
    ],
)
def test_a_stored_value_is_finite_and_fits(
    site: str, value: Callable[[], Tensor], kept: Any, dropped: Any, wrong: float, place: Place
) -> None:
    for where in kept:
        with pytest.raises(CaptureError) as caught:
            settle(site, changed(value(), where, wrong), place)
        assert str(caught.value) == f"{site}, layer 7: not finite in a torch.float32 model; use another --dtype"
        with pytest.raises(DtypeOverflowError) as overflowed:
            settle(site, changed(value(), where, -70000), place)
        assert str(overflowed.value) == (
            f"{site}, layer 7: 70000 does not fit torch.float16 (largest 65504); use another --store-dtype"
        )
    for where in dropped:
        settle(site, changed(value(), where, wrong), place)
        settle(site, changed(value(), where, 70000), place)


def test_the_largest_that_fits_and_no_position_at_all(place: Place) -> None:
    settle("hidden_states", changed(hidden(), (0, 3, 3), 65504), place)
    settle("hidden_states", torch.full((2, 6, 4), torch.nan), place, kept=[(2, 2), (3, 3)])
    with pytest.raises(CaptureError, match="layer 7: not finite"):
        settle("hidden_states", torch.full((2, 6, 4), torch.nan), place, kept=[(2, 2), (2, 3)])


def test_attention_that_is_not_finite(place: Place) -> None:
    with pytest.raises(CaptureError, match=r"^attentions, layer 7: not finite in a torch\.float32 model"):
        settle("attentions", changed(attention(), (1, 2, 2, 0), torch.nan), place)
    settle("attentions", changed(attention(), (1, 2, 4, 0), torch.nan), place)


def test_rows_of_attention_sum_to_one_or_to_one_at_most(place: Place) -> None:
    with pytest.raises(CaptureError, match=r"^attentions, layer 7: rows sum to 0\.7\d*\.\.1, expected 1$"):
        settle("attentions", changed(attention(), (1, 0, 2, 2), 0.1), place)
    settle("attentions", changed(attention(), (1, 0, 2, 2), 0.1), place, rows_sum_to_one=False)
    with pytest.raises(CaptureError, match=r"^attentions, layer 7: rows sum to 1\.\.1\.66\d*, expected 1$"):
        settle("attentions", changed(attention(), (1, 0, 2, 2), 1.0), place, rows_sum_to_one=False)
    settle("attentions", changed(attention(), (1, 0, 3, 2), 5.0), place)


def test_no_token_of_a_causal_model_sees_a_later_one(place: Place) -> None:
    with pytest.raises(
        CaptureError, match=r"^attentions, layer 7: a causal model attends to the future, or to padding$"
    ):
        settle("attentions", changed(attention(), (1, 0, 0, 2), 1e-30), place)
    settle("attentions", changed(attention(), (1, 0, 0, 2), 1e-30), place, is_causal=False)


def test_no_token_of_a_causal_model_sees_padding(place: Place) -> None:
    with pytest.raises(CaptureError, match="or to padding"):
        settle("attentions", changed(attention(), (1, 0, 0, 3), 1e-30), place)
    settle("attentions", changed(attention(), (1, 0, 0, 3), 1e-30), place, is_causal=False)


def test_the_first_layer_that_fails_is_named(place: Place) -> None:
    checks = PassChecks(KEPT, REAL, AttentionRules(is_causal=True, rows_sum_to_one=True))
    for layer, probs in enumerate((attention(), attention() * 0.5, changed(attention(), (0, 0, 5, 5), torch.nan))):
        checks.add("attentions", layer, place(probs), torch.float32)
    with pytest.raises(CaptureError, match="attentions, layer 1: rows sum to"):
        checks.settle()


def test_the_numbers_of_all_layers_leave_a_device_together() -> None:
    moved = []
    for num_layers in (2, 20):
        with PretendDevices() as pretended:
            checks = PassChecks(KEPT, REAL, AttentionRules(is_causal=True, rows_sum_to_one=True))
            for layer in range(num_layers):
                device = torch.device("cuda", 2 * layer // num_layers)
                checks.add("hidden_states", layer, Far(hidden(), device), torch.float32)
                checks.add("attentions", layer, Far(attention(), device), torch.float32)
            before = pretended.num_moved
            checks.settle()
            moved.append(pretended.num_moved - before)
    assert moved == [2, 2]  # one from each accelerator


class Reads(TorchDispatchMode):
    """Counts numbers that the host reads from tensors; on an accelerator it waits for each."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "bert"])
def test_the_host_reads_no_more_numbers_of_a_model_with_more_layers(name: str) -> None:
    found = []
    for num_layers in (2, 8):
        settings: dict[str, Any] = {"num_hidden_layers": num_layers}
        if name == "gpt_oss":
            settings["layer_types"] = ["sliding_attention", "full_attention"] * (num_layers // 2)
        made = traced(name, **settings)
        assert made.num_layers == num_layers
        with Reads() as reads:
            capture(made, TEXTS, CaptureConfig(sites=sites_of(name)))
        found.append(reads.num)
    assert found[0] == found[1] > 0
