"""Damage: what each method does, that seeds decide it, and that every bit comes back."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from builders.degradation import damage
from builders.degradation.damage import METHODS, Damaged, DamageStats, Method, check_level
from builders.degradation.weight_groups import Group, find_group
from tests.tiny_models import model_info, tiny_model
from tracekit.errors import ConfigError
from tracekit.model.traced import TracedModel

DTYPES = ("float32", "bfloat16", "float16")
FAMILIES = ("llama", "gpt2", "gpt_neox", "falcon_new", "gpt_oss", "mixtral")
"""Plain matrices; views of columns, of rows by head, by group of heads, of every second column; experts."""


def made(name: str, dtype: str = "float32") -> TracedModel:
    return TracedModel(tiny_model(name, dtype), None, model_info(name, dtype))


def group(traced: TracedModel, name: str) -> Group:
    return find_group(traced.model, traced.anatomy, name)


def bits(traced: TracedModel) -> dict[str, bytes]:
    """Every parameter's memory."""
    return {
        name: parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, parameter in traced.model.named_parameters()
    }


def values(of: Group) -> dict[tuple[str, str], Tensor]:
    return {(piece.path, piece.part): piece.weight.clone() for piece in of.pieces}


def damaged_values(name: str, kind: str, method: Method, level: float, seed: int) -> dict[tuple[str, str], Tensor]:
    traced = made(name)
    with Damaged(group(traced, kind)) as open_damage:
        open_damage.apply(method, level=level, seed=seed)
        return values(group(traced, kind))


