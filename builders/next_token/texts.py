"""Documents: texts to run a language model over, with what their source says of them.

    ud_ewt        UD English EWT: a sentence a document, with its gold words; CoNLL-U, or the Hub's columns
    go_emotions   GoEmotions: a comment a document, with the names of its labels; TSV (text, label ids, id), or columns
                  `text`, `labels` and `id`; another set with such columns is `text`, and its labels are not read
    csqa          CommonsenseQA: a question and its right answer (where it is known) as one text
    wikitext2     WikiText-2 and WikiText-103, raw: all lines that are read are one document, as perplexity over them is
    wikitext103   usually computed; a .raw, .tokens or .txt file, or column `text`
    text          any other: each `text` of a table is a document, and so is a raw text file

    https://huggingface.co/datasets/universal-dependencies/universal_dependencies   en_ewt                  CC BY-SA 4.0
    https://huggingface.co/datasets/google-research-datasets/go_emotions            simplified              Apache-2.0
    https://huggingface.co/datasets/tau/commonsense_qa                                                      MIT
    https://huggingface.co/datasets/Salesforce/wikitext                             wikitext-{2,103}-raw-v1 CC BY-SA
    one row of GoEmotions   I've never been this sad in my life!<tab>25<tab>edcu99z

The first five are names of their Hub originals, too. Of other sources the columns of the first row tell the kind,
unless `--kind` does. Nothing tells WikiText's lines in a Parquet or JSONL file from short texts: pass
`--kind wikitext2`.

Lines of a raw text file are joined as they stand, so that the document is the file; lines that are rows of a table (the
Hub's, whose blank lines are empty) are joined by two line feeds, as is usual there. `--offset` and `--limit` count
rows, in WikiText lines: they bound what has to be in memory, and cut its one document.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from builders.kit.cells import Cells, Columns
from builders.kit.columns import TextSource
from builders.kit.csqa_questions import COLUMNS as CSQA_COLUMNS
from builders.kit.csqa_questions import SAMPLE as CSQA_SAMPLE
from builders.kit.csqa_questions import SOURCE as CSQA
from builders.kit.csqa_questions import parse_row as parse_question
from builders.kit.sources import HubSource, SourceRow, read_examples
from builders.next_token.config import Kind
from builders.next_token.record import Word
from builders.next_token.treebanks import sentence_text, words_of
from tracekit.console import say
from tracekit.errors import ConfigError, SourceError
from tracekit.task import Examples

__all__ = ["EMOTIONS", "HUB", "SAMPLES", "Document", "Kind", "Line", "parse_row", "read_documents"]

HUB: dict[Kind, HubSource] = {
    "ud_ewt": HubSource("universal-dependencies/universal_dependencies", "en_ewt"),
    "go_emotions": HubSource("google-research-datasets/go_emotions", "simplified"),
    "csqa": CSQA,
    "wikitext2": HubSource("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext103": HubSource("Salesforce/wikitext", "wikitext-103-raw-v1"),
}
"""The originals on the Hub."""

_FOLDER = Path(__file__).parent
SAMPLES: dict[Kind, Path] = {
    "ud_ewt": _FOLDER / "next_token_ud_ewt.conllu",
    "go_emotions": _FOLDER / "next_token_go_emotions.tsv",
    "csqa": CSQA_SAMPLE,
    "wikitext2": _FOLDER / "next_token_wikitext.txt",
    "wikitext103": _FOLDER / "next_token_wikitext.txt",
    "text": _FOLDER / "next_token_wikitext.txt",
}
"""Small samples of every kind, written for this project."""

EMOTIONS = (
    *("admiration", "amusement", "anger", "annoyance", "approval", "caring", "confusion", "curiosity", "desire"),
    *("disappointment", "disapproval", "disgust", "embarrassment", "excitement", "fear", "gratitude", "grief", "joy"),
    *("love", "nervousness", "optimism", "pride", "realization", "relief", "remorse", "sadness", "surprise", "neutral"),
)
"""GoEmotions' labels by their ids."""

COLUMNS: Columns = {
    "text": ("text", "1"),
    "label": ("labels", "label", "2"),
    "id": ("id", "title"),
}
"""The columns of texts that are read; those of questions are CommonsenseQA's."""

