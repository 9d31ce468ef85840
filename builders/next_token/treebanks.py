"""Treebank sentences: gold words, and where each stands in the sentence's text.

Two forms are read: the columns of a CoNLL-U file (builders.kit.sources makes lists of them), and the rows of the
treebanks on the Hub, whose `tokens` are the words alone, with multi-word tokens in `mwt` and empty nodes in
`empty_nodes`; in older copies the three stand mixed in `tokens`, without ids.

    text    They didn't go.
    words   1 They   2-3 didn't   2 did   3 n't   4 go   4.1 home   5 .      (4.1 is understood, and stands nowhere)
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from builders.next_token.record import Word

__all__ = ["UPOS", "sentence_text", "words_of"]

UPOS = (
    *("NOUN", "PUNCT", "ADP", "NUM", "SYM", "SCONJ", "ADJ", "PART", "DET"),
    *("CCONJ", "PROPN", "PRON", "X", "_", "ADV", "INTJ", "VERB", "AUX"),
)
"""Parts of speech by the numbers that the Hub's rows give them."""

_NOTHING = ("_", "", "None", None)


class _ConlluLine(NamedTuple):
    """One line of a sentence, as CoNLL-U has it."""

    id: str
    form: str
    lemma: Any
    upos: Any
    head: Any
    deprel: Any
    misc: Any

    @property
    def is_empty(self) -> bool:
        return "." in self.id

    @property
    def is_multiword(self) -> bool:
        return "-" in self.id


def sentence_text(data: dict[str, Any]) -> str:
    """The text of a sentence: `text`, else the words joined as `SpaceAfter=No` tells.

    Raises:
        ValueError: the columns are no sentence.
    """
    given = data.get("text")
    if isinstance(given, str) and given.strip():
        return given
    pieces: list[str] = []
    for entry in _surface(_entries(data)):
        has_space = "SpaceAfter=No" not in str(entry.misc or "").split("|")
        pieces += [entry.form, " " * has_space]
    return "".join(pieces).rstrip(" ")


def words_of(data: dict[str, Any], text: str) -> list[Word]:
    """The gold words of a sentence, in its order, with their characters in `text`; tokens are left null.

    A multi-word token is followed by its words. These lie in their own characters where they spell the token
    (`did` `n't`), else each in all of it (`del` = `de` `el`).

    Raises:
        ValueError: the columns are no sentence, or a word does not stand in the text where it should.
    """
    entries = _entries(data)
    places: dict[str, tuple[int, int]] = {}
    cursor = 0
    for entry in _surface(entries):
        start = cursor
        while text[start : start + 1].isspace() and not text.startswith(entry.form, start):
            start += 1
        if not text.startswith(entry.form, start):
            raise ValueError(
                f"word {entry.id} {entry.form!r} is not in the text at character {start}, where it should be: "
                f"found {text[start : start + 20]!r}"
            )
        cursor = start + len(entry.form)
        places[entry.id] = (start, cursor)
        if entry.is_multiword:
            places |= _inner_places(entry, entries, start)
    return [_word(entry, places.get(entry.id)) for entry in entries]


def _surface(entries: Sequence[_ConlluLine]) -> Iterator[_ConlluLine]:
    """What is written: multi-word tokens instead of their words, no empty nodes."""
    covered = 0
    for entry in entries:
        if entry.is_empty:
            continue
        if entry.is_multiword:
            covered = _range_of(entry)[1]
            yield entry
        elif int(entry.id) > covered:
            yield entry


def _inner_places(token: _ConlluLine, entries: Sequence[_ConlluLine], start: int) -> dict[str, tuple[int, int]]:
    """Characters of a multi-word token's words."""
    first, last = _range_of(token)
    inner = [e for e in entries if e.id.isdigit() and first <= int(e.id) <= last]
    if "".join(entry.form for entry in inner) != token.form:
        return {entry.id: (start, start + len(token.form)) for entry in inner}
    places: dict[str, tuple[int, int]] = {}
    for entry in inner:
        places[entry.id] = (start, start + len(entry.form))
        start += len(entry.form)
    return places


def _range_of(token: _ConlluLine) -> tuple[int, int]:
    first, _, last = token.id.partition("-")
    return int(first), int(last)


def _word(entry: _ConlluLine, place: tuple[int, int] | None) -> Word:
    is_underscore = entry.form == "_"
    head = str(entry.head)
    return Word(
        id=entry.id,
        form=entry.form,
        lemma=entry.lemma if is_underscore and entry.lemma == "_" else _value(entry.lemma),
        upos=_value(entry.upos),
        head=int(head) if head.isdigit() else None,
        deprel=_value(entry.deprel),
        start_char=place[0] if place else None,
        stop_char=place[1] if place else None,
        start_token=None,
        stop_token=None,
    )


