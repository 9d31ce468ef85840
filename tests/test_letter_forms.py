"""Letters in every form that models write: phrase times wrapping times separator times letter; and what is none."""

import itertools
import json

import pytest

from builders.kit.letter_parsing import name_letter

PLANETS = {"A": "Mars", "B": "Jupiter", "C": "Venus", "D": "Earth"}
WORDS = ("Answer", "ANSWER", "The answer", "Final answer", "The correct answer", "Option", "Choice")
EMPHASIS = ("", "*", "**", "***", "_", "__", "`", '"')
SEPARATORS = (
    ": ",
    ":",
    " - ",
    " – ",
    " — ",
    " = ",
    "：",
    " ： ",
    "∶ ",
    "꞉ ",
    ":\n",
    ":\n\n",
    " -> ",
    " → ",
    " is ",
    " is: ",
)
LETTERS = {
    "plain": "{}",
    "brackets": "({})",
    "square": "[{}]",
    "bold": "**{}**",
    "bold with bracket": "**{})**",
    "bold with point": "**{}.**",
    "quotes": '"{}"',
    "code": "`{}`",
    "boxed": "\\boxed{{{}}}",
    "boxed text": "$\\boxed{{\\text{{{}}}}}$",
    "tag": "<b>{}</b>",
    "lenticular": "【{}】",
}
WIDE = str.maketrans("ABCD()", "ＡＢＣＤ（）")
CIRCLED = str.maketrans("ABCD", "ⒶⒷⒸⒹ")


def read(text: str) -> str | None:
    """The letter that is read; it is where `start` says."""
    named = name_letter(text, PLANETS)
    if named.letter is not None and text[named.start] in "ABCDＡＢＣＤⒶⒷⒸⒹ":
        assert text[named.start].translate(str.maketrans("ＡＢＣＤⒶⒷⒸⒹ", "ABCDABCD")) == named.letter
    return named.letter


def placements(word: str, mark: str, separator: str, letter: str) -> list[str]:
    """Emphasis around the word, the word and its separator, the letter, all of it, or left open."""
    sign, space = separator.rstrip(), separator[len(separator.rstrip()) :]
    return [
        f"{mark}{word}{mark}{separator}{letter}",
        f"{mark}{word}{sign}{mark}{space or ' '}{letter}",
        f"{word}{separator}{mark}{letter}{mark}",
        f"{mark}{word}{separator}{letter}{mark}",
        f"{mark}{word}{mark}{separator}{mark}{letter}{mark}",
    ]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("mark", EMPHASIS)