def flat(name: str, kind: str, method: Method, level: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights before and after, in one row."""
    before = torch.cat([value.flatten() for value in values(group(made(name), kind)).values()])
    after = torch.cat([value.flatten() for value in damaged_values(name, kind, method, level, seed).values()])
    return before, after


# ---------------------------------------------------------------- what a level means


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_level_0_leaves_every_bit(method: Method, dtype: str) -> None:
    traced = made("llama", dtype)
    with torch.no_grad():
        traced.anatomy.blocks[0].get_submodule("mlp.up_proj").weight[0, :4] = torch.tensor([-0.0, 0.0, 1e-7, -1e-7])
    before = bits(traced)
    with Damaged(group(traced, "mlp")) as open_damage:
        assert open_damage.apply(method, level=0.0, seed=5) == DamageStats(18_432, 0, 0, 0.0)
        assert bits(traced) == before


def test_mult_gauss_multiplies_by_one_plus_a_normal_number_times_the_level() -> None:
    before, after = flat("llama", "mlp", "mult_gauss", 0.25)
    drawn = ((after / before - 1) / 0.25).numpy()
    assert abs(drawn.mean()) < 4 / math.sqrt(len(drawn))
    assert abs(drawn.std() - 1) < 4 / math.sqrt(2 * len(drawn))
    assert abs((np.abs(drawn) < 1).mean() - 0.6827) < 0.02
    _, further = flat("llama", "mlp", "mult_gauss", 0.5)
    torch.testing.assert_close(further - before, 2 * (after - before), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("level", [0.1, 0.6])
def test_ablation_sets_a_share_to_zero_and_leaves_the_rest(level: float) -> None:
    before, after = flat("llama", "mlp", "ablation", level)
    is_zero = after == 0
    assert abs(is_zero.float().mean().item() - level) < 4 * math.sqrt(level * (1 - level) / len(after))
    assert torch.equal(after[~is_zero], before[~is_zero])
    _, more = flat("llama", "mlp", "ablation", level + 0.1)
    assert (more[is_zero] == 0).all()


def test_ablation_at_level_1_leaves_nothing() -> None:
    assert not flat("llama", "mlp", "ablation", 1.0)[1].any()


@pytest.mark.parametrize(("level", "num_values"), [(1.0, 3), (0.5, 5), (0.05, 41), (1 / 127, 255)])
@pytest.mark.parametrize(("name", "kind"), [("llama", "mlp"), ("gpt_neox", "k"), ("mixtral", "gate")])
def test_uni_quant_rounds_to_a_grid_of_each_pieces_own_range(
    name: str, kind: str, level: float, num_values: int
) -> None:
    before = values(group(made(name), kind))
    for key, after in damaged_values(name, kind, "uni_quant", level, 0).items():
        w = before[key].double()
        step = level * w.abs().max()
        is_tie = ((w / step).frac().abs() - 0.5).abs() < 1e-4  # either way, by rounding
        torch.testing.assert_close(after.double()[~is_tie], ((w / step).round() * step)[~is_tie], atol=1e-6, rtol=1e-6)
        assert (after.double() - w).abs().max() <= step * 0.5001
        grid = (after.double() / step).round().unique()
        assert len(grid) <= num_values
        assert grid.abs().max() <= 1 / level + 0.5
        if level >= 0.5:
            assert len(grid) == num_values


def test_uni_quant_leaves_nothing_from_level_2_and_a_matrix_of_zeros_as_it_is() -> None:
    assert not flat("llama", "mlp", "uni_quant", 2.0)[1].any()
    traced = made("llama")
    with torch.no_grad():
        traced.anatomy.blocks[0].get_submodule("mlp.up_proj").weight.zero_()
    with Damaged(group(traced, "up:0")) as open_damage:
        assert open_damage.apply("uni_quant", level=0.1, seed=0) == DamageStats(2048, 0, 0, 0.0)


@pytest.mark.parametrize(
    ("method", "level", "message"),
    [
        ("noise", 0.1, "damage method 'noise' - at `$.method`; expected one of mult_gauss, ablation, uni_quant"),
        ("ablation", 1.01, "level 1.01 of ablation - at `$.method`; expected a share from 0 to 1"),
        ("mult_gauss", -0.1, "level -0.1 of mult_gauss - at `$.method`; expected 0 (untouched) or more"),
        ("uni_quant", math.inf, "level inf of uni_quant - at `$.method`; expected 0 (untouched) or more"),
        ("mult_gauss", math.nan, "level nan of mult_gauss - at `$.method`; expected 0 (untouched) or more"),
    ],
)
def test_levels_without_a_meaning_are_refused(method: str, level: float, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_level(level, method=method, at="$.method")
    assert str(caught.value) == message


def test_a_level_without_a_meaning_damages_nothing() -> None:
    traced = made("llama")
    before = bits(traced)
    with Damaged(group(traced, "mlp")) as open_damage:
        with pytest.raises(ConfigError, match="level 2 of ablation - at `level`"):
            open_damage.apply("ablation", level=2, seed=0)
        assert bits(traced) == before


# ---------------------------------------------------------------- seeds


@pytest.mark.parametrize("method", ["mult_gauss", "ablation"])
def test_a_seed_decides_and_nothing_else_does(method: Method) -> None:
    first = damaged_values("llama", "attn", method, 0.3, 1)
    again = damaged_values("llama", "attn", method, 0.3, 1)
    other = damaged_values("llama", "attn", method, 0.3, 2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)
    torch.manual_seed(99)
    assert all(torch.equal(first[key], value) for key, value in damaged_values("llama", "attn", method, 0.3, 1).items())


def test_every_piece_has_draws_of_its_own() -> None:
    masks = [value == 0 for value in damaged_values("gpt_oss", "down", "ablation", 0.3, 1).values()]
    assert len(masks) == 12  # experts of three layers
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_torchs_own_random_numbers_go_on_as_if_nothing_had_been_drawn() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with Damaged(group(made("llama"), "mlp")) as open_damage:
        open_damage.apply("mult_gauss", level=0.3, seed=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "falcon_new", "gpt_oss"])
def test_a_weight_is_damaged_alike_in_every_group_that_holds_it(name: str, method: Method) -> None:
    whole = damaged_values(name, "attn", method, 0.2, 7)
    parts: dict[tuple[str, str], Tensor] = {}
    for kind in ("q", "k", "v:0", "v:1-2", "o"):
        parts |= damaged_values(name, kind, method, 0.2, 7)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[key], value) for key, value in whole.items())


def test_order_and_what_was_applied_before_do_not_matter() -> None:
    traced = made("gpt2")
    with Damaged(group(traced, "attn")) as open_damage:
        first = open_damage.apply("mult_gauss", level=0.2, seed=3)
        before = bits(traced)
        open_damage.apply("uni_quant", level=0.5, seed=4)
        open_damage.apply("ablation", level=0.5, seed=4)
        assert open_damage.apply("mult_gauss", level=0.2, seed=3) == first
        assert bits(traced) == before


@pytest.mark.parametrize("method", METHODS)
def test_stats_and_weights_do_not_depend_on_the_number_of_threads(method: Method) -> None:
    def run() -> tuple[DamageStats, dict[str, bytes]]:
        traced = made("llama")
        with torch.no_grad():
            for block in traced.anatomy.blocks:
                block.get_submodule("mlp.up_proj").weight = torch.nn.Parameter(
                    torch.linspace(-1, 2, 2**17).view(256, -1)
                )
        with Damaged(group(traced, "up")) as open_damage:
            return open_damage.apply(method, level=0.3, seed=1), bits(traced)

    alone = run()
    torch.set_num_threads(2)
    try:
        together = run()
    finally:
        torch.set_num_threads(1)
    assert alone == together


# ---------------------------------------------------------------- what is written down


@pytest.mark.parametrize(("method", "level"), [("mult_gauss", 0.1), ("ablation", 0.3), ("uni_quant", 0.2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stats_are_of_the_weights_as_they_are(method: Method, level: float, dtype: str) -> None:
    traced = made("gpt_neox", dtype)
    of = group(traced, "k")
    before = np.concatenate([value.double().flatten().numpy() for value in values(of).values()])
    with Damaged(of) as open_damage:
        stats = open_damage.apply(method, level=level, seed=1)
        after = np.concatenate([value.double().flatten().numpy() for value in values(of).values()])
    assert stats.num_weights == len(before)
    assert stats.num_changed == (before != after).sum() > 0
    assert stats.share_changed == stats.num_changed / stats.num_weights
    assert stats.num_nonfinite == 0
    expected = np.linalg.norm(after - before) / np.linalg.norm(before)
    np.testing.assert_allclose(stats.relative_change, expected, rtol=1e-5)


def test_weights_beyond_the_dtype_are_counted_and_left_out_of_the_norm() -> None:
    traced = made("llama", "float16")
    of = group(traced, "mlp")
    with Damaged(of) as open_damage:
        stats = open_damage.apply("mult_gauss", level=1e6, seed=0)
        num_nonfinite = sum(int((~value.isfinite()).sum()) for value in values(of).values())
        assert 0 < num_nonfinite < of.num_weights
        assert stats.num_nonfinite == num_nonfinite
        assert math.isfinite(stats.relative_change)
        assert open_damage.apply("mult_gauss", level=0.1, seed=0).num_nonfinite == 0


def test_norms_of_huge_weights_do_not_overflow() -> None:
    traced = made("llama")
    with torch.no_grad():
        traced.anatomy.blocks[0].get_submodule("mlp.up_proj").weight.mul_(1e25)
    with Damaged(group(traced, "up:0")) as open_damage:
        assert open_damage.apply("mult_gauss", level=0.1, seed=0).relative_change == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("name", FAMILIES)
def test_work_is_done_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = damaged_values(name, "attn", "uni_quant", 0.3, 0)
    largest = 0
    own = damage._damage_chunk

    def watched(weight: Tensor, *arguments: Any) -> Any:
        nonlocal largest
        largest = max(largest, weight.numel())
        return own(weight, *arguments)

    monkeypatch.setattr(damage, "_CHUNK", 50)
    monkeypatch.setattr(damage, "_damage_chunk", watched)
    in_chunks = damaged_values(name, "attn", "uni_quant", 0.3, 0)
    assert all(torch.equal(whole[key], in_chunks[key]) for key in whole)
    assert not any(value.any() for value in damaged_values(name, "mlp", "ablation", 1.0, 0).values())
    assert 0 < largest <= 50


# ---------------------------------------------------------------- bit by bit


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_bits_come_back_and_only_the_groups_weights_change(name: str, dtype: str) -> None:
    traced = made(name, dtype)
    before = bits(traced)
    for kind in ("k", "attn:1", "mlp", "embed"):
        of = group(traced, kind)
        whole = {piece.path.partition("[")[0] for piece in of.pieces}
        for _ in range(2):
            with Damaged(of) as open_damage:
                for method in METHODS:
                    stats = open_damage.apply(method, level=0.3, seed=1)
                    assert stats.num_changed > 0
                    now = bits(traced)
                    assert {path for path in before if now[path] != before[path]} == whole
                    changed = sum(
                        int((parameter.detach().double() != original.double()).sum())
                        for parameter, original in zip(
                            traced.model.parameters(), tiny_model(name, dtype).parameters(), strict=True
                        )
                    )
                    assert changed == stats.num_changed
                open_damage.restore()
                assert bits(traced) == before
                open_damage.apply("ablation", level=0.5, seed=2)
            assert bits(traced) == before


def test_bits_that_no_arithmetic_keeps_come_back() -> None:
    traced = made("llama")
    odd = torch.tensor([0x7FC00001, -0x3FFFFE, -0x80000000, 1], dtype=torch.int32).view(
        torch.float32
    )  # NaNs, -0, 1e-45
    with torch.no_grad():
        traced.anatomy.blocks[0].get_submodule("mlp.up_proj").weight[3, :4] = odd
    before = bits(traced)
    with Damaged(group(traced, "mlp")) as open_damage:
        open_damage.apply("ablation", level=1.0, seed=1)
        assert bits(traced) != before
    assert bits(traced) == before


def test_an_exception_restores() -> None:
    traced = made("gpt2", "bfloat16")
    before = bits(traced)

    def stop() -> None:
        with Damaged(group(traced, "attn")) as open_damage:
            open_damage.apply("mult_gauss", level=0.5, seed=1)
            assert bits(traced) != before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert bits(traced) == before


def test_an_exception_in_the_middle_of_damaging_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = made("gpt2")
    before = bits(traced)
    own = damage._damage_chunk
    num_done = 0

    def fail_later(*arguments: Any) -> Any:
        nonlocal num_done
        num_done += 1
        if num_done == 5:
            raise MemoryError
        return own(*arguments)

    monkeypatch.setattr(damage, "_damage_chunk", fail_later)
    with pytest.raises(MemoryError), Damaged(group(traced, "attn")) as open_damage:
        open_damage.apply("mult_gauss", level=0.5, seed=1)
    assert num_done == 5
    assert bits(traced) == before


def test_tied_embeddings_are_damaged_at_both_ends_and_come_back() -> None:
    traced = made("gpt2")
    model = traced.model
    before = bits(traced)
    with Damaged(group(traced, "embed")) as open_damage:
        open_damage.apply("ablation", level=0.5, seed=1)
        assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)
        assert (model.lm_head.weight == 0).float().mean() > 0.4
    assert bits(traced) == before
    assert model.lm_head.weight is model.transformer.wte.weight


def test_groups_that_share_weights_can_be_damaged_at_once() -> None:
    traced = made("gpt2")
    before = bits(traced)
    with Damaged(group(traced, "attn")) as outer:
        outer.apply("mult_gauss", level=0.1, seed=1)
        between = bits(traced)
        with Damaged(group(traced, "q")) as inner:
            inner.apply("ablation", level=0.5, seed=1)
        assert bits(traced) == between
    assert bits(traced) == before


def test_the_models_numbers_move_and_come_back() -> None:
    traced = made("llama")
    ids = traced.probe_ids()
    with torch.inference_mode():
        before = traced.run(ids).logits
        with Damaged(group(traced, "mlp")) as open_damage:
            open_damage.apply("mult_gauss", level=0.3, seed=1)
            assert not torch.equal(traced.run(ids).logits, before)
            open_damage.apply("mult_gauss", level=0.0, seed=1)
            assert torch.equal(traced.run(ids).logits, before)
        assert torch.equal(traced.run(ids).logits, before)
