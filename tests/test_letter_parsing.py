"""Which letter an output names: alone, beside texts, in sentences; and what names none."""

import pytest

from builders.introspection.prompts import bins_of
from builders.kit.letter_parsing import name_letter

LETTERS = list("ABCD")
PLANETS = {"A": "Mars", "B": "Jupiter", "C": "Venus", "D": "Earth"}
BINS = {one.label: one.text() for one in bins_of((0, 5, 10, 20, 40, 60, 80, 90, 100))}
NOT_STATED = "no letter of A, B, C, D at the start, and none stated"


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "b",
        " B\n",
        "B.",
        "B)",
        "B!",
        "b)",
        "(b)",
        "[B]",
        "“B”",
        "‘B’",
        "'B'",
        '"B"',
        "`B`",
        "**B**",
        "__B__",
        "* B",
        "- B",
        "• **B**",
        "<B>",
        "<b>B</b>",
        "<answer>B</answer>",
        "B</s>",
        "$B$",
        "\\(B\\)",
        "\\boxed{B}",
        "$\\boxed{\\text{B}}$",
        "\\textbf{B}",
        "**B.** Jupiter",
        "**B.** The largest",
        "B. Jupiter",
        "B.Jupiter",
        "(B)Jupiter",
        "B Jupiter",
        "B\tJupiter",
        "B (Jupiter)",
        "B (the largest)",
        "B - Jupiter",
        "B – the largest",
        "B — Jupiter",
        "B: the largest",
        "B = Jupiter",
        "B **Jupiter**",
        "B is right",
        "B because it is large",
        "B, because A is small",
        "B, not A",
        "B, A is wrong",
        "The answer is B, and A is not",
        "B, a planet",
        "B\n\nA is wrong",
        "B\nAnswer: B",
        "B. Jupiter is the largest, A is small",
        "The answer is B",
        "The answer is **B**.",
        "The correct answer is (B)",
        "The answer is 'B'.",
        "The answer is b",
        "the answer is: B",
        "The answer is $\\boxed{B}$.",
        "The answer is B Jupiter",
        "The best answer is B, not A",
        "**Answer:** B",
        "Answer: b",
        "ANSWER：B",
        "Sure, the answer is:\n\n**B. Jupiter**",
        "Option B",
        "option b",
        "I take choice B",
        "The letter is B",
        "Option B seems right",
        "A is wrong, the answer is B",
        "(A) isn't right; the answer is B",
        "Option A is wrong. Option B is right.",
        "Option (A) is incorrect, so the answer must be option B",
    ],
)
def test_an_output_that_names_b(text: str):
    named = name_letter(text, PLANETS)
    assert (named.letter, named.failure) == ("B", None)
    assert text[named.start] in "Bb"
    assert not text[named.start - 1 : named.start].isalnum()
    assert not text[named.start + 1 : named.start + 2].isalnum()


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("  (b)", 3),
        ("\n**B.** Jupiter", 3),
        ("A is wrong, the answer is B", 26),
        ("\\boxed{B}", 7),
        ("Better: option B, or B.", 15),
        (" Jupiter", 1),
        ("“Jupiter”", 0),
    ],
)
def test_start_is_where_the_letter_or_its_text_begins(text: str, start: int):
    named = name_letter(text, PLANETS)
    assert (named.letter, named.start) == ("B", start)