_DEFAULT: Kind = "wikitext2"
_WORD = re.compile(r"\w+")
_COMMENT_ID = re.compile(r"[a-z0-9]{7}")
"""What Reddit, where GoEmotions' comments are from, calls a comment: `edcu99z`."""


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """One text."""

    index: int
    """Row in the source; of lines that were joined, the first."""
    id: str
    """The source's own id, else the row, or for joined lines the source's name with their range."""
    kind: Kind
    """What it is."""
    text: str
    """The text."""
    words: list[Word] = []
    """Gold words (ud_ewt), with characters in `text`; their tokens are null."""
    labels: list[str] = []
    """Names of the gold labels (go_emotions)."""
    question: str | None = None
    """The question (csqa)."""
    answer: str | None = None
    """The right answer (csqa); None where it is not known."""


class Line(NamedTuple):
    """A row that is only part of a document."""

    row: int
    """Row in the source."""
    kind: Kind
    """What the document is."""
    text: str
    """The line; may be empty."""
    separator: str
    """What stands between it and the next."""


def read_documents(config: TextSource, kind: Kind | Literal["auto"] = "auto") -> Examples[Document]:
    """The documents of a source: a name of `HUB`, `sample`, `sample:KIND`, a local file, or a Hub id.

    Raises:
        ConfigError: the source is of another kind than `kind` says, or of none.
        SourceError: as builders.kit.sources.read_examples.
    """
    source, own = _known(config.source, kind)
    if own is not None and kind not in ("auto", own):
        raise ConfigError(f"--kind {kind} - at `$.kind`; the source {config.source!r} is {own}; leave --kind out")
    reader = _RowReader(own or kind)
    found = read_examples(
        msgspec.structs.replace(config, source=source),
        default=HUB[own or _DEFAULT] if source == "default" else HUB[_DEFAULT],
        sample=SAMPLES[own or "text"],
        parse=reader.read,
        columns={**CSQA_COLUMNS, **COLUMNS},
    )
    if reader.kind == "text" and config.label_column is not None:
        raise ConfigError(
            f"column {config.label_column!r} - at `$.source.label_column`; texts have no labels here; leave it "
            "out, or pass --kind go_emotions where the labels are GoEmotions'"
        )
    lines = [example for example in found.examples if isinstance(example, Line)]
    documents = [example for example in found.examples if isinstance(example, Document)]
    return Examples([*documents, *_joined(lines, found.source.id)], found.source)


class _RowReader:
    """Reads the rows of a source, all as the same kind: `auto` is what the first row is that has one."""

    def __init__(self, kind: Kind | Literal["auto"]) -> None:
        self.kind: Kind | Literal["auto"] = kind

    def read(self, row: SourceRow) -> Document | Line:
        """A row as a document, or as a line of one."""
        if self.kind == "auto":
            cells = Cells(row, COLUMNS)
            self.kind = _kind_of(cells)
            name, value = cells.first("label")
            if self.kind == "text" and value is not None:
                say(f"column {name!r} is not read; where it has GoEmotions' labels, pass --kind go_emotions")
        return parse_row(row, self.kind)


def _known(source: str, kind: str) -> tuple[str, Kind | None]:
    """A source as builders.kit.sources names it, and its kind where its name says it.

    Raises:
        ConfigError: there is no such sample.
    """
    kinds: dict[str, Kind] = {known: known for known in SAMPLES}
    name, colon, rest = source.partition(":")
    if name == "sample":
        wanted = rest if colon else kind if kind != "auto" else "text"
        if wanted not in kinds:
            raise ConfigError(
                f"source {source!r} - at `$.source.source`; the samples are "
                f"{' '.join(f'sample:{known}' for known in SAMPLES)}"
            )
        return "sample", kinds[wanted]
    if source == "default":
        return source, _DEFAULT
    if source in HUB:
        return "default", kinds[source]
    address = source.partition("@")[0]
    return source, next((known for known, hub in HUB.items() if address in (hub.id, f"{hub.id}:{hub.subset}")), None)


