"""Literals: lists and objects that a text cell holds, as the programs that write tables spell them.

    JSON                      ["Paris", "City of Paris"]      {"text": ["a", "b"], "label": ["A", "B"]}
    Python, as pandas does    ['Paris', 'City of Paris']      {'text': ['a', 'b'], 'label': ['A', 'B']}
    numpy, as Dataset.to_csv  ['Paris' 'City of Paris']       {'text': array(['a', 'b'], dtype=object), ...}

No code runs: the grammar knows brackets, texts, numbers and a few words. `ast.literal_eval` cannot read these cells: it
joins the two texts of a numpy list into one.
"""

import ast
import json
import re
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

__all__ = ["check_characters", "is_structured", "read_structure"]

_MAX_DEPTH = 32
_CLOSING = {"[": "]", "{": "}", "(": ")"}
_CUT = re.compile(r"\[\s*['\"{\[]|\{\s*['\"]")
"""A list or object begins here, wherever it ends."""
_CONTAINER = re.compile(
    r"array\(|(?:(?:frozen)?set|tuple|list|deque|dict_(?:values|keys)|OrderedDict|Index|Series|ListValue)\(\s*[\[{(]"
)
"""So does one that is written with its type: `array([1, 2])`, `Index(['a'], dtype='object')`, `frozenset({'a'})`."""
_TUPLE = re.compile(r"\(\s*(?:['\"].*['\",]\s*)?\)", re.DOTALL)
_NUMPY = re.compile(r"array|np\.(?:str_|bool_?|u?int\d+|float\d+)")
"""What numpy writes in front of brackets."""
_TOKEN = re.compile(
    r"(?P<text>'[^'\\]*(?:\\.[^'\\]*)*'|\"[^\"\\]*(?:\\.[^\"\\]*)*\")"
    r"|(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))"
    r"|(?P<word>[-+]?[A-Za-z_][\w.]*|<NA>|\.\.\.)"
    r"|(?P<mark>[\[\](){}:,=])",
    re.DOTALL,
)
_WORDS = {
    **dict.fromkeys(("None", "null", "nan", "NaN", "NaT", "<NA>"), None),
    **dict.fromkeys(("True", "true"), True),
    **dict.fromkeys(("False", "false"), False),
    **dict.fromkeys(("inf", "+inf", "Infinity"), float("inf")),
    **dict.fromkeys(("-inf", "-Infinity"), float("-inf")),
}


class _LiteralToken(NamedTuple):
    kind: str
    text: str
    follows_space: bool


def is_structured(text: str) -> bool:
    """Whether a text is a list or an object, or one that was cut off: `[sic] a title` is none."""
    bare = text.strip()
    closing = _CLOSING.get(bare[:1]) if bare[:1] != "(" else None
    is_whole = closing is not None and bare.endswith(closing)
    return is_whole or any(form.match(bare) for form in (_CUT, _CONTAINER)) or _TUPLE.fullmatch(bare) is not None


def read_structure(text: str) -> Any:
    """The list or object that a text holds.

    Raises:
        ValueError: the text holds something else; the message says what.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError:  # no JSON, or a number of too many digits, which the grammar refuses again
        value = _LiteralReader(text).read()
    if "\\u" in text:
        check_characters(value)
    return value


def check_characters(value: Any) -> None:
    r"""Refuse half a character: "\ud800" is JSON, but no tokenizer and no file takes it.

    Raises:
        ValueError: a text holds one.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{half!r} is half a character; expected whole ones (surrogates in pairs)") from error