def _value(value: Any) -> str | None:
    return None if value in _NOTHING else str(value)


def _entries(data: dict[str, Any]) -> list[_ConlluLine]:
    """The lines of a sentence, from either form.

    Raises:
        ValueError: columns are missing or of different lengths, or an id is none.
    """
    is_file = "form" in data
    names = ("form", "lemma", "upos", "head", "deprel") if is_file else ("tokens", "lemmas", "upos", "head", "deprel")
    columns = [data.get(name) for name in names]
    lengths = {name: len(column) for name, column in zip(names, columns, strict=True) if isinstance(column, list)}
    if len(lengths) < len(names) or len(set(lengths.values())) > 1 or not lengths[names[0]]:
        raise ValueError(f"no words; expected lists of one length in {', '.join(names)}, found {lengths}")
    rows = list(zip(*columns, strict=True))  # pyright: ignore[reportArgumentType] - they are lists, see above
    misc = data.get("misc") or [None] * len(rows)
    if is_file:
        entries = [_ConlluLine._make((i, *row, m)) for i, row, m in zip(data["id"], rows, misc, strict=True)]
    else:
        entries = _hub_entries(data, [(form, lemma, _upos(u), h, d) for form, lemma, u, h, d in rows], misc)
    _check_ids(entries)
    return entries


def _check_ids(entries: Sequence[_ConlluLine]) -> None:
    """Words are numbered 1, 2, ...; multi-word tokens and empty nodes stand at their words."""
    number = 0
    for entry in entries:
        parts = entry.id.replace(".", "-").split("-")
        is_id = 1 <= len(parts) <= 2 and all(part.isascii() and part.isdigit() for part in parts)
        number += is_id and len(parts) == 1
        expected = number + 1 if entry.is_multiword else number
        is_range = not entry.is_multiword or (is_id and int(parts[1]) >= int(parts[0]))
        if not is_id or int(parts[0]) != expected or not is_range:
            raise ValueError(f"id {entry.id!r} of {entry.form!r}; expected {number or 1}, or a range or node there")


def _upos(value: Any) -> Any:
    if not isinstance(value, int):
        return value
    if not 0 <= value < len(UPOS):
        raise ValueError(f"part of speech {value}; expected a name, or 0 to {len(UPOS) - 1}")
    return UPOS[value]


def _hub_entries(data: dict[str, Any], rows: Sequence[tuple[Any, ...]], misc: Sequence[Any]) -> list[_ConlluLine]:
    """The Hub's words numbered, and multi-word tokens and empty nodes put where they belong."""
    if "mwt" not in data:
        return _unmixed(rows, misc)
    before = {
        str(t["id"]).partition("-")[0]: _ConlluLine(t["id"], t["form"], None, None, None, None, t.get("misc"))
        for t in data["mwt"]
    }
    nodes: dict[str, list[_ConlluLine]] = {}
    for node in data.get("empty_nodes") or []:
        entry = _ConlluLine(node["id"], node["form"], node["lemma"], node["upos"], node["head"], node["deprel"], None)
        nodes.setdefault(entry.id.partition(".")[0], []).append(entry)
    entries = nodes.get("0", [])
    for number, (row, note) in enumerate(zip(rows, misc, strict=True), start=1):
        entries += [before[str(number)]] if str(number) in before else []
        entries += [_ConlluLine._make((str(number), *row, note)), *nodes.get(str(number), [])]
    return entries


def _unmixed(rows: Sequence[tuple[Any, ...]], misc: Sequence[Any]) -> list[_ConlluLine]:
    """Older copies: what has no head is a multi-word token (without part of speech) or an empty node (with one)."""
    entries: list[_ConlluLine] = []
    number = nodes = 0
    for i, (row, note) in enumerate(zip(rows, misc, strict=True)):
        form, _, upos, head, _ = row
        if str(head).isdigit():
            number, nodes = number + 1, 0
            entries.append(_ConlluLine._make((str(number), *row, note)))
        elif upos in _NOTHING:
            inner, spelled = 0, 0
            for other in rows[i + 1 :]:  # its words are those that spell it, two at least
                if spelled >= len(form) and inner >= 2:
                    break
                inner, spelled = inner + 1, spelled + len(other[0])
            entries.append(_ConlluLine._make((f"{number + 1}-{number + inner}", *row, note)))
        else:
            nodes += 1
            entries.append(_ConlluLine._make((f"{number}.{nodes}", *row, note)))
    return entries
