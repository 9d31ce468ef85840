"""Documents and gold words: every kind in every form, what is joined, and what is said of a malformed row."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import builders.kit.files
import builders.kit.sources
from builders.kit.columns import TextSource
from builders.kit.sources import HubSource, SourceRow
from builders.next_token.record import Word
from builders.next_token.texts import EMOTIONS, HUB, SAMPLES, Document, Line, parse_row, read_documents
from builders.next_token.treebanks import UPOS, sentence_text, words_of
from tracekit.errors import ConfigError, SourceError

# They didn't go home. The 4.1 is understood: it stands nowhere.
SENTENCE = [
    ("1", "They", "they", "PRON", "4", "nsubj", "_"),
    ("2-3", "didn't", "_", "_", "_", "_", "_"),
    ("2", "did", "do", "AUX", "4", "aux", "_"),
    ("3", "n't", "not", "PART", "4", "advmod", "_"),
    ("4", "go", "go", "VERB", "0", "root", "_"),
    ("4.1", "home", "home", "NOUN", "_", "_", "_"),
    ("5", "🏠", "🏠", "SYM", "4", "discourse", "SpaceAfter=No"),
    ("6", ".", ".", "PUNCT", "4", "punct", "_"),
]
TEXT = "They didn't go 🏠."


def documents(source: str | Path, kind: Any = "auto", **settings: Any) -> list[Document]:
    return read_documents(TextSource(source=str(source), **settings), kind).examples


def parsed(kind: Any = "auto", **data: Any) -> Document | Line:
    return parse_row(SourceRow(7, "here", data), kind)


def document(kind: Any = "auto", **data: Any) -> Document:
    found = parsed(kind, **data)
    assert isinstance(found, Document)
    return found


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def conllu(rows: list[tuple[str, ...]], *comments: str) -> str:
    lines = [f"# {comment}" for comment in comments]
    lines += [
        "\t".join((i, form, lemma, upos, "_", "_", head, rel, "_", misc))
        for i, form, lemma, upos, head, rel, misc in rows
    ]
    return "\n".join(lines) + "\n\n"


def columns(rows: list[tuple[str, ...]]) -> dict[str, Any]:
    names = ("id", "form", "lemma", "upos", "head", "deprel", "misc")
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def hub_row(*, mixed: bool) -> dict[str, Any]:
    """The sentence as the Hub has it: words alone with the others beside them, or all mixed and without ids."""
    rows = SENTENCE if mixed else [row for row in SENTENCE if row[0].isdigit()]
    data: dict[str, Any] = {
        "text": TEXT,
        "tokens": [row[1] for row in rows],
        "lemmas": [row[2] for row in rows],
        "upos": [UPOS.index(row[3]) for row in rows],
        "head": ["None" if row[4] == "_" and mixed else row[4] for row in rows],
        "deprel": [row[5] for row in rows],
    }
    if mixed:
        return {"idx": "s-1", **data}
    node = {"id": "4.1", "form": "home", "lemma": "home", "upos": "NOUN", "head": "_", "deprel": "_"}
    mwt = {"id": "2-3", "form": "didn't", "feats": None, "misc": None}
    return {"sent_id": "s-1", **data, "misc": [None] * len(rows), "mwt": [mwt], "empty_nodes": [node]}


def test_words_stand_where_the_text_has_them():
    words = words_of(columns(SENTENCE), TEXT)
    assert [(w.id, w.start_char, w.stop_char) for w in words] == [
        ("1", 0, 4),
        ("2-3", 5, 11),
        ("2", 5, 8),
        ("3", 8, 11),
        ("4", 12, 14),
        ("4.1", None, None),
        ("5", 15, 16),
        ("6", 16, 17),
    ]
    assert words[1] == Word(
        id="2-3",
        form="didn't",
        lemma=None,
        upos=None,
        head=None,
        deprel=None,
        start_char=5,
        stop_char=11,
        start_token=None,
        stop_token=None,
    )
    assert (words[2].lemma, words[2].upos, words[2].head, words[2].deprel) == ("do", "AUX", 4, "aux")
    assert (words[4].head, words[4].deprel) == (0, "root")


@pytest.mark.parametrize("mixed", [False, True])
def test_the_hubs_columns_give_the_same_words_as_conllu(mixed: bool):
    found = document(**hub_row(mixed=mixed))
    assert (found.kind, found.id, found.text) == ("ud_ewt", "s-1", TEXT)
    assert found.words == words_of(columns(SENTENCE), TEXT)


def test_words_that_do_not_spell_their_token_lie_in_all_of_it():
    rows = [
        ("1-2", "del", "_", "_", "_", "_", "SpaceAfter=No"),
        ("1", "de", "de", "ADP", "3", "case", "_"),
        ("2", "el", "el", "DET", "3", "det", "_"),
        ("3", "_", "_", "SYM", "0", "root", "_"),
    ]
    words = words_of(columns(rows), "del_")
    assert [(w.start_char, w.stop_char) for w in words] == [(0, 3), (0, 3), (0, 3), (3, 4)]
    assert [w.lemma for w in words] == [None, "de", "el", "_"]


def test_a_text_is_made_of_the_words_where_none_is_given():
    assert sentence_text(columns(SENTENCE)) == TEXT
    assert sentence_text(columns(SENTENCE) | {"text": "as given"}) == "as given"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": ["They"] * 8}, "word 2-3 'They' is not in the text at character 5.*found \"didn't go"),
        ({"form": ["They"]}, "no words; expected lists of one length"),
        ({"lemma": None}, "no words; expected lists of one length"),
        ({"id": ["1", "2-3", "2", "3", "4", "4.1", "5", "5"]}, "id '5' of '.'; expected 6"),
        ({"id": ["1", "3-2", "2", "3", "4", "4.1", "5", "6"]}, "id '3-2'"),
        ({"id": ["1", "2-x", "2", "3", "4", "4.1", "5", "6"]}, "id '2-x'"),
        ({"upos": [99] * 8}, None),
    ],
)
def test_a_sentence_that_is_none_says_what_is_wrong(change: dict[str, Any], message: str | None):
    data = columns(SENTENCE) | change
    if message is None:  # numbers stand for parts of speech in the Hub's rows only
        data = hub_row(mixed=False) | {"upos": [99] * 6}
        message = "part of speech 99; expected a name, or 0 to 17"
    with pytest.raises(ValueError, match=message):
        words_of(data, TEXT)


def test_a_conllu_file_is_read_sentence_by_sentence(tmp_path: Path):
    text = "\n\n" + conllu(SENTENCE, "newdoc id = d", "sent_id = a", f"text = {TEXT}") + conllu(SENTENCE[:1])
    found = documents(write(tmp_path / "x.conllu", text.replace("\n", "\r\n")))
    assert [(d.index, d.id, d.text, d.kind) for d in found] == [(0, "a", TEXT, "ud_ewt"), (1, "1", "They", "ud_ewt")]
    assert found[0].words == words_of(columns(SENTENCE), TEXT)
    assert documents(tmp_path / "x.conllu", offset=1)[0].id == "1"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("1\tgo\tgo\n\n", r"x\.conllu line 13: line 13: 3 columns between tabs; expected the 10"),
        ("# sent_id = b\n\n", r"x\.conllu line 13: a sentence without words"),
        (conllu(SENTENCE, "text = They did."), r"x\.conllu line 13: word 2-3 \"didn't\" is not in the text"),
    ],
)
def test_a_malformed_sentence_is_named_by_its_line_or_left_out(tmp_path: Path, broken: str, message: str):
    good = conllu(SENTENCE, "sent_id = a", f"text = {TEXT}", "newpar")
    path = write(tmp_path / "x.conllu", good + broken + good)
    with pytest.raises(SourceError, match=message):
        documents(path)
    found = read_documents(TextSource(source=str(path), on_bad_row="skip"))
    assert [d.index for d in found.examples] == [0, 2]
    assert len(found.source.skipped) == 1


def test_labels_are_named(tmp_path: Path):
    path = write(tmp_path / "x.tsv", 'He said "no\t4,27\tab\n\nOh\t26\tcd\r\n')
    assert [(d.index, d.id, d.kind, d.text, d.labels) for d in documents(path)] == [
        (0, "ab", "go_emotions", 'He said "no', ["approval", "neutral"]),
        (1, "cd", "go_emotions", "Oh", ["surprise"]),
    ]
    assert document(text="Oh", labels=[26, 0], id="edcu99z").labels == ["surprise", "admiration"]
    assert document("go_emotions", text="Oh", labels=["joy"]).labels == ["joy"]
    assert document("text", text="Oh", labels=["pos"]).labels == []
    assert len(EMOTIONS) == len(set(EMOTIONS)) == 28


OTHERS = [
    ("x.tsv", "great film\t1\nbad film\t0\n"),
    ("x.tsv", "great film\tpositive\tr1\n"),
    ("x.tsv", "great film\t1\t17\n"),
    ("x.tsv", "text\tlabel\nbad film\t0\n"),
    ("x.csv", "text,labels\nbad film,0\n"),
    ("x.csv", "text,labels,id\nbad film,[0],edcu99z\n"),
    ("x.jsonl", '{"text": "bad film", "labels": [0]}\n'),
    ("x.jsonl", '{"text": "bad film", "labels": ["joy"], "id": "edcu99z"}\n'),
    ("x.jsonl", '{"text": "bad film", "labels": [1], "id": 17}\n'),
    ("x.jsonl", '{"text": "bad film", "labels": [1], "id": "edcu99z", "split": "train"}\n'),
    ("x.jsonl", '{"text": "bad film", "labels": [28], "id": "edcu99z"}\n'),
    ("x.jsonl", '{"text": "bad film", "label": 1, "id": "edcu99z"}\n'),
]


@pytest.mark.parametrize(("name", "content"), OTHERS)
def test_other_sets_with_labels_are_texts_without_emotions(
    tmp_path: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
):
    found = documents(write(tmp_path / name, content))
    assert {(d.kind, *d.labels) for d in found} == {("text",)}
    assert found[-1].text.endswith("film")
    assert "is not read; where it has GoEmotions' labels, pass --kind go_emotions" in capsys.readouterr().err


@pytest.mark.parametrize(
    "cell", ["4,27", "[4, 27]", "[ 4 27]", "['approval', 'neutral']", "['approval' 'neutral']", "approval,neutral"]
)
def test_labels_of_a_flat_file_are_read_where_they_are_asked_for(tmp_path: Path, cell: str):
    path = write(tmp_path / "x.csv", f'body,emotion\nOh,"{cell}"\n')
    (found,) = documents(path, "go_emotions", text_column="body", label_column="emotion")
    assert (found.text, found.labels) == ("Oh", ["approval", "neutral"])
    with pytest.raises(ConfigError, match=r"column 'emotion' - at `\$\.source\.label_column`"):
        documents(path, text_column="body", label_column="emotion")


def test_the_first_row_says_what_all_rows_are(tmp_path: Path):
    path = write(tmp_path / "x.tsv", "Hm\tgood\tr1\nOh\t26\tcd\n")
    assert [(d.kind, d.text, d.labels) for d in documents(path)] == [("text", "Hm", []), ("text", "Oh", [])]


def test_a_treebank_of_a_csv_file_is_read(tmp_path: Path):
    row = hub_row(mixed=True)
    datasets.Dataset.from_list([row]).to_csv(tmp_path / "x.csv")
    assert documents(tmp_path / "x.csv")[0].words == words_of(columns(SENTENCE), TEXT)


@pytest.mark.parametrize("label", ["28", "-1", "x", "4,", ""])
def test_a_label_that_is_none_names_file_and_line(tmp_path: Path, label: str):
    path = write(tmp_path / "x.tsv", f"Oh\t26\tcd\n\nHm\t{label}\tef\n")
    with pytest.raises(SourceError, match=r"x\.tsv line 3: label .*expected ids 0 to 27"):
        documents(path)


def test_a_question_and_its_answer_are_one_text():
    choices = [{"label": "A", "text": "bank"}, {"label": "B", "text": "library"}]
    own = {"id": "q", "question": {"stem": "Where?", "question_concept": "door", "choices": choices}}
    hub = {"id": "q", "question": "Where?", "choices": {"label": ["A", "B"], "text": ["bank", "library"]}}
    for data in (own, hub):
        found = document(**data, answerKey="B")
        assert (found.kind, found.id, found.text) == ("csqa", "q", "Where? library")
        assert (found.question, found.answer) == ("Where?", "library")
        unlabelled = document(**data, answerKey="")
        assert (unlabelled.text, unlabelled.answer) == ("Where?", None)


def test_lines_of_a_raw_file_are_the_file_again(tmp_path: Path):
    text = " \n = A = \n \n one \n two \n"
    for suffix in (".txt", ".raw", ".tokens"):
        path = write(tmp_path / f"x{suffix}", text)
        (found,) = documents(path)
        assert (found.index, found.id, found.kind, found.text) == (0, f"{path.name} 0-4", "text", text)
    (part,) = documents(tmp_path / "x.raw", "wikitext103", offset=1, limit=3)
    assert (part.index, part.id, part.kind, part.text) == (1, "x.raw 1-3", "wikitext103", " = A = \n \n one \n")


def test_lines_that_are_rows_are_joined_by_two_line_feeds(tmp_path: Path):
    texts = ["", " = A = \n", "", " one \n"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet")
    (found,) = documents(tmp_path / "x.parquet", "wikitext2")
    assert found.text == "\n\n".join(texts)
    with pytest.raises(SourceError, match=r"x\.parquet row 0: no text in 'text'.*--kind wikitext2"):
        documents(tmp_path / "x.parquet")


def test_lines_without_anything_are_refused(tmp_path: Path):
    with pytest.raises(SourceError, match="lines 0 to 1 are blank"):
        documents(write(tmp_path / "x.txt", " \n\n"))


def test_other_texts_are_documents_each(tmp_path: Path):
    rows = [{"text": "one", "title": "T"}, {"text": "two"}]
    path = write(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [(d.id, d.kind, d.text) for d in documents(path)] == [("T", "text", "one"), ("1", "text", "two")]
    assert [d.text for d in documents(write(tmp_path / "x.tsv", "one\ntwo\n"))] == ["one", "two"]
    assert [d.text for d in documents(write(tmp_path / "x.csv", "text\none\n"))] == ["one"]


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("auto", {"context": "x"}, "columns of no kind that is known.*found: context"),
        ("auto", {"text": " "}, "no text in 'text'"),
        ("auto", {"text": 3}, "found 3"),
        ("go_emotions", {"text": "x"}, "label None"),
        ("ud_ewt", {"text": "x"}, "no words"),
        ("csqa", {"text": "x"}, "no question"),
        ("wikitext2", {"line": None}, "no text in 'line'"),
    ],
)
def test_a_row_of_another_kind_says_what_was_expected(kind: Any, data: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        parsed(kind, **data)


@pytest.mark.parametrize(
    ("source", "kind", "num_documents"),
    [
        ("sample", "text", 1),
        ("sample:text", "text", 1),
        ("sample:ud_ewt", "ud_ewt", 12),
        ("sample:go_emotions", "go_emotions", 12),
        ("sample:csqa", "csqa", 60),
        ("sample:wikitext2", "wikitext2", 1),
        ("sample:wikitext103", "wikitext103", 1),
    ],
)
def test_there_is_a_sample_of_every_kind(source: str, kind: str, num_documents: int):
    found = documents(source)
    assert {d.kind for d in found} == {kind}
    assert len(found) >= num_documents
    assert {kind for kind, path in SAMPLES.items() if path.exists()} == set(SAMPLES)


def test_the_treebank_sample_has_what_is_hard():
    words = [word for d in documents("sample:ud_ewt") for word in d.words]
    assert {word.id for word in words} >= {"5.1", "1-2", "3-4"}
    assert "😋" in [word.form for word in words]
    assert sum(1 for text in documents("sample")[0].text.split("\n") if text.strip() and " = " not in text) >= 12


def test_names_stand_for_the_originals_on_the_hub(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[HubSource, str | None, str]] = []

    def open_hub(hub: HubSource, revision: str | None, split: str) -> Any:
        asked.append((hub, revision, split))
        return builders.kit.files.Table(
            hub.id, "r", hub.subset, 1, lambda window: iter([SourceRow(0, "x", {"text": "x\n"})])
        )

    monkeypatch.setattr(builders.kit.sources, "_open_hub", open_hub)
    for name in ("wikitext2", "wikitext103", "default"):
        assert documents(name, split="test")[0].kind == ("wikitext2" if name == "default" else name)
    assert [hub.subset for hub, _, _ in asked] == ["wikitext-2-raw-v1", "wikitext-103-raw-v1", "wikitext-2-raw-v1"]
    assert documents("Salesforce/wikitext:wikitext-103-raw-v1@abc")[0].kind == "wikitext103"
    assert documents("Salesforce/wikitext:wikitext-2-v1")[0].kind == "text"
    assert {hub.id for hub in HUB.values()} == {
        "universal-dependencies/universal_dependencies",
        "google-research-datasets/go_emotions",
        "tau/commonsense_qa",
        "Salesforce/wikitext",
    }


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("sample:poems", "auto", "the samples are sample:ud_ewt sample:go_emotions"),
        ("sample:", "auto", "the samples are"),
        ("sample:csqa", "ud_ewt", "--kind ud_ewt.*is csqa"),
        ("wikitext2", "wikitext103", "--kind wikitext103.*is wikitext2"),
    ],
)
def test_a_kind_that_contradicts_the_source_is_refused(source: str, kind: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        documents(source, kind)


def test_the_kind_names_the_sample_too():
    assert documents("sample", "csqa")[0].kind == "csqa"


@pytest.mark.parametrize(
    ("file", "kind", "num_documents"),
    [
        ("ud_ewt/slice_dev_200.conllu", "ud_ewt", 200),
        ("ud_ewt/slice_test_200.conllu", "ud_ewt", 200),
        ("ud_ewt/slice_train_300.conllu", "ud_ewt", 300),
        ("goemotions/slice_dev_300.tsv", "go_emotions", 300),
        ("commonsenseqa/dev_300.jsonl", "csqa", 300),
        ("wikitext/slice_articles_12.jsonl", "text", 12),
        ("wikitext/slice_test_300lines.raw", "text", 1),
        ("wikitext/wiki.valid.tokens.txt", "text", 1),
    ],
)
def test_slices_of_the_real_datasets_are_read(shared: Path, file: str, kind: str, num_documents: int):
    found = documents(shared / "data" / file)
    assert (len(found), {d.kind for d in found}) == (num_documents, {kind})
    if num_documents == 1:
        assert found[0].text == (shared / "data" / file).read_text(encoding="utf-8")


def test_gold_words_of_the_real_treebank_are_where_they_are_said_to_be(shared: Path):
    num_multiword = num_empty = 0
    for path in sorted((shared / "data/ud_ewt").glob("*.conllu")):
        for found in documents(path):
            for word in found.words:
                num_empty += "." in word.id
                num_multiword += "-" in word.id
                if word.start_char is None:
                    assert "." in word.id
                else:
                    assert found.text[word.start_char : word.stop_char] == word.form
    assert num_multiword > 50
    assert num_empty == 3
