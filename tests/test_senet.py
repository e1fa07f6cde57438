"""SENets in the released form: layout and numbers of timm's `legacy_` networks, Caffe's pooling and strides."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import compare

import se_flax
from se_flax.backbones import senet
from se_flax.backbones.senet import CaffeBasicBlock, caffe_max_pooling


def test_only_the_resnets_stride_in_their_first_1x1():
    """ResNeXts and SENet-154 keep the stride in the grouped 3x3, as their prototxts do."""
    strides_first = {name: variant.attributes().get("stride_first", False) for name, variant in senet.VARIANTS.items()}
    assert {name for name, first in strides_first.items() if first} == {
        "legacy_seresnet50",
        "legacy_seresnet101",
        "legacy_seresnet152",
    }


def test_only_senet_154_drops_out_before_its_classifier():
    rates = {name: variant.attributes().get("drop_rate", 0.0) for name, variant in senet.VARIANTS.items()}
    assert {name: rate for name, rate in rates.items() if rate} == {"legacy_senet154": 0.2}
    assert se_flax.create_model("senet154").drop_rate == 0.2


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 47, 48])
def test_caffe_pooling_hangs_over_the_end(size):
    x = -jnp.arange(1, size * size + 1, dtype=jnp.float32).reshape(1, size, size, 1)
    # All values are negative and fall along both axes: every window's maximum is its first pixel.
    expected = x[:, ::2, ::2][:, : size // 2, : size // 2]
    np.testing.assert_array_equal(caffe_max_pooling(x, conv=None), expected)


def test_attention_of_a_basic_block_sees_no_negative_value():
    seen = []

    def spy(name):
        del name

        def call(x, **_):
            seen.append(float(x.min()))
            return x

        return call

    block = partial(CaffeBasicBlock, 4, conv=se_flax.Conv, norm=se_flax.BatchNorm, zero_init_last=False)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 8, 4)), jnp.float32)
    block(attention=spy).init(jax.random.key(0), x)
    assert seen == [0.0]


def test_the_released_and_the_modern_bottleneck_network_have_the_same_parameters():
    """Only names differ: a checkpoint of one form fits the other, entry by entry."""
    given = dict(compare.fixture("legacy_seresnet50")["entries"])
    renamed = {
        key.replace("layer0.", "").replace("se_module", "se").replace("last_linear", "fc"): shape
        for key, shape in given.items()
    }
    assert renamed == dict(compare.fixture("seresnet50")["entries"])
