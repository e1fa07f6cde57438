"""The convolution's lowerings for a CPU against XLA's own, whatever the shape."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolution_reference import arrays, check, reference
from hypothesis import given, settings
from hypothesis import strategies as st

from se_flax import Conv
from se_flax.lowering.convolution import convolve
from se_flax.lowering.cpu import dense
from se_flax.lowering.cpu.convolution import convolve_on_cpu
from se_flax.lowering.xla import xla_convolution
from se_flax.nn.pooling import max_pool

# Groups, their input and their output channels: dense with few, some, and many for the map; depthwise, also with a
# multiplier; groups of which 1, 2 and 4 go together into a dense convolution; many groups of few channels.
CHANNELS = st.sampled_from(
    [(1, 3, 5), (1, 8, 4), (1, 80, 4), (6, 1, 1), (4, 1, 2), (2, 40, 3), (4, 16, 8), (12, 4, 2), (16, 2, 2), (16, 2, 3)]
)
SIDES = st.integers(5, 9)
PAIRS = st.tuples(st.integers(0, 3), st.integers(0, 3))


@settings(deadline=None, max_examples=16)
@given(
    channels=CHANNELS,
    sides=st.tuples(SIDES, SIDES),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.one_of(st.sampled_from(["SAME", "VALID"]), st.tuples(PAIRS, PAIRS)),
)
def test_every_lowering_is_the_convolution_and_so_are_its_derivatives(
    channels, sides, size, strides, dilation, padding
):
    groups, width, out = channels
    x, kernel = arrays((2, *sides, groups * width), (*size, width, groups * out))
    check(x, kernel, strides, padding, dilation, groups)


@pytest.fixture
def large(monkeypatch):
    """Every map counts as one of those for which XLA's gradient of the kernel is slow."""
    monkeypatch.setattr(dense, "_SMALL_MAPS", 0)


@pytest.mark.program
@pytest.mark.parametrize(
    ("side", "width", "strides", "form"),
    [(8, 3, 1, "mul"), (8, 16, 1, "conv_general_dilated"), (4, 32, 2, "dot_general")],
)
def test_a_dense_one_takes_the_form_that_is_fast(side, width, strides, form):
    x, kernel = arrays((2, side, side, width), (3, 3, width, 8))
    found = str(
        jax.make_jaxpr(lambda x, k: convolve_on_cpu(x, k, (strides,) * 2, ((1, 1), (1, 1)), (1, 1), 1))(x, kernel)
    )
    forms = {"mul", "conv_general_dilated", "dot_general"}
    assert {name for name in forms if f" {name}" in found or f"{name}[" in found} == {form}
    check(x, kernel, (strides,) * 2, "SAME", (1, 1), 1)


@pytest.mark.program
@pytest.mark.parametrize(("side", "rows"), [((7, 7), 52), ((5, 6), 30), ((4, 13), 52), ((2, 30), 60)])
def test_rows_that_one_core_would_take_are_as_many_as_two_take(monkeypatch, side, rows):
    monkeypatch.setattr(dense, "_MIN_K", 16)
    monkeypatch.setattr(dense, "_MIN_N", 32)

    def multiplied(features):
        x, kernel = arrays((1, *side, 16), (1, 1, 16, features))
        settings = (1, 1), ((0, 0), (0, 0)), (1, 1), 1
        text = str(jax.make_jaxpr(lambda x, k: convolve_on_cpu(x, k, *settings))(x, kernel))
        check(x, kernel, *settings, convolution=convolve_on_cpu)
        return re.search(r"f32\[(\d+),\d+\] = dot_general", text)[1]

    assert multiplied(32) == str(rows)
    assert multiplied(31) == str(side[0] * side[1])


@pytest.mark.program
def test_a_large_batch_goes_some_images_at_a_time(large, monkeypatch):
    # An image's 8 rows of 6 patches of 3 * 4 values beside 3 * 5 of the gradient: two fit, and six are three times two.
    monkeypatch.setattr(dense, "_PATCHES", 2 * 8 * 6 * (3 * 4 + 3 * 5) * 4)
    x, kernel = arrays((6, 6, 6, 4), (3, 3, 4, 5))
    settings = (1, 1), ((1, 1), (1, 1)), (1, 1), 1
    text = str(jax.make_jaxpr(jax.grad(lambda k: convolve_on_cpu(x, k, *settings).sum()))(kernel))
    assert "length=3" in text
    check(x, kernel, *settings, convolution=convolve_on_cpu)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("groups", "width", "features"), [(1, 6, 5), (2, 3, 4), (1, 2, 5)])
