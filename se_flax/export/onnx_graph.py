"""ONNX graph builder: constants are folded and stored once, equal operations are added once."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Shape = tuple[Any, ...]
Stored = str | np.ndarray
"""A tensor's name in the graph, or an array that is known already."""


def symbolic(side: Any) -> bool:
    """Whether a side of a shape depends on the batch."""
    return not isinstance(side, int | np.integer)


@dataclass(frozen=True)
class Node:
    """An operation.

    Attributes:
      op: ONNX's name.
      inputs: names of tensors.
      outputs: likewise.
      attributes: as ONNX names them.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass
class Graph:
    """A graph under construction.

    Attributes:
      images: name of its input, whose first axis is the batch.
      nodes: operations, in order.
      constants: arrays, by name.
    """

    images: str
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    _known: dict[Any, str] = field(default_factory=dict)
    _transposed: dict[str, tuple[str, list[int]]] = field(default_factory=dict)

    def add(self, op: str, *inputs: Stored, **attributes: Any) -> str:
        """Adds an operation with one output, unless it is there; returns the output's name."""
        names = tuple(map(self.name, inputs))
        key = (op, names, repr(sorted(attributes.items())))
        if key not in self._known:
            (self._known[key],) = self.add_many(op, 1, *names, **attributes)
        return self._known[key]

    def add_many(self, op: str, outputs: int, *inputs: Stored, **attributes: Any) -> list[str]:
        """Adds an operation; returns the names of its outputs."""
        names = [f"{op.lower()}_{len(self.nodes)}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        self.nodes.append(Node(op, tuple(map(self.name, inputs)), tuple(names), attributes))
        return names

    def name(self, value: Stored) -> str:
        """The name under which a value can be read; equal arrays are stored once."""
        if isinstance(value, str):
            return value
        value = np.asarray(value)
        value = np.ascontiguousarray(value).reshape(value.shape)
        key = (value.dtype, value.shape, hashlib.sha256(value.tobytes()).digest())
        name = self._known.setdefault(key, f"constant_{len(self._known)}")
        self.constants.setdefault(name, value)
        return name

    def expand(self, value: Stored, before: Shape, after: Shape) -> Stored:
        """Repeats axes of length 1."""
        # Expand leaves an axis alone where it is asked for 1.
        wanted = [1 if symbolic(here) else there for here, there in zip(before, after, strict=True)]
        if not any(map(symbolic, wanted)):
            return self.add("Expand", value, np.asarray(wanted, np.int64))
        batch = self.add("Shape", self.images, start=0, end=1)
        parts = [batch if symbolic(side) else np.asarray([side], np.int64) for side in wanted]
        return self.add("Expand", value, self.add("Concat", *parts, axis=0))

    def reshape(self, value: Stored, before: Shape, after: Shape) -> Stored:
        """A tensor of shape `before` in the shape `after`, of whose sides at most one depends on the batch."""
        if before == after:
            return value
        sides = [-1 if symbolic(side) else side for side in after]
        if isinstance(value, np.ndarray):
            return value.reshape(sides)
        return self.add("Reshape", value, np.asarray(sides, np.int64))

    def transpose(self, value: Stored, axes: Sequence[int]) -> Stored:
        """A tensor with its axes in another order; of two transposes in a row one is left, or none."""
        order = [int(axis) for axis in axes]
        if isinstance(value, np.ndarray):
            return value.transpose(order)
        source, before = self._transposed.get(value, (value, list(range(len(order)))))
        order = [before[axis] for axis in order]
        if order == sorted(order):
            return source
        name = self.add("Transpose", source, perm=order)
        self._transposed[name] = source, order
        return name

    def protos(self) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """Operations and constants as ONNX stores them."""
        nodes = [helper.make_node(n.op, n.inputs, n.outputs, **n.attributes) for n in self.nodes]
        return nodes, [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
