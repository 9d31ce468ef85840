"""Scoring of short answers: normalisation, exact match, token F1 and the place of an alias."""

import json
import re
import string
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.kit.scoring import AliasMatch, exact_match, f1, find_alias, normalize_answer

SAMPLE = Path(__file__).parents[1] / "builders/trivia_qa/trivia_qa.jsonl"
TRIVIAQA = Path(__file__).parents[2] / "shared/data/triviaqa/triviaqa_300.jsonl"

# Words, articles, punctuation, and the characters that have gone wrong: "İ" grows when lower-cased, a sigma depends on
# what follows, U+0301 ends a word for a regular expression, U+00B7 does not end one for a sigma.
texts = st.text(st.sampled_from("aAnthe bB1_-.'‘’´`\"\t\n\u00a0İßΑΣσςÉé\u0301·–é🐎中ſ\u200d\u2028K")) | st.text()


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("Paris", "paris"),
        ("The Eiffel_Tower", "eiffel tower"),
        ("  A  man,\ta plan:\nan isthmus. ", "man plan isthmus"),
        ("Theatre, another, atheist", "theatre another atheist"),
        ("O’Neill's ‘quoted’ ´n` all", "o neill s quoted n all"),
        ("Jay-Z", "jay z"),
        ("H.A.L. 9000", "h l 9000"),
        ("$1,000.50", "1 000 50"),
        ("“Curly” – dashes", "“curly” – dashes"),
        ("a–b", "–b"),
        ("İstanbul", "i̇stanbul"),
        ("ΟΔΥΣΣΕΥΣ", "οδυσσευς"),
        ("STRASSE Straße", "strasse straße"),
        ("non\u00a0breaking\u2003space", "non breaking space"),
        ("中文 🐎", "中文 🐎"),
        ("The", ""),
        ("!!!", ""),
        ("", ""),
    ],
)
def test_normalize_answer(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


@given(texts)
def test_normalize_answer_is_idempotent(text: str) -> None:
    once = normalize_answer(text)
    assert normalize_answer(once) == once


@given(texts)
def test_normalized_text_has_no_articles_punctuation_or_stray_white_space(text: str) -> None:
    normalized = normalize_answer(text)
    assert not set(normalized) & set(string.punctuation + "‘’´`")
    assert not re.search(r"\b(?:a|an|the)\b", normalized)
    assert normalized == " ".join(normalized.split())


@pytest.mark.parametrize(
    ("answer", "aliases", "matches"),
    [
        ("The Eiffel Tower.", ["Big Ben", "Eiffel_tower"], True),
        ("Eiffel", ["Eiffel Tower"], False),
        ("Paris, France", ["Paris"], False),
        ("paris", iter(["PARIS"]), True),
        ("the The", ["The The"], True),
        ("The The.", ["The The"], True),
        ("The", ["A"], False),
        ("  a ", ["A"], True),
        ("!!!", ["!!!"], True),
        ("!!!", ["The"], False),
        ("", [""], False),
        ("   ", ["", " "], False),
        ("Paris", [""], False),
        ("Paris", [], False),
    ],
)
def test_exact_match(answer: str, aliases: Iterable[str], matches: bool) -> None:
    assert exact_match(answer, aliases) is matches


@pytest.mark.parametrize(
    ("answer", "aliases", "score"),
    [
        ("the Eiffel Tower", ["Eiffel Tower"], 1.0),
        ("Eiffel Tower in Paris", ["Eiffel Tower"], 2 * 2 / (4 + 2)),
        ("Eiffel Tower in Paris", ["Paris", "Tower in Paris", "Rome"], 2 * 3 / (4 + 3)),
        ("New York New York", ["New York"], 2 * 2 / (4 + 2)),
        ("New York", ["New York New York"], 2 * 2 / (2 + 4)),
        ("Rome", ["Paris"], 0.0),
        ("The", ["The Beatles"], 0.0),
        ("the", ["The The"], 2 * 1 / (1 + 2)),
        ("", [""], 0.0),
        ("Paris", [], 0.0),
    ],
)
def test_f1(answer: str, aliases: list[str], score: float) -> None:
    assert f1(answer, aliases) == pytest.approx(score)


@given(texts, st.lists(texts, max_size=4))
def test_f1_is_a_share_and_one_where_the_match_is_exact(answer: str, aliases: list[str]) -> None:
    score = f1(answer, aliases)
    assert 0 <= score <= 1
    if exact_match(answer, aliases):
        assert score == 1


@pytest.mark.parametrize(
    ("answer", "aliases", "found"),
    [
        ("It was the Eiffel_Tower, in Paris.", ["The Eiffel Tower"], "Eiffel_Tower"),
        ("It is in Paris, France.", ["Paris", "Paris, France", "France"], "Paris, France"),
        ("Paris or Paris", ["paris"], "Paris"),
        ("Parisian", ["Paris"], None),
        ("Tower Eiffel", ["Eiffel Tower"], None),
        ("Lord of the Rings", ["Lord of Rings"], "Lord of the Rings"),
        ("Lord of Rings!", ["The Lord of the Rings"], "Lord of Rings"),
        ("Say “Jay–Z”", ["Jay-Z"], None),
        ("It is jay z.", ["Jay-Z"], "jay z"),
        ("He played for ‘İstanbulspor’.", ["i̇stanbulspor"], "İstanbulspor"),
        ("İ İ İ Paris", ["Paris"], "Paris"),
        ("ὁ ΟΔΥΣΣΕΥΣ!", ["Οδυσσευς"], "ΟΔΥΣΣΕΥΣ"),
        ("a 🐎 runs", ["🐎"], "🐎"),
        ("The answer is A.", ["A"], None),
        (" The The ", ["The The"], "The The"),
        ("They are !!!", ["!!!"], None),
        ("", ["Paris", ""], None),
        ("Paris", [], None),
    ],
)
def test_find_alias(answer: str, aliases: list[str], found: str | None) -> None:
    match = find_alias(answer, aliases)
    assert (match and answer[match.start : match.stop]) == found


def test_find_alias_names_the_alias_as_given_and_the_first_of_equals() -> None:
    assert find_alias("in New York.", ["York", "new_york", "New York"]) == AliasMatch("new_york", 3, 11)


def test_find_alias_leaves_out_a_range_that_is_the_alias_only_in_its_surroundings() -> None:
    # The sigma before 'Β is not final, so it is lower-cased to σ there but to ς by itself.
    assert normalize_answer("ΑΣ'Β") == "ασ β"
    assert find_alias("ΑΣ'Β", ["ασ"]) is None


@given(texts, st.lists(texts, max_size=4))
def test_range_of_an_alias_normalises_to_the_alias(answer: str, aliases: list[str]) -> None:
    match = find_alias(answer, aliases)
    if match is not None:
        assert match.alias in aliases
        assert 0 <= match.start < match.stop <= len(answer)
        assert normalize_answer(answer[match.start : match.stop]) == normalize_answer(match.alias)


@given(before=texts, alias=texts, after=texts)
def test_alias_between_spaces_is_found(before: str, alias: str, after: str) -> None:
    answer = f"{before} {alias} {after}"
    if normalize_answer(alias) and "Σ" not in alias:  # whose lower case its surroundings decide
        match = find_alias(answer, [alias])
        assert match is not None
        assert normalize_answer(answer[match.start : match.stop]) == normalize_answer(alias)


@pytest.mark.parametrize("path", [SAMPLE, TRIVIAQA], ids=["sample", "triviaqa"])
def test_every_real_alias_matches_itself_and_is_found_in_a_sentence(path: Path) -> None:
    if not path.exists():
        pytest.skip(f"{path} is not here")
    for line in path.read_text(encoding="utf-8").splitlines()[::5]:
        aliases = json.loads(line)["aliases"]
        for alias in aliases:
            assert exact_match(alias, aliases), alias
            assert f1(alias, aliases) == 1, alias
            if normalize_answer(alias):
                assert find_alias(f"I think it is the {alias}.", [alias]), alias