class _LiteralReader:
    """Reads one cell from its first token to its last."""

    def __init__(self, text: str) -> None:
        self._tokens = list(_tokens(text))
        self._place = 0

    def read(self) -> Any:
        """The whole cell."""
        value = self._value(0)
        if self._place < len(self._tokens):
            self._fail(self._tokens[self._place].text)
        return value

    def _next(self) -> _LiteralToken:
        if self._place == len(self._tokens):
            raise ValueError("the cell ends inside a list or an object; was it cut off?")
        self._place += 1
        return self._tokens[self._place - 1]

    def _is_next(self, mark: str) -> bool:
        return self._place < len(self._tokens) and self._tokens[self._place][:2] == ("mark", mark)

    def _take(self, mark: str) -> bool:
        found = self._is_next(mark)
        self._place += found
        return found

    def _fail(self, what: str) -> NoReturn:
        raise ValueError(f"{what[:40]!r} is not expected at its place")

    def _value(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
        kind, text, _ = self._next()
        if kind == "text":
            return _unquoted(text)
        if kind == "number":
            return _number(text)
        if kind == "word":
            return self._word(text, depth)
        if text == "[":
            return self._items("]", depth, [])
        if text == "(":
            return self._items(")", depth, [])
        if text == "{":
            return self._braces(depth)
        return self._fail(text)

    def _word(self, word: str, depth: int) -> Any:
        if word in _WORDS:
            return _WORDS[word]
        if word == "...":
            raise ValueError("numpy left elements out ('...'); write the table again, as JSONL or Parquet")
        if _NUMPY.fullmatch(word) and self._take("("):
            value = self._value(depth + 1)
            while not self._take(")"):  # `, dtype=object`
                token = self._next()
                if token.kind == "mark" and token.text not in ",=":
                    self._fail(token.text)
            return value
        return self._fail(word)

    def _separator(self) -> str:
        if self._take(","):
            return ","
        token = self._next()
        if not token.follows_space:
            self._fail(token.text)
        self._place -= 1
        return " "

    def _items(self, closing: str, depth: int, found: list[Any]) -> list[Any]:
        """Elements between commas, or all between blanks, as numpy writes them; `found` are those that are read."""
        separators: set[str] = set()
        while not self._take(closing):
            if found:
                separators.add(self._separator())
                if self._take(closing):
                    break
            if len(separators) > 1:
                raise ValueError("some elements stand between commas and some do not")
            found.append(self._value(depth + 1))
        return found

    def _braces(self, depth: int) -> Any:
        """An object, or a Python set as a list."""
        if self._take("}"):
            return {}
        key = self._value(depth + 1)
        if not self._is_next(":"):
            return self._items("}", depth, [key])
        found: dict[str, Any] = {}
        while True:
            if not isinstance(key, str | int) or not self._take(":"):
                self._fail(str(key))
            found[str(key)] = self._value(depth + 1)
            if self._take("}") or (self._take(",") and self._take("}")):
                return found
            if self._tokens[self._place - 1].text != ",":
                self._fail(self._next().text)
            key = self._value(depth + 1)


def _tokens(text: str) -> Iterator[_LiteralToken]:
    place, follows_space = 0, True
    while place < len(text):
        if text[place].isspace():
            place, follows_space = place + 1, True
            continue
        match = _TOKEN.match(text, place)
        if match is None:
            raise ValueError(
                f"{text[place : place + 20]!r} at character {place + 1} is no text in quotes and no number"
            )
        assert match.lastgroup is not None, match
        yield _LiteralToken(match.lastgroup, match[0], follows_space)
        place, follows_space = match.end(), False


def _unquoted(text: str) -> str:
    """The text of a literal in quotes."""
    if "\\" not in text and "\n" not in text:
        return text[1:-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an escape that Python does not know
        try:
            return ast.literal_eval(text)
        except (SyntaxError, ValueError, Warning) as error:
            raise ValueError(f"{text[:40]} is no text in quotes") from error


def _number(text: str) -> int | float:
    digits = text.lstrip("+-")
    if len(digits) > 1 and digits[0] == "0" and digits[1].isdecimal():
        raise ValueError(f"{text[:40]!r} begins with 0; put texts in quotes")
    return int(text) if digits.isdecimal() else float(text)