def parse_row(row: SourceRow, kind: Kind | Literal["auto"] = "auto") -> Document | Line:
    """A row as a document, or as a line of one; `auto` goes by its columns.

    Raises:
        SourceError: no text, or the kind's own columns are missing or wrong.
    """
    cells = Cells(row, COLUMNS)
    found = _kind_of(cells) if kind == "auto" else kind
    if found in ("wikitext2", "wikitext103") or (found == "text" and "line" in cells.data):
        is_line = "line" in cells.data
        column = "line" if is_line else cells.names("text")[0]
        line = row.data.get(column)
        if not isinstance(line, str):
            raise SourceError(f"no text in {column!r}; expected some, found {line!r}; columns: {cells.listed}")
        return Line(row.index, found, line, "" if is_line else "\n\n")
    if found == "ud_ewt":
        data = {name: value if name == "text" else cells.structure(name, value) for name, value in cells.data.items()}
        text = sentence_text(data)
        cells = Cells(row, {**COLUMNS, "id": ("sent_id", "idx")})
        return _document(row, cells.identity(), found, text, words=words_of(data, text))
    if found == "csqa":
        asked = parse_question(row)
        answer = None if asked.label_idx is None else asked.choices[asked.label_idx].text
        text = asked.question if answer is None else f"{asked.question} {answer}"
        return _document(row, asked.example_id, found, text, question=asked.question, answer=answer)
    text = _text(cells)
    if found == "go_emotions":
        cells = Cells(row, {**COLUMNS, "id": ("id", "3")})
        name, value = cells.first("label")
        return _document(row, cells.identity(), found, text, labels=_labels(name, cells.structure(name, value)))
    return _document(row, cells.identity(), "text", text)


def _kind_of(cells: Cells) -> Kind:
    """What the columns of a row say.

    Raises:
        SourceError: they are columns of no kind.
    """
    data = cells.data
    if "head" in data and ("form" in data or "tokens" in data):
        return "ud_ewt"
    if cells.named("question"):
        return "csqa"
    if not cells.named("text"):
        if "question" in data and ("choices" in data or isinstance(data["question"], dict)):
            return "csqa"
        if _is_go_emotions(data):
            return "go_emotions"
    if "line" in data or any(name in data for name in cells.names("text")):
        return "text"
    raise SourceError(
        "columns of no kind that is known; expected `text`, `question` and `choices`, or a treebank's; name the column "
        f"of the text by --text-column, or say --kind; found: {cells.listed}"
    )


def _is_go_emotions(data: dict[str, Any]) -> bool:
    """Whether a row has GoEmotions' exact form: other sets number other labels."""
    if data.keys() == {"1", "2", "3"}:
        ids, identity, is_id = str(data["2"]).split(","), str(data["3"]), _WORD
    elif data.keys() == {"text", "labels", "id"} and isinstance(data["labels"], list):
        ids, identity, is_id = list(map(str, data["labels"])), str(data["id"]), _COMMENT_ID
    else:
        return False
    return (
        all(_is_emotion_id(one) for one in ids) and not identity.isdecimal() and is_id.fullmatch(identity) is not None
    )


def _is_emotion_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) < len(EMOTIONS)


def _document(row: SourceRow, identity: str, kind: Kind, text: str, **known: Any) -> Document:
    if not text.strip():
        raise SourceError(f"no text (kind {kind}); expected some characters, found {text!r}")
    return Document(index=row.index, id=identity, kind=kind, text=text, **known)


def _joined(lines: Sequence[Line], source: str) -> list[Document]:
    """The one document that lines make; none where there are no lines.

    Raises:
        SourceError: there is nothing in them.
    """
    if not lines:
        return []
    first, last = lines[0].row, lines[-1].row
    text = lines[0].separator.join(line.text for line in lines)
    if not text.strip():
        raise SourceError(
            f"{source} lines {first} to {last} are blank; expected text; raise --limit or change --offset"
        )
    return [Document(index=first, id=f"{source} {first}-{last}", kind=lines[0].kind, text=text)]


def _text(cells: Cells) -> str:
    try:
        return cells.text("text", what=f"text in {cells.names('text')[0]!r}")
    except SourceError as error:
        raise SourceError(f"{error} (blank lines of WikiText: pass --kind wikitext2)") from error


def _labels(name: str, value: Any) -> list[str]:
    """Names of labels given as a list or as `4,27`, each an id or a name."""
    given = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    names: list[str] = []
    for label in given:
        text = str(int(label) if isinstance(label, float) and label.is_integer() else label).strip()
        if not _is_emotion_id(text) and text not in EMOTIONS:
            raise SourceError(
                f"label {label!r} in column {name!r}; expected ids 0 to {len(EMOTIONS) - 1} of GoEmotions, or its "
                "names; for texts with other labels pass --kind text"
            )
        names.append(EMOTIONS[int(text)] if _is_emotion_id(text) else text)
    return names
