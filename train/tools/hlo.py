"""Collectives (kind, bytes) parsed from HLO text."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<rest>.*)$")
_ARRAY = re.compile(r"\b(?P<type>pred|[a-z]+\d+\w*)\[(?P<shape>[\d,<=]*)\]")
_OPERAND = re.compile(r"%([\w.-]+)")


@dataclass(frozen=True)
class Collective:
    """Number of collective operations of one kind in a program, and the size of their operands in bytes."""

    count: int
    bytes: int


def collectives(text: str) -> dict[str, Collective]:
    """Counts the collective operations of one device's program.

    Args:
      text: the optimised HLO (`compiled.as_text()`).

    Returns:
      Counts by kind, for the kinds that occur: all-reduce, all-gather, reduce-scatter, collective-permute, all-to-all.
      An asynchronous operation (start and done) counts once, and so does one in the body of a loop. The bytes are those
      of the operands; the network traffic depends on the algorithm (a ring all-reduce sends close to twice as much).
    """
    sizes: dict[str, int] = {}
    found: dict[str, list[int]] = {}
    for name, shape, opcode, operands in _instructions(text):
        sizes[name] = array_bytes(shape)
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            found.setdefault(kind, []).append(sum(sizes[operand] for operand in operands))
    return {kind: Collective(len(calls), sum(calls)) for kind, calls in sorted(found.items())}


def array_bytes(shape: str) -> int:
    """Size in bytes of a shape in HLO: `bf16[128,56,56,64]{3,0,2,1:T(8,128)(2,1)}`, or a tuple of such shapes."""
    total = 0
    for match in _ARRAY.finditer(shape):
        bits = 1 if match["type"] == "pred" else int(re.findall(r"\d+", match["type"])[0])
        # A bounded dynamic dimension, `<=8`, takes the memory of its bound.
        elements = math.prod(int(side.lstrip("<=")) for side in match["shape"].split(",") if side)
        total += elements * (1 if bits < 8 else bits // 8)
    return total


def _instructions(text: str) -> Iterator[tuple[str, str, str, list[str]]]:
    """Name, shape, opcode and names of the operands of every instruction."""
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        rest = match["rest"]
        end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
        call = re.match(r"\s*([\w-]+)\(", rest[end:])
        if call is None:
            continue
        opened = end + call.end() - 1
        yield match["name"], rest[:end], call[1], _OPERAND.findall(rest[opened : _closing(rest, opened) + 1])


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`; layouts have parentheses too."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    return len(text) - 1
