"""ResNeSt: layout and numbers of timm, and where its strided mean sits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import se_flax
from se_flax.backbones.resnest import SplitAttention, SplitAttentionBottleneck
from se_flax.nn.residual import average_by_2, project

RNG = np.random.default_rng(4)
PARTS = {"conv": se_flax.Conv, "norm": se_flax.BatchNorm, "downsample": project}


@pytest.mark.parametrize(
    ("radix", "groups", "width", "kernel", "hidden"),
    [(2, 1, 64, (3, 3, 32, 128), 32), (2, 1, 256, (3, 3, 128, 512), 128), (4, 2, 80, (3, 3, 10, 320), 80)],
)
def test_widths_of_split_attention(radix, groups, width, kernel, hidden):
    module = SplitAttention(width, se_flax.Conv, se_flax.BatchNorm, radix=radix, groups=groups)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4, 4, width)))["params"]
    assert shapes["conv"]["kernel"].shape == kernel
    assert shapes["fc1"]["kernel"].shape == (1, 1, width // groups, hidden)
    assert shapes["fc2"]["kernel"].shape == (1, 1, hidden // groups, radix * width)
    assert shapes["fc1"]["bias"].shape == (hidden,)


def test_the_mean_before_or_after_the_convolution():
    x = jnp.asarray(RNG.standard_normal((2, 8, 8, 32)), jnp.float32)
    block = partial(SplitAttentionBottleneck, 8, strides=2, **PARTS)
    variables = block().init(jax.random.key(0), x)
    variables = jax.tree.map(lambda a: jnp.asarray(RNG.uniform(0.1, 1.0, a.shape), jnp.float32), variables)
    after = block().apply(variables, x)
    before = block(average_first=True).apply(variables, x)
    smooth = block(antialias=average_by_2).apply(variables, x)
    assert after.shape == before.shape == smooth.shape == (2, 4, 4, 32)
    assert not np.allclose(after, before, rtol=1e-3)
    assert not np.allclose(after, smooth, rtol=1e-3)


def test_the_mean_counts_the_padding():
    """A constant map is darker at its border: a corner's window holds four pixels and five zeros."""
    block = SplitAttentionBottleneck(8, strides=2, **PARTS)
    pooled = block.average(jnp.ones((1, 8, 8, 1)))[0, :, :, 0]
    np.testing.assert_allclose(pooled[0, 0], 4 / 9, rtol=1e-6)
    np.testing.assert_allclose(pooled[0, 1:], 6 / 9, rtol=1e-6)
    np.testing.assert_allclose(pooled[1:, 1:], 1.0, rtol=1e-6)


def test_a_block_without_a_stride_has_no_mean():
    x = jnp.asarray(RNG.standard_normal((1, 6, 6, 8)), jnp.float32)
    assert SplitAttentionBottleneck(8, **PARTS).average(x) is x
