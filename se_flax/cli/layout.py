"""Tables and paragraphs as wide as the terminal."""

import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any, TextIO

_GAP = "  "
_UNLIMITED = 1_000_000
_NARROWEST = 20
_WRAPPED = 20  # a cell narrower than this is not worth a second line
_OPTIONAL = 40  # an optional column narrower than this is left out
_BESIDE = 30  # with less room beside a term, its explanation is below the term

# An indented term, two or more spaces, and its explanation.
_TERM = re.compile(r"( +\S+(?: \S+)*)  +(\S.*)")

# What a terminal acts on: control characters but tabs and ends of lines, and changes of the direction of writing.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")

Row = tuple[str, ...]


def printable(text: str) -> str:
    """The text with `?` in place of every character that a terminal would act on."""
    return _CONTROL.sub("?", text)


class Printable:
    """A stream whose text is `printable`.

    Args:
      stream: where it goes.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes text."""
        return self._stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def terminal_width() -> int:
    """Width of the output in characters: `COLUMNS`, or the terminal's width; without either (a pipe), no limit."""
    return max(shutil.get_terminal_size(fallback=(_UNLIMITED, 24)).columns, _NARROWEST)


def wrapped(text: str, indent: str = "    ") -> str:
    """Wraps a paragraph and indents all lines but the first; long words are not broken."""
    lines = textwrap.wrap(
        text, terminal_width(), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)


def print_table(rows: Sequence[Row], right: Sequence[int] = (), optional: Sequence[int] = ()) -> None:
    """Prints rows in columns, with the first row as the header, at most as wide as the terminal.

    A table that is too wide is printed in the first of these ways that fits: with wrapped cells; without the optional
    columns; in parts below each other, each with the first column; as a paragraph per row.

    Args:
      rows: equally long tuples; the first column names the row.
      right: right-aligned columns.
      optional: columns that may be left out.
    """
    width = terminal_width()
    columns = list(range(len(rows[0])))
    least = [
        _least(column, _OPTIONAL if i in optional else _WRAPPED) for i, column in enumerate(zip(*rows, strict=True))
    ]
    for shown in (columns, [i for i in columns if i not in optional]):
        widths = _fitted(rows, shown, least, width)
        if widths is not None:
            _print_columns(rows, shown, widths, right)
            return
    parts = _parts(rows, shown, least, width)
    if parts is None:
        _print_paragraphs(rows, shown, width)
        return
    for i, part in enumerate(parts):
        if i:
            print()
        _print_columns(rows, part, _fitted(rows, part, least, width) or [], right)


def _least(cells: Sequence[str], wrapped: int) -> int:
    """Least width of a column: that of its longest word, and of cells up to `wrapped`, which are not wrapped."""
    words = (len(word) for cell in cells for word in cell.split())
    return max(max(words, default=0), min(max(map(len, cells)), wrapped))


def _fitted(rows: Sequence[Row], columns: Sequence[int], least: Sequence[int], width: int) -> list[int] | None:
    """Widths of the columns, reduced from the widest on until they fit; None if they cannot fit."""
    widths = {i: max(len(row[i]) for row in rows) for i in columns}
    over = sum(widths.values()) + len(_GAP) * (len(columns) - 1) - width
    for _ in range(over):
        free = [i for i in columns if widths[i] > least[i]]
        if not free:
            return None
        widths[max(free, key=widths.__getitem__)] -= 1
    return list(widths.values())


def _parts(rows: Sequence[Row], columns: Sequence[int], least: Sequence[int], width: int) -> list[list[int]] | None:
    """The columns in groups that fit, each with the first column; None if a column does not fit at all."""
    parts: list[list[int]] = []
    for column in columns[1:]:
        if parts and _fitted(rows, [*parts[-1], column], least, width) is not None:
            parts[-1].append(column)
        elif _fitted(rows, [columns[0], column], least, width) is not None:
            parts.append([columns[0], column])
        else:
            return None
    return parts


def _print_columns(rows: Sequence[Row], columns: Sequence[int], widths: Sequence[int], right: Sequence[int]) -> None:
    for i, row in enumerate(rows):
        cells = [textwrap.wrap(row[k], w, break_on_hyphens=False) or [""] for k, w in zip(columns, widths, strict=True)]
        for n in range(max(map(len, cells))):
            lines = (cell[n] if n < len(cell) else "" for cell in cells)
            padded = (x.rjust(w) if k in right else x.ljust(w) for k, x, w in zip(columns, lines, widths, strict=True))
            print(_GAP.join(padded).rstrip())
        if i == 0:
            print(_GAP.join("-" * w for w in widths))


def _print_paragraphs(rows: Sequence[Row], columns: Sequence[int], width: int) -> None:
    head = rows[0]
    for row in rows[1:]:
        print(row[columns[0]])
        for i in columns[1:]:
            if row[i]:
                text = f"{head[i]}: {row[i]}"
                for line in textwrap.wrap(
                    text, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
                ):
                    print(line)


def reflowed(text: str) -> str:
    """Wraps a help text to the terminal's width.

    Args:
      text: paragraphs without indentation; indented lines with a term, two or more spaces and its explanation, which
        may continue in its column on the next lines; other indented lines, such as commands, which are kept.

    Returns:
      The text with its paragraphs and explanations rewrapped.
    """
    width, lines = terminal_width(), list[str]()
    for line in text.splitlines():
        before = lines[-1] if lines else ""
        indent = len(line) - len(line.lstrip())
        term = _TERM.match(before)
        continued = (term is not None and indent == term.start(2)) or (indent == 0 and before[:1].strip() != "")
        if line.strip() and continued:
            lines[-1] = f"{before} {line.strip()}"
        else:
            lines.append(line)
    return "\n".join(_filled(line, width) for line in lines) + "\n" * text.endswith("\n")


def _filled(line: str, width: int) -> str:
    term = _TERM.match(line)
    if len(line) <= width or (line.startswith(" ") and term is None):
        return line
    if term is None:
        return textwrap.fill(line, width, break_on_hyphens=False, break_long_words=False)
    head, column = line[: term.start(2)], term.start(2)
    if width - column < _BESIDE:
        head, column = "", 8
    body = textwrap.wrap(term[2], max(width - column, _NARROWEST), break_on_hyphens=False, break_long_words=False)
    first = [head + body[0]] if head else [term[1], " " * column + body[0]]
    return "\n".join(first + [" " * column + x for x in body[1:]])
