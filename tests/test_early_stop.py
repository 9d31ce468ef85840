"""Early stop: a pass that ends early hands over what a whole pass does, bit by bit, and leaves the model as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.architecture_page import GROUPS
from tests.every_architecture import CASES, LENGTHS, _given, _traced, build
from tests.pretend_devices import PretendDevices, spread
from tests.test_every_architecture import FEW as FEW_CLASSES
from tests.test_every_architecture import SLICE
from tests.tiny_configs import VOCAB_SIZE
from tests.tiny_models import CAUSAL, few_first, proven, sites_of, tiny_model, token_ids, traced
from tracekit.config import CaptureConfig
from tracekit.errors import CaptureError, ConfigError
from tracekit.model.anatomy import Anatomy
from tracekit.model.capture import NextTokens, Text, Trace, capture
from tracekit.model.early_stop import PassOrder, examine_passes
from tracekit.model.hooks import _ACTIVE, _PROBABILITIES
from tracekit.model.proof import prove, replay
from tracekit.model.traced import TracedModel
from tracekit.model.values import ValuePolicy

TEXTS = (Text(token_ids(20), 12), Text(token_ids(9, start=5), 4), Text(token_ids(31, start=7), 30))


def without_numbers(*layers: str, sites: tuple[str, ...] = ("hidden", "attn", "qkv", "resid")) -> CaptureConfig:
    return CaptureConfig(sites=sites, layers=layers or ("all",), numbers="none")


def with_numbers(config: CaptureConfig) -> CaptureConfig:
    return CaptureConfig(sites=config.sites, layers=config.layers, tokens=config.tokens)


@contextmanager
def blocks_run(made: TracedModel) -> Iterator[list[int]]:
    """The blocks that ran to their end, by number."""
    found: list[int] = []
    handles = [
        block.register_forward_hook(lambda module, args, output, number=number: found.append(number))
        for number, block in enumerate(made.anatomy.blocks)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def captured(made: TracedModel, config: CaptureConfig, texts: Any = TEXTS) -> tuple[list[Trace], list[int]]:
    """What is captured, and which blocks ran."""
    with blocks_run(made) as found:
        traces = capture(made, texts, config)
    return traces, found


def assert_same(mine: list[Trace], theirs: list[Trace]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert a.specs == b.specs
        for name, tensor in b.tensors.items():
            np.testing.assert_array_equal(a.tensors[name], tensor)


# ---------------------------------------------------------------- what is handed over


@pytest.mark.parametrize("name", few_first(CAUSAL))
@pytest.mark.parametrize(("layers", "last"), [(("0",), 0), (("1",), 1), (("0-1",), 1), (("0", "-1"), 2)])
def test_kept_layers_are_those_of_a_whole_pass_and_no_later_block_runs(
    name: str, layers: tuple[str, ...], last: int
) -> None:
    made, config = traced(name), without_numbers(*layers)
    assert made.order == PassOrder(can_stop=True, inputs_are_hidden=True)
    whole, _ = captured(made, with_numbers(config))
    traces, found = captured(made, config)
    assert_same(traces, whole)
    assert found == [*range(last + 1)]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FEW_CLASSES else pytest.mark.slow) for n in SLICE])
def test_any_architecture_hands_over_what_a_whole_pass_does(name: str) -> None:
    case = CASES[name]
    if case.auto == "choices":
        pytest.skip("an encoder with a head for choices runs whole")
    model = build(case)
    sites = tuple(site for group in _given(case, model)[0] if group != "next" for site in GROUPS[group])
    if not sites:
        pytest.skip("it gives nothing")
    made = _traced(case, model)
    prove(made, sites)
    texts = [Text([3 + (7 * n + i * (i + 7)) % (VOCAB_SIZE - 3) for i in range(n)], n - 2) for n in LENGTHS]
    last = max(layout.layers[0] for layout in made.layouts.values())  # some have no attention in their first blocks
    config = without_numbers(f"0-{last}", sites=sites)
    before = logits_of(made)
    traces, found = captured(made, config, texts)
    assert_same(traces, capture(made, texts, with_numbers(config)))
    ends_early = made.order.inputs_are_hidden or "hidden_states" not in sites
    assert {*found} == {*range(last + 1 if ends_early else made.num_layers)}
    assert torch.equal(logits_of(made), before)


@pytest.mark.parametrize(
    ("site", "layer", "expected"),
    [
        ("hidden_states", "0", []),
        ("hidden_states", "1", [0]),
        ("hidden_states", "2", [0, 1]),
        ("hidden_states", "3", [0, 1, 2]),
        ("resid_embed", "2", []),
        ("resid_pre_attn", "1", [0]),
        ("resid_post_attn", "1", [0, 1]),
        ("resid_post_mlp", "1", [0, 1]),
        ("attentions", "1", [0, 1]),
        ("keys", "1", [0, 1]),
    ],
)
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_the_pass_ends_before_the_first_block_that_nothing_waits_for(
    name: str, site: str, layer: str, expected: list[int]
) -> None:
    made, config = traced(name), without_numbers(layer, sites=(site,))
    whole, _ = captured(made, with_numbers(config))
    traces, found = captured(made, config)
    assert_same(traces, whole)
    assert found == expected


def test_without_sites_and_numbers_no_block_runs() -> None:
    traces, found = captured(traced("llama"), without_numbers(sites=("none",)))
    assert found == []
    assert [trace.tensors for trace in traces] == [{}, {}, {}]


@pytest.mark.parametrize("tokens", ["prompt", "answer", "last"])
def test_positions_are_cut_as_in_a_whole_pass(tokens: Any) -> None:
    made = traced("llama")
    config = CaptureConfig(sites=("hidden", "attn"), layers=("1",), tokens=tokens, numbers="none")
    assert_same(capture(made, TEXTS, config), capture(made, TEXTS, with_numbers(config)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_the_same_bits(dtype: str) -> None:
    made, config = traced("gemma2", dtype), without_numbers("0-1")
    traces, found = captured(made, config)
    assert_same(traces, capture(made, TEXTS, with_numbers(config)))
    assert found == [0, 1]


# ---------------------------------------------------------------- numbers


def test_no_row_goes_through_the_head_and_there_are_no_numbers() -> None:
    made, rows = traced("llama"), []
    handle = made.model.lm_head.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[:2]))
    traces = capture(made, TEXTS, without_numbers(sites=("hidden",)))
    handle.remove()
    assert rows == [(1, 1)]  # the whole model ran: its last layer is kept
    assert all(len(values) == 0 for trace in traces for values in trace.next_tokens)
    assert len(traces[0].next_tokens) == len(NextTokens())


@pytest.mark.parametrize("sites", [("topk",), ("all",), ("hidden", "topk_ids")])
def test_sites_of_the_head_without_the_head(sites: tuple[str, ...]) -> None:
    with pytest.raises(
        ConfigError, match=r"--numbers none with --sites .*topk_ids.* language-model head.* other sites"
    ):
        capture(traced("llama"), TEXTS, CaptureConfig(sites=sites, numbers="none"))


def test_texts_that_are_scored_run_whole_and_texts_without_an_answer_stop_by_themselves() -> None:
    made, config = traced("llama"), CaptureConfig(sites=("hidden",), layers=("1",))
    prompts = [Text(text.token_ids, len(text.token_ids)) for text in TEXTS]
    assert captured(made, config)[1] == [0, 1, 2]
    traces, found = captured(made, config, prompts)
    assert found == [0]
    assert_same(traces, capture(made, TEXTS, config))
    assert captured(made, config, [*prompts[:2], TEXTS[2]])[1] == [0, 1, 2]
    assert captured(made, config, [prompts[0]._replace(asked_ids=(5,))])[1] == [0, 1, 2]
    assert captured(made, CaptureConfig(sites=("hidden", "topk"), layers=("1",)), prompts)[1] == [0, 1, 2]


# ---------------------------------------------------------------- where the model runs whole


def test_values_that_may_be_anything_and_pictures_run_whole() -> None:
    made, config = traced("llama"), without_numbers("0")
    with blocks_run(made) as found:
        capture(made, TEXTS, config, policy=ValuePolicy(may_be_nonfinite=True, may_overflow=True))
    assert found == [0, 1, 2]
    given = Text(TEXTS[0].token_ids, 20, inputs={"position_ids": torch.arange(20)[None]})
    assert captured(made, config, [given])[1] == [0, 1, 2]


def test_hidden_states_that_are_not_the_blocks_inputs_come_from_a_whole_pass() -> None:
    made = traced("llama")
    made.order = PassOrder(can_stop=True, inputs_are_hidden=False)
    assert captured(made, without_numbers("1", sites=("hidden",)))[1] == [0, 1, 2]
    assert captured(made, without_numbers("1", sites=("resid_post_mlp",)))[1] == [0, 1]
    made.order = PassOrder()
    assert captured(made, without_numbers("1", sites=("resid_post_mlp",)))[1] == [0, 1, 2]


def test_an_encoder_with_a_head_for_choices_and_an_offloaded_model_are_never_stopped() -> None:
    model = accelerate.cpu_offload(tiny_model("gemma2", attention=None), execution_device=torch.device("cpu"))
    made, config = proven(model, "gemma2"), without_numbers("0")
    assert made.order == PassOrder()
    before = logits_of(made)
    traces, found = captured(made, config)
    assert found == [0, 1, 2]
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits_of(made), before)
    assert_same(traces, capture(traced("gemma2"), TEXTS, with_numbers(config)))


def test_a_model_on_several_accelerators_is_stopped_and_left_as_it_was() -> None:
    model, config = tiny_model("gpt2", attention=None), without_numbers("0-1")
    device_map = {"transformer.wte": 0, "transformer.wpe": 0, "transformer.h.0": 0, "transformer.h.1": 1}
    device_map |= {"transformer.h.2": 1, "transformer.ln_f": 1, "lm_head": 0}
    with PretendDevices():
        made = proven(spread(model, device_map), "gpt2")
        assert made.order == PassOrder(can_stop=True, inputs_are_hidden=True)
        before = logits_of(made).cpu()
        traces, found = captured(made, config)
        assert torch.equal(logits_of(made).cpu(), before)
    assert found == [0, 1]
    assert_same(traces, capture(traced("gpt2"), TEXTS, with_numbers(config)))


class Stack(nn.Module):
    """Blocks that run in any order; what goes into one may be changed before."""

    def __init__(self, order: list[int], change: Callable[[int, Tensor], Tensor] = lambda number, x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.order, self.change = order, change

    def run(self, *, output_hidden_states: bool = False) -> Any:
        hidden = [torch.ones(1, 5, 4)]
        for number in self.order:
            x = self.change(number, hidden[-1])
            hidden.append(self.blocks[number](x))
        return type("Output", (), {"hidden_states": tuple(hidden)})

    def examined(self) -> PassOrder:
        return examine_passes(Anatomy(self, list(self.blocks), None, "stack"), self.run)


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        (Stack([0, 1, 2]), PassOrder(can_stop=True, inputs_are_hidden=True)),
        (Stack([0, 1, 2], lambda number, x: x + number), PassOrder(can_stop=True, inputs_are_hidden=False)),
        (Stack([0, 2, 1]), PassOrder()),
        (Stack([0, 1, 1, 2]), PassOrder()),
        (Stack([0, 1]), PassOrder()),
        (Stack([0, 1, 2], lambda number, x: x + torch.rand(())), PassOrder()),
    ],
    ids=["plain", "changed between", "another order", "twice", "left out", "by chance"],
)
def test_what_a_pass_is_like_is_measured(stack: Stack, expected: PassOrder) -> None:
    assert stack.examined() == expected


# ---------------------------------------------------------------- the model is left alone


def logits_of(made: TracedModel) -> Tensor:
    with torch.inference_mode():
        return made.run(made.probe_ids()).logits


def state_of(made: TracedModel) -> Any:
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
        for name, module in made.model.named_modules()
    ]
    return hooks, made.model.config._attn_implementation, _ACTIVE.get(), _PROBABILITIES.get()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_oss", "bloom", "falcon"])
def test_after_a_pass_that_ended_early(name: str) -> None:
    made = traced(name)
    before, logits = state_of(made), logits_of(made)
    assert captured(made, without_numbers("0"))[1] == [0]
    assert state_of(made) == before
    assert torch.equal(logits_of(made), logits)


def test_after_a_value_that_is_not_finite_before_the_end() -> None:
    made = traced("llama")
    before = state_of(made)
    with torch.no_grad():
        made.model.model.layers[1].mlp.down_proj.weight[5, 7] = torch.nan
    assert captured(made, without_numbers("0"))[1] == [0]
    with pytest.raises(CaptureError, match="resid_post_mlp, layer 1: not finite"):
        capture(made, TEXTS, without_numbers("0-1", sites=("resid_post_mlp",)))
    assert state_of(made) == before


# ---------------------------------------------------------------- replay


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_a_replay_compares_with_plain_transformers(name: str) -> None:
    made, config = traced(name, sites=sites_of(name)), without_numbers("0-1")
    for text, trace in zip(TEXTS, capture(made, TEXTS, config), strict=True):
        result = replay(made, "000001", text, trace, config)
        assert (result.num_replayed, result.num_positions, result.num_agreeing) == (1, 0, 0)
        assert {"hidden_states", "attentions", "queries", "resid_post_mlp"} <= {error.site for error in result.sites}
        wrong = trace.tensors["hidden_states"].copy()
        wrong[1] = trace.tensors["hidden_states"][0]
        with pytest.raises(CaptureError, match="sample 000001: hidden_states differs"):
            replay(made, "000001", text, trace._replace(tensors=trace.tensors | {"hidden_states": wrong}), config)
