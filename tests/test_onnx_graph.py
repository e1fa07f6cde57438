"""ONNX graphs: one transpose, at the images; weights stored once; patterns in one operation; the numbers are JAX's."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_variables import random_variables

import se_flax
from se_flax import functional as F

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SHAPE = (6, 4, 8)
KERNELS = {k: np.random.default_rng(k).standard_normal((k, k, 8, 8)).astype(np.float32) for k in (1, 3)}
GATE = np.random.default_rng(4).standard_normal((8, 8)).astype(np.float32)
BIAS = np.linspace(-1, 1, 8, dtype=np.float32)


def conv(x, k=3, stride=1):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, KERNELS[k], (stride, stride), "SAME", dimension_numbers=layout)


cut = jax.lax.slice_in_dim


def mean(x):
    return x.mean((1, 2), keepdims=True)


def pool(x):
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4


def shuffle(x):
    n, h, w, c = x.shape
    return x.reshape(n, h, w, 2, c // 2).swapaxes(3, 4).reshape(n, h, w, c)


def normalised(x):
    """Over the channels."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def operations(function):
    """How often the graph has each operation, once its result is JAX's at two batch sizes."""
    from se_flax.export import onnx_program

    program = onnx_program.to_onnx(function, SHAPE)
    session = onnxruntime.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
    for count in (1, 3):
        x = np.random.default_rng(count).standard_normal((count, *SHAPE)).astype(np.float32)
        expected = np.asarray(function(jnp.asarray(x)))
        (got,) = session.run(None, {"images": x})
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    return Counter(node.op_type for node in program.graph.node)


# The result of a convolution is read as [N, H, W, C] at the end of these, which is the second transpose.
@pytest.mark.parametrize(
    ("function", "transposes"),
    [
        (lambda x: x, 0),
        (lambda x: x.mean((1, 2)), 1),
        (lambda x: conv(x).mean((1, 2)), 1),
        (lambda x: conv(x), 2),
        (lambda x: conv(conv(x)) + x, 2),
        (lambda x: conv(jnp.maximum(conv(x) * mean(x), jnp.tanh(x))), 2),
        (lambda x: conv(cut(jnp.pad(conv(x), ((0, 0), (1, 0), (0, 2), (0, 0))), 1, 5, 2, 1)), 2),
        (lambda x: conv(jnp.concatenate([cut(conv(x), 0, 3, 1, 3), cut(x, 3, 8, 1, 3)], -1)), 2),
        (lambda x: conv(jnp.concatenate([conv(x), jnp.ones_like(x), mean(x) + 0 * x], 1)), 2),
        (lambda x: conv(sum(jnp.split(conv(x), 2, axis=1))), 2),
        (lambda x: conv(jnp.max(jnp.stack([conv(x), x, conv(x, 1)], 1), 1)), 2),
        (lambda x: conv(sum(jnp.unstack(jnp.stack([conv(x), 2 * x], -1), axis=-1))), 2),
        (lambda x: conv(conv(normalised(conv(x)))), 2),
        (lambda x: conv(x) * jax.nn.softmax(conv(x, 1).max(-1, keepdims=True), (1, 2)), 2),
        (lambda x: conv(x * jax.nn.sigmoid(cut(jnp.stack([conv(x).max(-1), x.mean(-1)], -1), 1, 2, 1, 3))), 2),
        (lambda x: pool(conv(x)).reshape(-1, 2 * SHAPE[0] * SHAPE[1]), 2),
        (lambda x: conv(shuffle(conv(x))), 3),
        (lambda x: jnp.einsum("nhwc,nhwd->ncd", conv(x), conv(x, 1)), 1),
    ],
)
def test_a_map_is_transposed_only_where_its_order_matters(function, transposes):
    assert operations(function)["Transpose"] == transposes


