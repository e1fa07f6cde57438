"""Selective kernel networks: layout and numbers of timm, and the choice between branches by its formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import se_flax
from se_flax.backbones.sknet import SelectiveKernel
from se_flax.nn.branches import weigh_branches

RNG = np.random.default_rng(3)


class Weigh(nn.Module):
    """`weigh_branches` on its own."""

    width: int
    groups: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(self, branches, train=False):
        norm = partial(se_flax.BatchNorm, momentum=0.9)
        return weigh_branches(branches, self.width, norm=norm, groups=self.groups, use_bias=self.use_bias, train=train)


@pytest.mark.parametrize(("count", "groups"), [(2, 1), (3, 1), (2, 2), (4, 2), (1, 1), (1, 4)])
def test_weights_of_branches_by_their_formula(count, groups):
    """Group by group, output by output, in float64 NumPy."""
    n, channels, width = 2, 8, 12
    branches = [jnp.asarray(RNG.standard_normal((n, 5, 4, channels)), jnp.float32) for _ in range(count)]
    module = Weigh(width, groups, use_bias=True)
    variables = module.init(jax.random.key(0), branches)
    variables = jax.tree.map(lambda a: jnp.asarray(RNG.uniform(0.5, 1.5, a.shape), jnp.float32), variables)
    params, stats = variables["params"], variables["batch_stats"]["bn"]
    assert params["fc_reduce"]["kernel"].shape == (1, 1, channels // groups, width)
    assert params["fc_select"]["kernel"].shape == (1, 1, width // groups, count * channels)

    def grouped(z, kernel, bias):
        kernel = np.asarray(kernel, np.float64)[0, 0]
        inputs, outputs = z.shape[-1] // groups, kernel.shape[-1] // groups
        parts = [
            z[:, g * inputs : (g + 1) * inputs] @ kernel[:, g * outputs : (g + 1) * outputs] for g in range(groups)
        ]
        return np.concatenate(parts, -1) + np.asarray(bias, np.float64)

    z = np.asarray(sum(np.asarray(b, np.float64) for b in branches)).mean((1, 2))
    z = grouped(z, **params["fc_reduce"])
    z = (z - np.asarray(stats["mean"])) / np.sqrt(np.asarray(stats["var"], np.float64) + 1e-5)
    z = np.maximum(z * np.asarray(params["bn"]["scale"]) + np.asarray(params["bn"]["bias"]), 0)
    logits = grouped(z, **params["fc_select"]).reshape(n, groups, count, channels // groups)
    exp = np.exp(logits)
    gates = exp / exp.sum(2, keepdims=True) if count > 1 else 1 / (1 + np.exp(-logits))
    gates = gates.transpose(0, 2, 1, 3).reshape(n, count, channels)
    expected = sum(np.asarray(b) * gates[:, r, None, None] for r, b in enumerate(branches))
    np.testing.assert_allclose(module.apply(variables, branches), expected, rtol=2e-5, atol=1e-5)


def test_equal_branches_share_equally():
    x = jnp.asarray(RNG.standard_normal((2, 4, 4, 6)), jnp.float32)
    module = Weigh(4)
    variables = module.init(jax.random.key(0), [x, x, x])
    np.testing.assert_allclose(module.apply(variables, [x, x, x]), x, rtol=1e-5, atol=1e-6)


def test_the_choice_learns_its_batch_statistics():
    x = jnp.asarray(RNG.standard_normal((4, 4, 4, 6)), jnp.float32)
    module = Weigh(4)
    variables = module.init(jax.random.key(0), [x, 2 * x])
    _, new = module.apply(variables, [x, 2 * x], train=True, mutable=["batch_stats"])
    assert float(jnp.abs(new["batch_stats"]["bn"]["mean"]).max()) > 0


def test_half_precision_maps_are_weighed_in_single():
    x = jnp.ones((2, 4, 4, 6), jnp.bfloat16)
    module = Weigh(4)
    variables = module.init(jax.random.key(0), [x, x])
    assert module.apply(variables, [x, x]).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_a_dilated_branch_reaches_as_far_as_a_5x5():
    """A single pixel in the middle: which outputs of a branch does it change?"""
    kernel = SelectiveKernel(4, se_flax.Conv, se_flax.BatchNorm, dilations=(1, 2), split=False)
    x = jnp.zeros((1, 9, 9, 4))
    variables = kernel.init(jax.random.key(0), x)
    impulse = x.at[0, 4, 4].set(1.0)
    moved = np.abs(kernel.apply(variables, impulse) - kernel.apply(variables, x)).sum((0, 3)) > 0
    rows = np.flatnonzero(moved.any(1))
    assert (rows.min(), rows.max()) == (2, 6)


@pytest.mark.parametrize(("split", "inputs"), [(True, 4), (False, 8)])
def test_split_branches_see_their_share_of_the_channels(split, inputs):
    kernel = SelectiveKernel(8, se_flax.Conv, se_flax.BatchNorm, split=split)
    shapes = jax.eval_shape(kernel.init, jax.random.key(0), jnp.zeros((1, 8, 8, 8)))["params"]
    assert shapes["paths_0"]["conv"]["kernel"].shape == shapes["paths_1"]["conv"]["kernel"].shape == (3, 3, inputs, 8)


@pytest.mark.parametrize(
    ("features", "reduction", "divisor", "width"),
    [(64, 16, 8, 8), (2048, 16, 8, 128), (128, 16, 32, 32), (1024, 16, 32, 64), (64, 8, 16, 16), (512, 8, 16, 64)],
)
def test_hidden_width_of_the_choice(features, reduction, divisor, width):
    """The paper's d = max(C / r, L) (section 3.1), in multiples of L."""
    kernel = SelectiveKernel(features, se_flax.Conv, se_flax.BatchNorm, reduction=reduction, divisor=divisor)
    shapes = jax.eval_shape(kernel.init, jax.random.key(0), jnp.zeros((1, 4, 4, 4)))["params"]
    assert shapes["attn"]["fc_reduce"]["kernel"].shape == (1, 1, features, width)


def test_statistics_of_descriptors_do_not_cancel():
    """Eight values near a thousand that differ by one: the difference of their moments in float32 would be noise."""
    z = jnp.asarray(1000 + RNG.standard_normal((8, 1, 1, 5)), jnp.float32)
    norm = se_flax.BatchNorm(momentum=0.0)
    y, new = norm.apply(norm.init(jax.random.key(0), z), z, train=True, mutable=["batch_stats"])
    exact = np.asarray(z, np.float64)[:, 0, 0]
    np.testing.assert_allclose(new["batch_stats"]["var"], exact.var(0, ddof=1), rtol=1e-4)
    np.testing.assert_allclose(y[:, 0, 0], (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5), atol=1e-3)
