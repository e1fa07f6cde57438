"""Shapes that users meet outside image batches: other ranks, no images, sides of unknown length, strict promotion."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CLASSES, SMALLEST, model_and_shapes, small_side
from formulas import batch_norm, double, excite, random_variables
from jax import export
from scipy.signal import correlate

import se_flax
from se_flax import CBAM, ECA, EffectiveSE, ScSE, SqueezeExcite, UserError, functional
from se_flax.attention import GlobalContext

RNG = np.random.default_rng(0)
SHAPES = {"signal": (2, 9, 16), "image": (2, 5, 4, 16), "volume": (2, 3, 5, 4, 16)}
MAPS = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
MODULES = [SqueezeExcite(reduction=4), EffectiveSE(), ECA(), CBAM(reduction=4), GlobalContext(), ScSE()]
EVERY = pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def map_and_mean(shape):
    x = RNG.standard_normal(shape).astype(np.float32)
    pixels = x.astype(np.float64).reshape(shape[0], -1, shape[-1])
    return x, pixels, pixels.mean(1)


def gated(x, gate):
    return x * gate.reshape(x.shape[0], *(1 for _ in x.shape[1:-1]), x.shape[-1])


def layer(params):
    kernel, bias = double(params["kernel"], params["bias"])
    return kernel[0, 0], bias


@MAPS
def test_the_squeeze_is_over_all_spatial_axes(shape):
    x, _, mean = map_and_mean(shape)
    for module, gate in (
        (SqueezeExcite(reduction=4), lambda p: excite(mean, *layer(p["fc1"]), *layer(p["fc2"]))),
        (EffectiveSE(gate="sigmoid"), lambda p: sigmoid(mean @ layer(p["fc"])[0] + layer(p["fc"])[1])),
        (ECA(kernel_size=3), lambda p: sigmoid([np.correlate(z, p["conv"]["kernel"][:, 0, 0], "same") for z in mean])),
    ):
        variables = random_variables(module, x)
        expected = gated(x, np.asarray(gate(variables["params"])))
        np.testing.assert_allclose(module.apply(variables, x), expected, rtol=1e-5, atol=1e-5)


@MAPS
def test_global_context_weighs_all_pixels(shape):
    x, pixels, _ = map_and_mean(shape)
    variables = random_variables(GlobalContext(), x)
    p = variables["params"]
    kernel, bias = layer(p["conv_attn"])
    weights = np.exp(pixels @ kernel + bias)
    context = (pixels * weights).sum(1) / weights.sum(1)
    hidden = context @ layer(p["mlp_scale"]["fc1"])[0] + layer(p["mlp_scale"]["fc1"])[1]
    scale, offset = double(p["mlp_scale"]["norm"]["scale"], p["mlp_scale"]["norm"]["bias"])
    hidden = (hidden - hidden.mean(1, keepdims=True)) / np.sqrt(hidden.var(1, keepdims=True) + 1e-6) * scale + offset
    gate = sigmoid(np.maximum(hidden, 0) @ layer(p["mlp_scale"]["fc2"])[0] + layer(p["mlp_scale"]["fc2"])[1])
    np.testing.assert_allclose(GlobalContext().apply(variables, x), gated(x, gate), rtol=1e-5, atol=1e-5)


@MAPS
def test_cbams_spatial_kernel_has_an_axis_per_spatial_axis(shape):
    x, pixels, mean = map_and_mean(shape)
    module = CBAM(reduction=4, kernel_size=3)
    variables = random_variables(module, x)
    p = variables["params"]
    axes = len(shape) - 2
    assert p["spatial_conv"]["kernel"].shape == (3,) * axes + (2, 1)
    paths = [np.maximum(z @ layer(p["fc1"])[0] + layer(p["fc1"])[1], 0) for z in (mean, pixels.max(1))]
    gate = sigmoid(sum(hidden @ layer(p["fc2"])[0] + layer(p["fc2"])[1] for hidden in paths))
    y = gated(x.astype(np.float64), gate)
    descriptor = np.stack([y.max(-1), y.mean(-1)], -1)
    kernel = np.asarray(p["spatial_conv"]["kernel"], np.float64)[..., 0]
    logits = np.stack([sum(correlate(image[..., c], kernel[..., c], "same") for c in (0, 1)) for image in descriptor])
    norm = batch_norm(logits[..., None], p["spatial_bn"], variables["batch_stats"]["spatial_bn"])
    np.testing.assert_allclose(module.apply(variables, x), y * sigmoid(norm), rtol=1e-5, atol=1e-5)


@MAPS
@pytest.mark.parametrize("combine", ["add", "max"])
def test_scse_gates_channels_and_pixels_at_once(shape, combine):
    x, _, mean = map_and_mean(shape)
    module = ScSE(combine=combine)
    variables = random_variables(module, x)
    p = variables["params"]
    assert p["fc1"]["kernel"].shape == (1, 1, 16, 8) and p["conv"]["kernel"].shape == (1, 1, 16, 1)
    by_channel = gated(x, excite(mean, *layer(p["fc1"]), *layer(p["fc2"])))
    kernel, bias = layer(p["conv"])
    by_pixel = x * sigmoid(x.astype(np.float64) @ kernel + bias)
    expected = by_channel + by_pixel if combine == "add" else np.maximum(by_channel, by_pixel)
    np.testing.assert_allclose(module.apply(variables, x), expected, rtol=1e-5, atol=1e-5)


def test_scse_combines_in_two_ways_only():
    with pytest.raises(UserError, match="got combine='mul' for ScSE; give add or max"):
        ScSE(combine="mul").init(jax.random.key(0), jnp.zeros((1, 2, 2, 8)))


@pytest.mark.parametrize("module", [*MODULES, SqueezeExcite(reduction=4, squeeze="max")], ids=repr)
def test_padding_does_not_count_in_the_squeeze(module):
    """Where a sequence ends early, the result is that of the sequence alone, whatever is in the padding."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 9, 16)).astype(np.float32)
    lengths = [9, 4, 1]
    mask = np.arange(9) < np.array(lengths)[:, None]
    variables = random_variables(module, x)
    got = module.apply(variables, x, mask=mask)
    other = np.where(mask[..., None], x, 1e3 * rng.standard_normal(x.shape)).astype(np.float32)
    for i, length in enumerate(lengths):
        alone = module.apply(variables, x[i : i + 1, :length])
        np.testing.assert_allclose(got[i : i + 1, :length], alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        np.where(mask[..., None], module.apply(variables, other, mask=mask), 0), np.where(mask[..., None], got, 0)
    )


