"""Conversion of traced JAX programs to ONNX, for the operations of this package's networks.

A program is traced with a batch of symbolic size. What depends on weights alone is computed while the graph is built;
functions within the program are inlined; where it differs by platform, the form for accelerators is taken (XLA's own
convolutions). An operation that is missing here is refused by name.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from onnx import helper

from se_flax.errors import UserError
from se_flax.export.onnx_graph import Broadcast, Graph, Shape, Value, symbolic

OPSET = 18
IR_VERSION = 8
"""The intermediate representation that came with the opset: readers of that year accept the file."""


def to_onnx(
    function: Callable[[jax.Array], jax.Array],
    shape: Shape,
    *,
    inputs: str = "images",
    outputs: str = "logits",
    metadata: Mapping[str, Any] | None = None,
) -> onnx.ModelProto:
    """Turns a function of images into an ONNX model.

    Args:
      function: from float32 `[N, H, W, C]` to one float32 array with the batch in front.
      shape: (H, W, C).
      inputs: name of the input.
      outputs: name of the output.
      metadata: JSON-able notes that the model carries, one property each.

    Returns:
      The model, opset 18, whose batch size is free.

    Raises:
      UserError: an operation that has no form here.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    program = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((batch, *shape), jnp.float32))
    graph = Graph(inputs)
    (result,) = _run(graph, program.jaxpr, program.consts, [inputs])
    graph.nodes.append(helper.make_node("Identity", [graph.name(result)], [outputs]))
    (described,) = program.out_avals
    sides = ["batch" if symbolic(side) else side for side in described.shape]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "se_flax",
            [helper.make_tensor_value_info(inputs, onnx.TensorProto.FLOAT, ["batch", *shape])],
            [helper.make_tensor_value_info(outputs, helper.np_dtype_to_tensor_dtype(described.dtype), sides)],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="se-flax",
    )
    helper.set_model_props(model, {name: json.dumps(value) for name, value in (metadata or {}).items()})
    onnx.checker.check_model(model, full_check=True)
    return model


# --- From a program's equations to nodes ------------------------------------------------------------------------------

_CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")


def _run(graph: Graph, program: Any, constants: Sequence[Any], arguments: Sequence[Value]) -> list[Value]:
    """Adds a traced program to a graph; returns its results."""
    values = dict(zip(program.constvars, map(np.asarray, constants), strict=True))
    values |= dict(zip(program.invars, arguments, strict=True))

    def read(x: Any) -> Value:
        return np.asarray(x.val, x.aval.dtype) if hasattr(x, "val") else values[x]

    for equation in program.eqns:
        results = _apply(graph, equation, [read(x) for x in equation.invars])
        values |= dict(zip(equation.outvars, results, strict=True))
    return [read(x) for x in program.outvars]


def _apply(graph: Graph, equation: Any, inputs: list[Value]) -> list[Value]:
    name, settings = equation.primitive.name, equation.params
    if name == "platform_index":
        return [np.asarray(settings["platforms"].index(None), np.int32)]
    if name == "cond" and isinstance(inputs[0], np.ndarray):
        branch = settings["branches"][int(inputs[0])]
        return _run(graph, branch.jaxpr, branch.consts, inputs[1:])
    if name in _CALLS:
        inner = settings["call_jaxpr"] if "call_jaxpr" in settings else settings["jaxpr"]
        return _run(graph, getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs)
    known = all(isinstance(x, np.ndarray) for x in inputs)
    if known and not any(symbolic(side) for x in equation.outvars for side in x.aval.shape):
        results = equation.primitive.bind(*inputs, **settings)
        return [np.asarray(x) for x in (results if equation.primitive.multiple_results else [results])]
    if name in _ELEMENTWISE:
        return [_elementwise(graph, _ELEMENTWISE[name], equation, inputs)]
    if name not in _OPERATIONS:
        raise UserError(
            f"the network uses the operation {name!r}, which has no ONNX form here; export it as stablehlo or "
            "savedmodel, or leave out the module of your own that brings it in"
        )
    result = _OPERATIONS[name](graph, equation, *inputs)
    return result if isinstance(result, list) else [result]


def _elementwise(graph: Graph, op: Any, equation: Any, inputs: list[Value]) -> Value:
    shape = equation.outvars[0].aval.shape
    emit = op if callable(op) else lambda graph, *operands: graph.add(op, *operands)
    shapes = [x.aval.shape for x in equation.invars]
    if any(not isinstance(x, Broadcast) and s == shape for x, s in zip(inputs, shapes, strict=True)):
        return emit(graph, *(x.source if isinstance(x, Broadcast) else x for x in inputs))
    # Nothing is full yet: compute on the small arrays, and repeat the result where somebody needs it.
    sides = [x.source_shape if isinstance(x, Broadcast) else s for x, s in zip(inputs, shapes, strict=True)]
    small = tuple(next((s[i] for s in sides if s and _repeated(s[i])), 1) for i in range(len(shape)))
    result = emit(graph, *(x.source if isinstance(x, Broadcast) else x for x in inputs))
    return result if small == shape else Broadcast(result, small, shape)


