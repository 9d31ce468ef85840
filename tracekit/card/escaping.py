"""Text from data in Markdown and in Python: what a name says is shown, and does nothing.

    escaped    in a sentence, a heading or a cell      a<b> | `c`   ->  a&lt;b&gt; \\| \\`c\\`
    code       a code span                             a`b          ->  ``a`b``
    fence      a block of code
    prose      a docstring, its `code` as code
    python     a literal in a snippet                  x"); y(      ->  'x"); y('

Templates print nothing else: `finalize` escapes every value that is not `Markdown`.
"""

import re
from typing import Any

from tracekit.console import printable

__all__ = ["Markdown", "cell", "code", "escaped", "fence", "finalize", "prose", "python"]

_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_SPECIAL = re.compile(r"[\\`*\[\]|~&<>]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


class Markdown(str):
    """Text that is Markdown already: tracekit's own words, with every name in them escaped."""

    __slots__ = ()


def escaped(text: str) -> Markdown:
    """Text that Markdown shows as it stands, in one line."""
    if isinstance(text, Markdown):
        return text
    return Markdown(_SPECIAL.sub(lambda found: _HTML.get(found[0], f"\\{found[0]}"), _line(text)))


def finalize(value: Any) -> Any:
    """What a template prints of a value. A space at its end is kept: templates print separators such as `"; "`."""
    if not isinstance(value, str) or isinstance(value, Markdown):
        return value
    return escaped(value) + " " * bool(value.strip() and value[-1] == " ")


def cell(text: str) -> Markdown:
    """Text as a cell of a table."""
    if isinstance(text, Markdown):
        return Markdown(re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split())))
    return escaped(text)


def code(text: str) -> Markdown:
    """Text as a code span, whatever backticks it holds; in a table too."""
    line = _line(text).replace("|", "\\|")
    if line:  # ` A` is another code than `A`
        line = " " * text[0].isspace() + line + " " * text[-1].isspace()
    marks = "`" * _more_than(line, 1)
    pad = " " * (line[:1] == "`" or line[-1:] == "`" or line[:1] == line[-1:] == " ")
    return Markdown(f"{marks}{pad}{line}{pad}{marks}")


def prose(text: str) -> Markdown:
    """A sentence of a docstring in a cell: what stands between backticks is code, the rest is shown as it stands."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # one is left over
        return escaped(text)
    return Markdown(
        "".join(code(part) if number % 2 and part else _escaped_part(part) for number, part in enumerate(parts))
    )


def _escaped_part(text: str) -> str:
    return " " * text[:1].isspace() + escaped(text) + " " * (text.strip() != "" and text[-1:].isspace())


def fence(text: str, language: str) -> Markdown:
    """Text as a block of code, whatever backticks it holds; no line of it opens an HTML comment."""
    marks = "`" * _more_than(text, 3)
    lines = [" " * line.startswith("<!--") + line for line in re.split(r"\r\n?|\n", text)]
    return Markdown("\n".join([f"{marks}{language}", *lines, marks]))


def python(text: str) -> Markdown:
    """Text as a Python literal, in double quotes where it holds none."""
    literal = repr(text)
    return Markdown(f'"{literal[1:-1]}"' if literal[0] == "'" and '"' not in text else literal)


def _line(text: str) -> str:
    """A text in one line, its control and reordering characters as `\\x1b`."""
    return printable(" ".join(text.split()))


def _more_than(text: str, least: int) -> int:
    """Backticks that end no earlier than they should."""
    return max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