@pytest.mark.parametrize(
    "text",
    [
        "A cat",
        "a cat",
        "A.D. 476",
        "A's",
        "A’ll do",
        "A-level",
        "A long time ago",
        "B?",
        "AB",
        "ABCD",
        "A B C D",
        "C# and others",
        "D-Day",
        "B12",
        "E",
        "Option E",
        "The answer is E",
        "The answer is A cat",
        "The answer is a cat",
        "the answer is A's",
        "The answer is B.C. 44",
        "Answer: C-reactive protein",
        "Answer: C++",
        "The answer is not A",
        "Option A is wrong",
        "A: is not a planet",
        "<b>Mars</b>",
        "(A) is wrong",
        "I don't know",
        "1. B",
        "It is B",
        "I think B",
        "-B-",
        "- A cat",
        "Neither A nor B",
        "Both A and C are right",
        "The answer is Jupiter",
        "Jupiter and Mars",
        "Jupiters",
        "答",
        "...",
        "70%",
    ],
)
def test_an_output_that_names_no_letter(text: str):
    assert name_letter(text, PLANETS) == (None, 0, NOT_STATED)


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_an_empty_output_names_no_letter(text: str):
    assert name_letter(text, PLANETS) == (None, 0, "the output is empty")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("A, B, C or D", "A, B, ..."),
        ("a, b, c or d", "A, B, ..."),
        ("A and B", "A, B, ..."),
        ("B or C?", "B, C, ..."),
        ("A, and B", "A, B, ..."),
        ("A/B", "A, B, ..."),
        ("A & B", "A, B, ..."),
        ("(A), (B)", "A, B, ..."),
        ("**A** or **B**", "A, B, ..."),
        ('"B" or "C"', "B, C, ..."),
        ("A\nB\nC\nD", "A, B, ..."),
        ("A. Mars\nB. Jupiter\nC. Ve", "A, B, ..."),
        ("The answer is A or B", "A, B, ..."),
        ("Answer: B, C", "B, C, ..."),
        ("Option A is good. Option B is better.", "A, B"),
        ("The answer is **A**. Hmm, no, the answer should be B or so, no, B", "A, B"),
    ],
)
def test_an_output_of_several_letters_names_none_and_says_so(text: str, names: str):
    assert name_letter(text, PLANETS) == (None, 0, f"several letters: {names}")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("60 to 80 %", "F"),
        ("60 to 80%", "F"),
        ("60 to 80", "F"),
        ("F. 60 to 80 %", "F"),
        ("F 60 to 80 %", "F"),
        ("F (60-80%)", "F"),
        ("A under 5 %", "A"),
        ("Under 5%.", "A"),
        ("over 90 %", "H"),
        ("Range: F", "F"),
        ("The range is f.", "F"),
        ("5 to 10 %", "B"),
        ("70%", None),
        ("70", None),
        ("5", None),
        ("60", None),
        ("80 to 60 %", None),
        ("A 70% chance", None),
        ("A high chance", None),
        ("a very high one", None),
        ("I", None),
        ("G or H", None),
    ],
)
def test_bins_are_named_by_letter_or_by_their_whole_text(text: str, letter: str | None):
    assert name_letter(text, BINS).letter == letter


