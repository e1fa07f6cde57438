"""No public call warns: pytest makes every warning an error, so calling is the test."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import se_flax
from se_flax import functional as F
from se_flax.attention import GlobalContext
from se_flax.ctr import functional as C
from se_flax.ctr.layers import BilinearInteraction
from se_flax.lowering.dispatch import Function
from se_flax.nn.norm import EvoNormS0, GroupNorm, LayerNorm
from tests.random_variables import random_variables

KEY = jax.random.key(0)
# Every kind of network and of block that the zoo has.
NETWORKS = {
    "seresnet20": {"depth": 1},
    "sepreresnet164": {"depth": 1},
    "seresnet18": {},
    "seresnet50": {"depths": (1, 1, 1, 1)},
    "legacy_senet154": {"depths": (1, 1, 1, 1)},
    "seresnetaa50d": {"depths": (1, 1, 1, 1)},
    "test_efficientnet": {},
    "test_efficientnet_gn": {},
    "test_efficientnet_ln": {},
    "test_efficientnet_evos": {},
    "efficientnet_cc_b0_4e": {},
    "mnasnet_small": {},
    "lcnet_035": {},
    "mobilenetv3_small_050": {},
    "skresnet18": {},
    "skresnet50": {"depths": (1, 1, 1, 1)},
    "resnest14d": {},
    "resnest50d_4s2x40d": {"depths": (1, 1, 1, 1)},
    "se_bn_inception": {},
    "se_mobilenetv1_100": {},
    "se_shake_even29_2x4x64d": {"depth": 1},
    "se_shake_shake26_2x96d": {"depth": 1},
    "se_shufflenet_g3_100": {},
    "se_vgg16_bn": {},
    "se_wrn16_8": {"depth": 1},
}
ATTENTIONS = {
    "se": se_flax.SqueezeExcite,
    "se max": partial(se_flax.SqueezeExcite, squeeze="max"),
    "se none": partial(se_flax.SqueezeExcite, squeeze="none"),
    "eca": se_flax.ECA,
    "ese": se_flax.EffectiveSE,
    "cbam": se_flax.CBAM,
    "gc": GlobalContext,
}


def shapes_of(model, side=96):
    return jax.eval_shape(model.init, KEY, jnp.zeros((1, side, side, 3)))


def table_of(module, *arguments, rngs=KEY, **keywords):
    return module.tabulate(rngs, *arguments, console_kwargs={"width": 250, "force_terminal": False}, **keywords)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_networks_table_has_all_its_layers(name):
    model = se_flax.create_model(name, **NETWORKS[name])
    table = table_of(model, jnp.zeros((1, 96, 96, 3)))
    variables = shapes_of(model)
    paths = {"/".join(key.key for key in path[:-1]) for path, _ in jax.tree_util.tree_leaves_with_path(variables)}
    shown = {line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│")}
    assert {path.partition("/")[2] for path in paths} <= shown
    count = sum(x.size for x in jax.tree.leaves(variables))
    assert f"Total Parameters: {count:,}" in table


@pytest.mark.parametrize("placement", list(se_flax.Placement))
@pytest.mark.parametrize("attention", ["se", "cbam"])
def test_the_table_of_a_network_in_training_mode(attention, placement):
    model = se_flax.create_model("seresnet20", depth=1, attention=ATTENTIONS[attention], placement=placement)
    rngs = {"params": KEY, "dropout": KEY}
    assert "layer3_0/se" in table_of(model, jnp.zeros((1, 8, 8, 3)), rngs=rngs, train=True, return_features=True)


def test_the_table_with_the_costs_of_each_call():
    model = se_flax.create_model("seresnet20", depth=1)
    assert " flops " in table_of(model, jnp.zeros((1, 8, 8, 3)), compute_flops=True)


def test_the_table_of_a_fused_network():
    model = se_flax.create_model("seresnet50", depths=(1, 1, 1, 1))
    variables = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes_of(model, 32))
    fused, _ = se_flax.fuse(model, variables)
    assert "layer4_0/conv3" in table_of(fused, jnp.zeros((1, 32, 32, 3)))


MODULES = {
    **{name: kind() for name, kind in ATTENTIONS.items()},
    "conv": se_flax.Conv(8),
    "depthwise": se_flax.Conv(32, groups=32),
    "batch norm": se_flax.BatchNorm(),
    "group norm": GroupNorm(),
    "layer norm": LayerNorm(),
    "evo norm": EvoNormS0(),
    "cosine": se_flax.CosineClassifier(5),
    "fields": se_flax.SqueezeExciteFields(),
    "bilinear": BilinearInteraction(),
}
SHAPES = {"cosine": (3, 7), "fields": (3, 5, 4), "bilinear": (3, 5, 4)}


@pytest.mark.parametrize("name", MODULES)
def test_a_modules_table(name):
    x = jnp.zeros(SHAPES.get(name, (2, 8, 8, 32)))
    assert type(MODULES[name]).__name__ in table_of(MODULES[name], x)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_takes_numpys_float64_for_jaxs_float32(name):
    x = np.random.default_rng(0).normal(size=SHAPES.get(name, (2, 8, 8, 32)))
    assert x.dtype == np.float64
    module = MODULES[name]
    variables = jax.jit(module.init)(KEY, jnp.asarray(x))
    expected = module.apply(variables, jnp.asarray(x))
    y = module.apply(variables, x)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, expected)
    assert jax.tree.map(jnp.shape, module.init(KEY, x)) == jax.tree.map(jnp.shape, variables)


@pytest.mark.parametrize("name", ["seresnet20", "test_efficientnet", "seresnet18", "lcnet_035", "se_vgg16_bn"])
def test_a_network_takes_numpys_float64_for_jaxs_float32(name):
    model = se_flax.create_model(name, **NETWORKS[name])
    images = np.zeros((1, 32, 32, 3))
    assert jax.eval_shape(lambda v: model.apply(v, images), shapes_of(model, 32)).dtype == jnp.float32
    assert jax.eval_shape(lambda key: model.init(key, images), KEY) == shapes_of(model, 32)


def test_a_fused_network_takes_numpys_float64():
    model = se_flax.create_model("seresnet20", depth=1)
    fused, variables = se_flax.fuse(model, random_variables(model, 1, 8, 8, 3))
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
    np.testing.assert_array_equal(fused.apply(variables, images), fused.apply(variables, jnp.asarray(images)))


def test_functions_take_numpys_float64():
    rng = np.random.default_rng(0)
    x, fields = rng.normal(size=(2, 4, 4, 8)), rng.normal(size=(2, 5, 4))
    layers = rng.normal(size=(8, 3)), rng.normal(size=3), rng.normal(size=(3, 8)), rng.normal(size=8)
    of_fields = rng.normal(size=(5, 3)), rng.normal(size=3), rng.normal(size=(3, 5)), rng.normal(size=5)
    calls = {
        "squeeze": (F.squeeze, x),
        "maximum": (partial(F.squeeze, kind="max"), x),
        "no squeeze": (partial(F.squeeze, kind="none"), x),
        "excite": (F.excite, x, *layers),
        "scale": (F.scale, x, rng.normal(size=(2, 1, 1, 8))),
        "channel_conv": (F.channel_conv, x, rng.normal(size=3)),
        "channel_gate_mean_max": (F.channel_gate_mean_max, x, *layers),
        "spatial_descriptor": (F.spatial_descriptor, x),
        "squeeze_excite_fields": (C.squeeze_excite_fields, fields, *of_fields),
        "hadamard": (C.hadamard, fields),
        "bilinear_all": (C.bilinear_all, fields, rng.normal(size=(4, 4))),
        "bilinear_each": (C.bilinear_each, fields, rng.normal(size=(5, 4, 4))),
        "bilinear_interaction": (C.bilinear_interaction, fields, rng.normal(size=(10, 4, 4))),
        "factorisation": (C.factorisation, fields),
    }
    for name, (function, *arrays) in calls.items():
        y = function(*arrays)
        assert isinstance(y, jax.Array) and y.dtype == jnp.float32, name
        np.testing.assert_array_equal(y, function(*map(jnp.asarray, arrays)), err_msg=name)


def test_a_function_as_an_argument_is_a_tree_without_leaves():
    def double(x):
        return 2 * x

    given = Function(partial(partial(double)))
    assert given(3) == 6 and given.name == "double" and Function(jax.nn.relu).name == "relu"
    assert jax.tree.leaves(given) == [] and Function(double).function is double


@pytest.mark.parametrize("words", [["list"], ["info", "seresnet50"], ["costs", "seresnet20"]])
def test_the_commands_do_not_warn(words):
    """Importing included, which a test in this process comes too late for."""
    command = [sys.executable, "-W", "error", "-m", "se_flax", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
