"""What the passes ask: bins, messages that share their beginning, and the hash of what is asked."""

from itertools import pairwise, product

import pytest

from builders.introspection.config import PASSES, Pass
from builders.introspection.prompts import SYSTEM, bins_of, instruction_sha256, message
from builders.kit.choices import Choice
from tracekit.errors import ConfigError

EDGES = (0, 5, 10, 20, 40, 60, 80, 90, 100)
BINS = bins_of(EDGES)
QUESTION = "Which planet is the largest?"
CHOICES = [
    Choice(label=label, text=text) for label, text in zip("ABCD", ("Mars", "Jupiter", "Venus", "Earth"), strict=True)
]
SHOWN = "Which planet is the largest?\nA. Mars\nB. Jupiter\nC. Venus\nD. Earth\n\n"


# Bins


def test_default_bins():
    assert "".join(one.label for one in BINS) == "ABCDEFGH"
    assert [one.midpoint for one in BINS] == [2.5, 7.5, 15, 30, 50, 70, 85, 95]
    assert [(one.low, one.high) for one in BINS] == list(pairwise(EDGES))
    assert [one.text() for one in BINS] == [
        "under 5 %",
        "5 to 10 %",
        "10 to 20 %",
        "20 to 40 %",
        "40 to 60 %",
        "60 to 80 %",
        "80 to 90 %",
        "over 90 %",
    ]


def test_edges_and_midpoints_of_ones_own():
    bins = bins_of((0, 33.5, 100), (0, 100))
    assert [(one.label, one.low, one.high, one.midpoint) for one in bins] == [("A", 0, 33.5, 0), ("B", 33.5, 100, 100)]
    assert [one.text() for one in bins] == ["under 33.5 %", "over 33.5 %"]


def test_as_many_bins_as_there_are_letters():
    bins = bins_of((*range(26), 100))
    assert (len(bins), bins[-1].label) == (26, "Z")


@pytest.mark.parametrize(
    "edges",
    [
        (),
        (0,),
        (0, 100),
        (0, 50, 90),
        (5, 50, 100),
        (0, 50, 50, 100),
        (0, 60, 50, 100),
        (100, 50, 0),
        (0, float("nan"), 100),
        (-1, 50, 100),
        (0, 50, 101),
        (0, 0.5, 1),
        (*range(27), 100),
    ],
)
def test_edges_that_do_not_rise_from_0_to_100_are_refused(edges: tuple[float, ...]):
    with pytest.raises(ConfigError) as caught:
        bins_of(edges)
    shown = " ".join(f"{edge:g}" for edge in edges)
    wanted = f"edges {shown} - at `$.bin_edges`; expected 3 to 27 percentages that rise from 0 to 100"
    assert str(caught.value) == wanted


@pytest.mark.parametrize("midpoints", [(25,), (25, 75, 80), (75, 25), (-1, 75), (25, 101), (25, float("nan"))])
def test_midpoints_that_are_not_one_inside_each_bin_are_refused(midpoints: tuple[float, ...]):
    with pytest.raises(ConfigError) as caught:
        bins_of((0, 50, 100), midpoints)
    shown = " ".join(f"{middle:g}" for middle in midpoints)
    assert str(caught.value) == f"midpoints {shown} - at `$.bin_midpoints`; expected 2, one inside each bin"


@pytest.mark.parametrize("edges", [(0, 50.00001, 50.00002, 100), (0, 0.0000001, 99.9999999, 100)])
def test_bins_never_read_alike(edges: tuple[float, ...]):
    texts = [one.text() for one in bins_of(edges)]
    assert len(set(texts)) == len(texts)
    assert not any(text.startswith("over 100") for text in texts)
    assert all(text.split()[0] in ("under", "over") or text.split()[0] != text.split()[2] for text in texts)


# Messages


def test_messages_as_they_are_asked():
    mcq, own, other = (message(name, QUESTION, CHOICES, BINS) for name in PASSES)
    assert mcq == SHOWN + "Which option is right? Give the letter of one option."
    ranges = "\n".join(f"{one.label}. {one.text()}" for one in BINS)
    asked = (
        "Do not answer the question. How likely is it that {} would answer it correctly?\n{}\n"
        "Give the letter of one range."
    )
    assert own == SHOWN + asked.format("you", ranges)
    assert other == SHOWN + asked.format("a typical college-educated person", ranges)


def test_all_passes_share_question_and_options():
    messages = [message(name, QUESTION, CHOICES, BINS) for name in PASSES]
    assert len(set(messages)) == 3
    assert all(one.startswith(SHOWN) for one in messages)
    same = SHOWN + "Do not answer the question. How likely is it that "
    assert [one.startswith(same) for one in messages] == [False, True, True]


@pytest.mark.parametrize(
    "text", ["{question}", "{who} {0} {}", "{{x}}", "}{", "100 %", "%s %d %(x)s", "\\n", "é🐎", "A. B\nC. D", "$x$"]
)
@pytest.mark.parametrize("name", PASSES)
def test_any_text_survives(name: Pass, text: str):
    choices = [Choice(label="A", text=text), *CHOICES[1:]]
    whole = message(name, text, choices, BINS)
    assert whole.startswith(f"{text}\nA. {text}\nB. Jupiter\n")
    assert whole.removeprefix(f"{text}\nA. {text}") == message(name, QUESTION, CHOICES, BINS).removeprefix(
        f"{QUESTION}\nA. Mars"
    )


def test_bins_have_no_part_in_the_question_pass():
    assert message("mcq", QUESTION, CHOICES, []) == message("mcq", QUESTION, CHOICES, BINS)


# Hash


def test_the_hash_tells_apart_everything_that_is_asked():
    bins = [BINS, bins_of((0, 50, 100))]
    confidence: tuple[Pass, ...] = ("self_confidence", "other_confidence")
    hashes = [instruction_sha256(name, system, some) for name, system, some in product(confidence, (SYSTEM, ""), bins)]
    hashes += [instruction_sha256("mcq", system, []) for system in (SYSTEM, "")]
    assert len(set(hashes)) == 10
    assert all(len(one) == 64 and set(one) <= set("0123456789abcdef") for one in hashes)


def test_the_hash_is_that_of_the_texts_and_not_of_what_a_bin_counts_for():
    same = bins_of(EDGES, [one.midpoint + 1 for one in BINS])
    assert instruction_sha256("self_confidence", SYSTEM, same) == instruction_sha256("self_confidence", SYSTEM, BINS)