def test_a_letter_that_is_stated_is_read_in_any_dress(word: str, mark: str):
    wrong = []
    forms = itertools.product(SEPARATORS, LETTERS.values(), range(5))
    for number, (separator, form, place) in enumerate(forms):
        right = "ABCD"[number % 4]
        text = placements(word, mark, separator, form.format(right))[place]
        dresses = (text, text.translate(WIDE), text.translate(CIRCLED), f"> {text}.", f"Venus is hot.\n\n{text}")
        shown = dresses[number // 4 % 5]
        if read(shown) != right:
            wrong.append((shown, name_letter(shown, PLANETS)))
    assert wrong == []


@pytest.mark.parametrize("right", "ABCD")
@pytest.mark.parametrize(
    "tail", ["", ".", "!", "\n", " {text}", ". {text}", ") {text}", ": {text}", ", because it fits"]
)
def test_text_after_the_letter_changes_nothing(right: str, tail: str):
    for head in ("", "Answer: ", "**Answer**: ", "The answer is ", "Option "):
        assert read(head + right + tail.format(text=PLANETS[right])) == right


@pytest.mark.parametrize(
    "key", ["answer", "Answer", "final_answer", "correct_answer", "choice", "option", "letter", "答案"]
)
@pytest.mark.parametrize("right", "ABCD")
def test_json_is_read_by_its_answer(key: str, right: str):
    for value in (right, f"({right})", f"{right}. {PLANETS[right]}", [right], {"letter": right}):
        for more in ({}, {"confidence": 0.9}, {"reasoning": "A is small, so it is not A but B or C"}):
            for data in ({key: value} | more, more | {key: value}):
                for text in (json.dumps(data, ensure_ascii=False), json.dumps(data, indent=2, ensure_ascii=False)):
                    assert read(text) == right
                    assert read(f"```json\n{text}\n```") == right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('{"answer": "C', "C"),
        ('Here it is: {"answer": "C"}', "C"),
        ("答案：C", "C"),
        ("正确答案是：Ｃ", "C"),
        ("答案为 C。", "C"),
        ("答え：C", "C"),
        ("정답: C", "C"),
        ("الجواب: C", "C"),
        ("Ответ: C", "C"),
        ("Respuesta: C", "C"),
        ("La respuesta es C.", "C"),
        ("Réponse : C", "C"),
        ("Die Antwort ist C.", "C"),
        ("Ｃ", "C"),
        ("（Ｃ）", "C"),
        ("Ｃ．Venus", "C"),
        ("【C】", "C"),
        ("⒞", "C"),
        ("𝐂", "C"),
        ("So it is $\\boxed{C}$.", "C"),
        ("Hence $\\boxed{\\textbf{(C)}}$", "C"),
        ("\u200bC", "C"),
        ("**C**: it has no moon", "C"),
        ("# Answer\n\nC", "C"),
        ("- **Answer:** C", "C"),
        ("## C", "C"),
        ("> C. Venus", "C"),
        ("答案选C", "C"),
        ("回答：C", "C"),
        ("La respuesta es la C", "C"),
        ("C is close to the sun", "C"),
        ("The answer is C. If moons counted, it would be A.", "C"),
        ("<answer>\nC\n</answer>", "C"),
        ("<b>Answer</b>: C", "C"),
        ("Answer: C (not B)", "C"),
        ("C is correct; B is wrong", "C"),
        ("While B is large, the answer is C.", "C"),
        ("B is wrong, so the answer is C", "C"),
        ("The answer could be B or C. Answer: C", "C"),
        ("C. Venus is hotter than B", "C"),
        ("C. Venus is hot, but B is large", "C"),
        ("C\n\nHowever, B is large.", "C"),
        ("C, since A and B are wrong", "C"),
        ("The answer is C, not B or A", "C"),
        ("The answer is C because B is too large, but A is small", "C"),
        ("Answer: C\n\nExplanation: A is cold, B is large, but D is home.", "C"),
        ("Which planet has no moon?\nA. Mars\nB. Jupiter\nC. Venus\nD. Earth\nAnswer: C", "C"),
        ("B is the largest, but the question asks for the ringed one: C", "C"),
        ("B is the largest, but the question asks for the ringed one, so the answer is C.", "C"),
        ("A is the closest; however, the one without a moon is asked for: **C**.", "C"),
    ],
)
def test_other_forms_that_are_unambiguous(text: str, right: str):
    assert read(text) == right


@pytest.mark.parametrize("first", "ABCD")
@pytest.mark.parametrize("second", "ABCD")
@pytest.mark.parametrize(
    "text",
    [
        "{0} or {1}",
        "{0} (or {1})",
        "{0}, or maybe {1}",
        "{0}, though {1} is also possible",
        "{0}; alternatively {1}",
        "{0} and also {1}",
        "{0}. Hmm, no, {1}.",
        "{0}... wait, {1}",
        "{0}. Let me check again: {1}.",
        "{0}. No, it's {1}",
        "Answer: {0}\nAnswer: {1}",
        "Answer: {0} or {1}",
        "**Answer**: {0}, but it could be {1}",
        "The answer is {0}, but it is {1}.",
        "The answer is {0}. On second thought, so it's {1}.",
        "The answer is {0} if moons count, otherwise {1}",
        "{0} is the largest, but {1} has rings and the question asks for rings",
        "{0} is large, whereas {1} has rings",
        "{0} is tempting; however {1} fits better",
        '{{"answer": "{0}", "final_answer": "{1}"}}',
        "{0} is right, although some say: {1}",
        "{0} is correct, but many people choose {1}.",
        "{0} is large, but some would answer: {1}",
        "{0} is large, but it would be wrong to say: {1}",
        "{0} is the best, however the textbook says so: {1}",
        '{{"answer": ["{0}", "{1}"]}}',
        '{{"answer": "{0} or {1}"}}',
        "\\boxed{{{0}}} or \\boxed{{{1}}}",
        "It is between {0} and {1}",
        "Answer: {0} {1}",
        "Answer: {0}; {1}",
        "Answer: {0}. {1}",
        "Answer: ({0})({1})",
        "{0} - false, {1} - true",
        "{0} (false) {1} (true)",
        "{0} is worse than {1}",
        "{0} is inferior to {1}.",
        "{0} is close, {1} is right",
        "{0}/{1}",
        "Not {0}, maybe {1}",
    ],
)
def test_of_two_letters_none_is_read(text: str, first: str, second: str):
    if first != second:
        assert name_letter(text.format(first, second), PLANETS).letter is None, text.format(first, second)


