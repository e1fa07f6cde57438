"""Conversion of traced JAX programs to ONNX, for the operations of this package's networks.

A program is traced with a batch of symbolic size. What depends on weights alone is computed while the graph is built;
functions within the program are inlined; where it differs by platform, the form for accelerators is taken (XLA's own
convolutions). An operation that is missing here is refused by name.

Why not jax2onnx (0.17.1): it refuses `platform_index`, which every convolution here has, loses a max pool's padding and
transposes around each convolution; docs/export.md has the measurements.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from onnx import helper

from se_flax.errors import UserError
from se_flax.export.onnx_graph import Graph, Node, Shape, symbolic
from se_flax.export.onnx_layout import View, arrange, plain
from se_flax.export.onnx_operations import OPERATIONS
from se_flax.export.onnx_simplify import simplify

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
      The model, opset 18, whose batch size is free. Maps are `[N, C, H, W]` inside.

    Raises:
      UserError: an operation that has no form here.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    program = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((batch, *shape), jnp.float32))
    graph = Graph(inputs)
    # The one transpose of a convolutional network: what is done to the images is done in the order of its maps.
    maps = (0, len(shape), *range(1, len(shape)))
    sides = (batch, *shape)
    images = View(graph.transpose(inputs, maps), tuple(sides[axis] for axis in maps), maps, sides)
    (result,) = _run(graph, program.jaxpr, program.consts, [images])
    (described,) = program.out_avals
    last = arrange(graph, _view(result), tuple(range(len(described.shape))), full=True)
    graph.nodes.append(Node("Identity", (graph.name(last),), (outputs,), {}))
    nodes, constants = simplify(graph).protos()
    result_sides = ["batch" if symbolic(side) else side for side in described.shape]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "se_flax",
            [helper.make_tensor_value_info(inputs, onnx.TensorProto.FLOAT, ["batch", *shape])],
            [helper.make_tensor_value_info(outputs, helper.np_dtype_to_tensor_dtype(described.dtype), result_sides)],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="se-flax",
    )
    helper.set_model_props(model, {name: json.dumps(value) for name, value in (metadata or {}).items()})
    onnx.checker.check_model(model, full_check=True)
    return model


_CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")


def _run(graph: Graph, program: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Adds a traced program to a graph; arguments and results are views, or arrays where they are known."""
    values = dict(zip(program.constvars, map(np.asarray, constants), strict=True))
    values |= dict(zip(program.invars, arguments, strict=True))

    def read(x: Any) -> Any:
        return np.asarray(x.val, x.aval.dtype) if hasattr(x, "val") else values[x]

    for equation in program.eqns:
        results = _apply(graph, equation, [read(x) for x in equation.invars])
        values |= dict(zip(equation.outvars, results, strict=True))
    return [read(x) for x in program.outvars]


def _apply(graph: Graph, equation: Any, inputs: list[Any]) -> list[Any]:
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
    if name not in OPERATIONS:
        raise UserError(
            f"the network uses the operation {name!r}, which has no ONNX form here; export it as stablehlo or "
            "savedmodel, or leave out the module of your own that brings it in"
        )
    result = OPERATIONS[name](graph, equation, *map(_view, inputs))
    return result if isinstance(result, list) else [result]


def _view(value: Any) -> View:
    return value if isinstance(value, View) else plain(value, value.shape)
