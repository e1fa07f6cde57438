"""ResNets: counts and costs as published, blocks against NumPy, outputs and training step against timm."""

import re
from functools import partial

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from costs import count, products, traced
from formulas import batch_norm, conv, random_variables, relu

import se_flax
from se_flax import CBAM, ECA, BatchNorm, Conv, EffectiveSE, Placement, SqueezeExcite, UserError
from se_flax.backbones.resnet import ResNet
from se_flax.nn.residual import BasicBlock, Bottleneck, PreActBottleneck, pad_channels, project, project_linear

RESNET50 = 25_557_032
# Blocks and channels of the stages of ResNet-50, the N_s and C_s of Hu et al. 2020, equation 5.
STAGES = {2: (3, 256), 3: (4, 512), 4: (6, 1024), 5: (3, 2048)}


def shapes(name, **attributes):
    variables = traced(name, 32, **attributes)
    return {"/".join(path): leaf.shape for path, leaf in flax.traverse_util.flatten_dict(variables["params"]).items()}


def added(name="resnet50", **attributes):
    """Weights and biases that an attention adds."""
    inside = {key: np.prod(shape) for key, shape in shapes(name, **attributes).items() if "/se/" in key}
    return tuple(sum(n for key, n in inside.items() if key.endswith(kind)) for kind in ("kernel", "bias"))