@pytest.mark.parametrize("wrong", "ABCD")
@pytest.mark.parametrize(
    "text",
    [
        "not {}",
        "Not {}.",
        "It's not {}",
        "Answer: not {}",
        "The answer is not {}",
        "The answer isn't {}",
        "{} is wrong",
        "{} is not correct",
        "{}. Wrong.",
        "{}: incorrect",
        "{} (incorrect)",
        "{} - not correct",
        "Answer: {} is wrong",
        "Anything but {}",
        "The answer is anything but {}",
        "Option {} is wrong",
        "Option {} is incorrect.",
        "{} is tempting, but it is wrong",
        "{} is the largest, but that is not what is asked",
        "{} seems right, however the question asks for rings",
        "Why not {}?",
        "{}?",
        "{} is ruled out",
        "{} was rejected.",
        "{} is a distractor",
        "{} is the second best",
        "The answer would be {} if it had rings",
        "The answer is {}, unless moons count",
        "{} — неверно",
        "정답은 {}가 아닙니다",
        "정답: {} 아님",
        "答えは{}ではありません",
        '{{"reasoning": "{} is small"}}',
        '{{"answer": null, "rejected": "{}"}}',
        '{{"answer": "not {}"}}',
    ],
)
def test_a_letter_that_is_denied_is_none(text: str, wrong: str):
    assert name_letter(text.format(wrong), PLANETS).letter is None


@pytest.mark.parametrize(
    "text",
    [
        "What is the correct answer: A, B, C or D?",
        "Which option is the answer? A) Mars B) Jupiter C) Venus D) Earth",
        "The options are A. Mars, B. Jupiter, C. Venus, D. Earth",
        "A) Mars\nB) Jupiter\nC) Venus\nD) Earth",
        "A. Mars\nB. Jupiter\nC. Venus\nD. Earth",
        "Question: Which planet has no moon?\nA. Mars\nB. Jupiter\nC. Venus\nD. Earth",
        '{"A": "Mars", "B": "Jupiter", "C": "Venus", "D": "Earth"}',
        '{"A": 0.1, "B": 0.9}',
        '{"answer": "A", "text": "Jupiter"}',
        "Ａ．Mars Ｂ．Jupiter Ｃ．Venus",
        "答案：A、B",
        "Answer: A, B",
        "Answer: E",
        "Answer - a planet",
        "The answer - A planet",
        "**Answer**: a cat",
        "В",  # a Cyrillic letter: the third of its alphabet, and in looks a B
        "I choose neither",
        "All of the above",
        "None of them: A, B, C, D",
    ],
)
def test_lists_questions_and_words_name_none(text: str):
    assert name_letter(text, PLANETS).letter is None


@pytest.mark.parametrize("other", "ABCD")
@pytest.mark.parametrize(
    "text",
    [
        # what an option is not, in front of it
        *(
            "Exclude option {}.",
            "We can rule out option {}",
            "I would eliminate answer {}",
            "Discard choice {}",
            "Not option {}",
        ),
        *(
            "Don't choose option {}",
            "Never option {}",
            "All but choice {}",
            "The opposite of answer {}",
            "Avoid option {}.",
        ),
        *("Incorrect answer: {}", "The wrong answer is {}", "The least likely answer is {}", "The worst choice is {}"),
        *(
            "The second best answer is {}",
            "An alternative answer is {}",
            "A tempting answer is {}",
            "Previous answer: {}",
        ),
        *("Example answer: {}", "E.g. answer: {}", "For example, the answer is {}", "My first guess was option {}"),
        *(
            "Falsche Antwort: {}",
            "Mauvaise réponse : {}",
            "Неправильный ответ: {}",
            "错误答案：{}",
            "誤った解答: {}",
            "不正解：{}",
        ),
        # what others say, or would be so
        *("Many people think the answer is {}.", "Students usually answer {}", "You might think the answer is {}"),
        *(
            "If you meant rings, the answer is {}",
            "Unless it is hot, the answer is {}",
            "Initially, the answer seems to be {}",
        ),
        *("Why is the answer {}?", "Is option {} right?", "Let's check answer {}.", "Consider option {}"),
        # what is said after it
        *("Option {} fails", "Option {} does not work", "Option {} can't be correct", "Option {} is unlikely"),
        *(
            "Option {} refers to a planet.",
            "Answer {} is less likely",
            "The letter {} stands for a planet",
            "({}) cannot be",
        ),
        *(
            "{} is impossible",
            "{} is too hot",
            "{} doesn't fit",
            "{}. None of the above",
            "{}. I don't know",
            "{}: I am not sure.",
        ),
        *(
            "{}. No",
            "{}. Unknown",
            "Cevap {} değil",
            "정답은 {}가 아니다",
            "उत्तर {} नहीं है",
            "答案{}不正确",
            "正解は{}ではない",
        ),
        *('{{"wrong_answer": "{}"}}', '{{"unlikely_answer": "{}"}}', '{{"option": "{}", "is_correct": false}}'),
        *(
            '{{"answer_options": "{}"}}',
            '{{"student_answer": "{}", "feedback": "wrong"}}',
            '{{"rejectedChoice": "{}"}}',
        ),
    ],
)
def test_a_letter_that_is_not_the_writers_own_answer_is_none(text: str, other: str):
    assert name_letter(text.format(other), PLANETS).letter is None