@pytest.mark.parametrize(
    ("options", "text", "letter"),
    [
        (["a dog", "A cat", "cat", "A dog"], "A cat", "B"),
        (["a dog", "A cat", "cat", "A dog"], "a Cat.", "B"),
        (["a dog", "A cat", "cat", "A dog"], "A dog", None),
        (["cat", "x", "y", "z"], "A cat", "A"),
        (["cat", "x", "y", "z"], "A catalyst", None),
        (["red", "x", "y", "red blood cell"], "A red blood cell", None),
        (["red", "x", "y", "red blood cell"], "A red one", "A"),
        (["476 B.C.", "A.D. 476", "B.C. 44", "D.C."], "A.D. 476.", "B"),
        (["476 B.C.", "A.D. 476", "B.C. 44", "D.C."], "B.C. 44", "C"),
        (["A", "B", "A and B", "neither"], "A and B", "C"),
        (["A", "B", "A and B", "neither"], "A or B", None),
        (["Dijkstra", "A* search", "depth first", "greedy"], "A* search", "B"),
        (["C. elegans", "D. melanogaster", "E. coli", "yeast"], "D. melanogaster", "B"),
        (["vitamin C", "vitamin A", "vitamin D", "hepatitis B"], "Vitamin C", "A"),
        (["B", "A", "C", "E"], "A", "A"),
        (["B", "A", "C", "E"], "b", "B"),
        (["B", "A", "C", "E"], "E", "D"),
        (["E", "F", "G", "H"], "“g”", "C"),
        (["(x+y)*", ".*", "C++", "[a-z]"], "(x+y)*", "A"),
        (["(x+y)*", ".*", "C++", "[a-z]"], ".*", "B"),
        (["(x+y)*", ".*", "C++", "[a-z]"], "anything", None),
        (["(x+y)*", ".*", "C++", "[a-z]"], "C++", "C"),
        (["(x+y)*", ".*", "C++", "[a-z]"], "C", "C"),
        (["x", "C++", "y", "z"], "C#", None),
        (["1", "-1", "0", "2"], "-1", "B"),
        (["1", "0", "2", "3"], "-1", None),
        (["1", "0", "2", "3"], "1.", "A"),
        (["1.5", "15", "1", "5"], "1.5", "A"),
        (["1.5", "15", "1", "5"], "15", "B"),
        (["5", "5%", "50", "50%"], "5%", "B"),
        (["+", "-", "*", "/"], "-", "B"),
        (["+", "-", "*", "/"], "...", None),
        (["x", "x", "y", "z"], "x", None),
        (["x", "x", "y", "z"], "A", "A"),
        (["x", "x", "y", "z"], "B. x", "B"),
        (["Saint-Exupéry", "x", "y", "z"], "*saint exupéry*", "A"),
        (["Jupiter, the planet", "x", "y", "z"], "“Jupiter the planet”.", "A"),
    ],
)
def test_the_texts_of_options_tell_letters_from_words(options: list[str], text: str, letter: str | None):
    named = name_letter(text, dict(zip(LETTERS, options, strict=True)))
    assert named.letter == letter
    assert (named.failure is None) == (letter is not None)
    assert named.start == 0


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("A. Mars\nB.", "A, B"),
        ("A. Mars\nB", "A, B"),
        ("A. Mars\nB. Jup", "A, B"),
        ("A.\nB.\nC.", "A, B"),
        ("A. Mars\nB. Something else", "A, B"),
        ("(A) Mars\n(B) Ju", "A, B"),
        ("A) Mars\n\nB) Ju", "A, B"),
        ("**A.** Mars\n**B.** Ju", "A, B"),
        ("- A. Mars\n- B. Ju", "A, B"),
        ("A: Mars\nB: Ju", "A, B"),
        ("A - Mars\nB - Ju", "A, B"),
        ("a. mars\nb. ju", "A, B"),
        ("A Mars\nB Jupiter", "A, B"),
        ("A. Mars B. Ju", "A, B"),
        ("A. Mars B", "A, B"),
        ("A. B. C.", "A, B"),
        ("A) B) C", "A, B"),
        ("A.Mars\nB.Ju", "A, B"),
        ("B. Jupiter\nC. Venus\nD.", "B, C"),
        ("B. Jupiter\nIt is so.\nC. Ve", "B, C"),
        ("Answer: A. Mars\nB. Ju", "A, B"),
    ],
)
def test_a_list_of_options_that_is_cut_names_none(text: str, names: str):
    assert name_letter(text, PLANETS) == (None, 0, f"several letters: {names}, ...")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("A. Wrong. The answer is B", "A, B"),
        ("A. Wrong! B", "A, B"),
        ("A. No, B", "A, B"),
        ("A. No: b", "A, B"),
        ("A. Mars. Wait, it's B.", "A, B"),
        ("A, sorry, I mean **B**.", "A, B"),
        ("A. Mars. Actually, no, option B", "A, B"),
        ("A. Actually B is right", "A, B"),
        ("A.\n\nThe correct answer is B.", "A, B"),
        ("The answer is A. Actually B.", "A, B"),
        ("Option A. On second thought: (B).", "A, B"),
    ],
)
def test_a_letter_that_is_taken_back_is_none(text: str, names: str):
    assert name_letter(text, PLANETS) == (None, 0, f"several letters: {names}, ...")