def test_a_kernel_gradient_of_rows_of_patches_with_everything_uneven(large, stride, groups, width, features):
    x, kernel = arrays((2, 9, 8, groups * width), (3, 2, width, features))
    check(x, kernel, (stride, 2), ((2, 1), (0, 3)), (2, 3), groups, convolution=convolve_on_cpu)


@pytest.mark.program
@pytest.mark.parametrize(("side", "features", "slow"), [(64, 32, False), (210, 32, True), (64, 65, True)])
def test_small_maps_of_few_channels_keep_xlas_gradient_of_the_kernel(side, features, slow):
    x = jax.ShapeDtypeStruct((1, side, side, 32), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 32, features), jnp.float32)

    def gradient(x, kernel):
        return jax.grad(lambda k: convolve_on_cpu(x, k, (1, 1), ((1, 1), (1, 1)), (1, 1), 1).sum())(kernel)

    assert ("remat" in str(jax.make_jaxpr(gradient)(x, kernel))) == slow


@pytest.mark.parametrize("images", [1, 16, 37])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_depthwise_kernels_gradient_takes_in_every_image(images, stride):
    check(*arrays((images, 6, 5, 3), (3, 3, 1, 3)), (stride, stride), ((1, 1), (1, 1)), (1, 1), 3)


@pytest.mark.program
@pytest.mark.parametrize(
    ("width", "groups", "dtype", "form"),
    [
        (4, 16, jnp.float32, "mul"),
        (8, 16, jnp.float32, "mul"),
        (8, 16, jnp.bfloat16, "conv_general_dilated"),
        (9, 16, jnp.float32, "conv_general_dilated"),
        (4, 15, jnp.float32, "conv_general_dilated"),
    ],
)
def test_many_groups_of_few_channels_are_a_sum_of_products(width, groups, dtype, form):
    x = jax.ShapeDtypeStruct((1, 8, 8, width * groups), dtype)
    kernel = jax.ShapeDtypeStruct((3, 3, width, width * groups), dtype)

    def convolution(x, kernel):
        return convolve_on_cpu(x, kernel, (1, 1), ((1, 1), (1, 1)), (1, 1), groups)

    text = str(jax.make_jaxpr(convolution)(x, kernel))
    assert {name for name in ("mul", "conv_general_dilated") if f" {name}" in text or f"{name}[" in text} == {form}


@pytest.mark.program
@pytest.mark.parametrize(("width", "groups", "parts"), [(16, 32, 32), (16, 64, 32), (9, 16, 16), (4, 12, 3)])
def test_wider_groups_are_at_most_32_dense_convolutions(width, groups, parts):
    x = jax.ShapeDtypeStruct((1, 4, 4, width * groups), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, width, width * groups), jnp.float32)

    def convolution(x, kernel):
        return convolve_on_cpu(x, kernel, (1, 1), ((1, 1), (1, 1)), (1, 1), groups)

    assert len(re.findall(r"= conv_general_dilated\[", str(jax.make_jaxpr(convolution)(x, kernel)))) == parts


