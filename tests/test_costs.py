"""Costs of networks against formulas of this file, the tables of two papers, and timm's tables. Nothing is computed."""

import functools
import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import se_flax
from se_flax import CBAM, ECA, EffectiveSE, SqueezeExcite, UserError
from se_flax.attention import GlobalContext
from se_flax.backbones.resnet import ResNet
from se_flax.cli import main
from se_flax.nn.residual import BasicBlock, Bottleneck

KEYS = {
    "params", "params_with_statistics", "macs", "macs_paper", "activations", "attention_params", "attention_macs"
}  # fmt: skip


@functools.cache
def costs(name, size=None, **attributes):
    model = se_flax.create_model(name, **attributes) if attributes else name
    return se_flax.costs(model, size or se_flax.get_variant(name).input_size)


def total(counted, what):
    return sum(getattr(layer, what) for layer in counted.by_layer)


# --- ResNets, by a formula -------------------------------------------------------------------------------------------


def resnet(depths, *, stride_first, groups=1, base_width=64, size=224, reduction=None):
    """Products, convolution outputs, norm and classifier sizes of a bottleneck network (He et al. 2016, table 1)."""
    side = size // 2
    products, outputs, channels, params = 49 * 3 * 64 * side**2, 64 * side**2, 64, 49 * 3 * 64 + 128
    statistics, sums = 128, 0
    attention = {"params": 0, "products": 0, "squeezes": 0, "outputs": 0}
    side //= 2
    for stage, depth in enumerate(depths):
        width, out = 64 * 2**stage * base_width // 64 * groups, 256 * 2**stage
        for block in range(depth):
            after = side // 2 if stage and not block else side
            first = after if stride_first else side
            kernels = [channels * width, 9 * width * width // groups, width * out]
            pixels, widths = [first**2, after**2, after**2], [width, width, out]
            if not block:
                kernels, pixels, widths = [*kernels, channels * out], [*pixels, after**2], [*widths, out]
            products += sum(k * p for k, p in zip(kernels, pixels, strict=True))
            outputs += sum(w * p for w, p in zip(widths, pixels, strict=True))
            params += sum(kernels) + 2 * sum(widths)
            statistics += 2 * sum(widths)
            sums += out * after**2
            if reduction:
                weights = 2 * out * out // reduction
                attention["params"] += weights + out // reduction + out
                attention["products"] += weights
                attention["squeezes"] += out * after**2
                attention["outputs"] += out // reduction + out
            channels, side = out, after
    return {
        "params": params + 2048 * 1000 + 1000 + attention["params"],
        "params_with_statistics": params + 2048 * 1000 + 1000 + attention["params"] + statistics,
        "macs": products + 2048 * 1000 + attention["products"] + 2 * outputs + 2048 * side**2,
        "macs_paper": products + 2048 * 1000 + attention["products"] + sums + attention["squeezes"],
        "activations": outputs + 1000 + attention["outputs"],
        "attention_params": attention["params"],
        "attention_macs": attention["products"],
    }


@pytest.mark.parametrize(
    ("name", "size", "layout"),
    [
        ("resnet50", 224, {"stride_first": False}),
        ("msra_resnet50", 224, {"stride_first": True}),
        ("msra_seresnet50", 224, {"stride_first": True, "reduction": 16}),
        ("seresnet50", 160, {"stride_first": False, "reduction": 16}),
        ("seresnext50_32x4d", 224, {"stride_first": False, "groups": 32, "base_width": 4, "reduction": 16}),
    ],
)
def test_every_figure_of_a_resnet_follows_from_its_table_of_layers(name, size, layout):
    assert costs(name, size).totals() == resnet((3, 4, 6, 3), **layout, size=size)


# --- timm's tables ---------------------------------------------------------------------------------------------------


# results/benchmark-infer-amp-nhwc-pt240-cu124-rtx3090.csv of huggingface/pytorch-image-models (commit 5c33776a): GMACs
# and millions of activations at a size. Parameters of the attention: counted in timm's modules; None where not.
@pytest.mark.parametrize(
    ("name", "size", "giga", "mega", "attention_params"),
    [
        ("seresnet50", 160, 2.10, 5.69, 2_530_992),
        ("legacy_seresnet50", 224, 3.88, 10.60, 2_530_992),
        ("seresnext26t_32x4d", 288, 4.46, 16.68, 1_400_800),
        ("ecaresnet50d_pruned", 224, 2.53, 6.43, 86),
        ("efficientnet_b0", 224, 0.40, 6.75, 636_540),
        ("efficientnet_b0_gn", 224, 0.42, 6.75, None),
        ("mobilenetv3_small_050", 224, 0.03, 0.92, 128_288),
        ("mixnet_s", 224, 0.25, 6.25, 773_582),
        ("skresnet18", 224, 1.82, 3.24, None),
        ("resnest14d", 224, 2.76, 7.33, None),
        ("mobilenetv1_100", 224, 0.58, 5.04, 0),
        ("mobilenetv2_100", 224, 0.31, 6.68, 0),
        ("inception_resnet_v2", 299, 13.18, 25.06, 0),
    ],
)
def test_multiply_adds_and_activations_are_those_of_timms_table(name, size, giga, mega, attention_params):
    counted = costs(name, size)
    assert (round(counted.macs / 1e9, 2), round(counted.activations / 1e6, 2)) == (giga, mega)
    if attention_params is not None:
        assert counted.attention_params == attention_params


# --- The squeeze-and-excitation paper --------------------------------------------------------------------------------


# Hu et al. 2020, tables 2 and 3: 10^9 multiply-adds without and with SE, printed and by the convention of `macs_paper`.
MSRA, RESNEXT = {"stride_first": True}, {"stride_first": False, "groups": 32, "base_width": 4}
RESNETS = [
    ((3, 4, 6, 3), MSRA, (3.86, 3.86), (3.87, 3.87)),
    ((3, 4, 23, 3), MSRA, (7.58, 7.58), (7.60, 7.59)),
    ((3, 8, 36, 3), MSRA, (11.30, 11.30), (11.32, 11.32)),
    ((3, 4, 6, 3), RESNEXT, (4.24, 4.24), (4.25, 4.24)),
    ((3, 4, 23, 3), RESNEXT, (7.99, 7.98), (8.00, 7.99)),
]
OTHERS = {
    "vgg16_bn": ((15.47, 15.47), (15.48, 15.48)),
    "bn_inception": ((2.03, 2.03), (2.04, 2.03)),
    "mobilenetv1_100": ((0.569, 0.569), (0.572, 0.572)),  # the last two are printed in 10^6
    "shufflenet_g3_100": ((0.140, 0.139), (0.142, 0.141)),
}


def check(printed, ours, counted):
    digits = 3 if printed < 1 else 2
    assert round(counted / 1e9, digits) == ours
    assert abs(printed - ours) < 1.5 * 10**-digits  # nowhere more than one unit of the last digit


@pytest.mark.parametrize(("depths", "layout", "plain", "with_se"), RESNETS)
def test_multiply_adds_of_table_2(depths, layout, plain, with_se):
    """By the formula, which the traced networks of 50 layers follow above."""
    check(*plain, resnet(depths, **layout)["macs_paper"])
    check(*with_se, resnet(depths, **layout, reduction=16)["macs_paper"])


def test_no_convention_gives_all_of_table_2():
    """With the product by the gate, one more per pooled element, three figures come right and two go wrong."""
    with_product = []
    for depths, layout, _, (printed, ours) in RESNETS:
        plain, with_se = resnet(depths, **layout), resnet(depths, **layout, reduction=16)
        pooled = with_se["macs_paper"] - plain["macs_paper"] - with_se["attention_macs"]
        figure = round((with_se["macs_paper"] + pooled) / 1e9, 2)
        assert (figure == printed) != (ours == printed)
        with_product.append(figure)
    assert with_product == [3.88, 7.60, 11.33, 4.25, 8.00]


@pytest.mark.parametrize(("name", "figures"), OTHERS.items(), ids=OTHERS)
def test_multiply_adds_of_tables_2_and_3(name, figures):
    plain, with_se = costs(name, 224), costs(f"se_{name}", 224)
    check(*figures[0], plain.macs_paper)
    check(*figures[1], with_se.macs_paper)
    assert plain.attention_params == plain.attention_macs == 0
    assert with_se.params - plain.params == with_se.attention_params
    assert with_se.macs - plain.macs == with_se.attention_macs


def test_where_one_name_has_several_figures():
    """The stride and the norms make three of ResNet-50; Inception-ResNet-v2 was released larger than printed."""
    assert round(costs("msra_resnet50", 224).macs_paper / 1e9, 2) == 3.86
    later = costs("resnet50", 224)
    assert (round(total(later, "products") / 1e9, 2), round(later.macs / 1e9, 2)) == (4.09, 4.11)
    assert round(costs("inception_resnet_v2", 299).macs_paper / 1e9, 2) == 13.17  # 11.75 in table 2


# The released Caffe models: parameters with SE, of its layers' weights and biases; convolutions and layers in 10^9.
# Derived from the prototxts, not from the code here.
RELEASED = {
    50: (28_088_024, 2_514_944, 16_048, 3.8605),
    101: (49_326_872, 4_743_168, 34_544, 7.5749),
    152: (66_821_848, 6_578_176, 50_864, 11.2890),
    "50_32x4d": (27_559_896, 2_514_944, 16_048, 4.2330),
    "101_32x4d": (48_955_416, 4_743_168, 34_544, 7.9747),
}


@pytest.mark.parametrize(
    ("name", "params", "weights", "biases", "giga"),
    [
        ("se_bn_inception", 11_931_622, 639_360, 7_038, 2.0332),
        ("legacy_senet154", 115_088_984, 6_578_176, 50_864, 20.6884),
        *((f"msra_seresnet{layers}", *RELEASED[layers]) for layers in (50, 101, 152)),
        *((f"legacy_seresnet{layers}", *RELEASED[layers]) for layers in (50, 101, 152)),
        *((f"seresnext{layers}", *RELEASED[layers]) for layers in ("50_32x4d", "101_32x4d")),
        *((f"legacy_seresnext{layers}", *RELEASED[layers]) for layers in ("50_32x4d", "101_32x4d")),
    ],
)
def test_figures_of_the_released_models(name, params, weights, biases, giga):
    counted = costs(name, 224)
    assert (counted.params, counted.attention_params) == (params, weights + biases)
    assert counted.attention_macs == weights  # one product per weight and image
    assert round(total(counted, "products") / 1e9, 4) == giga


def ablation(**settings):
    places = {key: settings.pop(key) for key in ("stages", "placement") if key in settings}
    return costs("msra_resnet50", 224, attention=partial(SqueezeExcite, use_bias=False, **settings), **places)


def test_parameters_of_the_ablations():
    """Tables 10 to 16, in millions: with running statistics; with biases too, but for r = 2 and one stage alone."""

    def by_formula(reduction):
        return resnet((3, 4, 6, 3), stride_first=True, reduction=reduction)["params_with_statistics"]

    printed = {4: 35.7, 8: 30.7, 16: 28.1, 32: 26.9}
    # With and without biases: only one of the two is what is printed.
    assert round(by_formula(2) / 1e6, 1) == 45.8
    assert round((by_formula(8) - 16_992) / 1e6, 1) == 30.6
    assert {r: round(by_formula(r) / 1e6, 1) for r in printed} == printed
    assert round(by_formula(None) / 1e6, 1) == 25.6
    assert round(ablation(reduction=2).params_with_statistics / 1e6, 1) == 45.7
    stages = [round(ablation(stages=(s,)).params_with_statistics / 1e6, 1) for s in (2, 3, 4)]
    assert stages == [25.6, 25.7, 26.4]
    assert round(ablation(placement="3x3").params_with_statistics / 1e6, 1) == 25.8
    assert round(ablation(squeeze="none").params_with_statistics / 1e6, 1) == 28.1


def test_multiply_adds_of_the_ablations():
    """Tables 13, 15 and 16 leave out the pooling, 0.0012 to 0.0055 of these, which tables 2 and 3 have."""

    def giga(counted):
        return round((counted.macs_paper - total(counted, "squeezes")) / 1e9, 2)

    assert giga(costs("msra_resnet50", 224)) == 3.86
    assert [giga(ablation(stages=(s,))) for s in (2, 3, 4)] == [3.86, 3.86, 3.86]
    assert giga(ablation()) == 3.87
    assert giga(ablation(placement="3x3")) == 3.86
    assert giga(ablation(squeeze="none")) == 4.27
    with_pooling = [round(ablation(stages=(s,)).macs_paper / 1e9, 2) for s in (2, 3, 4)]
    assert with_pooling == [3.87, 3.87, 3.87]


@pytest.mark.parametrize("reduction", [2, 16])
def test_weights_follow_equation_5(reduction):
    stages = {2: (3, 256), 3: (4, 512), 4: (6, 1024), 5: (3, 2048)}
    expected = 2 * sum(n * c**2 for n, c in stages.values()) // reduction
    counted = ablation(reduction=reduction)
    assert counted.attention_params == counted.attention_macs == expected


# --- What belongs to what --------------------------------------------------------------------------------------------

TINY = partial(ResNet, depths=(1, 1), strides=(1, 2), width=16, num_classes=5)
# Channels and side of the attended map of each of the two blocks, for images of 32 pixels.
_WIDE = [(64, 8), (128, 4)]
_NARROW = [(16, 8), (32, 4)]
PLACES = {
    BasicBlock: {"standard": _NARROW, "pre": [(16, 8)] * 2, "post": _NARROW, "identity": _NARROW, "3x3": _NARROW},
    Bottleneck: {"standard": _WIDE, "pre": [(16, 8), (64, 8)], "post": _WIDE, "identity": _WIDE, "3x3": _NARROW},
}


@pytest.mark.parametrize("block", PLACES, ids=lambda block: block.__name__)
@pytest.mark.parametrize("place", ["standard", "pre", "post", "identity", "3x3"])
def test_attention_is_told_from_the_rest_at_every_place(block, place):
    """At two of these places the norm before it takes the gate in, and pools for it."""
    plain = se_flax.costs(TINY(block=block), 32)
    counted = se_flax.costs(TINY(block=block, attention=partial(SqueezeExcite, reduction=4), placement=place), 32)
    maps = PLACES[block][place]
    assert counted.attention_macs == sum(2 * c * c // 4 for c, _ in maps)
    assert counted.attention_params == sum(2 * c * c // 4 + c // 4 + c for c, _ in maps)
    assert total(counted, "squeezes") == sum(c * side**2 for c, side in maps)
    assert counted.macs - counted.attention_macs == plain.macs
    assert counted.params - counted.attention_params == plain.params
    assert total(counted, "sums") == total(plain, "sums")
    assert [layer.path for layer in counted.by_layer if layer.is_attention] == ["layer1_0/se", "layer2_0/se"]
    others = [layer for layer in counted.by_layer if not layer.is_attention]
    assert [(x.path, x.params, x.products, x.norms) for x in others] == [
        (x.path, x.params, x.products, x.norms) for x in plain.by_layer
    ]


class HalfSqueeze(SqueezeExcite):
    """An attention that this package does not know, in a module of its own."""


@pytest.mark.parametrize(
    ("attention", "params", "macs", "squeezes"),
    [
        (ECA, [3, 3], [3 * 16, 3 * 32], 1),
        (EffectiveSE, [16 * 17, 32 * 33], [16**2, 32**2], 1),
        (partial(HalfSqueeze, reduction=2), [16**2 + 24, 32**2 + 48], [16**2, 32**2], 1),
        # Both paths go through the layers; the 7x7 convolution of 2 maps and its norm; two poolings by pixels, two by
        # channels.
        (
            partial(CBAM, reduction=4),
            [2 * 64 + 20 + 98 + 2, 2 * 256 + 40 + 98 + 2],
            [4 * 64 + 64 * 98 + 2 * 64, 4 * 256 + 16 * 98 + 2 * 16],
            4,
        ),
        # A weight per pixel, the weighted mean, two layers of a quarter with a layer norm between them.
        (
            partial(GlobalContext, reduction=4.0),
            [17 + 16 * 4 + 4 + 8 + 4 * 16 + 16, 33 + 32 * 8 + 8 + 16 + 8 * 32 + 32],
            [2 * 64 * 16 + 2 * 64 + 5 * 4, 2 * 16 * 32 + 2 * 256 + 5 * 8],
            0,
        ),
    ],
    ids=["eca", "ese", "own", "cbam", "gc"],
)
def test_every_attention_is_counted(attention, params, macs, squeezes):
    counted = se_flax.costs(TINY(block=BasicBlock, attention=attention), 32)
    layers = [layer for layer in counted.by_layer if layer.is_attention]
    assert [layer.params for layer in layers] == params
    assert [layer.macs for layer in layers] == macs
    assert [layer.squeezes for layer in layers] == [squeezes * 16 * 64, squeezes * 32 * 16]


def test_split_attention_without_its_convolution():
    layers = {layer.path: layer for layer in costs("resnest14d", 224).by_layer}
    gate, convolution, norm = (layers[f"layer1_0/conv2{part}"] for part in ("", "/conv", "/bn0"))
    assert gate.is_attention and not convolution.is_attention and not norm.is_attention
    # 64 channels in two splits: layers of 64 to 32 and 32 to 128, a norm between them.
    assert gate.params == 64 * 32 + 32 + 2 * 32 + 32 * 128 + 128
    assert gate.macs == 64 * 32 + 2 * 32 + 32 * 128


class Own(nn.Module):
    """A network of somebody else's: Linen's layers, a bias, activations with sums in them, a loop, a checkpoint."""

    @nn.compact
    def __call__(self, x):
        y = nn.silu(nn.Conv(4, (3, 3), name="first")(x))
        y = nn.hard_swish(nn.BatchNorm(use_running_average=True, name="norm")(y))
        y = y + nn.remat(nn.Conv)(4, (1, 1), name="second")(y)
        y, _ = jax.lax.scan(lambda y, _: (y @ jnp.ones((4, 4)), None), y, length=3)
        return nn.Dense(2, name="head")(y.mean((1, 2)))


def test_a_network_of_somebody_elses():
    counted = se_flax.costs(Own(), 8)
    layers = {layer.path: layer for layer in counted.by_layer}
    assert layers["first"].products == 64 * 9 * 3 * 4 and layers["second"].products == 64 * 16
    assert layers["norm"].norms == 2 * 64 * 4 and layers["head"].products == 8
    own = layers[""]
    assert (own.products, own.sums, own.final_poolings) == (3 * 64 * 16, 64 * 4, 64 * 4)
    assert counted.macs_paper == total(counted, "products") + 64 * 4
    assert counted.params == 3 * 9 * 4 + 4 + 8 + 16 + 4 + 10 and counted.params_with_statistics == counted.params + 8


def test_the_layers_add_up():
    counted = costs("seresnet50", 160)
    assert counted.totals().keys() == KEYS
    for name in ("params", "macs", "macs_paper", "activations"):
        assert total(counted, name) == getattr(counted, name)
    assert sum(layer.params for layer in counted.by_layer if layer.is_attention) == counted.attention_params
    assert all(type(value) is int for value in counted.totals().values())
    order = [layer.path for layer in counted.by_layer]
    assert order.index("conv1") < order.index("layer1_0/conv1") < order.index("layer4_2/conv3") < order.index("fc")


@pytest.mark.parametrize("size", [0, -3, 2.5, "224"])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(UserError, match=f"got image_size={size!r}; give a positive whole number of pixels"):
        se_flax.costs("resnet20", size)


# --- The command -----------------------------------------------------------------------------------------------------


def run(capsys, *words):
    status = main([str(word) for word in words])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_command_prints_the_same(capsys):
    counted = se_flax.costs("seresnet20", 32)
    status, out, _ = run(capsys, "costs", "seresnet20", "--json")
    assert status == 0 and json.loads(out) == counted.totals()
    status, out, _ = run(capsys, "costs", "seresnet20", "--by-layer")
    assert "one image of 32 x 32 pixels" in out and f"{counted.macs_paper:,}" in out
    assert f"{100 * counted.attention_params / counted.params:.2f} %" in out
    (line,) = (line for line in out.splitlines() if line.startswith("layer3_2/se "))
    assert line.split() == ["layer3_2/se", "SqueezeExcite", "580", "512", "4,608", "68"]
    layers = json.loads(run(capsys, "costs", "seresnet20", "--by-layer", "--json")[1])["by_layer"]
    assert sum(layer["macs"] for layer in layers) == counted.macs


def test_the_command_leaves_the_attention_out(capsys):
    out = run(capsys, "costs", "seresnet20", "--image-size", 16, "--without-attention", "--json")[1]
    assert json.loads(out) == se_flax.costs("resnet20", 16).totals()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seresnet21"], "unknown model 'seresnet21'; closest: "),
        (["seresnet20", "--image-size", "0"], "got --image-size=0; give a positive whole number of pixels"),
    ],
)
def test_the_command_refuses_in_one_line(capsys, words, message):
    status, _, err = run(capsys, "costs", *words)
    assert status == 1 and message in err and err.count("\n") == 1
