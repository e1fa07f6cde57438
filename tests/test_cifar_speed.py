"""airbench94: a closed formula for its counts, a NumPy forward pass, its initialisation, its norms without a scale."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from costs import count, products, traced
from formulas import batch_norm, conv, double, random_variables, squeeze_excite
from one_step import check_training_step, images_of

import se_flax
from se_flax import UserError
from se_flax.backbones.cifar_speed import VARIANTS, identity_first

WIDTHS = (64, 256, 256)  # Jordan 2024, section 3


def costs(se, part=1):
    """Parameters; multiply-adds at 32 pixels."""
    params, macs, channels, side = 24 * 12 + 24, 24 * 12 * 31**2, 24, 31
    for width in (width // part for width in WIDTHS):
        macs += 9 * channels * width * side**2 + 9 * width * width * (side // 2) ** 2 + se * 2 * width * (width // 16)
        params += 9 * channels * width + 9 * width * width + 2 * width
        params += se * (2 * width * (width // 16) + width // 16 + width)
        channels, side = width, side // 2
    return params + channels * 10 + 10, macs + channels * 10


def test_counts():
    for se, prefix in ((False, ""), (True, "se_")):
        for name, part in ((f"{prefix}airbench94", 1), (f"{prefix}airbench94_050", 2)):
            assert (count(traced(name, 32)["params"]), products(name, 32)) == costs(se, part)
    assert {name.removeprefix("se_") for name in VARIANTS} == {"airbench94", "airbench94_050"}
    params, macs = costs(False)
    assert round(params / 1e6, 2) == 1.97  # Jordan 2024, table 2
    # Forward and backward pass of 9.9 epochs, two operations each: 3.6e14 (section 1).
    assert round(9.9 * 50_000 * 6 * macs / 1e14, 1) == 3.5


gelu = np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))


def halved(x):
    n, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))


def forward(variables, x):
    params, stats = variables["params"], variables["batch_stats"]

    def norm(x, group, name):
        return batch_norm(x, {"scale": 1, **params[group][name]}, stats[group][name])

    (x,) = double(x)
    x = gelu(conv(x, params["whiten"]["kernel"], padding=((0, 0), (0, 0))) + double(params["whiten"]["bias"])[0])
    for group in ("layer1", "layer2", "layer3"):
        p = params[group]
        x = gelu(norm(halved(conv(x, p["conv1"]["kernel"])), group, "norm1"))
        x = norm(conv(x, p["conv2"]["kernel"]), group, "norm2")
        x = gelu(squeeze_excite(x, p["se"]) if "se" in p else x)
    return x.max((1, 2)) / 9 @ params["head"]["kernel"] + params["head"]["bias"]


def test_the_network_is_what_numpy_computes():
    images = images_of(2, 17)
    model = se_flax.create_model("se_airbench94", widths=(16, 32, 32), stages=(3, 4))
    variables = random_variables(model, images)
    assert [name for name in ("layer1", "layer2", "layer3") if "se" in variables["params"][name]] == [
        "layer2",
        "layer3",
    ]
    assert set(variables["params"]["layer1"]["norm1"]) == {"bias"}
    logits, maps = model.apply(variables, images, return_features=True)
    np.testing.assert_allclose(logits, forward(variables, images), rtol=1e-3, atol=1e-4)
    assert [x.shape[1:] for x in maps] == [(8, 8, 16), (4, 4, 32), (2, 2, 32)]


def test_norms_without_a_scale_are_folded():
    images = images_of(2, 17)
    model = se_flax.create_model("se_airbench94", widths=(16, 32, 32))
    variables = random_variables(model, images)
    fused, folded = se_flax.fuse(model, variables)
    # The first norm of a group reads the pooled map: the maximum lies between it and the convolution.
    left = {f"layer{i}": {"norm1"} for i in (1, 2, 3)}
    assert {group: set(norms) for group, norms in folded["batch_stats"].items()} == left
    np.testing.assert_allclose(fused.apply(folded, images), model.apply(variables, images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("channels", "features"), [(3, 8), (8, 8), (8, 3)])
def test_a_convolution_passes_its_input_on_at_first(channels, features):
    kernel = identity_first(jax.random.key(0), (3, 3, channels, features))
    x = images_of(2, 5)[..., :1] * np.arange(1, channels + 1)
    y, passed = conv(x, kernel), min(channels, features)
    np.testing.assert_allclose(y[..., :passed], x[..., :passed], rtol=1e-6)
    others = np.asarray(kernel)[..., passed:]
    bound = 1 / math.sqrt(9 * channels)  # torch's default
    assert np.all(np.abs(others) <= bound) and (others.size == 0 or np.abs(others).max() > 0.9 * bound)


def test_a_training_step():
    attention = partial(se_flax.SqueezeExcite, reduction=4.0)
    check_training_step(
        se_flax.create_model("se_airbench94", widths=(16, 32, 32), attention=attention), images_of(4, 17)
    )


def test_images_that_are_too_small_are_refused():
    model = se_flax.create_model("airbench94")
    with pytest.raises(UserError, match=r"got images of 8 x 8 pixels.*resize them to at least 9 x 9"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