@pytest.mark.program
@pytest.mark.parametrize("groups", [16, 32])
def test_sums_of_shifted_maps_take_a_batch_of_unknown_size(groups):
    (batch,) = jax.export.symbolic_shape("b")
    shapes = (batch, 9, 8, 32), (3, 3, 32 // groups, 32)
    settings = (2, 1), ((1, 1), (1, 1)), (1, 1), groups
    exported = jax.export.export(jax.jit(lambda x, k: convolve_on_cpu(x, k, *settings)), platforms=["cpu"])(
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    )
    assert "gather" not in exported.mlir_module()
    x, kernel = arrays((3, *shapes[0][1:]), shapes[1])
    np.testing.assert_allclose(exported.call(x, kernel), reference(x, kernel, *settings), rtol=1e-4, atol=1e-4)


@pytest.mark.program
@pytest.mark.parametrize("groups", [16, 32])
@pytest.mark.parametrize("strides", [(2, 2), (1, 3)])
def test_a_strided_gradient_of_shifted_maps_multiplies_no_gaps(groups, strides):
    x, kernel = arrays((2, 9, 8, 32), (3, 2, 32 // groups, 32))
    settings = strides, ((1, 1), (1, 1)), (1, 1), groups
    text = jax.jit(jax.grad(lambda x: convolve_on_cpu(x, kernel, *settings).sum())).lower(x).as_text()
    interior = re.findall(r"stablehlo.pad.* interior = \[(.*?)\]", text)
    assert interior and set(", ".join(interior).split(", ")) == {"0"}
    check(x, kernel, *settings, convolution=convolve_on_cpu)


@pytest.mark.parametrize("groups", [16, 32])
@pytest.mark.parametrize(("sides", "stride"), [((2, 70), 1), ((4, 33), 1), ((6, 71), 2)])
def test_a_kernels_gradient_takes_in_more_columns_than_a_loop_adds(groups, sides, stride):
    x, kernel = arrays((2, *sides, 32), (3, 3, 32 // groups, 32))
    check(x, kernel, (stride, stride), ((1, 1), (1, 1)), (1, 1), groups)


@pytest.mark.program
@pytest.mark.parametrize("groups", [16, 32])
def test_the_loops_of_a_kernels_gradient_add_at_most_32_columns(groups):
    # From about 120 products on, XLA's loop becomes twenty times slower.
    def loops(columns):
        x, kernel = arrays((2, 6, columns, 32), (3, 3, 32 // groups, 32))
        settings = (1, 1), ((1, 1), (1, 1)), (1, 1), groups
        program = jax.jit(jax.grad(lambda kernel: convolve_on_cpu(x, kernel, *settings).sum()))
        return program.lower(kernel).as_text().count(" call @")

    assert [loops(columns) - loops(32) for columns in (33, 64, 65)] == [3, 3, 6]


@pytest.mark.program
def test_a_strided_convolutions_gradient_multiplies_no_gaps():
    x, kernel = arrays((2, 9, 8, 16), (3, 3, 16, 24))

    def gaps(convolution):
        settings = (2, 1), ((1, 1), (1, 1)), (1, 1), 1
        text = str(jax.make_jaxpr(jax.grad(lambda x: convolution(x, kernel, *settings).sum()))(x))
        return "lhs_dilation=(2, 1)" in text

    assert gaps(reference) and not gaps(convolve_on_cpu)
    check(x, kernel, (2, 1), "SAME", (1, 1), 1)


@pytest.mark.program
def test_parts_of_a_grouped_convolution_are_made_once_for_all_their_readers():
    x, kernel = arrays((2, 9, 9, 64), (3, 3, 16, 64))

    def loss(x, kernel):
        return jnp.sin(convolve(jnp.maximum(x, 0), kernel, (1, 1), "SAME", (1, 1), 4)).sum()

    text = jax.jit(jax.grad(loss, 1)).lower(x, kernel).compile().as_text()
    assert text.count(" maximum(") == 4  # one for every part, whose readers are its value and its kernel's gradient


@pytest.mark.program
@pytest.mark.parametrize("taps", [3, 5])
def test_a_depthwise_kernels_gradient_writes_no_window_of_every_image(taps):
    x, kernel = arrays((16, 14, 14, 8), (taps, taps, 1, 8))

    def gradient(x, kernel, cotangent):
        return jax.vjp(lambda k: convolve(x, k, (1, 1), "SAME", (1, 1), 8), kernel)[1](cotangent)

    memory = jax.jit(gradient).lower(x, kernel, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < taps * taps * x.nbytes / 2


@pytest.mark.program
@pytest.mark.parametrize(("groups", "channels"), [(1, 16), (16, 16), (16, 32)])
def test_the_patches_are_not_kept_for_the_gradient(large, groups, channels):
    x, kernel = arrays((4, 8, 8, channels), (3, 3, channels // groups, channels))
    settings = (1, 1), ((1, 1), (1, 1)), (1, 1), groups
    _, pullback = jax.vjp(lambda x, k: convolve_on_cpu(x, k, *settings), x, kernel)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pullback))
    assert kept < 9 * x.size


@pytest.mark.parametrize(("groups", "channels"), [(1, 4), (16, 32)])
def test_second_derivatives_and_batching_work(groups, channels):
    x, kernel = arrays((2, 6, 6, channels), (3, 3, channels // groups, channels))

    def loss(convolution, kernel):
        return (convolution(x, kernel, (1, 1), "SAME", (1, 1), groups) ** 2).sum()

    hessians = [jax.jvp(jax.grad(partial(loss, f)), (kernel,), (kernel,))[1] for f in (convolve, reference)]
    np.testing.assert_allclose(*hessians, rtol=1e-4, atol=1e-3)
    each = jax.vmap(lambda k: convolve(x, k, (2, 2), "SAME", (1, 1), groups))(jnp.stack([kernel, 2 * kernel]))
    np.testing.assert_allclose(each[1], 2 * each[0], rtol=1e-5)


@pytest.mark.parametrize(("groups", "channels"), [(1, 4), (4, 4), (2, 4), (16, 32)])
def test_gradients_over_several_devices_add_up(groups, channels):
    # The kernel is the same on all devices and the images are not: shard_map checks both, and sums the gradient.
    x, kernel = arrays((8, 5, 5, channels), (3, 3, channels // groups, channels))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def gradient(x, kernel):
        return jax.grad(lambda k: (convolve(x, k, (1, 1), "SAME", (1, 1), groups) ** 2).sum())(kernel)

    spread = jax.shard_map(gradient, mesh=mesh, in_specs=(spec("data"), spec()), out_specs=spec())
    np.testing.assert_allclose(jax.jit(spread)(x, kernel), gradient(x, kernel), rtol=1e-4, atol=1e-4)


def test_two_groups_of_sixteen_channels_have_gradients():
    # As one dense block whose gradient is summed, XLA crashes on this shape.
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 16, 16, 32), (3, 3, 16, 32)))

    def loss(kernel, form):
        return jnp.sum(jnp.sin(form(x, kernel, (1, 1), ((1, 1), (1, 1)), (1, 1), 2)))

    got = jax.jit(jax.grad(lambda k: loss(k, convolve_on_cpu)))(kernel)
    np.testing.assert_allclose(got, jax.grad(lambda k: loss(k, xla_convolution))(kernel), rtol=1e-4, atol=1e-4)


@pytest.mark.program
@pytest.mark.parametrize(("groups", "size"), [(4, 3), (4, 1), (1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_other_platforms_keep_xlas_convolution_alone(platform, groups, size):
    x = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)
    kernel = jax.ShapeDtypeStruct((size, size, 4 // groups, 4), jnp.float32)
    function = jax.jit(lambda x, k: convolve(x, k, (1, 1), "SAME", (1, 1), groups))
    text = jax.export.export(function, platforms=[platform])(x, kernel).mlir_module()
    assert "stablehlo.convolution" in text
    assert "stablehlo.dot_general" not in text and "stablehlo.multiply" not in text
    cpu = jax.export.export(function, platforms=["cpu"])(x, kernel).mlir_module()
    assert ("stablehlo.dot_general" in cpu) == (size == 1 and groups < 4)


@pytest.mark.parametrize(("kernel", "groups"), [(3, 4), (1, 1), (3, 1), (3, 2)])
def test_bfloat16_stays_bfloat16(kernel, groups):
    x = jnp.ones((1, 8, 8, 4), jnp.bfloat16)
    model = Conv(4, kernel, groups=groups)
    assert model.apply(model.init(jax.random.key(0), x), x).dtype == jnp.bfloat16


@pytest.mark.parametrize(("size", "strides", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
def test_max_pooling_is_xlas_and_so_is_its_gradient(size, strides, padding):
    (x,) = arrays((2, 7, 9, 3))

    def xla_convolution(x):
        pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        window, steps = (1, size, size, 1), (1, strides, strides, 1)
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, steps, pads)

    expected, pullback = jax.vjp(xla_convolution, x)
    value, own_pullback = jax.vjp(lambda x: max_pool(x, size, strides, padding), x)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_allclose(own_pullback(expected)[0], pullback(expected)[0], rtol=1e-6)
