"""ONNX graph builder with constant folding and deferred broadcasts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from se_flax.errors import UserError

Shape = tuple[Any, ...]
Value = Any
"""A tensor's name in the graph; a NumPy array that is known already; or a `Broadcast`."""


def symbolic(side: Any) -> bool:
    """Whether a side of a shape depends on the batch."""
    return not isinstance(side, int | np.integer)


@dataclass(frozen=True)
class Broadcast:
    """A value before its axes of length 1 are repeated: ONNX's elementwise operations do that by themselves.

    Attributes:
      source: tensor's name or array.
      source_shape: of the rank of `shape`, with ones where it is repeated.
      shape: after the repetition.
    """

    source: Value
    source_shape: Shape
    shape: Shape


@dataclass
class Graph:
    """A graph under construction.

    Attributes:
      images: name of its input, whose first axis is the batch.
      nodes: operations, in order.
      initializers: constants.
    """

    images: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def add(self, op: str, *inputs: Value, **attributes: Any) -> str:
        """Adds an operation with one output; returns the output's name."""
        return self.add_many(op, 1, *inputs, **attributes)[0]

    def add_many(self, op: str, outputs: int, *inputs: Value, **attributes: Any) -> list[str]:
        """Adds an operation; returns the names of its outputs."""
        names = [f"{op.lower()}_{len(self.nodes)}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(op, [self.name(x) for x in inputs], names, **attributes))
        return names

    def name(self, value: Value) -> str:
        """The name under which a value can be read; a constant is stored for it."""
        if isinstance(value, str):
            return value
        if isinstance(value, Broadcast):
            return self.expand(value)
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value).reshape(np.shape(value)), name))
        return name

    def expand(self, value: Broadcast) -> str:
        """Repeats the axes of a broadcast value."""
        # Expand leaves an axis alone where it is asked for 1.
        wanted = [1 if symbolic(here) else there for here, there in zip(value.source_shape, value.shape, strict=True)]
        if not any(map(symbolic, wanted)):
            return self.add("Expand", value.source, np.asarray(wanted, np.int64))
        batch = self.add("Shape", self.images, start=0, end=1)
        parts = [batch if symbolic(side) else np.asarray([side], np.int64) for side in wanted]
        return self.add("Expand", value.source, self.add("Concat", *parts, axis=0))

    def reshape(self, value: Value, before: Shape, after: Shape) -> Value:
        """A value of shape `before` in the shape `after`, of whose sides one may depend on the batch."""
        if before == after:
            return value
        sides = [-1 if symbolic(side) else side for side in after]
        if sides.count(-1) > 1:
            raise UserError(f"a reshape to {after} has two sides that depend on the batch; ONNX takes one")
        if isinstance(value, np.ndarray):
            return value.reshape(sides)
        return self.add("Reshape", value, np.asarray(sides, np.int64))

    def transpose(self, value: Value, axes: Sequence[int]) -> Value:
        """A value with its axes in another order."""
        order = [int(axis) for axis in axes]
        if order == list(range(len(order))):
            return value
        return value.transpose(order) if isinstance(value, np.ndarray) else self.add("Transpose", value, perm=order)
