"""CommonsenseQA's rows, in every form they come in; and options encoded with their question, cut to fit."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

from builders.kit.choices import Choice
from builders.kit.columns import ChoiceSource
from builders.kit.csqa_questions import SAMPLE, SOURCE, cut_to_fit, encode_choices, parse_row
from builders.kit.sources import SourceRow, read_examples
from tests.tiny_checkpoint import tiny_tokenizer
from tracekit.errors import ConfigError, SourceError

NESTED: dict[str, Any] = {
    "answerKey": "B",
    "id": "1afa",
    "question": {
        "question_concept": "revolving door",
        "stem": "A revolving door is convenient for two direction travel?",
        "choices": [{"label": "A", "text": "bank"}, {"label": "B", "text": "mall"}],
    },
}
HUB: dict[str, Any] = {
    "id": "1afa",
    "question": "A revolving door is convenient for two direction travel?",
    "question_concept": "revolving door",
    "choices": {"label": ["A", "B"], "text": ["bank", "mall"]},
    "answerKey": "B",
}
FLAT: dict[str, Any] = {
    "id": "1afa",
    "question": "A revolving door is convenient for two direction travel?",
    "question_concept": "revolving door",
    "A": "bank",
    "B": "mall",
    "answerKey": "B",
}
QUESTION = "where do fish live in the wide blue sea ?"
CHOICES = [Choice(label="A", text="water"), Choice(label="B", text="sand dune")]


def parsed(data: dict[str, Any]):
    return parse_row(SourceRow(index=7, where="here", data=data))


def bert_like(*, has_types: bool = True) -> PreTrainedTokenizerFast:
    """Words and punctuation as tokens, [CLS] question [SEP] option [SEP]."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *QUESTION.split(), "water", "sand", "dune"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if has_types else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=names,
    )


@pytest.mark.parametrize("data", [NESTED, HUB, FLAT])
def test_every_form_gives_the_same_question(data: dict[str, Any]):
    question = parsed(data)
    assert question.question == "A revolving door is convenient for two direction travel?"
    assert question.concept == "revolving door"
    assert question.choices == [Choice(label="A", text="bank"), Choice(label="B", text="mall")]
    assert (question.label_idx, question.gold_label) == (1, "B")
    assert (question.index, question.example_id) == (7, "1afa")


@pytest.mark.parametrize(
    ("choices", "texts"),
    [
        ('[{"label": "A", "text": "bank"}, {"label": "B", "text": "mall"}]', ["bank", "mall"]),
        ('{"label": ["A", "B"], "text": ["bank", "mall"]}', ["bank", "mall"]),
        (["bank", 8, "park"], ["bank", "8", "park"]),
    ],
)
def test_choices_of_a_flat_file(choices: Any, texts: list[str]):
    question = parsed({"question": "Q?", "choices": choices, "answerKey": "B"})
    assert [choice.text for choice in question.choices] == texts
    assert [choice.label for choice in question.choices] == ["A", "B", "C"][: len(texts)]
    assert question.concept is None
    assert question.example_id == "7"


@pytest.mark.parametrize("answer", [{"answerKey": ""}, {"answerKey": None}, {}])
def test_an_empty_answer_is_an_unlabelled_split(answer: dict[str, Any]):
    question = parsed({key: value for key, value in HUB.items() if key != "answerKey"} | answer)
    assert question.label_idx is None
    assert question.gold_label is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "no question; expected a text in 'question', 'stem' or 'question.stem', found ' '"),
        ({"question": None}, "no question"),
        ({"question": {"choices": []}}, "no question"),
        ({"answerKey": "F"}, "the answer is 'F'; expected one of A B, or empty where unlabelled"),
        (
            {"answerKey": 1},
            "the answer is 1; expected one of A B, or empty where unlabelled; say where numbers count",
        ),
        ({"choices": None}, "0 options; expected 2 to 26"),
        ({"choices": ["only"]}, "1 options; expected 2 to 26"),
        ({"choices": {"label": ["A", "B"], "text": ["bank"]}}, "2 labels and 1 texts"),
        ({"choices": {"label": ["A", "A"], "text": ["bank", "mall"]}}, "labelled A A; expected each label once"),
        ({"choices": {"label": ["A", "B"], "text": ["bank", " "]}}, "an option whose text is ' '"),
        ({"choices": [{"text": "bank"}, {"label": "B", "text": "mall"}]}, "an option whose label is None"),
        ({"choices": "A. bank"}, "column 'choices' holds the options as 'A. bank'"),
    ],
)
def test_a_malformed_row_says_what_was_expected(change: dict[str, Any], message: str):
    with pytest.raises(SourceError) as caught:
        parsed(HUB | change)
    assert message in str(caught.value)


