"""Levels of damage summed up: ratios by hand, means that leave out what is not there, a table, pictures."""

import statistics

import msgspec
import pytest

from builders.degradation.levels import distinct, level_lines, level_pictures, level_stats
from builders.degradation.record import DegradationRecord
from tests.sample_records import degradation_record
from tracekit.plots import draw_picture


def answer(text: str, group: str = "mlp", level: float = 0.1, **changes: object) -> DegradationRecord:
    record = degradation_record(generated_answer=text, generated_token_ids=[1] * len(text.split()), **changes)
    damage = msgspec.structs.replace(record.damage, group=group, level=level)
    return msgspec.structs.replace(record, damage=damage)


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("the cat the dog", 1, 3 / 4),
        ("The cat, the dog.", 2, 1.0),
        ("no no no no no", 1, 1 / 5),
        ("no no no no no", 4, 1 / 2),
        ("don't DON'T", 1, 1 / 2),
        ("one", 2, None),
        (".", 1, None),
        ("!!!! !!!! !!!!", 1, 1 / 3),
        ("", 1, None),
    ],
)
def test_distinct_is_the_share_of_different_n_grams(text: str, n: int, share: float | None):
    assert distinct(text, n) == share


def test_a_level_is_summed_over_its_own_answers_and_what_is_missing_is_left_out():
    records = [
        answer("no no no no no", is_correct=True, perplexity=8.0, is_perplexity_finite=True),
        answer(
            "one two three four",
            is_correct=None,
            perplexity=8.0,
            is_perplexity_finite=True,
            num_nonfinite_values=0,
            num_overflowed_values=0,
            num_nonfinite_tokens=0,
        ),
        answer("", is_correct=False, token_entropies=[None], perplexity=None),
        answer("other level", level=0.2),
        answer("other group", group="attn", level=0.1),
    ]
    attn, mlp, higher = level_stats(records)
    assert [(one.group, one.level, one.num_samples) for one in (attn, mlp, higher)] == [
        ("attn", 0.1, 1),
        ("mlp", 0.1, 3),
        ("mlp", 0.2, 1),
    ]
    assert mlp.mean_tokens == pytest.approx(3.0)
    assert mlp.repetition == pytest.approx((0.5 + 0.0) / 2)
    assert mlp.distinct_1 == pytest.approx((0.2 + 1.0) / 2)
    assert mlp.distinct_2 == pytest.approx((0.25 + 1.0) / 2)
    assert (mlp.accuracy, mlp.perplexity, mlp.mean_entropy) == (0.5, 8.0, 0.5)
    assert mlp.nonfinite_share == pytest.approx(2 / 3)
    assert (attn.repetition, attn.perplexity) == (None, None)


def test_the_spread_is_over_repeats_and_stands_in_the_table():
    texts = {0: ("one two", "one"), 1: ("one two three four", "one two three"), 2: ("one", "one one")}
    records = [
        answer(text, repeat=repeat, is_correct=repeat == 1, perplexity=8.0, is_perplexity_finite=True)
        for repeat, some in texts.items()
        for text in some
    ]
    (level,) = level_stats(records)
    assert (level.num_samples, level.num_repeats) == (6, 3)
    assert level.mean_tokens == pytest.approx(13 / 6)
    assert level.spread.mean_tokens == pytest.approx(statistics.stdev([1.5, 3.5, 1.5]))
    assert level.spread.accuracy == pytest.approx(statistics.stdev([0.0, 1.0, 0.0]))
    assert level.spread.repetition is None  # one repeat alone has answers of four words
    assert level.spread.perplexity is None
    lines = level_lines([level])
    assert lines[0] == "ablation, mlp (mean ± standard deviation over 3 repeats)"
    assert "2.2±1.2" in lines[2].split()
    assert "8" in lines[2].split()


def test_one_repeat_has_no_spread():
    (level,) = level_stats([answer("one two"), answer("one")])
    assert level.num_repeats == 1
    assert set(msgspec.structs.astuple(level.spread)) == {None}
    assert not any("±" in line for line in level_lines([level]))


def test_the_table_has_a_block_for_each_group_and_a_dash_for_what_is_missing():
    lines = level_lines(level_stats([answer("one two", level=level) for level in (0.0, 0.5)] + [answer("x", "attn")]))
    assert [line for line in lines if not line.startswith(" ") and line] == ["ablation, attn", "ablation, mlp"]
    row = next(line for line in lines if line.split()[:1] == ["0.5"])
    assert row.split()[:4] == ["0.5", "1", "2.0", "-"]


def test_a_picture_is_drawn_for_each_method_the_same_every_time():
    stats = level_stats([answer("a b c d e", group, level) for group in ("attn", "mlp", "q") for level in (0.0, 0.5)])
    (picture,) = level_pictures(stats)
    assert picture.file == "levels-ablation.png"
    assert [curve.name for curve in picture.panels[0].curves] == ["attn", "mlp", "q"]
    drawn = draw_picture(picture)
    assert drawn.startswith(b"\x89PNG")
    assert draw_picture(picture) == drawn