@pytest.mark.parametrize("other", "ABCD")
@pytest.mark.parametrize(
    "verdict", [" is wrong.", " is incorrect because", " (wrong)", " ✗", " - incorrect", " is not it", " cannot be"]
)
@pytest.mark.parametrize("head", ["", "Answer: ", "Option "])
def test_an_option_whose_text_is_denied_is_none(head: str, verdict: str, other: str):
    for sign in (". ", ") ", ": "):
        assert name_letter(f"{head}{other}{sign}{PLANETS[other]}{verdict}", PLANETS).letter is None


@pytest.mark.parametrize("tie", [" is ", ", which is ", ", i.e. ", " is the "])
@pytest.mark.parametrize("head", ["", "Answer: "])
def test_a_letter_that_is_called_by_another_options_text_is_none(head: str, tie: str):
    for letter, other in itertools.permutations(PLANETS, 2):
        assert name_letter(f"{head}{letter}{tie}{PLANETS[other]}", PLANETS).letter is None
        assert name_letter(f"{head}{letter}{tie}{PLANETS[letter]}", PLANETS).letter in (letter, None)


@pytest.mark.parametrize(
    "options", [{"A": "True", "B": "False"}, {"A": "Wrong", "B": "Right"}, {"A": "No", "B": "Yes"}]
)
@pytest.mark.parametrize("form", ["{}. {}", "{}: {}", "({}) {}", "Answer: {}. {}.", "**{}. {}**", "{} ({})"])
def test_options_that_are_verdicts_are_no_denials(form: str, options: dict[str, str]):
    for letter, text in options.items():
        assert name_letter(form.format(letter, text), options).letter == letter


@pytest.mark.parametrize(
    "text",
    [
        "B (90%), A (10%)",
        "A: 10%, B: 80%, C: 5%, D: 5%",
        "A=Mars, B=Jupiter",
        "A) Mars\n\nWait, no: B) Jupiter",
        "A: It is Jupiter.",
        "A: The largest is B",
        '{"answer": "A", "correct": "B"}',
        "Eliminate choice A and choice B",
    ],
)
def test_two_letters_of_one_line_or_a_correction_are_none(text: str):
    assert name_letter(text, PLANETS).letter is None


@pytest.mark.parametrize(
    "text",
    [
        "The answer should be C",
        "The answer is probably C",
        "The answer is most likely (C).",
        "The correct answer would be: C",
        "The answer is therefore C",
        "Option A is wrong, so option C is correct.",
        "It is not A, the answer is C",
        "People like Mars. The answer is C.",
        "A is large, but the answer is C",
        "I choose option C (Venus).",
        "Option C, because it has no moon",
        "Option C is the most suitable",
        "C. Venus, not Mars",
        "C. Venus, no doubt",
        "The answer is C, I don't know why",
        "C - I'm not joking",
        "There is no doubt that the answer is C.",
        "If A were right, it would be red. Hence the answer is C.",
        "Considering all options, the answer is C.",
        '{"rejected_choice": "A", "choice": "C"}',
        '{"finalAnswer": "C"}',
    ],
)
def test_answers_beside_what_is_denied_are_read(text: str):
    assert read(text) == "C"


@pytest.mark.attack
@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "piece",
    [" ", "-", "*", "=>", "<b>", "</b>", ": ", "answer ", "but ", "not A, ", "(", "\\boxed{", "\n", "A B ", "C"],
)
def test_long_outputs_are_read_in_no_time(piece: str):
    for head in ("", "Answer", "B", "B is so: ", "Answer: B, but "):
        name_letter(head + piece * 2000 + "x", PLANETS)
