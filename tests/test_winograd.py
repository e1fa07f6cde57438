"""Winograd's minimal filtering against the convolution that it is, and how exact it is."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolution_reference import arrays, check, reference
from hypothesis import given, settings
from hypothesis import strategies as st

from se_flax.lowering.cpu import winograd
from se_flax.lowering.cpu.convolution import convolve_on_cpu

SIDES = st.integers(1, 8)
PADS = st.tuples(st.integers(1, 2), st.integers(1, 3))


SAME = ((1, 1), (1, 1))
GIVEN = arrays((2, 16, 16, 64), (3, 3, 64, 64))


@settings(deadline=None, max_examples=10)
@given(images=st.integers(1, 3), sides=st.tuples(SIDES, SIDES), padding=st.tuples(PADS, PADS))
def test_it_is_the_convolution_and_so_are_its_derivatives(images, sides, padding):
    x, kernel = arrays((images, *sides, 3), (3, 3, 3, 5))

    def filtering(x, kernel, strides, padding, dilation, groups):
        return winograd.convolve(x, kernel, padding)

    check(x, kernel, (1, 1), padding, (1, 1), 1, convolution=filtering)


@pytest.mark.parametrize(("side", "channels"), [(28, 64), (7, 256)])
def test_its_error_in_float32_is_below_twice_the_direct_sums(side, channels):
    x, kernel = arrays((1, side, side, channels), (3, 3, channels, channels))
    x, kernel = jnp.maximum(x, 0), kernel / np.sqrt(9 * channels)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), *SAME, (0, 0))), (3, 3), (1, 2))
    exact = np.einsum("nhwcij,ijcf->nhwf", windows.astype(np.float64), np.asarray(kernel, np.float64), optimize=True)
    values = winograd.convolve(x, kernel, SAME), reference(x, kernel, (1, 1), SAME, (1, 1), 1)
    ours, theirs = (np.sqrt(np.mean((value - exact) ** 2)) for value in values)
    assert ours < 2 * theirs < 1e-6


def products(*arguments):
    return str(jax.make_jaxpr(lambda x, kernel: convolve_on_cpu(x, kernel, *arguments))(*GIVEN)).count("dot_general")


@pytest.mark.program
def test_many_channels_take_it_and_a_transforms_four_products_are_one():
    assert products((1, 1), SAME, (1, 1), 1) == 4  # one for every row of factors


@pytest.mark.program
def test_its_gradients_leave_no_gaps_between_pixels():
    def loss(x, kernel):
        return winograd.convolve(x, kernel, SAME).sum()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(*GIVEN).as_text()
    assert set(", ".join(re.findall(r"interior = \[(.*?)\]", text)).split(", ")) == {"0"}


@pytest.mark.program
@pytest.mark.parametrize("arguments", [((2, 2), SAME, (1, 1), 1), ((1, 1), SAME, (2, 2), 1)])
def test_strides_and_dilation_keep_their_forms(arguments):
    assert products(*arguments) == 0


@pytest.mark.program
@pytest.mark.parametrize("change", [{"_CHANNELS": 65}, {"_TILES": 129}])
def test_few_channels_and_few_pixels_keep_their_form(monkeypatch, change):
    for name, value in change.items():
        monkeypatch.setattr(winograd, name, value)
    assert products((1, 1), SAME, (1, 1), 1) == 0


@pytest.mark.program
def test_parts_of_grouped_convolutions_and_half_precision_keep_their_form():
    x, kernel = arrays((2, 16, 16, 128), (3, 3, 64, 128))
    grouped = jax.make_jaxpr(lambda x, k: convolve_on_cpu(x, k, (1, 1), SAME, (1, 1), 2))(x, kernel)
    assert str(grouped).count("conv_general_dilated") == 2
    half = [a.astype(jnp.bfloat16) for a in GIVEN]
    assert "conv_general_dilated" in str(
        jax.make_jaxpr(lambda x, k: convolve_on_cpu(x, k, (1, 1), SAME, (1, 1), 1))(*half)
    )


@pytest.mark.program
def test_a_batch_of_unknown_size_takes_it_where_one_image_would():
    (batch,) = jax.export.symbolic_shape("b")
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((batch, 24, 24, 64), (3, 3, 64, 64)))

    def convolution(x, kernel):
        return convolve_on_cpu(x, kernel, (1, 1), SAME, (1, 1), 1)

    exported = jax.export.export(jax.jit(convolution), platforms=["cpu"])(x, kernel)
    assert "stablehlo.convolution" not in exported.mlir_module()
    x, kernel = arrays((3, 24, 24, 64), (3, 3, 64, 64))
    np.testing.assert_allclose(
        exported.call(x, kernel), reference(x, kernel, (1, 1), SAME, (1, 1), 1), rtol=1e-3, atol=1e-3
    )