@pytest.mark.parametrize(
    ("function", "counts"),
    [
        (lambda x: F.hard_swish(x), {"HardSwish": 1}),
        (lambda x: F.hard_sigmoid(x) * x, {"HardSwish": 1}),
        (lambda x: F.hard_sigmoid(x) * (x + 1), {"HardSigmoid": 1, "Mul": 1, "Add": 1}),
        (lambda x: jnp.clip(x + 2, 0, 4) / 4 * x, {"Add": 0, "HardSigmoid": 1, "Mul": 1}),
        (lambda x: jnp.clip(x + 3, 0, 6) / 5, {"Clip": 1, "Div": 1, "Add": 1}),
        (lambda x: jnp.clip(x + 3, 1, 6) / 6, {"Clip": 1, "Div": 1, "Add": 1}),
        (lambda x: 6 / (jnp.clip(x, 0, 6) + 3), {"Clip": 1, "Div": 1, "Add": 1}),
        (lambda x: jax.nn.relu6(x), {"Clip": 1}),
        (lambda x: jax.nn.relu(x), {"Relu": 1}),
        (lambda x: jnp.minimum(jnp.maximum(x, -1), BIAS), {"Max": 1, "Min": 1}),
        (lambda x: mean(conv(x)), {"GlobalAveragePool": 1, "Div": 0, "Mul": 0}),
        (lambda x: conv(x).sum((1, 2)), {"GlobalAveragePool": 1, "Mul": 1}),
        (lambda x: conv(x).max((1, 2)), {"GlobalMaxPool": 1}),
        (lambda x: conv(x).mean(1), {"ReduceSum": 1, "Div": 1}),
        (lambda x: pool(conv(x)), {"AveragePool": 1, "Div": 0, "Mul": 0}),
        (lambda x: conv(x) + BIAS, {"Conv": 1, "Add": 0}),
        (lambda x: conv(x) + np.float32(0.5), {"Conv": 1, "Add": 1}),
        (lambda x: conv(x) + BIAS - conv(x), {"Conv": 1, "Add": 1, "Sub": 1}),
        (lambda x: conv(x) + np.linspace(0, 1, 4, dtype=np.float32)[:, None], {"Conv": 1, "Add": 1}),
        (lambda x: x.mean((1, 2)) @ GATE + BIAS, {"Gemm": 1, "Add": 0}),
        (lambda x: x.mean((1, 2)) @ GATE + np.ones((1, 8), np.float32), {"Gemm": 1, "Add": 0}),
        (lambda x: conv(x) * jax.nn.sigmoid(mean(conv(x)) @ GATE + BIAS), {"Conv": 2, "Gemm": 0, "Add": 0, "Mul": 1}),
        (lambda x: conv(x, 1) * (conv(mean(x), 1) + 1), {"Conv": 1, "GlobalAveragePool": 1}),
        (lambda x: mean(conv(x, 1, 2)) * (conv(mean(x), 1, 2) + 1), {"Conv": 2}),
        (lambda x: mean(conv(x, 3)) * (conv(mean(x), 3) + 1), {"Conv": 2}),
        (lambda x: conv(x) * conv(x), {"Conv": 1}),
    ],
)
def test_patterns_become_one_operation_where_they_are_the_same_function(function, counts):
    found = operations(function)
    assert {op: found[op] for op in counts} == counts


def test_an_array_is_stored_once_and_none_that_is_not_read():
    from se_flax.export import onnx_program

    constants = onnx_program.to_onnx(lambda x: conv(jnp.tanh(conv(x) + BIAS)) + BIAS, SHAPE).graph.initializer
    assert sorted(tuple(c.dims) for c in constants) == [(8,), (8, 8, 3, 3)]


def test_se_resnet_50_has_the_operations_of_the_paper_and_no_more_bytes_than_its_weights():
    from se_flax.export import onnx_program

    model = se_flax.create_model("seresnet50")
    model, variables = se_flax.fuse(model, random_variables(model, 1, 64, 64, 3))
    program = onnx_program.to_onnx(partial(model.apply, variables), (64, 64, 3))
    # 53 convolutions and two 1x1 convolutions per gate; a mean per gate and one for the classifier; 16 residual sums.
    assert Counter(node.op_type for node in program.graph.node) == {
        "Conv": 53 + 2 * 16,
        "Relu": 1 + 3 * 16 + 16,
        "Sigmoid": 16,
        "Mul": 16,
        "Add": 16,
        "GlobalAveragePool": 16 + 1,
        "MaxPool": 1,
        "Gemm": 1,
        "Transpose": 1,
        "Reshape": 1,
        "Identity": 1,
    }
    weights = sum(4 * np.size(leaf) for leaf in jax.tree.leaves(variables))
    assert program.ByteSize() <= 1.02 * weights
    kinds = [node.op_type for node in program.graph.node]
    gate = next(i for i, kind in enumerate(kinds) if kind == "Sigmoid")
    assert kinds[gate - 4 : gate + 2] == ["GlobalAveragePool", "Conv", "Relu", "Conv", "Sigmoid", "Mul"]
