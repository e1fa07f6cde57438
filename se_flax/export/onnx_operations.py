"""JAX's operations in ONNX: one function each, from an equation and views of its inputs to a view of its result."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from onnx import helper

from se_flax.errors import UserError
from se_flax.export.onnx_graph import Graph, Shape, Stored, symbolic
from se_flax.export.onnx_layout import (
    View,
    arrange,
    broadcast,
    common_order,
    filled,
    plain,
    reshape,
    transpose,
    without,
)

Emit = Callable[..., str]


def _shape(equation: Any, output: int = 0) -> Shape:
    return tuple(equation.outvars[output].aval.shape)


# --- Elementwise ------------------------------------------------------------------------------------------------------


def _elementwise(emit: str | Emit) -> Callable[..., View]:
    def apply(graph: Graph, equation: Any, *inputs: View) -> View:
        shape = _shape(equation)
        maps = [x for x in inputs if len(x.shape) == len(shape)]
        order = common_order(maps)
        # Axes that are repeated in all operands stay short: the result is repeated where somebody needs it.
        operands = [arrange(graph, x, order if len(x.shape) == len(shape) else ()) for x in inputs]
        sides = tuple(next((s for x in maps if (s := x.side(axis)) != 1), 1) for axis in order)
        result = emit(graph, *operands) if callable(emit) else graph.add(emit, *operands)
        return View(result, sides, order, shape)

    return apply


def _is_zero(value: Stored) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 0 and value == 0


def _clamp(graph: Graph, low: Stored, x: Stored, high: Stored) -> str:
    return graph.add("Min", graph.add("Max", x, low), high)


def _power(graph: Graph, equation: Any, x: View) -> View:
    exponent = np.asarray(equation.params["y"], np.float32)
    return _elementwise(lambda g, a: g.add("Pow", a, exponent))(graph, equation, x)


def _cast(graph: Graph, equation: Any, x: View) -> View:
    before, after = equation.invars[0].aval.dtype, equation.outvars[0].aval.dtype
    if before == after:
        return x
    to = helper.np_dtype_to_tensor_dtype(np.dtype(after))
    return _elementwise(lambda g, a: g.add("Cast", a, to=to))(graph, equation, x)


def _same(graph: Graph, equation: Any, x: View) -> View:
    return x


_ELEMENTWISE: Mapping[str, str | Emit] = {
    "abs": "Abs",
    "add": "Add",
    "add_any": "Add",
    "and": "And",
    "clamp": _clamp,
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "erfc": lambda g, x: g.add("Sub", np.float32(1), g.add("Erf", x)),
    "exp": "Exp",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "log1p": lambda g, x: g.add("Log", g.add("Add", x, np.float32(1))),
    "logistic": "Sigmoid",
    "lt": "Less",
    "max": lambda g, x, y: g.add("Relu", x) if _is_zero(y) else g.add("Max", x, y),
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "not": "Not",
    "or": "Or",
    "pow": "Pow",
    "rsqrt": lambda g, x: g.add("Reciprocal", g.add("Sqrt", x)),
    "select_n": lambda g, which, no, yes: g.add("Where", which, yes, no),
    "sqrt": "Sqrt",
    "square": lambda g, x: g.add("Mul", x, x),
    "sub": "Sub",
    "tanh": "Tanh",
}

# --- Shapes -----------------------------------------------------------------------------------------------------------


def _broadcast(graph: Graph, equation: Any, x: View, *_: View) -> View:
    return broadcast(x, _shape(equation), equation.params["broadcast_dimensions"])


def _reshape(graph: Graph, equation: Any, x: View) -> View:
    return reshape(graph, x, _shape(equation))


def _transpose(graph: Graph, equation: Any, x: View) -> View:
    return transpose(x, equation.params["permutation"])


def _slice(graph: Graph, equation: Any, x: View) -> View:
    settings, after = equation.params, _shape(equation)
    steps = settings["strides"] or (1,) * len(after)
    limits = zip(settings["start_indices"], settings["limit_indices"], steps, strict=True)
    cut = {axis: limit for axis, limit in enumerate(limits) if after[axis] != x.shape[axis]}
    if not cut:
        return x
    x = filled(graph, x, *cut)
    rows = [(start, end, x.order.index(axis), step) for axis, (start, end, step) in cut.items()]
    sides = tuple(1 if axis is None else after[axis] for axis in x.order)
    return View(graph.add("Slice", x.stored, *np.asarray(rows, np.int64).T), sides, x.order, after)


def _pad(graph: Graph, equation: Any, x: View, fill: View) -> View:
    low, high, inner = zip(*equation.params["padding_config"], strict=True)
    if any(inner):
        raise UserError("the network spreads a map with zeros between its pixels, which has no ONNX form here")
    after = _shape(equation)
    x = filled(graph, x, *(axis for axis, ends in enumerate(zip(low, high, strict=True)) if any(ends)))
    pads = [0 if axis is None else ends[axis] for ends in (low, high) for axis in x.order]
    sides = tuple(1 if axis is None else after[axis] for axis in x.order)
    return View(graph.add("Pad", x.stored, np.asarray(pads, np.int64), fill.stored), sides, x.order, after)


def _gather(graph: Graph, equation: Any, x: View, starts: View) -> View:
    """Indexing by constants, which is no slice where the batch is symbolic: one axis after the other."""
    layout, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    if not isinstance(starts.stored, np.ndarray) or layout.operand_batching_dims:
        raise UserError("the network indexes by what it computes, which has no ONNX form here")
    stored = arrange(graph, x, tuple(range(len(x.shape))), full=True)
    listed: list[int] = []  # axes from which a list of rows is taken; of the others, one window
    along: list[int] = []
    for column, axis in enumerate(layout.start_index_map):
        first = starts.stored[..., column]
        dims = [d for d in range(first.ndim) if (first != first.take([0], d)).any()]
        listed, along = listed + [axis] * bool(dims), along + dims
        rows = np.moveaxis(first, dims[0], 0).reshape(first.shape[dims[0]], -1)[:, 0] if dims else first.reshape(-1)[:1]
        offsets = np.arange(1 if dims else sizes[axis])
        stored = graph.add("Gather", stored, (rows[:, None] + offsets).reshape(-1).astype(np.int64), axis=axis)
    after = _shape(equation)
    kept = [a for a in range(len(sizes)) if a in listed or a not in layout.collapsed_slice_dims]
    placed = [i for i in range(len(after)) if i not in layout.offset_dims and after[i] != 1]
    if along != sorted(set(along)) or placed != [kept.index(axis) for axis in listed]:
        raise UserError("the network indexes several axes by one list, which has no ONNX form here")
    return plain(graph.add("Reshape", stored, np.asarray([-1 if symbolic(s) else s for s in after], np.int64)), after)


def _concatenate(graph: Graph, equation: Any, *parts: View) -> View:
    axis, after = equation.params["dimension"], _shape(equation)
    order = common_order([filled(graph, x, axis) for x in parts])
    tensors = [arrange(graph, x, order, full=True) for x in parts]
    sides = tuple(1 if a is None else after[a] for a in order)
    return View(graph.add("Concat", *tensors, axis=order.index(axis)), sides, order, after)


def _stack(graph: Graph, equation: Any, *parts: View) -> View:
    axis, after = equation.params["axis"], _shape(equation)
    order = common_order([filled(graph, x) for x in parts])
    tensors = [graph.add("Unsqueeze", arrange(graph, x, order, full=True), np.asarray([0], np.int64)) for x in parts]
    order = (axis, *(a if a is None else a + (a >= axis) for a in order))
    sides = tuple(1 if a is None else after[a] for a in order)
    return View(graph.add("Concat", *tensors, axis=0), sides, order, after)


def _unstack(graph: Graph, equation: Any, x: View) -> list[View]:
    axis = equation.params["axis"]
    x = filled(graph, x, axis)
    place = x.order.index(axis)
    shape = without(x, x.stored, (axis,))
    drop = [i for i in range(len(x.order)) if i != place]
    sides, order = tuple(shape.sides[i] for i in drop), tuple(shape.order[i] for i in drop)
    names = [graph.add("Gather", x.stored, np.asarray(i, np.int64), axis=place) for i in range(len(equation.outvars))]
    return [View(name, sides, order, shape.shape) for name in names]


def _split(graph: Graph, equation: Any, x: View) -> list[View]:
    axis, sizes = equation.params["axis"], equation.params["sizes"]
    x = filled(graph, x, axis)
    names = graph.add_many("Split", len(sizes), x.stored, np.asarray(sizes, np.int64), axis=x.order.index(axis))

    def part(name: str, shape: Shape) -> View:
        return View(name, tuple(1 if a is None else shape[a] for a in x.order), x.order, shape)

    return [part(name, _shape(equation, i)) for i, name in enumerate(names)]


# --- Sums, products, convolutions -------------------------------------------------------------------------------------


def _reduce(op: str, over_pixels: str = "") -> Callable[..., View]:
    """`over_pixels` is the operation over all axes of a tensor but the first two."""

    def emit(graph: Graph, equation: Any, x: View) -> View:
        axes = equation.params["axes"]
        if any(x.repeats(axis) for axis in axes):
            x = filled(graph, x, *axes)
        places = sorted(x.order.index(axis) for axis in axes if axis in x.order)
        counts = [x.sides[place] for place in places]
        if not places:
            return without(x, x.stored, axes)
        if not over_pixels or len(places) < 2 or places != list(range(2, len(x.sides))):
            return without(x, graph.add(op, x.stored, np.asarray(places, np.int64), keepdims=1), axes)
        result = graph.add(over_pixels, x.stored)
        if op == "ReduceSum":
            result = graph.add("Mul", result, np.asarray(math.prod(counts), equation.outvars[0].aval.dtype))
        return without(x, result, axes)

    return emit


def _matrix_product(graph: Graph, equation: Any, left: View, right: View) -> View:
    (over_left, over_right), (each_left, each_right) = equation.params["dimension_numbers"]
    shape, ranks = _shape(equation), (len(left.shape), len(right.shape))
    if not each_left and over_left == (ranks[0] - 1,) and over_right == (0,) and ranks[1] == 2:
        last = ranks[0] - 1
        if ranks[0] == 4 and left.order[1:2] == (last,) and left.order[0] == 0 and isinstance(right.stored, np.ndarray):
            kernel = right.stored.T[:, :, None, None]
            order = (0, last, *(axis for axis in range(4) if axis not in (0, last)))
            y = graph.add("Conv", arrange(graph, left, order, full=True), kernel)
            return View(y, tuple(shape[axis] for axis in order), order, shape)
        operands = [arrange(graph, x, tuple(range(len(x.shape))), full=True) for x in (left, right)]
        return plain(graph.add("Gemm" if ranks[0] == 2 else "MatMul", *operands), shape)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    at_left = {axis: next(letters) for axis in range(ranks[0])}
    shared = dict(zip((*over_right, *each_right), (*over_left, *each_left), strict=True))
    at_right = {axis: at_left[shared[axis]] if axis in shared else next(letters) for axis in range(ranks[1])}
    kept = [at_left[axis] for axis in each_left]
    kept += [at_left[axis] for axis in range(ranks[0]) if axis not in (*over_left, *each_left)]
    kept += [at_right[axis] for axis in range(ranks[1]) if axis not in shared]
    terms, operands = [], []
    for x, at in ((left, at_left), (right, at_right)):
        x = filled(graph, x)
        order = tuple(axis for axis in x.order if axis is not None)
        order += tuple(axis for axis in range(len(x.shape)) if axis not in order)
        terms.append("".join(at[axis] for axis in order))
        operands.append(arrange(graph, x, order))
    # Images first, as all maps are stored.
    order = tuple(sorted(range(len(shape)), key=lambda axis: not symbolic(shape[axis])))
    formula = ",".join(terms) + "->" + "".join(kept[axis] for axis in order)
    return View(graph.add("Einsum", *operands, equation=formula), tuple(shape[a] for a in order), order, shape)


def _convolution(graph: Graph, equation: Any, x: View, kernel: View) -> View:
    settings, shape = equation.params, _shape(equation)
    layout = settings["dimension_numbers"]
    if settings["batch_group_count"] != 1 or any(step != 1 for step in settings["lhs_dilation"]):
        raise UserError("the network has a transposed convolution, which has no ONNX form here")
    y = graph.add(
        "Conv",
        arrange(graph, x, tuple(layout.lhs_spec), full=True),
        arrange(graph, kernel, tuple(layout.rhs_spec), full=True),
        strides=list(settings["window_strides"]),
        pads=_pads(settings["padding"]),
        dilations=list(settings["rhs_dilation"]),
        group=settings["feature_group_count"],
    )
    return View(y, tuple(shape[axis] for axis in layout.out_spec), tuple(layout.out_spec), shape)


def _pads(pairs: Any) -> list[int]:
    return [side for ends in zip(*pairs, strict=True) for side in ends]


def _pool(op: str) -> Callable[..., View]:
    def emit(graph: Graph, equation: Any, x: View) -> View:
        settings, shape, order = equation.params, _shape(equation), (0, 3, 1, 2)
        window, steps, pads = (settings[key] for key in ("window_dimensions", "window_strides", "padding"))
        dilated = any(side != 1 for key in ("base_dilation", "window_dilation") for side in settings[key])
        if len(window) != 4 or dilated or {window[0], window[3], steps[0], steps[3]} != {1}:
            raise UserError(f"the network pools over windows {window} of a map, which has no ONNX form here")
        also = {"count_include_pad": 1} if op == "AveragePool" else {}
        y = graph.add(
            op,
            arrange(graph, x, order, full=True),
            kernel_shape=list(window[1:3]),
            strides=list(steps[1:3]),
            pads=_pads(pads[1:3]),
            **also,
        )
        if also:
            y = graph.add("Mul", y, np.asarray(math.prod(window), equation.outvars[0].aval.dtype))
        return View(y, tuple(shape[axis] for axis in order), order, shape)

    return emit


OPERATIONS: Mapping[str, Callable[..., View | list[View]]] = {
    **{name: _elementwise(emit) for name, emit in _ELEMENTWISE.items()},
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "convert_element_type": _cast,
    "copy": _same,
    "copy_p": _same,
    "dot_general": _matrix_product,
    "gather": _gather,
    "integer_pow": _power,
    "name": _same,
    "pad": _pad,
    "reduce_max": _reduce("ReduceMax", "GlobalMaxPool"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_sum": _reduce("ReduceSum", "GlobalAveragePool"),
    "reduce_window_max": _pool("MaxPool"),
    "reduce_window_sum": _pool("AveragePool"),
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "squeeze": _reshape,
    "stack": _stack,
    "stop_gradient": _same,
    "transpose": _transpose,
    "unstack": _unstack,
}
"""The networks' operations by JAX's names: (graph, equation, views of its inputs) -> view of its result, or views."""