def test_a_mask_has_an_entry_per_pixel_and_an_empty_one_gives_zero():
    x = jnp.ones((2, 5, 8))
    with pytest.raises(UserError, match=r"mask of shape \(5,\) for a map of shape \(2, 5, 8\); .* pixel, \(2, 5\)"):
        functional.squeeze(x, mask=jnp.ones(5))
    with pytest.raises(UserError, match="got a mask with a squeeze that is a function"):
        functional.squeeze(x, lambda x: x.mean(1, keepdims=True), mask=jnp.ones((2, 5)))
    for kind in ("mean", "max"):
        np.testing.assert_array_equal(functional.squeeze(x, kind, jnp.zeros((2, 5))), np.zeros((2, 1, 8)))


@EVERY
@pytest.mark.parametrize(
    ("shape", "hint"),
    [((32,), r"by x\[None, None\]"), ((2, 32), r"by x\[:, None\]"), ((1, 2, 3, 4, 5, 32), r"H, W, C\]")],
)
def test_another_rank_is_refused(module, shape, hint):
    message = rf"got an array of shape \({', '.join(map(str, shape))},?\) .*; give float \[N, L, C\].*{hint}"
    with pytest.raises(UserError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape))


@EVERY
@MAPS
def test_no_images_give_no_maps(module, shape):
    x = jnp.zeros(shape)
    variables = module.init(jax.random.key(0), x)
    assert module.apply(variables, x[:0]).shape == (0, *shape[1:])


@MAPS
def test_a_convolution_takes_signals_and_volumes(shape):
    x = RNG.standard_normal(shape).astype(np.float32)
    module = se_flax.Conv(1, 3)
    kernel = random_variables(module, x)["params"]["kernel"]
    expected = np.stack(
        [sum(correlate(image[..., c], kernel[..., c, 0], "same") for c in range(shape[-1])) for image in x]
    )
    np.testing.assert_allclose(module.apply({"params": {"kernel": kernel}}, x)[..., 0], expected, rtol=1e-4, atol=1e-4)


def test_a_convolution_says_which_ranks_it_takes():
    with pytest.raises(UserError, match=r"of shape \(2, 32\) .* for a convolution; give float \[N, L, C\]"):
        se_flax.Conv(8).init(jax.random.key(0), jnp.zeros((2, 32)))
    with pytest.raises(UserError, match=r"kernel_size=\(3, 3\) for a map of shape \(2, 9, 4\); give one"):
        se_flax.Conv(8, (3, 3)).init(jax.random.key(0), jnp.zeros((2, 9, 4)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: functional.squeeze(jnp.zeros((2, 8))), r"got an array of shape \(2, 8\) .* for a squeeze; give float"),
        (
            lambda: functional.scale(jnp.zeros((2, 8, 2, 8)), jnp.zeros((2, 8))),
            r"gate of shape \(2, 8\) for a map of shape \(2, 8, 2, 8\); give it the map's rank, such as \(2, 1, 1, 8\)",
        ),
        (
            lambda: functional.excite(jnp.zeros((2, 8)), jnp.zeros((1, 1, 8, 2)), None, jnp.zeros((2, 8)), None),
            r"a kernel of shape \(1, 1, 8, 2\) for 8 channels; give \[8, M\]",
        ),
        (
            lambda: functional.channel_conv(jnp.zeros((2, 8)), jnp.zeros((3, 1, 1))),
            r"a kernel of shape \(3, 1, 1\) over the channels; give one axis of odd length",
        ),
        (lambda: functional.channel_conv(jnp.zeros((2, 8)), jnp.zeros(4)), r"a kernel of shape \(4,\) over the"),
    ],
)
def test_formulas_refuse_what_would_meet_the_wrong_axes(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize("name", SMALLEST)
def test_every_family_classifies_no_images(name):
    model, shapes = model_and_shapes(name)
    variables = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)
    side = small_side(name)
    images = jnp.zeros((0, side, side, 3))
    fused = [se_flax.fuse(model, variables)] if "batch_stats" in variables else []
    for network, its_variables in ((model, variables), *fused):
        logits, stages = jax.jit(lambda v, x, network=network: network.apply(v, x, return_features=True))(
            its_variables, images
        )
        assert logits.shape == (0, CLASSES) and {stage.shape[0] for stage in stages} == {0}


