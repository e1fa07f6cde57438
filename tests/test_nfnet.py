"""Networks without norms: scaled weight standardisation against NumPy, variances, and the papers' tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import se_flax
from se_flax import UserError
from se_flax.backbones.nfnet import GAMMA
from se_flax.nn.weight_standardised import ScaledStdConv


def test_the_kernel_is_standardised_over_its_inputs():
    # Brock et al. 2021a, equation 5, with the gain of each output.
    conv = ScaledStdConv(6, 3, groups=2, gamma=1.7)
    variables = conv.init(jax.random.key(0), jnp.zeros((1, 5, 5, 4)))
    params = jax.tree.map(lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape), variables["params"])
    v = params["kernel"].reshape(18, 6)
    expected = params["gain"] * 1.7 * (v - v.mean(0)) / np.sqrt(18 * (v.var(0) + 1e-5))
    kernel, bias = conv.apply({"params": params}, 4, 2, method="weights")
    np.testing.assert_allclose(np.asarray(kernel).reshape(18, 6), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(bias, params["bias"], rtol=1e-6)


@pytest.mark.parametrize("name", GAMMA)
def test_a_convolution_behind_an_activation_keeps_the_variance(name):
    # Paper a, appendix D: gamma is 1 / the standard deviation of the activation of a standard normal number.
    act = {"relu": jax.nn.relu, "silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}[name]
    x = jax.random.normal(jax.random.key(0), (64, 8, 8, 64))
    conv = ScaledStdConv(128, 1, gamma=GAMMA[name])
    y = conv.apply(conv.init(jax.random.key(1), x), act(x))
    assert 0.95 < float(jnp.var(y)) < 1.05


def shapes_of(name, **attributes):
    model = se_flax.create_model(name, **attributes)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]


@pytest.mark.parametrize(("name", "depths"), [("nfnet_f0", (1, 2, 6, 3)), ("dm_nfnet_f1", (2, 4, 12, 6))])
def test_stages_are_the_papers(name, depths):
    # Brock et al. 2021b, table 1 and section 4.1: widths 256, 512, 1536, 1536, groups of 128, a second 3x3.
    params = shapes_of(name)
    for stage, (depth, width) in enumerate(zip(depths, (256, 512, 1536, 1536), strict=True)):
        blocks = [block for path, block in params.items() if path.startswith(f"stages_{stage}_")]
        assert len(blocks) == depth
        for block in blocks:
            assert block["conv2b"]["kernel"].shape == (3, 3, 128, width // 2)
            assert block["attn_last"]["fc1"]["kernel"].shape == (1, 1, width, width // 2)
            assert ("skipinit_gain" in block) == name.startswith("dm")


def test_a_new_network_passes_its_input_on():
    """Every branch starts at zero (paper b, section 3), so no block but those with a shortcut changes the map."""
    model = se_flax.create_model("test_nfnet", depths=(3, 1, 1, 1), num_classes=4)
    x = jax.random.normal(jax.random.key(0), (1, 64, 64, 3))
    variables = model.init(jax.random.key(0), x)
    shallow = se_flax.create_model("test_nfnet", num_classes=4)
    kept = {name: leaf for name, leaf in variables["params"].items() if name not in ("stages_0_1", "stages_0_2")}
    ours = model.apply(variables, x, return_features=True)[1].stages_0
    np.testing.assert_allclose(ours, shallow.apply({"params": kept}, x, return_features=True)[1].stages_0, rtol=1e-6)


def test_there_is_no_norm_to_fold():
    model = se_flax.create_model("test_nfnet")
    with pytest.raises(UserError, match=r"NFNet has no .*BatchNorm in .* so there is nothing to fuse; use it as it is"):
        se_flax.fuse(model, {"params": {}})


def test_attention_is_where_the_family_has_it():
    assert "attn" not in str(shapes_of("test_nfnet", attention=None))
    regnet = shapes_of("nf_regnet_b0", attention=se_flax.ECA, stages=(5,))
    assert {name[:8] for name, block in regnet.items() if "attn" in block} == {"stages_3"}