@pytest.mark.parametrize(
    "text",
    [
        "B\n\nA is wrong",
        "B\n\n(A) is wrong",
        "B\n\nA is small",
        "B\n\nMars is too small",
        "B\nB. Jupiter",
        "B\nA.D. 476",
        "B\nE. Pluto",
        "B, no doubt",
        "B. No other planet is as large",
        "B. Actually A is small",
        "B. There is no C.",
        "B. Jupiter (A is smaller)",
        "B. Actually, B.",
        "The answer is B. Actually, it is B.",
        "The answer is B.\n\nA. Mars is small",
        "B because option A is small",
        "B. The largest planet",
        "B. Jupi",
        "B: jupiter, of course",
    ],
)
def test_what_is_said_of_other_options_leaves_b(text: str):
    assert name_letter(text, PLANETS)[0::2] == ("B", None)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("A. Jupiter", "B"),
        ("A) **Jupiter**", "B"),
        ("A (Jupiter)", "B"),
        ("A. Jupiter is the largest", "B"),
        ("A\nJupiter", "B"),
        ("**A.** Jup", "B"),
        ("The answer is A. Jupiter", "B"),
        ("The answer is **A**: Venus", "C"),
        ("Option A (Earth)", "D"),
    ],
)
def test_a_letter_with_the_text_of_another_option_is_none(text: str, other: str):
    assert name_letter(text, PLANETS) == (None, 0, f"the letter A, but the text of {other}")


@pytest.mark.parametrize(
    ("options", "text", "named"),
    [
        (["NP-hard", "P-complete", "in P", "in NP"], "A. P-complete", "B"),
        (["NP-hard", "P-complete", "in P", "in NP"], "A. NP-hard", None),
        (["NP-hard", "P-complete", "in P", "in NP"], "A. The problem", None),
        (["under 5 %", "5 to 10 %", "10 to 20 %", "over 20 %"], "A. 5 to 10", "B"),
        (["under 5 %", "5 to 10 %", "10 to 20 %", "over 20 %"], "A. 5", "B"),
        (["under 5 %", "5 to 10 %", "10 to 20 %", "over 20 %"], "A. under", None),
        (["under 5 %", "5 to 10 %", "10 to 20 %", "over 20 %"], "A. 70 %", None),
        (["under 5 %", "5 to 10 %", "10 to 20 %", "over 20 %"], "A. (1 to 5 %)", None),
        (["red blood cell", "red", "y", "z"], "A. red", None),
        (["red blood cell", "red", "y", "z"], "A. red blood cell", None),
        (["red blood cell", "red", "y", "z"], "A. red bl", None),
        (["red blood cell", "red", "y", "z"], "A. red shoes", "B"),
        (["10 %", "1", "y", "z"], "A. 1", "B"),
        (["red", "red blood cell", "y", "z"], "A. red", None),
        (["red", "red blood cell", "y", "z"], "A. red one", None),
        (["red", "red blood cell", "y", "z"], "A. red blood cell", "B"),
        (["the sun", "the moon", "y", "z"], "A. the", None),
        (["10", "1", "-1", "100"], "A. 1", "B"),
        (["1", "-1", "2", "3"], "A. -1", "B"),
        (["-1", "1", "2", "3"], "A. -1", None),
        (["x", "x", "y", "z"], "A. x", None),
        (["+", "-", "*", "/"], "A.", None),
        (["B", "A", "y", "z"], "A. B", None),
    ],
)
def test_texts_that_begin_alike_are_told_apart(options: list[str], text: str, named: str | None):
    found = name_letter(text, dict(zip(LETTERS, options, strict=True)))
    if named is None:
        assert (found.letter, found.failure) == ("A", None)
    else:
        assert found == (None, 0, f"the letter A, but the text of {named}")


@pytest.mark.parametrize("text", ["B\n\nQuestion: Two?\nA. 1\nB. 2\nAnswer: A", " B. Jupiter\n\nQ: Who?\nAnswer: A"])
def test_another_question_that_follows_is_not_read(text: str):
    assert name_letter(text, PLANETS)[0::2] == ("B", None)


def test_an_output_that_goes_on_to_another_question_names_none():
    assert name_letter("\n\nQuestion: Two?\nAnswer: A", PLANETS) == (None, 0, "nothing before another question")
    assert name_letter("A planet\n\nQuestion: Two?\nAnswer: A", PLANETS) == (None, 0, NOT_STATED)
