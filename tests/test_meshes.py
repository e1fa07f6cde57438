"""Networks in a project with JAX's own mesh: explicit and automatic axes, images and parameters sharded."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolution_reference import arrays
from families import SMALLEST, model_and_shapes, small_side
from formulas import random_variables
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import se_flax
from se_flax.attention import GlobalContext
from se_flax.lowering.convolution import convolve
from se_flax.nn.norm import EvoNormS0, GroupNorm, LayerNorm
from se_flax.nn.residual import Bottleneck

AXES = pytest.mark.parametrize("axes", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])


def make_mesh(axes):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axes,) * 2)


def last_axis_over(axis, size):
    """How parameters are sharded: along their last axis, where it can be divided."""
    return lambda x: PartitionSpec(*[None] * (x.ndim - 1), axis) if x.ndim and x.shape[-1] % size == 0 else None


REPLICATED = lambda x: PartitionSpec()  # noqa: E731


def placed(tree, mesh, spec):
    """Arrays (or their shapes) on a mesh."""

    def place(x):
        sharding = NamedSharding(mesh, spec(x) or PartitionSpec())
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.device_put(x, sharding)

    return jax.tree.map(place, tree)


def images(x):
    return PartitionSpec("data")


def assert_same_numbers(got, expected, tolerance):
    scale = max(1.0, float(np.max(np.abs(expected))))
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale)


def check(function, parameters, x, mesh, spec, images=images, tolerance=1e-4):
    """Value and gradients of `function(parameters, x)` are those of one device; gradients lie as their operands do."""

    def value_and_gradients(parameters, x):
        def loss(parameters, x):
            y = function(parameters, x)
            return jnp.sum(jnp.sin(y).astype(jnp.float32)), y

        (_, y), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(parameters, x)
        return y, gradients

    expected = jax.jit(value_and_gradients)(parameters, x)
    on_mesh = placed(parameters, mesh, spec), placed(x, mesh, images)
    got = jax.jit(value_and_gradients)(*on_mesh)
    jax.tree.map(partial(assert_same_numbers, tolerance=tolerance), got, expected)
    if mesh.axis_types[0] is AxisType.Explicit:
        for ours, operand in zip(jax.tree.leaves(got[1]), jax.tree.leaves(on_mesh), strict=True):
            assert ours.sharding.is_equivalent_to(operand.sharding, ours.ndim)


@AXES
@pytest.mark.parametrize(
    ("parameters", "batch"),
    [(REPLICATED, 4), (last_axis_over("model", 2), 16), (last_axis_over("data", 4), 16)],
    ids=["replicated-4", "over_model-16", "over_data-16"],
)
@pytest.mark.parametrize(
    ("channels", "features", "groups", "size", "strides"),
    [
        (8, 16, 1, 1, 1),  # matrix product
        (8, 8, 8, 3, 1),  # depthwise
        (8, 8, 8, 3, 2),
        (32, 32, 16, 3, 2),  # few channels a group
        (32, 64, 2, 3, 2),  # grouped
        (64, 64, 1, 3, 1),  # Winograd's
        (16, 72, 1, 3, 2),  # patches
        (3, 8, 1, 3, 2),  # few channels
    ],
)
def test_every_form_of_a_convolution(axes, parameters, batch, channels, features, groups, size, strides):
    x, kernel = arrays((batch, 12, 12, channels), (size, size, channels // groups, features))
    convolution = partial(convolve, strides=(strides,) * 2, padding="SAME", dilation=(1, 1), groups=groups)
    check(lambda k, x: convolution(x, k), kernel, x, make_mesh(axes), parameters)


@AXES
@pytest.mark.parametrize(
    ("parameters", "spec"),
    [
        (REPLICATED, PartitionSpec("data")),
        (last_axis_over("data", 4), PartitionSpec("data")),
        (last_axis_over("model", 2), PartitionSpec("data", None, None, "model")),
    ],
    ids=["replicated", "over_data", "and_channels_over_model"],
)
@pytest.mark.parametrize(
    "module",
    [
        se_flax.SqueezeExcite(reduction=4),
        se_flax.SqueezeExcite(reduction=4, squeeze="none"),
        se_flax.EffectiveSE(),
        se_flax.ECA(),
        se_flax.CBAM(reduction=4),
        GlobalContext(),
        se_flax.Conv(8, use_bias=True),
        se_flax.CosineClassifier(8),
        GroupNorm(4),
        LayerNorm(),
        EvoNormS0(4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_every_attention_and_norm(axes, parameters, spec, module):
    (x,) = arrays((8, 5, 4, 16))
    if isinstance(module, se_flax.CosineClassifier):
        x, spec = x[:, 0, 0], PartitionSpec(spec[0], *spec[3:])
    variables = random_variables(module, x)
    statistics = {name: tree for name, tree in variables.items() if name != "params"}

    def function(params, x):
        return module.apply({"params": params, **statistics}, x)

    check(function, variables["params"], x, make_mesh(axes), parameters, lambda x: spec)


def smooth(name):
    """A network without kinks in its activation, whose gradient would jump where rounding moves a number over one."""
    return se_flax.create_model(name, num_classes=8, **({"act": jax.nn.silu} if name == "seresnet20" else {}))


@pytest.mark.parametrize(
    ("name", "axes", "parameters"),
    [
        ("seresnet20", AxisType.Auto, REPLICATED),
        ("seresnet20", AxisType.Auto, last_axis_over("model", 2)),
        ("seresnet20", AxisType.Explicit, REPLICATED),
        ("seresnet20", AxisType.Explicit, last_axis_over("data", 4)),
        ("test_efficientnet", AxisType.Explicit, last_axis_over("data", 4)),
        ("mobilenetv3_small_050", AxisType.Explicit, last_axis_over("model", 2)),
    ],
)
def test_a_networks_gradients_are_those_of_one_device(name, axes, parameters):
    model = smooth(name)
    (x,) = arrays((8, 32, 32, 3))
    variables = random_variables(model, x)
    params, statistics = variables.pop("params"), variables

    def logits(params, x):
        return model.apply({"params": params, **statistics}, x, train=True, mutable=["batch_stats"])[0]

    check(logits, params, x, make_mesh(axes), parameters, tolerance=1e-3)


@pytest.mark.parametrize("parameters", [REPLICATED, last_axis_over("data", 4)], ids=["replicated", "over_data"])
def test_a_convolution_is_not_deferred_on_explicit_axes(parameters):
    norm = partial(se_flax.BatchNorm, defer_conv=True)
    attention = partial(se_flax.SqueezeExcite, reduction=4)
    block = Bottleneck(8, conv=se_flax.Conv, norm=norm, act=jax.nn.silu, attention=attention)
    (x,) = arrays((8, 6, 6, 32))
    variables = random_variables(block, x)
    params, statistics = variables.pop("params"), variables

    def output(params, x):
        return block.apply({"params": params, **statistics}, x, train=True, mutable=["batch_stats"])[0]

    check(output, params, x, make_mesh(AxisType.Explicit), parameters)


@pytest.mark.parametrize("name", SMALLEST)
def test_every_family_differentiates_on_explicit_axes(name, monkeypatch):
    def must_not_be_traced(*args, **kwargs):
        raise AssertionError("the form for a CPU is traced")

    monkeypatch.setattr("se_flax.lowering.convolution.convolve_on_cpu", must_not_be_traced)
    model, shapes = model_and_shapes(name)
    mesh, side = make_mesh(AxisType.Explicit), small_side(name)
    x = placed(jax.ShapeDtypeStruct((16, side, side, 3), jnp.float32), mesh, images)
    variables = placed(shapes, mesh, last_axis_over("data", 4))
    params, statistics = variables.pop("params"), variables

    def loss(params, statistics, x):
        rngs = {"dropout": jax.random.key(0)}
        variables = {"params": params, **statistics}
        logits, _ = model.apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs)
        return jnp.mean(jnp.square(logits))

    jax.jit(jax.grad(loss)).trace(params, statistics, x)


@AXES
@pytest.mark.parametrize("name", ["seresnet20", "test_efficientnet"])
def test_a_fused_network_computes_and_differentiates(axes, name):
    model = smooth(name)
    (x,) = arrays((8, 32, 32, 3))
    fused, variables = se_flax.fuse(model, random_variables(model, x))
    check(fused.apply, variables, x, make_mesh(axes), last_axis_over("data", 4), tolerance=1e-3)
