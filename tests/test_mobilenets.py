"""MobileNet v1 and v2: timm's numbers, and the counts of the papers that gave them attention."""

from functools import partial

import numpy as np
import pytest
from costs import count, products, traced
from one_step import check_training_step, images_of
from parity import compare, synthetic

import se_flax
from se_flax import ECA, SqueezeExcite, UserError
from se_flax.backbones import mobilenetv1, mobilenetv2
from se_flax.checkpoints.convert import variable_shapes
from se_flax.checkpoints.torch import torch_key, torch_shape
from se_flax.nn.mobile_table import scale_width

# (output channels, side of the output) of every block at 224 pixels: Howard et al. 2017, table 1, and Sandler et al.
# 2018, table 2 with (expanded channels, input's side) in front.
V1 = [(64, 112), (128, 56), (128, 56), (256, 28), (256, 28), *[(512, 14)] * 6, (1024, 7), (1024, 7)]
V2 = [
    (32, 112, 16, 112),
    (96, 112, 24, 56),
    (144, 56, 24, 56),
    (144, 56, 32, 28),
    *[(192, 28, 32, 28)] * 2,
    (192, 28, 64, 14),
    *[(384, 14, 64, 14)] * 3,
    (384, 14, 96, 14),
    *[(576, 14, 96, 14)] * 2,
    (576, 14, 160, 7),
    *[(960, 7, 160, 7)] * 2,
    (960, 7, 320, 7),
]


def params_of(name, **attributes):
    return count(traced(name, **attributes)["params"])


def test_se_mobilenet_is_hu_et_als_by_its_parameters_and_multiply_adds():
    plain, se = params_of("mobilenetv1_100"), params_of("se_mobilenetv1_100")
    # Howard et al. 2017, table 4, and Hu et al. 2020, table 3.
    assert round(plain / 1e6, 1) == 4.2 and round(se / 1e6, 1) == 4.7
    assert se - plain == sum(2 * c * c // 16 + c // 16 + c for c, _ in V1)
    # Other places and reductions that one could think of have other digits.
    depthwise = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024]
    for channels, r in ((depthwise, 16), (depthwise, 8), ([c for c, _ in V1], 8), ([c for c, _ in V1], 32)):
        assert round((plain + sum(2 * c * c // r for c in channels)) / 1e6, 1) != 4.7

    macs, se_macs = products("mobilenetv1_100"), products("se_mobilenetv1_100")
    squeezed = sum(c * side**2 for c, side in V1)
    assert round(macs / 1e6) == 569
    assert round((se_macs + squeezed) / 1e6) == 572  # one operation for each value that the gates pool


def test_mobilenetv2_with_attention_has_the_parameters_of_the_eca_paper():
    plain, se, eca = (params_of(name) for name in ("mobilenetv2_100", "se_mobilenetv2_100", "eca_mobilenetv2_100"))
    # Wang et al. 2020, table 3, whose M is 2^20.
    assert [round(n / 2**20, 2) for n in (plain, se, eca)] == [3.34, 3.40, 3.34]
    assert se - plain == sum(2 * c * c // 8 + c // 8 + c for _, _, c, _ in V2)
    assert eca - plain == sum(1 if c < 96 else 3 for _, _, c, _ in V2)


def test_mobilenetv2_has_the_flops_of_the_eca_paper_as_its_code_counts_them():
    """Their counter adds 4 per value of a batch norm, 1 of a ReLU6, takes 2n - 1 for a product of n; M is 2^20."""
    norms = 32 * 112**2 + 1280 * 7**2 + sum(c * side**2 for _, _, c, side in V2)
    norms += sum(hidden * (before**2 * (i > 0) + side**2) for i, (hidden, before, _, side) in enumerate(V2))
    linear = sum(c * side**2 for _, _, c, side in V2)
    extra = 4 * norms + (norms - linear) + 1279 * 1000
    pooled = linear + sum(c for _, _, c, _ in V2)
    layers = sum(2 * c * c // 8 - (c // 8 + c) for _, _, c, _ in V2)
    plain, eca, se = (products(f"{kind}mobilenetv2_100") for kind in ("", "eca_", "se_"))
    assert round((plain + extra) / 2**20, 1) == 319.4
    assert round((eca + extra + pooled) / 2**20, 1) == 319.9
    # Printed 320.1; their code for this network was not released, and our count stays below.
    assert (se + extra + pooled + layers) / 2**20 == pytest.approx(320.1, abs=0.1)


# timm 1.0.31 (PyTorch 2.13, CPU) with the weights and images of tests/parity/synthetic.py, 64 pixels, every variance's
# scale 1: the first logits of both images.
LOGITS = {
    "mobilenetv1_100": [
        [0.6884055, 0.3791167, -0.4962633, -0.0408927, 0.0870925],
        [0.6856254, 0.4300961, -0.6294634, -0.1286365, 0.2123375],
    ],
    "mobilenetv2_100": [
        [-0.0805316, 0.9622312, -4.0552206, 3.8809192, -2.0261183],
        [0.0542199, 0.9027544, -3.0751395, 3.1099384, -1.9209672],
    ],
}


@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_timms(name):
    model = se_flax.create_model(name)
    state = {}
    for path, leaf in variable_shapes(model, 64).items():
        key = torch_key(path)
        scale = 1.0 if key.endswith(("running_mean", "running_var")) else None
        state[key] = synthetic.tensor(key, torch_shape(path, leaf.shape), scale)
    images = synthetic.images((2, 3, 64, 64)).transpose(0, 2, 3, 1)
    logits = compare.compiled(model.apply, se_flax.from_timm(name, state), images)
    np.testing.assert_allclose(logits[:, :5], LOGITS[name], rtol=0, atol=1e-4 * np.abs(logits).max())


@pytest.mark.parametrize(
    ("name", "layout"), [("se_mobilenetv1_100", mobilenetv1.LAYOUT), ("se_mobilenetv2_100", mobilenetv2.LAYOUT)]
)
def test_a_training_step(name, layout):
    attention = partial(mobilenetv1.SE, reduction=2.0)
    small = scale_width(layout, 0.125)
    model = se_flax.create_model(name, layout=small, attention=attention, num_classes=8, drop_rate=0.1)
    check_training_step(model, images_of(4, 32))


def test_any_attention_goes_to_the_end_of_the_blocks_of_chosen_stages():
    variables = traced("mobilenetv2_100", 64, attention=ECA, stages=(3, 8))
    kernels = {block: tree["se"] for block, tree in variables["params"].items() if "se" in tree}
    assert kernels.keys() == {"blocks_1_0", "blocks_1_1", "blocks_6_0"}
    # The paper's rule from 24 and 320 channels.
    assert [kernels[block]["conv"]["kernel"].shape[0] for block in sorted(kernels)] == [3, 3, 5]
    with pytest.raises(UserError, match="got attention stages"):
        traced("mobilenetv1_100", 64, attention=SqueezeExcite, stages=(7,))