def _repeated(side: Any) -> bool:
    return symbolic(side) or side != 1


def _is_zero(value: Value) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 0 and value == 0


def _scaled(factor: float) -> Callable[..., str]:
    return lambda graph, x: graph.add("Mul", x, np.float32(factor))


def _power(graph: Graph, equation: Any, x: Value) -> Value:
    exponent = equation.params["y"]
    return _elementwise(graph, lambda g, a: g.add("Pow", a, np.asarray(exponent, np.float32)), equation, [x])


def _cast(graph: Graph, equation: Any, x: Value) -> Value:
    before, after = equation.invars[0].aval.dtype, equation.outvars[0].aval.dtype
    if before == after:
        return x
    to = helper.np_dtype_to_tensor_dtype(np.dtype(after))
    return _elementwise(graph, lambda g, a: g.add("Cast", a, to=to), equation, [x])


_ELEMENTWISE: Mapping[str, Any] = {
    "abs": "Abs",
    "add": "Add",
    "and": "And",
    "clamp": lambda g, low, x, high: g.add("Min", g.add("Max", x, low), high),
    "copy": "Identity",
    "copy_p": "Identity",
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
    "name": "Identity",
    "neg": "Neg",
    "not": "Not",
    "or": "Or",
    "pow": "Pow",
    "rsqrt": lambda g, x: g.add("Reciprocal", g.add("Sqrt", x)),
    "select_n": lambda g, which, no, yes: g.add("Where", which, yes, no),
    "sqrt": "Sqrt",
    "square": lambda g, x: g.add("Mul", x, x),
    "stop_gradient": "Identity",
    "sub": "Sub",
    "tanh": "Tanh",
}


def _broadcast(graph: Graph, equation: Any, x: Value, *_: Value) -> Value:
    shape, axes = equation.params["shape"], equation.params["broadcast_dimensions"]
    before = equation.invars[0].aval.shape
    source, sides = (x.source, x.source_shape) if isinstance(x, Broadcast) else (x, before)
    spread: list[Any] = [1] * len(shape)
    for side, axis in zip(sides, axes, strict=True):
        spread[axis] = side
    source = graph.reshape(source, sides, tuple(spread))
    return source if tuple(spread) == tuple(shape) else Broadcast(source, tuple(spread), tuple(shape))


def _reshape(graph: Graph, equation: Any, x: Value) -> Value:
    return graph.reshape(x, equation.invars[0].aval.shape, equation.outvars[0].aval.shape)


def _transpose(graph: Graph, equation: Any, x: Value) -> Value:
    return graph.transpose(x, equation.params["permutation"])


def _reduce(op: str) -> Callable[..., str]:
    def emit(graph: Graph, equation: Any, x: Value) -> str:
        return graph.add(op, x, np.asarray(equation.params["axes"], np.int64), keepdims=0)

    return emit


def _slice(graph: Graph, equation: Any, x: Value) -> Value:
    settings, shape = equation.params, equation.invars[0].aval.shape
    steps = settings["strides"] or (1,) * len(shape)
    rows = [
        (start, end, axis, step)
        for axis, (start, end, step) in enumerate(
            zip(settings["start_indices"], settings["limit_indices"], steps, strict=True)
        )
        if start or step != 1 or end != shape[axis]
    ]
    return graph.add("Slice", x, *np.asarray(rows, np.int64).reshape(-1, 4).T) if rows else x


def _pad(graph: Graph, equation: Any, x: Value, fill: Value) -> Value:
    low, high, inner = zip(*equation.params["padding_config"], strict=True)
    if any(inner):
        raise UserError("the network spreads a map with zeros between its pixels, which has no ONNX form here")
    return graph.add("Pad", x, np.asarray([*low, *high], np.int64), fill)


def _gather(graph: Graph, equation: Any, x: Value, starts: Value) -> Value:
    """Indexing by constants, which is no slice where the batch is symbolic: one axis after the other."""
    layout, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    if not isinstance(starts, np.ndarray) or layout.operand_batching_dims:
        raise UserError("the network indexes by what it computes, which has no ONNX form here")
    listed: list[int] = []  # axes from which a list of rows is taken; of the others, one window
    along: list[int] = []
    for column, axis in enumerate(layout.start_index_map):
        first = starts[..., column]
        dims = [d for d in range(first.ndim) if (first != first.take([0], d)).any()]
        listed, along = listed + [axis] * bool(dims), along + dims
        rows = np.moveaxis(first, dims[0], 0).reshape(first.shape[dims[0]], -1)[:, 0] if dims else first.reshape(-1)[:1]
        offsets = np.arange(1 if dims else sizes[axis])
        x = graph.add("Gather", x, (rows[:, None] + offsets).reshape(-1).astype(np.int64), axis=axis)
    after = equation.outvars[0].aval.shape
    kept = [a for a in range(len(sizes)) if a in listed or a not in layout.collapsed_slice_dims]
    placed = [i for i in range(len(after)) if i not in layout.offset_dims and after[i] != 1]
    if along != sorted(set(along)) or placed != [kept.index(axis) for axis in listed]:
        raise UserError("the network indexes several axes by one list, which has no ONNX form here")
    return graph.add("Reshape", x, np.asarray([-1 if symbolic(side) else side for side in after], np.int64))


