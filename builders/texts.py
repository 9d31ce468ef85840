"""Documents: texts to run a language model over, with what their source says of them.

    ud_ewt        UD English EWT: a sentence a document, with its gold words; CoNLL-U, or the Hub's columns
    go_emotions   GoEmotions: a comment a document, with the names of its labels; TSV (text, label ids, id), or columns
                  `text` and `labels`
    csqa          CommonsenseQA: a question and its right answer (where it is known) as one text
    wikitext2     WikiText-2 and WikiText-103, raw: all lines that are read are one document, as perplexity over them is
    wikitext103   usually computed; a .raw, .tokens or .txt file, or column `text`
    text          any other: each `text` of a table is a document, and so is a raw text file

    https://huggingface.co/datasets/universal-dependencies/universal_dependencies   en_ewt                  CC BY-SA 4.0
    https://huggingface.co/datasets/google-research-datasets/go_emotions            simplified              Apache-2.0
    https://huggingface.co/datasets/tau/commonsense_qa                                                      MIT
    https://huggingface.co/datasets/Salesforce/wikitext                             wikitext-{2,103}-raw-v1 CC BY-SA
    one row of GoEmotions   I've never been this sad in my life!<tab>25<tab>edcu99z

The first five are names of their Hub originals, too. A local file tells what it is by its suffix and columns, except
that nothing tells WikiText's lines in a Parquet or JSONL file from short texts: `--kind wikitext2` says so.

Lines of a raw text file are joined as they stand, so that the document is the file; lines that are rows of a table (the
Hub's, whose blank lines are empty) are joined by two line feeds, as is usual there. `--offset` and `--limit` count
rows, in WikiText lines: they bound what has to be in memory, and cut its one document.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from builders.configs import Kind
from builders.csqa_questions import SAMPLE as CSQA_SAMPLE
from builders.csqa_questions import SOURCE as CSQA
from builders.csqa_questions import parse_row as parse_question
from builders.sources import Examples, HubSource, Row, read_examples
from builders.treebanks import sentence_text, words_of
from tracekit.config import SourceConfig
from tracekit.errors import ConfigError, SourceError
from tracekit.records import Word

__all__ = ["EMOTIONS", "HUB", "SAMPLES", "Document", "Kind", "Line", "parse_row", "read_documents"]

HUB: dict[Kind, HubSource] = {
    "ud_ewt": HubSource("universal-dependencies/universal_dependencies", "en_ewt"),
    "go_emotions": HubSource("google-research-datasets/go_emotions", "simplified"),
    "csqa": CSQA,
    "wikitext2": HubSource("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext103": HubSource("Salesforce/wikitext", "wikitext-103-raw-v1"),
}
"""The originals on the Hub."""

_FOLDER = Path(__file__).parent / "samples"
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

_DEFAULT: Kind = "wikitext2"


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


def read_documents(config: SourceConfig, kind: Kind | Literal["auto"] = "auto") -> Examples[Document]:
    """The documents of a source: a name of `HUB`, `sample`, `sample:KIND`, a local file, or a Hub id.

    Raises:
        ConfigError: the source is of another kind than `kind` says, or of none.
        SourceError: as builders.sources.read_examples.
    """
    source, own = _known(config.source, kind)
    if own is not None and kind not in ("auto", own):
        raise ConfigError(f"--kind {kind} - at `$.kind`; the source {config.source!r} is {own}; leave --kind out")
    found = read_examples(
        msgspec.structs.replace(config, source=source),
        default=HUB[own or _DEFAULT] if source == "default" else HUB[_DEFAULT],
        sample=SAMPLES[own or "text"],
        parse=partial(parse_row, kind=own or kind),
    )
    lines = [example for example in found.examples if isinstance(example, Line)]
    documents = [example for example in found.examples if isinstance(example, Document)]
    return Examples([*documents, *_joined(lines, found.info.id)], found.info)


def _known(source: str, kind: str) -> tuple[str, Kind | None]:
    """A source as builders.sources names it, and its kind where its name says it.

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


def parse_row(row: Row, kind: Kind | Literal["auto"] = "auto") -> Document | Line:
    """A row as a document, or as a line of one; `auto` goes by its columns.

    Raises:
        SourceError: no text, or the kind's own columns are missing or wrong.
    """
    data = row.data
    found = _kind_of(data) if kind == "auto" else kind
    if found in ("wikitext2", "wikitext103") or (found == "text" and "line" in data):
        column = "line" if "line" in data else "text"
        return Line(row.index, found, _text(data, column, may_be_empty=True), "" if column == "line" else "\n\n")
    if found == "ud_ewt":
        text = sentence_text(data)
        identity = data.get("sent_id", data.get("idx"))
        return _document(row, identity, found, text, words=words_of(data, text))
    if found == "go_emotions":
        is_table = "text" in data
        text = _text(data, "text" if is_table else "1")
        labels = _labels(data.get("labels", data.get("label")) if is_table else data.get("2"))
        return _document(row, data.get("id") if is_table else data.get("3"), found, text, labels=labels)
    if found == "csqa":
        asked = parse_question(row)
        answer = None if asked.label_idx is None else asked.choices[asked.label_idx].text
        text = asked.question if answer is None else f"{asked.question} {answer}"
        return _document(row, asked.example_id, found, text, question=asked.question, answer=answer)
    return _document(row, data.get("id", data.get("title")), "text", _text(data, "1" if "1" in data else "text"))


def _kind_of(data: dict[str, Any]) -> Kind:
    """What the columns say."""
    if "head" in data and ("form" in data or "tokens" in data):
        return "ud_ewt"
    if "question" in data and ("choices" in data or isinstance(data["question"], dict)):
        return "csqa"
    if "2" in data or ("text" in data and "labels" in data):
        return "go_emotions"
    if "line" in data or "text" in data or "1" in data:
        return "text"
    raise SourceError(
        "columns of no kind that is known; expected `text`, `text` and `labels`, `question` and `choices`, or a "
        f"treebank's; found: {', '.join(data)}"
    )


def _document(row: Row, identity: Any, kind: Kind, text: str, **known: Any) -> Document:
    if not text.strip():
        raise SourceError(f"no text (kind {kind}); expected some characters, found {text!r}")
    name = str(row.index if identity in (None, "") else identity)
    return Document(index=row.index, id=name, kind=kind, text=text, **known)


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


def _text(data: dict[str, Any], column: str, *, may_be_empty: bool = False) -> str:
    text = data.get(column)
    if not isinstance(text, str) or not (may_be_empty or text.strip()):
        hint = "" if may_be_empty else " (blank lines of WikiText: pass --kind wikitext2)"
        raise SourceError(f"no text in {column!r}; expected some, found {text!r}{hint}; columns: {', '.join(data)}")
    return text


def _labels(value: Any) -> list[str]:
    """Names of labels given as a list or as `4,27`, each an id or a name."""
    given = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    names: list[str] = []
    for label in given:
        text = str(label).strip()
        is_id = text.isascii() and text.isdigit() and int(text) < len(EMOTIONS)
        if not is_id and text not in EMOTIONS:
            raise SourceError(
                f"label {label!r}; expected ids 0 to {len(EMOTIONS) - 1} of GoEmotions, or its names; for texts with "
                "other labels pass --kind text"
            )
        names.append(EMOTIONS[int(text)] if is_id else text)
    return names