def symbolic_images(smallest):
    constraints = [f"h >= {smallest}", f"w >= {smallest}"]
    return jax.ShapeDtypeStruct((*export.symbolic_shape("n, h, w", constraints=constraints), 3), jnp.float32)


@pytest.mark.parametrize("name", SMALLEST)
def test_every_family_is_exported_for_images_of_any_size(name):
    model, shapes = model_and_shapes(name)
    images = symbolic_images(224 if name.startswith("vgg") else 96)
    exported = export.export(jax.jit(model.apply), platforms=["cpu", "tpu"])(shapes, images)
    assert exported.out_avals[0].shape[1:] == (CLASSES,)


def test_a_vgg_says_which_sizes_it_must_know():
    model, shapes = model_and_shapes("vgg11_bn")
    with pytest.raises(UserError, match=r'7 or more pixels .* constraints such as \["h >= 224", "w >= 224"\]'):
        export.export(jax.jit(model.apply))(shapes, symbolic_images(96))


@pytest.mark.parametrize("name", ["seresnet20", "shake_shake26_2x96d", "resnest14d", "bn_inception"])
def test_an_exported_network_computes_the_same_at_every_size(name):
    model, shapes = model_and_shapes(name)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: (0.5 + 0.1 * rng.standard_normal(s.shape)).astype(s.dtype) * 0.2, shapes)
    exported = export.export(jax.jit(model.apply))(shapes, symbolic_images(96))
    for side in ((96, 96), (101, 98)):
        x = rng.standard_normal((1, *side, 3)).astype(np.float32)
        expected = jax.jit(model.apply)(variables, x)
        np.testing.assert_allclose(exported.call(variables, x), expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALLEST)
def test_every_family_trains_without_rank_promotion(name):
    model, shapes = model_and_shapes(name)
    side = small_side(name)
    images = jax.ShapeDtypeStruct((16, side, side, 3), jnp.float32)

    def loss(params, rest, x):
        rngs = {"dropout": jax.random.key(0)}
        logits, _ = model.apply({"params": params, **rest}, x, train=True, mutable=["batch_stats"], rngs=rngs)
        return jnp.mean(jnp.square(logits))

    params, rest = shapes.pop("params"), shapes
    with jax.numpy_rank_promotion("raise"):
        jax.jit(jax.grad(loss)).trace(params, rest, images)


@EVERY
def test_every_attention_works_without_rank_promotion(module):
    x = jnp.ones((2, 6, 5, 16))
    with jax.numpy_rank_promotion("raise"):
        variables = jax.jit(module.init)(jax.random.key(0), x)
        jax.jit(jax.grad(lambda v, x: module.apply(v, x).sum())).trace(variables, x)


@EVERY
@MAPS
def test_batch_axis_false_takes_one_image_as_the_batch_has_it(module, shape):
    rng = np.random.default_rng(2)
    x, mask = rng.standard_normal(shape).astype(np.float32), rng.random(shape[:-1]) < 0.7
    variables = random_variables(module, x)
    alone = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, batch_axis=False), x[0])
    assert alone == jax.eval_shape(lambda: variables)

    def one(x, mask):
        return module.apply(variables, x, mask=mask, batch_axis=False)

    for given in (None, mask):
        whole = module.apply(variables, x, mask=given)
        np.testing.assert_allclose(one(x[1], None if given is None else given[1]), whole[1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(jax.vmap(one)(x, given), whole, rtol=1e-5, atol=1e-6)


@EVERY
@pytest.mark.parametrize("shape", [(16,), (1, 1, 1, 1, 16)])
def test_batch_axis_false_refuses_what_is_no_map_of_one_image(module, shape):
    message = f"{shape} and dtype float32 for {type(module).__name__} with batch_axis=False, the map of one image; give"
    with pytest.raises(UserError, match=re.escape(message) + r" .*, map the call over images with jax\.vmap, or leave"):
        jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(shape), batch_axis=False))


@EVERY
def test_a_descriptor_or_a_signal_without_a_batch_axis_says_what_to_add(module):
    message = r"got an array of shape \(9, 16\) .* by x\[:, None\] \(and a signal without images by x\[None\]\)"
    with pytest.raises(UserError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((9, 16)))