def _concatenate(graph: Graph, equation: Any, *parts: Value) -> Value:
    return graph.add("Concat", *parts, axis=equation.params["dimension"])


def _stack(graph: Graph, equation: Any, *parts: Value) -> Value:
    axis = equation.params["axis"]
    return graph.add("Concat", *(graph.add("Unsqueeze", x, np.asarray([axis], np.int64)) for x in parts), axis=axis)


def _unstack(graph: Graph, equation: Any, x: Value) -> list[str]:
    axis = equation.params["axis"]
    return [graph.add("Gather", x, np.asarray(i, np.int64), axis=axis) for i in range(len(equation.outvars))]


def _split(graph: Graph, equation: Any, x: Value) -> list[str]:
    sizes = equation.params["sizes"]
    return graph.add_many("Split", len(sizes), x, np.asarray(sizes, np.int64), axis=equation.params["axis"])


def _matrix_product(graph: Graph, equation: Any, left: Value, right: Value) -> Value:
    (over_left, over_right), (each_left, each_right) = equation.params["dimension_numbers"]
    ranks = [len(x.aval.shape) for x in equation.invars]
    if not each_left and over_left == (ranks[0] - 1,) and over_right == (0,) and ranks[1] == 2:
        return graph.add("MatMul", left, right)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    at_left = {axis: next(letters) for axis in range(ranks[0])}
    shared = dict(zip((*over_right, *each_right), (*over_left, *each_left), strict=True))
    at_right = {axis: at_left[shared[axis]] if axis in shared else next(letters) for axis in range(ranks[1])}
    kept = [at_left[axis] for axis in each_left]
    kept += [at_left[axis] for axis in range(ranks[0]) if axis not in (*over_left, *each_left)]
    kept += [at_right[axis] for axis in range(ranks[1]) if axis not in shared]
    terms = ("".join(at[axis] for axis in range(rank)) for at, rank in zip((at_left, at_right), ranks, strict=True))
    return graph.add("Einsum", left, right, equation=",".join(terms) + "->" + "".join(kept))


def _convolution(graph: Graph, equation: Any, x: Value, kernel: Value) -> Value:
    settings = equation.params
    layout = settings["dimension_numbers"]
    if settings["batch_group_count"] != 1 or any(step != 1 for step in settings["lhs_dilation"]):
        raise UserError("the network has a transposed convolution, which has no ONNX form here")
    y = graph.add(
        "Conv",
        graph.transpose(x, layout.lhs_spec),
        graph.transpose(kernel, layout.rhs_spec),
        strides=list(settings["window_strides"]),
        pads=_pads(settings["padding"]),
        dilations=list(settings["rhs_dilation"]),
        group=settings["feature_group_count"],
    )
    return graph.transpose(y, np.argsort(layout.out_spec).tolist())


def _pads(pairs: Sequence[tuple[int, int]]) -> list[int]:
    return [side for ends in zip(*pairs, strict=True) for side in ends]


def _pool(op: str) -> Callable[..., Value]:
    def emit(graph: Graph, equation: Any, x: Value) -> Value:
        settings = equation.params
        window, steps, pads = (settings[key] for key in ("window_dimensions", "window_strides", "padding"))
        dilated = any(side != 1 for key in ("base_dilation", "window_dilation") for side in settings[key])
        if len(window) != 4 or dilated or {window[0], window[3], steps[0], steps[3]} != {1}:
            raise UserError(f"the network pools over windows {window} of a map, which has no ONNX form here")
        also = {"count_include_pad": 1} if op == "AveragePool" else {}
        y = graph.add(
            op,
            graph.transpose(x, (0, 3, 1, 2)),
            kernel_shape=list(window[1:3]),
            strides=list(steps[1:3]),
            pads=_pads(pads[1:3]),
            **also,
        )
        return graph.transpose(_scaled(math.prod(window))(graph, y) if also else y, (0, 2, 3, 1))

    return emit


_OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "convert_element_type": _cast,
    "dot_general": _matrix_product,
    "gather": _gather,
    "integer_pow": _power,
    "pad": _pad,
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_window_max": _pool("MaxPool"),
    "reduce_window_sum": _pool("AveragePool"),
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "squeeze": _reshape,
    "stack": _stack,
    "transpose": _transpose,
    "unstack": _unstack,
}
