"""The formulas against float64 NumPy."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import ACTIVATIONS, GATES, double, excite

import se_flax.functional as F
from se_flax.errors import UserError

EXAMPLES = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
FLOATS = st.floats(-20, 20, width=32)
# Few shapes, since each compiles anew; one-pixel maps and one channel are among them.
MAPS = st.sampled_from([(2, 3, 5, 4), (1, 1, 1, 8), (3, 2, 2, 1)]).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=FLOATS)
)


def weights(channels=6, hidden=3, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((channels, hidden), (hidden,), (hidden, channels), (channels,))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@EXAMPLES
@hypothesis.given(hnp.arrays(np.float32, 16, elements=st.floats(-60, 60, width=32)))
def test_every_gate_and_activation_is_its_formula(x):
    exact = x.astype(np.float64)
    for name, gate in F.GATES.items():
        np.testing.assert_allclose(gate(x), GATES[name](exact), rtol=2e-6, atol=2e-6, err_msg=name)
    for name, activation in F.ACTIVATIONS.items():
        np.testing.assert_allclose(activation(x), ACTIVATIONS[name](exact), rtol=1e-5, atol=1e-5, err_msg=name)


def test_hard_functions_at_their_corners():
    corners = jnp.array([-4.0, -3.0, 0.0, 3.0, 4.0])
    np.testing.assert_array_equal(F.hard_sigmoid(corners), [0, 0, 0.5, 1, 1])
    np.testing.assert_array_equal(F.hard_swish(corners), [0, 0, 0, 3, 4])


@EXAMPLES
@hypothesis.given(MAPS)
def test_squeeze_is_mean_maximum_or_the_map_itself(x):
    exact = x.astype(np.float64)
    np.testing.assert_allclose(F.squeeze(x), exact.mean((1, 2), keepdims=True), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(F.squeeze(x, "max"), x.max((1, 2), keepdims=True))
    np.testing.assert_array_equal(F.squeeze(x, "none"), x)
    np.testing.assert_array_equal(F.squeeze(x, lambda a: a[:, :1, :1]), x[:, :1, :1])


def test_a_bfloat16_map_is_pooled_in_float32():
    # 9,999 ones and a 1,000. A bfloat16 sum of ones stops at 256, whose neighbour is 258.
    x = np.ones((1, 100, 100, 2), np.float32)
    x[0, 0, 0, 0] = 1000
    low = jnp.asarray(x, jnp.bfloat16)
    pooled = F.squeeze(low)
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled[0, 0, 0], [1.0999, 1.0], rtol=1e-6)
    assert F.squeeze(low, "max").dtype == F.squeeze(low, "none").dtype == jnp.float32


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ["relu", "hard_swish"])
def test_excite_is_equation_3(biases, gate, activation):
    w1, b1, w2, b2 = weights()
    b1, b2 = (b1, b2) if biases else (None, None)
    z = np.random.default_rng(1).standard_normal((4, 6)).astype(np.float32)
    expected = excite(*double(z, w1, b1, w2, b2), activation, gate)
    np.testing.assert_allclose(
        F.excite(z, w1, b1, w2, b2, activation=activation, gate=gate), expected, rtol=1e-5, atol=1e-6
    )


@EXAMPLES
@hypothesis.given(hnp.arrays(np.float32, (3, 1, 1, 6), elements=FLOATS))
def test_excite_takes_any_descriptor(z):
    parameters = weights()
    np.testing.assert_allclose(F.excite(z, *parameters), excite(*double(z, *parameters)), rtol=1e-4, atol=1e-5)


def test_a_gate_is_computed_in_float32_from_a_bfloat16_descriptor():
    parameters = weights()
    z = jnp.asarray(np.random.default_rng(2).standard_normal((5, 6)), jnp.bfloat16)
    gate = F.excite(z, *parameters)
    assert gate.dtype == jnp.float32
    np.testing.assert_allclose(gate, excite(*double(z, *parameters)), rtol=1e-5)


def test_scale_multiplies_in_the_dtype_of_the_map():
    x = jnp.full((2, 3, 3, 4), 3.0, jnp.bfloat16)
    gate = jnp.linspace(0, 1, 4, dtype=jnp.float32)[None, None, None]
    scaled = F.scale(x, gate)
    assert scaled.dtype == jnp.bfloat16
    np.testing.assert_allclose(scaled.astype(np.float32), np.broadcast_to(3 * np.asarray(gate), x.shape), rtol=0.01)


@pytest.mark.parametrize(
    ("channels", "kwargs", "width"),
    [
        (256, {"reduction": 16}, 16),
        (64, {"reduction": 32}, 2),
        (100, {"reduction": 16}, 6),  # 6.25
        (104, {"reduction": 16, "rounding": "nearest"}, 7),  # 6.5 goes up
        (103, {"reduction": 16, "rounding": "nearest"}, 6),  # 6.4375
        (100, {"reduction": 16, "rounding": "ceil"}, 7),
        (96, {"fraction": 1 / 3, "rounding": "nearest"}, 32),
        (96, {"reduction": 3}, 32),  # and not 31, which 96 * (1/3) may round to
        (4, {"reduction": 16}, 1),  # never zero
        (4, {"fraction": 0.01, "rounding": "nearest"}, 1),
        (32, {"fraction": 0.25, "rounding": "multiple_of_8"}, 8),
        (3, {"fraction": 0.25, "rounding": "multiple_of_8"}, 8),  # at least the divisor
        (72, {"fraction": 0.25, "rounding": "multiple_of_8"}, 24),  # 18 -> 16 loses 11 %, so 24
        (76, {"fraction": 0.25, "rounding": "multiple_of_8"}, 24),  # 19 -> 16 loses 16 %
        (70, {"fraction": 0.25, "rounding": "multiple_of_8"}, 16),  # 17.5 -> 16 loses 8.6 %
        (72, {"fraction": 0.25, "rounding": "multiple_of_8_any"}, 16),
        (80, {"fraction": 0.25, "rounding": "multiple_of_8_any"}, 24),  # 20, half way, goes up
        (64, {"reduction": 16, "rounding": "multiple_of_8_any"}, 8),  # timm's SE-ResNet-18
        (64, {"reduction": 16, "rounding": lambda value: int(value) + 100}, 104),
    ],
)
def test_reduced_width(channels, kwargs, width):
    assert F.reduced_width(channels, **kwargs) == width


@EXAMPLES
@hypothesis.given(st.integers(1, 4096), st.floats(0.02, 2))
def test_multiples_of_8_lose_at_most_a_tenth(channels, fraction):
    width = F.reduced_width(channels, fraction=fraction, rounding="multiple_of_8")
    assert width % 8 == 0 and width >= 8
    assert width >= 0.9 * channels * fraction
    # Otherwise the nearest multiple, or the one above it.
    assert width <= channels * fraction + 12


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "got reduction=None and fraction=None; give exactly one of them"),
        ({"reduction": 16, "fraction": 0.25}, "got reduction=16 and fraction=0.25; give exactly one of them"),
        ({"reduction": 0}, "got reduction=0; it must be positive"),
        ({"reduction": -4}, "got reduction=-4; it must be positive"),
        ({"fraction": -0.5}, "got fraction=-0.5; it must be positive"),
        ({"reduction": float("nan")}, "got reduction=nan; it must be positive"),
        ({"reduction": 16, "rounding": "flor"}, "unknown rounding 'flor'; closest: floor"),
    ],
)
def test_a_width_that_cannot_be_is_refused(kwargs, message):
    with pytest.raises(UserError, match=message):
        F.reduced_width(64, **kwargs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: F.squeeze(z, "maxx"), "unknown squeeze 'maxx'; closest: max"),
        (lambda z: F.excite(z, *weights(), gate="sigmoyd"), "unknown gate 'sigmoyd'; closest: sigmoid"),
        (lambda z: F.excite(z, *weights(), activation="swish"), "unknown activation 'swish'; closest: hard_swish"),
        (lambda z: F.excite(z, *weights(), gate=None), "unknown gate None; allowed: .*sigmoid.*, or a function"),
    ],
)
def test_an_unknown_name_is_answered_with_the_closest(call, message):
    with pytest.raises(UserError, match=message):
        call(np.zeros((1, 1, 1, 6), np.float32))


def test_eca_kernel_sizes_are_those_of_the_authors_rule():
    sizes = {16: 3, 64: 3, 128: 5, 256: 5, 512: 5, 1024: 5, 2048: 7}
    assert {channels: F.eca_kernel_size(channels) for channels in sizes} == sizes
    assert F.eca_kernel_size(1) == 1
    assert F.eca_kernel_size(256, gamma=1.0) == 9


@pytest.mark.parametrize("bias", [None, 0.5])
@pytest.mark.parametrize("size", [1, 3, 5, 9])
def test_channel_conv_correlates_along_the_channels(size, bias):
    rng = np.random.default_rng(size)
    z, kernel = rng.standard_normal((2, 1, 1, 7)), rng.standard_normal(size)
    expected = np.stack([np.convolve(np.pad(row.ravel(), size // 2), kernel[::-1], "valid") for row in z])
    out = F.channel_conv(z.astype(np.float32), kernel.astype(np.float32), bias)
    np.testing.assert_allclose(out[:, 0, 0], expected + (bias or 0), rtol=1e-5, atol=1e-5)
    assert F.channel_conv(jnp.asarray(z, jnp.bfloat16), kernel.astype(np.float32)).dtype == jnp.float32


@pytest.mark.parametrize("gate", ["sigmoid", "tanh"])
@pytest.mark.parametrize("biases", [True, False])
def test_cbam_channel_gate_is_equation_2(biases, gate):
    w1, b1, w2, b2 = weights()
    b1, b2 = (b1, b2) if biases else (None, None)
    x = np.random.default_rng(3).standard_normal((2, 4, 3, 6)).astype(np.float32)
    d, v1, c1, v2, c2 = double(x, w1, b1, w2, b2)

    def path(z):
        return np.maximum(z @ v1 + (0 if c1 is None else c1), 0) @ v2 + (0 if c2 is None else c2)

    expected = GATES[gate](path(d.mean((1, 2))) + path(d.max((1, 2))))
    out = F.channel_gate_mean_max(x, w1, b1, w2, b2, gate=gate)
    np.testing.assert_allclose(out[:, 0, 0], expected, rtol=1e-5, atol=1e-6)


@EXAMPLES
@hypothesis.given(MAPS)
def test_spatial_descriptor_is_maximum_then_mean_over_the_channels(x):
    expected = np.stack([x.max(-1), x.astype(np.float64).mean(-1)], -1)
    np.testing.assert_allclose(F.spatial_descriptor(x), expected, rtol=1e-5, atol=1e-5)
    assert F.spatial_descriptor(x.astype(jnp.bfloat16)).dtype == jnp.float32
