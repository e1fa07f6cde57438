"""Attention modules: names and shapes of their parameters, and outputs against float64 NumPy."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import ACTIVATIONS, GATES, batch_norm, conv, double, excite, random_variables, squeeze_excite

import se_flax
from se_flax import CBAM, ECA, EffectiveSE, Placement, SqueezeExcite, UserError
from se_flax.nn.residual import BasicBlock, project

X = np.random.default_rng(0).standard_normal((2, 5, 4, 16)).astype(np.float32)
SQUEEZES = {
    "mean": lambda x: x.mean((1, 2), keepdims=True),
    "max": lambda x: x.max((1, 2), keepdims=True),
    "none": lambda x: x,
}
EVERY = pytest.mark.parametrize(
    "module", [SqueezeExcite(reduction=4), EffectiveSE(), ECA(), CBAM(reduction=4)], ids=repr
)


def shapes(variables):
    flat = jax.tree_util.tree_leaves_with_path(variables)
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in flat}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_squeeze_excite_is_its_formula(squeeze, gate, bias):
    module = SqueezeExcite(reduction=4, squeeze=squeeze, gate=gate, use_bias=bias)
    variables = random_variables(module, X)
    names = ["fc1/bias"] * bias + ["fc1/kernel"] + ["fc2/bias"] * bias + ["fc2/kernel"]
    expected_shapes = {"fc1/kernel": (1, 1, 16, 4), "fc1/bias": (4,), "fc2/kernel": (1, 1, 4, 16), "fc2/bias": (16,)}
    assert shapes(variables) == {f"params/{name}": expected_shapes[name] for name in names}
    p = variables["params"]
    layers = double(p["fc1"]["kernel"][0, 0], p["fc1"].get("bias"), p["fc2"]["kernel"][0, 0], p["fc2"].get("bias"))
    expected = X * excite(SQUEEZES[squeeze](X.astype(np.float64)), *layers, gate=gate)
    np.testing.assert_allclose(module.apply(variables, X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_squeeze_excite_with_another_activation_and_other_names(activation):
    module = SqueezeExcite(width=3, activation=activation, names=("conv_reduce", "conv_expand"))
    variables = random_variables(module, X)
    p = variables["params"]
    assert p.keys() == {"conv_reduce", "conv_expand"}
    renamed = {"fc1": p["conv_reduce"], "fc2": p["conv_expand"]}
    expected = squeeze_excite(X.astype(np.float64), renamed, activation=activation)
    np.testing.assert_allclose(module.apply(variables, X), expected, rtol=1e-5, atol=1e-5)


def test_squeeze_excite_takes_functions():
    module = SqueezeExcite(
        reduction=4, squeeze=lambda x: x[:, :1, :1], activation=jnp.abs, gate=jnp.cos, rounding=lambda width: 5
    )
    variables = random_variables(module, X)
    (w1, b1), (w2, b2) = ((p["kernel"][0, 0], p["bias"]) for p in variables["params"].values())
    w1, b1, w2, b2 = double(w1, b1, w2, b2)
    assert w1.shape == (16, 5)
    expected = X * np.cos(np.abs(X[:, :1, :1] @ w1 + b1) @ w2 + b2)
    np.testing.assert_allclose(module.apply(variables, X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "base", "width"),
    [
        ({}, None, 6),  # 96 / 16
        ({"reduction": 5.0}, None, 19),
        ({"reduction": 5.0, "rounding": "ceil"}, None, 20),
        ({"fraction": 0.25, "reduction": 3.0}, None, 24),  # the fraction wins over the reduction,
        ({"width": 7, "fraction": 0.25}, None, 7),  # and the width over both
        ({"fraction": 0.25}, 16, 4),  # EfficientNet: a share of the block's input
        ({"reduction": 200.0}, None, 1),
    ],
)
def test_hidden_width(kwargs, base, width):
    module = SqueezeExcite(**kwargs)
    x = jax.ShapeDtypeStruct((1, 2, 2, 96), jnp.float32)
    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, base_channels=base), x)
    assert variables["params"]["fc1"]["kernel"].shape == (1, 1, 96, width)
    assert variables["params"]["fc2"]["kernel"].shape == (1, 1, width, 96)


@pytest.mark.parametrize("bias", [True, False])
def test_effective_se_is_one_full_layer_and_a_hard_gate(bias):
    module = EffectiveSE(use_bias=bias)
    variables = random_variables(module, X)
    assert shapes(variables) == {
        **({"params/fc/bias": (16,)} if bias else {}),
        "params/fc/kernel": (1, 1, 16, 16),
    }
    p = variables["params"]["fc"]
    x, kernel = double(X, p["kernel"][0, 0])
    expected = x * GATES["hard_sigmoid"](x.mean((1, 2), keepdims=True) @ kernel + (p["bias"] if bias else 0))
    np.testing.assert_allclose(module.apply(variables, X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kwargs", "size"), [({}, 3), ({"kernel_size": 5}, 5), ({"gamma": 1.0, "b": 2.0}, 7)])
def test_eca_correlates_neighbouring_channels(kwargs, size):
    module = ECA(**kwargs)
    variables = random_variables(module, X)
    assert shapes(variables) == {"params/conv/kernel": (size, 1, 1)}
    x, kernel = double(X, variables["params"]["conv"]["kernel"][:, 0, 0])
    z = np.stack([np.correlate(np.pad(row, size // 2), kernel, "valid") for row in x.mean((1, 2))])
    expected = x * GATES["sigmoid"](z)[:, None, None]
    np.testing.assert_allclose(module.apply(variables, X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_cbam_gates_channels_then_pixels(bias, train):
    module = CBAM(reduction=4, use_bias=bias)
    variables = random_variables(module, X)
    biases = {"params/fc1/bias": (4,), "params/fc2/bias": (16,)} if bias else {}
    assert shapes(variables) == {
        **biases,
        "params/fc1/kernel": (1, 1, 16, 4),
        "params/fc2/kernel": (1, 1, 4, 16),
        "params/spatial_conv/kernel": (7, 7, 2, 1),
        "params/spatial_bn/scale": (1,),
        "params/spatial_bn/bias": (1,),
        "batch_stats/spatial_bn/mean": (1,),
        "batch_stats/spatial_bn/var": (1,),
    }
    p, stats = variables["params"], variables["batch_stats"]["spatial_bn"]
    w1, b1, w2, b2 = double(
        p["fc1"]["kernel"][0, 0], p["fc1"].get("bias", 0.0), p["fc2"]["kernel"][0, 0], p["fc2"].get("bias", 0.0)
    )
    x = X.astype(np.float64)
    logits = sum(np.maximum(z @ w1 + b1, 0) @ w2 + b2 for z in (x.mean((1, 2)), x.max((1, 2))))
    x = x * GATES["sigmoid"](logits)[:, None, None]
    logits = conv(np.stack([x.max(-1), x.mean(-1)], -1), p["spatial_conv"]["kernel"])
    batch = {"mean": logits.mean((0, 1, 2)), "var": logits.var((0, 1, 2))}
    expected = x * GATES["sigmoid"](batch_norm(logits, p["spatial_bn"], batch if train else stats))
    out, new = module.apply(variables, X, train=train, mutable=["batch_stats"])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    # The authors' momentum is 0.01 in PyTorch's convention.
    kept = 0.99 * np.asarray(stats["mean"]) + 0.01 * batch["mean"] if train else stats["mean"]
    np.testing.assert_allclose(new["batch_stats"]["spatial_bn"]["mean"], kept, rtol=1e-5)


@EVERY
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
def test_dtype_of_the_map_is_kept_and_parameters_are_float32(module, dtype):
    x = jax.ShapeDtypeStruct((2, 5, 4, 16), dtype)
    for train in (False, True):
        (out, _), variables = jax.eval_shape(
            lambda x, train=train: (
                module.init_with_output(jax.random.key(0), x, train=train, base_channels=8),
                module.init(jax.random.key(0), x),
            ),
            x,
        )
        assert out.shape == x.shape and out.dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@EVERY
def test_a_gate_in_bfloat16_loses_only_the_rounding_of_its_map(module):
    variables = random_variables(module, X)
    low = jnp.asarray(X, jnp.bfloat16)
    exact = np.asarray(module.apply(variables, low.astype(jnp.float32)))
    # Three roundings to 8 bits (map after each of two gates, gate) would be 1.2 %; a gate pooled in bfloat16 is worse.
    out = np.asarray(module.apply(variables, low), np.float32)
    np.testing.assert_allclose(out, exact, rtol=0.012, atol=1e-3)


@EVERY
def test_modules_survive_strict_dtype_promotion(module):
    variables = random_variables(module, X)
    with jax.numpy_dtype_promotion("strict"):
        for dtype in (jnp.float32, jnp.bfloat16):
            assert module.apply(variables, jnp.asarray(X, dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (SqueezeExcite(gate="sigmoyd"), "unknown gate 'sigmoyd'; closest: sigmoid, hard_sigmoid"),
        (SqueezeExcite(squeeze="men"), "unknown squeeze 'men'; closest: mean"),
        (SqueezeExcite(activation="rellu"), "unknown activation 'rellu'; closest: relu"),
        (SqueezeExcite(rounding="flor"), "unknown rounding 'flor'; closest: floor"),
        (SqueezeExcite(reduction=0.0), "got reduction=0.0; it must be positive"),
        (SqueezeExcite(reduction=-16.0), "got reduction=-16.0; it must be positive"),
        (SqueezeExcite(fraction=0.0), "got fraction=0.0; it must be positive"),
        (EffectiveSE(gate="hard"), "unknown gate 'hard'"),
        (ECA(gate="tan"), "unknown gate 'tan'; closest: tanh"),
        (ECA(kernel_size=4), "got kernel_size=4 for ECA; give an odd positive number, or None for the paper's rule"),
        (ECA(kernel_size=-1), "got kernel_size=-1 for ECA; give an odd positive number"),
        (CBAM(reduction=0.0), "got reduction=0.0; it must be positive"),
        (CBAM(gate="sigmoyd"), "unknown gate 'sigmoyd'; closest: sigmoid"),
    ],
)
def test_what_cannot_be_is_refused(module, message):
    with pytest.raises(UserError, match=re.escape(message)):
        jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2, 2, 16), jnp.float32))


@pytest.mark.parametrize("attention", [SqueezeExcite, ECA, EffectiveSE])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("placement", ["standard", "3x3"])
def test_norm_and_gate_in_one_affine_are_norm_then_gate(attention, train, placement):
    separate = type("Separate", (attention,), {"squeezes_mean": False})
    images = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16, 16, 3)), jnp.float32)
    results = []
    for kind in (attention, separate):
        block = partial(
            BasicBlock, features=8, conv=se_flax.Conv, norm=se_flax.BatchNorm, downsample=project, zero_init_last=False
        )(attention=kind, placement=Placement(placement))
        variables = block.init(jax.random.key(0), images)

        def loss(params, block=block, variables=variables):
            y, new = block.apply({**variables, "params": params}, images, train=train, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, new)

        results.append(jax.value_and_grad(loss, has_aux=True)(variables["params"]))
        text = str(jax.make_jaxpr(lambda p, loss=loss: loss(p)[0])(variables["params"]))
        results[-1] = (*results[-1], text)
    ours, theirs, (fused, plain) = results[0][:2], results[1][:2], (results[0][2], results[1][2])
    assert fused != plain
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_only_gates_of_the_mean_go_into_the_norm():
    assert SqueezeExcite().squeezes_mean and ECA().squeezes_mean and EffectiveSE().squeezes_mean
    assert not SqueezeExcite(squeeze="max").squeezes_mean and not SqueezeExcite(squeeze="none").squeezes_mean
    assert not CBAM().squeezes_mean