# Hu et al. 2020, tables 10 and 13 to 15, recounted from equation 5 and the released models.
@pytest.mark.parametrize(
    ("attributes", "weights", "biases"),
    [
        ({"attention": partial(SqueezeExcite, reduction=2)}, 20_119_552, 22_656),
        ({"attention": partial(SqueezeExcite, reduction=4)}, 10_059_776, 18_880),
        ({"attention": partial(SqueezeExcite, reduction=8)}, 5_029_888, 16_992),
        ({"attention": SqueezeExcite}, 2_514_944, 16_048),
        ({"attention": partial(SqueezeExcite, reduction=32)}, 1_257_472, 15_576),
        ({"attention": partial(SqueezeExcite, use_bias=False)}, 2_514_944, 0),
        ({"attention": SqueezeExcite, "stages": (2,)}, 24_576, 816),
        ({"attention": SqueezeExcite, "stages": (3,)}, 131_072, 2_176),
        ({"attention": SqueezeExcite, "stages": (4,)}, 786_432, 6_528),
        ({"attention": SqueezeExcite, "stages": (5,)}, 1_572_864, 6_528),
        ({"attention": SqueezeExcite, "placement": "3x3"}, 157_184, 4_012),
        ({"attention": SqueezeExcite, "placement": "pre"}, 1_991_168, 13_940),
        ({"attention": SqueezeExcite, "placement": "post"}, 2_514_944, 16_048),
        ({"attention": SqueezeExcite, "placement": "identity"}, 2_514_944, 16_048),
    ],
    ids=lambda value: (
        ",".join(f"{k}={getattr(v, 'keywords', v)}" for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_weights_and_biases_of_the_ablations(attributes, weights, biases):
    variables = traced("resnet50", 32, **attributes)
    assert added(**attributes) == (weights, biases)
    assert count(variables["params"]) == RESNET50 + weights + biases


def test_counts_with_and_without_biases_and_running_statistics():
    plain = traced("resnet50", 32)
    assert count(plain["params"]) == RESNET50
    assert count(plain) == 25_610_152
    for bias, learnable, with_statistics in ((True, 28_088_024, 28.141), (False, 28_071_976, 28.125)):
        variables = traced("resnet50", 32, attention=partial(SqueezeExcite, use_bias=bias))
        assert count(variables["params"]) == learnable
        assert count(variables) == learnable + 53_120
        assert round(count(variables) / 1e6, 3) == with_statistics


def test_eca_adds_a_kernel_per_block():
    variables = traced("ecaresnet50", 32)
    # By the rule 5, 5, 5, 7 weights a block; the authors' released network has 3, 5, 5, 7.
    assert count(variables["params"]) - RESNET50 == 5 * 3 + 5 * 4 + 5 * 6 + 7 * 3 == 86
    kernels = {key: shape for key, shape in shapes("ecaresnet50").items() if "/se/" in key}
    assert len(kernels) == 16 and kernels["layer4_2/se/conv/kernel"] == (7, 1, 1)


def test_multiply_adds_without_se_with_the_later_stride_and_without_the_squeeze():
    se, plain = products("msra_seresnet50"), products("msra_seresnet50", attention=None)
    assert se - plain == 2_514_944  # one product per weight and image
    assert round(products("resnet50") / 1e9, 2) == 4.09  # the stride in the 3x3 costs 0.23
    # Table 16: both layers on every pixel. The paper has 4.27 in all.
    full = products("msra_seresnet50", attention=partial(SqueezeExcite, squeeze="none"))
    pixels = {2: 56**2, 3: 28**2, 4: 14**2, 5: 7**2}
    assert full - plain == sum(2 * n * c**2 // 16 * pixels[stage] for stage, (n, c) in STAGES.items())
    assert round((full - plain) / 1e9, 3) == 0.411
    assert round(full / 1e9, 2) == 4.27


@pytest.mark.parametrize(
    ("name", "attributes", "stages", "leaf"),
    [
        ("resnet50", {"attention": partial(ECA), "stages": (4,)}, {"layer3"}, "se/conv/kernel"),
        ("resnet18", {"attention": CBAM, "stages": (2, 5)}, {"layer1", "layer4"}, "se/spatial_conv/kernel"),
        (
            "resnext50_32x4d",
            {"attention": EffectiveSE, "stages": (3, 4, 5)},
            {"layer2", "layer3", "layer4"},
            "se/fc/bias",
        ),
        ("seresnet18", {"attention": SqueezeExcite, "stages": ()}, set(), "se/fc1/kernel"),
        ("seresnet18", {"attention": None}, set(), "se/fc1/kernel"),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_any_attention_goes_into_the_chosen_stages(name, attributes, stages, leaf):
    keys = shapes(name, **attributes)
    blocks = {key.split("/")[0] for key in keys if key.startswith("layer")}
    attending = {key.split("/")[0] for key in keys if key.endswith(leaf)}
    assert attending == {block for block in blocks if block.split("_")[0] in stages}
    assert {key.split("/")[0] for key in keys if "/se/" in key} == attending


@pytest.mark.parametrize(("stages", "wrong"), [((6,), 6), ((1, 2), 1), ((0,), 0)])
def test_a_stage_that_is_not_there_is_refused(stages, wrong):
    message = f"got attention stages {stages}, but {wrong} is not a stage of blocks; allowed: 2, 3, 4, 5"
    with pytest.raises(UserError, match=re.escape(message)):
        traced("seresnet18", 32, stages=stages)


class Shift(nn.Module):
    """In the place of an attention: 2x - 0.3 commutes with neither a ReLU, nor a norm, nor a sum."""

    @nn.compact
    def __call__(self, x, *, train=False, base_channels=None):
        return 2 * x - 0.3


def parts(variables):
    """Convolutions and evaluation-mode norms of a block as NumPy functions of its own parameters."""
    params, stats = variables["params"], variables["batch_stats"]
    convs = {k: partial(conv, kernel=v["kernel"]) for k, v in params.items() if "kernel" in v}
    norms = {k: partial(batch_norm, params=v, stats=stats[k]) for k, v in params.items() if "scale" in v}
    return convs, norms


def shift(place, here):
    return (lambda x: 2 * x - 0.3) if place == here else (lambda x: x)


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("place", Placement)
def test_basic_block(place, strides):
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 4)).astype(np.float32)
    features = 4 * strides
    block = BasicBlock(features, Conv, BatchNorm, strides=strides, attention=Shift, placement=place, downsample=project)
    variables = random_variables(block, x)
    convs, norms = parts(variables)
    assert convs.keys() == {"conv1", "conv2"} | ({"downsample_0"} if strides > 1 else set())
    at = partial(shift, place)
    y = at("pre")(x.astype(np.float64))
    y = relu(at("3x3")(norms["bn1"](convs["conv1"](y, strides=strides))))
    y = at("standard")(norms["bn2"](convs["conv2"](y)))
    shortcut = norms["downsample_1"](convs["downsample_0"](x, strides=2)) if strides > 1 else x
    expected = at("post")(relu(y + at("identity")(shortcut)))
    np.testing.assert_allclose(block.apply(variables, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride_first", [False, True])
@pytest.mark.parametrize("place", Placement)
def test_bottleneck(place, stride_first):
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 4)).astype(np.float32)
    block = Bottleneck(
        32, Conv, BatchNorm, strides=2, attention=Shift, placement=place, downsample=project, groups=4, base_width=8,
        stride_first=stride_first,
    )  # fmt: skip
    variables = random_variables(block, x)
    convs, norms = parts(variables)
    assert convs["conv2"].keywords["kernel"].shape == (3, 3, 4, 16)  # 32 * 8 / 64 channels in each of 4 groups
    first, second = (2, 1) if stride_first else (1, 2)
    at = partial(shift, place)
    y = at("pre")(x.astype(np.float64))
    y = relu(norms["bn1"](convs["conv1"](y, strides=first)))
    y = relu(at("3x3")(norms["bn2"](convs["conv2"](y, strides=second, groups=4))))
    y = at("standard")(norms["bn3"](convs["conv3"](y)))
    shortcut = norms["downsample_1"](convs["downsample_0"](x, strides=2))
    expected = at("post")(relu(y + at("identity")(shortcut)))
    assert expected.shape == (2, 3, 3, 128)
    np.testing.assert_allclose(block.apply(variables, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("place", Placement)
def test_pre_activation_bottleneck(place, strides):
    channels = 16 if strides == 1 else 4
    x = np.random.default_rng(0).standard_normal((2, 6, 6, channels)).astype(np.float32)
    block = PreActBottleneck(
        4, Conv, BatchNorm, strides=strides, attention=Shift, placement=place, downsample=project_linear
    )
    variables = random_variables(block, x)
    convs, norms = parts(variables)
    assert convs.keys() == {"conv1", "conv2", "conv3"} | ({"downsample_0"} if strides > 1 else set())
    at = partial(shift, place)
    x = x.astype(np.float64)
    y = activated = relu(norms["bn1"](at("pre")(x)))
    y = relu(norms["bn2"](convs["conv1"](y, strides=strides)))
    y = relu(norms["bn3"](at("3x3")(convs["conv2"](y))))
    y = at("standard")(convs["conv3"](y))
    shortcut = x
    if strides > 1:
        # Identity mappings, section 4: the projection starts behind the first norm; but never behind a gate.
        shortcut = convs["downsample_0"](x if place == "pre" else activated, strides=2)
    expected = at("post")(y + at("identity")(shortcut))
    np.testing.assert_allclose(block.apply(variables, x.astype(np.float32)), expected, rtol=1e-4, atol=1e-4)


def test_padded_shortcut_drops_pixels_and_adds_zeros_on_both_sides():
    x = np.random.default_rng(0).standard_normal((2, 5, 6, 4)).astype(np.float32)
    y = np.asarray(pad_channels(x, 9, 2))
    assert y.shape == (2, 3, 3, 9)
    np.testing.assert_array_equal(y[..., 2:6], x[:, ::2, ::2])
    assert not y[..., :2].any() and not y[..., 6:].any()


def test_unknown_placement_names_the_closest():
    with pytest.raises(UserError, match="unknown placement 'identty'; closest: identity"):
        se_flax.create_model("seresnet18", placement="identty")
    with pytest.raises(UserError, match="unknown placement 'before'; allowed: "):
        Placement.parse("before")
    assert se_flax.create_model("seresnet18", placement=Placement.PRE).placement is Placement.PRE


TINY = partial(ResNet, depths=(1, 2, 1, 1), width=8, num_classes=5)


def test_a_new_network_starts_with_identity_blocks_unless_told_otherwise():
    images = np.zeros((1, 32, 32, 3), np.float32)
    for zero_init in (True, False):
        model = TINY(depths=(2,), strides=(1,), block=BasicBlock, zero_init_last=zero_init)
        params = model.init(jax.random.key(0), images)["params"]
        last = [v["bn2"]["scale"] for k, v in params.items() if k.startswith("layer")]
        assert all((np.asarray(scale) == (0 if zero_init else 1)).all() for scale in last) and len(last) == 2
        assert (np.asarray(params["bn1"]["scale"]) == 1).all()
        assert 0 < float(params["fc"]["kernel"].std()) < 0.02


def test_dropout_and_stochastic_depth_act_while_training_only():
    images = np.random.default_rng(0).standard_normal((4, 32, 32, 3)).astype(np.float32)
    plain, dropping = TINY(block=BasicBlock), TINY(block=BasicBlock, drop_rate=0.5, drop_path_rate=0.5)
    variables = random_variables(plain, images)
    np.testing.assert_array_equal(dropping.apply(variables, images), plain.apply(variables, images))
    run = jax.jit(
        lambda key: dropping.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})[0]
    )
    first, again, other = (np.asarray(run(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_stochastic_depth_grows_with_depth_and_leaves_the_shortcut():
    x = np.random.default_rng(0).standard_normal((64, 2, 2, 4)).astype(np.float32)
    block = BasicBlock(4, Conv, BatchNorm, attention=Shift, drop_path_rate=0.5, act=lambda x: x)
    variables = random_variables(block, x)
    y, _ = block.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
    kept = np.asarray(y != x).any((1, 2, 3))
    assert 16 < kept.sum() < 48  # 4 standard deviations around 32
    rates = []

    class Spy(BasicBlock):
        def drop(self, branch, train):
            rates.append(self.drop_path_rate)
            return branch

    jax.eval_shape(TINY(block=Spy, drop_path_rate=0.2).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    np.testing.assert_allclose(rates, [0, 0.05, 0.1, 0.15, 0.2])
