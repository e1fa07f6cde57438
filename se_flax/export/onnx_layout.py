"""Tensors as views: which axis is stored where, so that axes are moved and repeated only where an operation asks.

The networks compute on maps [N, H, W, C]; ONNX's convolutions and pools take and give [N, C, H, W]. A convolution's
result is a view whose tensor stays [N, C, H, W], elementwise operations and reductions take the order that they find,
and so the images are transposed once and nothing else is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from se_flax.errors import UserError
from se_flax.export.onnx_graph import Graph, Shape, Stored, symbolic

Order = tuple[int | None, ...]


@dataclass(frozen=True)
class View:
    """A value of a traced program as a tensor of the graph holds it.

    Attributes:
      stored: the tensor's name, or an array.
      sides: its shape.
      order: for each of its axes the program's axis that it holds; None for an axis of length 1 that holds none.
      shape: in the program. An axis that is stored with length 1, or not at all, is repeated.
    """

    stored: Stored
    sides: Shape
    order: Order
    shape: Shape

    def side(self, axis: int | None) -> Any:
        """The stored length of a program's axis; 1 where it is not stored."""
        return self.sides[self.order.index(axis)] if axis is not None and axis in self.order else 1

    def repeats(self, axis: int) -> bool:
        """Whether an axis is shorter than in the program."""
        return self.side(axis) != self.shape[axis]

    @property
    def long(self) -> list[int]:
        """The program's axes that are stored with another length than 1, in the order of the tensor."""
        return [axis for axis, side in zip(self.order, self.sides, strict=True) if axis is not None and side != 1]


def plain(stored: Stored, shape: Shape) -> View:
    """A tensor with the program's axes in the program's order."""
    return View(stored, tuple(shape), tuple(range(len(shape))), tuple(shape))


def common_order(views: Sequence[View]) -> Order:
    """The order of axes in which operands of equal rank meet: that of the largest tensor, maps [N, C, H, W] first."""
    rank = len(views[0].shape)
    held = [view for view in views if isinstance(view.stored, str)]
    if held:
        order = max(held, key=lambda view: (len(view.long), view.long != sorted(view.long))).order
        if all(axis in order for view in views for axis in view.long):
            return order
    return tuple(range(rank))


def arrange(graph: Graph, view: View, order: Order, *, full: bool = False) -> Stored:
    """The tensor with a program's axes in a given order, which names all that are long.

    Args:
      graph: where operations are added.
      view: the value.
      order: for each axis wanted the program's axis; None for an axis of length 1.
      full: repeat what the view repeats.
    """
    stored, sides = _transposed(graph, view, order)
    wanted = tuple(view.side(axis) for axis in order)
    stored = graph.reshape(stored, sides, wanted)
    whole = tuple(1 if axis is None else view.shape[axis] for axis in order)
    return graph.expand(stored, wanted, whole) if full and whole != wanted else stored


def filled(graph: Graph, view: View, *axes: int) -> View:
    """A view that repeats nothing and stores the given axes, in its own order if that has a place for all of them."""
    order: Order = view.order
    for axis in range(len(view.shape)):
        if axis not in order and (axis in axes or view.repeats(axis)):
            if None not in order:
                order = tuple(range(len(view.shape)))
                break
            place = order.index(None)
            order = (*order[:place], axis, *order[place + 1 :])
    sides = tuple(1 if axis is None else view.shape[axis] for axis in order)
    return replace(view, stored=arrange(graph, view, order, full=True), sides=sides, order=order)


def _transposed(graph: Graph, view: View, order: Order) -> tuple[Stored, Shape]:
    """The tensor with its long axes as ordered, and axes of length 1 where they are wanted, as far as there are any."""
    ones = [i for i, side in enumerate(view.sides) if side == 1]
    axes: list[int] = []
    for axis in order:
        if axis in view.long:
            axes.append(view.order.index(axis))
        elif ones:
            axes.append(ones.pop(0))
    axes += ones
    # Axes of length 1 go anywhere without a transpose; a reshape sets them.
    if [i for i in axes if view.sides[i] != 1] == [i for i, side in enumerate(view.sides) if side != 1]:
        return view.stored, view.sides
    return graph.transpose(view.stored, axes), tuple(view.sides[i] for i in axes)


def reshape(graph: Graph, view: View, after: Shape) -> View:
    """A value in another shape. Axes of length 1 come and go, and axes are split and joined, in the order as stored.

    Raises:
      UserError: two sides of the new shape depend on the batch.
    """
    before = view.shape
    long = [axis for axis, side in enumerate(before) if side != 1]
    new = [axis for axis, side in enumerate(after) if side != 1]
    if [before[axis] for axis in long] == [after[axis] for axis in new]:
        moved = dict(zip(long, new, strict=True))
        return View(view.stored, view.sides, tuple(None if a is None else moved.get(a) for a in view.order), after)
    groups = _groups(before, after)
    if groups is None:
        if sum(map(symbolic, after)) > 1:
            raise UserError(f"a reshape to {after} has two sides that depend on the batch; ONNX takes one")
        stored = arrange(graph, view, tuple(range(len(before))), full=True)
        return plain(graph.reshape(stored, before, after), after)
    view = filled(graph, view)
    groups.sort(key=lambda group: min(view.order.index(axis) for axis in group[0]))
    stored, sides = _transposed(graph, view, tuple(axis for group in groups for axis in group[0]))
    axes = tuple(axis for group in groups for axis in group[1])
    split = tuple(after[axis] for axis in axes)
    return View(graph.reshape(stored, sides, split), split, axes, after)


def _groups(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]] | None:
    """Axes of two shapes that hold the same elements, apart from those of length 1; None if that cannot be said."""
    old = [axis for axis, side in enumerate(before) if side != 1]
    new = [axis for axis, side in enumerate(after) if side != 1]
    groups = []
    while old and new:
        left, right = [old.pop(0)], [new.pop(0)]
        while (here := [before[i] for i in left]) != (there := [after[i] for i in right]):
            if any(map(symbolic, here + there)):
                return None
            short = math.prod(here) < math.prod(there)
            if math.prod(here) == math.prod(there):
                break
            if not (old if short else new):
                return None
            (left if short else right).append((old if short else new).pop(0))
        groups.append((left, right))
    return None if old or new else groups


def broadcast(view: View, shape: Shape, axes: Sequence[int]) -> View:
    """A value as part of a larger shape; `axes` are the new places of its axes (`jax.lax.broadcast_in_dim`)."""
    order = tuple(None if axis is None else axes[axis] for axis in view.order)
    return View(view.stored, view.sides, order, tuple(shape))


def transpose(view: View, axes: Sequence[int]) -> View:
    """A value with its axes in another order; the tensor stays."""
    order = tuple(None if axis is None else list(axes).index(axis) for axis in view.order)
    return View(view.stored, view.sides, order, tuple(view.shape[axis] for axis in axes))


def without(view: View, stored: Stored, axes: Sequence[int]) -> View:
    """A view of `stored`, which is the view's tensor with the program's axes `axes` reduced to length 1."""
    kept = [axis for axis in range(len(view.shape)) if axis not in axes]
    order = tuple(kept.index(axis) if axis in kept else None for axis in view.order)
    sides = tuple(1 if axis in axes else side for axis, side in zip(view.order, view.sides, strict=True))
    return View(stored, sides, order, tuple(view.shape[axis] for axis in kept))