def test_a_question_of_many_megabytes_is_too_long_to_be_cut():
    with pytest.raises(SourceError, match=r"^too long: a question of 5000000 characters"):
        parsed(HUB | {"question": "word " * 10**6})


def test_the_sample_is_spread_over_the_letters():
    found = read_examples(ChoiceSource(source="sample"), default=SOURCE, sample=SAMPLE, parse=parse_row).examples
    assert len(found) >= 60
    assert len({example.question for example in found}) == len({example.example_id for example in found}) == len(found)
    assert all(len({choice.text for choice in example.choices}) == 5 for example in found)
    assert all([choice.label for choice in example.choices] == list("ABCDE") for example in found)
    assert all(example.concept for example in found)
    counts = Counter(example.gold_label for example in found)
    assert set(counts) == set("ABCDE")
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_slices_of_the_real_dataset_are_read(shared: Path):
    for name, count in (("train_500.jsonl", 500), ("dev_300.jsonl", 300)):
        settings = ChoiceSource(source=str(shared / "data/commonsenseqa" / name))
        found = read_examples(settings, default=SOURCE, sample=SAMPLE, parse=parse_row).examples
        assert len(found) == count
        assert all(len(example.choices) == 5 and example.label_idx is not None for example in found)


def test_a_csv_file_is_read(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("id,question,A,B,C,answerKey\nx1,Where?,here,there,nowhere,C\nx2,When?,now,later,,A\n")
    found = read_examples(ChoiceSource(source=str(path)), default=SOURCE, sample=SAMPLE, parse=parse_row).examples
    assert [(q.example_id, q.gold_label, len(q.choices)) for q in found] == [("x1", "C", 3), ("x2", "A", 2)]


@pytest.mark.parametrize("has_types", [True, False])
def test_options_are_encoded_as_the_tokenizer_encodes_pairs(has_types: bool):
    tokenizer = bert_like(has_types=has_types)
    encoded = encode_choices(tokenizer, QUESTION, CHOICES, None)
    for choice, one in zip(CHOICES, encoded, strict=True):
        plain = tokenizer(QUESTION, choice.text)
        assert one.input_ids == plain.input_ids
        assert one.token_type_ids == (plain.token_type_ids if has_types else None)
        assert one.num_cut == 0
        assert one.text == f"{QUESTION} {choice.text}"


def test_offsets_point_at_the_tokens_in_the_text():
    tokenizer = bert_like()
    for one in encode_choices(tokenizer, QUESTION, CHOICES, 9):
        pieces = [one.text[start:stop] for start, stop in one.offsets]
        tokens = tokenizer.convert_ids_to_tokens(one.input_ids)
        assert pieces == ["" if token.startswith("[") else token for token in tokens]


def test_only_the_beginning_of_the_question_is_cut():
    tokenizer = bert_like()
    encoded = encode_choices(tokenizer, QUESTION, CHOICES, 8)
    texts = [tokenizer.decode(one.input_ids) for one in encoded]
    assert texts == ["[CLS] wide blue sea ? [SEP] water [SEP]", "[CLS] blue sea ? [SEP] sand dune [SEP]"]
    assert [one.num_cut for one in encoded] == [6, 7]
    assert [len(one.input_ids) for one in encoded] == [8, 8]


def test_an_option_that_leaves_no_room_for_the_question_is_refused():
    tokenizer = bert_like()
    assert len(encode_choices(tokenizer, QUESTION, CHOICES, 6)[1].input_ids) == 6
    with pytest.raises(ConfigError, match=r"--max-seq-len 5 leaves no room .* 'sand dune'; .* give 6 at least"):
        encode_choices(tokenizer, QUESTION, CHOICES, 5)


def test_a_character_of_several_tokens_goes_whole():
    tokenizer = tiny_tokenizer()
    question = "🙂🙂 ok?"
    assert len(tokenizer("🙂").input_ids) >= 4

    def excess(text: str, limit: int) -> int:
        return len(tokenizer(text).input_ids) - limit

    kept = {cut_to_fit(tokenizer, question, lambda text, n=limit: excess(text, n)) for limit in range(1, 14)}
    assert kept <= {question, "🙂 ok?", "ok?", "k?", "?"}
    assert cut_to_fit(tokenizer, question, lambda text: 1) is None


def test_a_real_tokenizer_keeps_what_is_left_a_text(shared: Path):
    tokenizer = GPT2TokenizerFast.from_pretrained(shared / "tokenizers/gpt2")
    question = "Sammy wanted to go to where the people were.  Where might he go?"
    for limit in range(2, 16):
        kept = cut_to_fit(tokenizer, question, lambda text, n=limit: len(tokenizer(text).input_ids) - n)
        assert kept is not None
        assert question.endswith(kept)
        assert len(tokenizer(kept).input_ids) <= limit
