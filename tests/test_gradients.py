"""Gradients of every attention, norm and convolution, in every form, against finite differences in float64."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import random_variables
from parity.compare import double_precision

from se_flax import CBAM, ECA, BatchNorm, Conv, EffectiveSE, ScSE, SqueezeExcite
from se_flax.attention import GlobalContext
from se_flax.backbones.resnest import SplitAttention
from se_flax.backbones.sknet import SelectiveAttention
from se_flax.ctr import SqueezeExciteFields
from se_flax.export.folding import FoldedNorm
from se_flax.functional import ACTIVATIONS
from se_flax.lowering.convolution import convolve
from se_flax.lowering.cpu import dense
from se_flax.lowering.dispatch import force
from se_flax.nn.mobile import CondConv
from se_flax.nn.norm import EvoNormS0, GroupNorm, LayerNorm
from se_flax.nn.norm_attention import conv_norm_attend, norm_act_attend

STEP, TOLERANCE = 1e-5, 1e-6


@pytest.fixture(autouse=True)
def _double(monkeypatch):
    with double_precision(monkeypatch):
        yield


def check(function, *arguments, platform, flat=()):
    """Compares each array's gradient, along a random direction, with the slope of a weighted sum of the outputs.

    Arrays whose path ends as `flat` says have no influence, all others have.
    """
    rng = np.random.default_rng(0)
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(arguments), strict=True)
    tree, leaves = jax.tree.structure(arguments), [np.asarray(leaf, np.float64) for leaf in leaves]

    def value(leaves):
        outputs = jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))
        assert all(y.dtype == np.float64 for y in outputs)
        weights = np.random.default_rng(1)
        return sum(jnp.vdot(y, weights.standard_normal(y.shape)) for y in outputs)

    with force(platform):
        compiled = jax.jit(jax.value_and_grad(value)).lower(leaves).compile()
    _, gradients = compiled(leaves)
    for i, (path, leaf, gradient) in enumerate(zip(paths, leaves, gradients, strict=True)):
        name = jax.tree_util.keystr(path)
        direction = rng.standard_normal(leaf.shape)
        ends = (compiled([*leaves[:i], leaf + sign * STEP * direction, *leaves[i + 1 :]])[0] for sign in (1, -1))
        slope, size = (next(ends) - next(ends)) / (2 * STEP), np.linalg.norm(gradient)
        assert (size > 1e-3) is not name.endswith(flat), name
        assert abs(np.vdot(gradient, direction) - slope) < TOLERANCE * max(size, 1e-3), name


def check_module(module, *shapes, platform="cpu", without=(), flat=(), **settings):
    """A module's gradients with respect to its parameters, without those of some submodules, and its inputs."""
    rng = np.random.default_rng(2)
    inputs = [rng.standard_normal(shape) for shape in shapes]
    variables = random_variables(module, *map(jnp.asarray, inputs))
    params = {name: part for name, part in variables.get("params", {}).items() if name not in without}
    rest = {"batch_stats": variables["batch_stats"]} if "batch_stats" in variables and not without else {}

    def apply(params, *inputs):
        return module.apply({"params": params, **rest}, *inputs, mutable=["batch_stats"], **settings)[0]

    check(apply, params, *inputs, platform=platform, flat=flat)


# --- Attention --------------------------------------------------------------------------------------------------------

ATTENTION = {
    "se": SqueezeExcite(reduction=2),
    "se max": SqueezeExcite(reduction=2, squeeze="max", activation="silu", gate="hard_sigmoid"),
    "se none": SqueezeExcite(reduction=2, squeeze="none", activation="hard_swish", gate="tanh", use_bias=False),
    "ese": EffectiveSE(),
    "eca": ECA(),
    "cbam": CBAM(reduction=2, kernel_size=3),
    "scse add": ScSE(),
    "scse max": ScSE(combine="max"),
    "gc": GlobalContext(reduction=2, activation="gelu"),
}
MAP = (2, 5, 4, 8)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
    flat = "['conv_attn']['bias']"  # a softmax over the pixels takes it away
    check_module(ATTENTION[name], MAP, flat=flat, train=True)


class Branches(nn.Module):
    """Attention over two branches, the layers of which are its submodules."""

    def setup(self):
        self.attention = SelectiveAttention(width=4, norm=BatchNorm, act=jax.nn.silu)

    def __call__(self, a, b):
        return self.attention([a, b], train=True)


BRANCHES = {
    "selective": (Branches(), MAP, MAP),
    "split": (SplitAttention(4, Conv, BatchNorm, groups=2), (3, 4, 4, 4)),
    "split of one": (SplitAttention(4, Conv, BatchNorm, radix=1), (3, 4, 4, 4)),
    "fields": (SqueezeExciteFields(reduction=2), (3, 6, 4)),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_attention_over_branches_and_fields(name):
    module, *shapes = BRANCHES[name]
    flat = ("['fc1']['bias']",) if "split" in name else ()  # a batch norm takes it away
    check_module(module, *shapes, flat=flat, **({} if name in ("selective", "fields") else {"train": True}))


@pytest.mark.parametrize("squeeze", ["mean", "max"])
def test_attention_with_a_mask(squeeze):
    mask = np.arange(6) < np.array([[6], [4], [1]])
    check_module(SqueezeExcite(reduction=2, squeeze=squeeze), (3, 6, 8), mask=mask)


# --- Norms ------------------------------------------------------------------------------------------------------------

NORMS = {
    "batch": (BatchNorm(), MAP, True),
    "batch evaluated": (BatchNorm(), MAP, False),
    "batch of vectors": (BatchNorm(use_scale=False), (6, 8), True),
    "group": (GroupNorm(4), MAP, True),
    "instance": (GroupNorm(1), MAP, True),
    "layer": (LayerNorm(), MAP, True),
    "evo": (EvoNormS0(4), MAP, True),
    "evo linear": (EvoNormS0(4, nonlinear=False), MAP, True),
}


@pytest.mark.parametrize("name", NORMS)
def test_norm(name):
    module, shape, train = NORMS[name]
    check_module(module, shape, train=train)


class Unit(nn.Module):
    """A 1x1 convolution, a norm, an activation and attention as one step."""

    norm: type = BatchNorm
    act: str | None = None
    attention: type | None = None
    defer: bool = False

    @nn.compact
    def __call__(self, x, *, train=False):
        conv = Conv(16, 1, use_bias=self.norm is FoldedNorm, name="conv")
        norm = self.norm(defer_conv=self.defer, name="norm")
        attention = self.attention and self.attention(name="attention")
        if self.act is None:
            return conv_norm_attend(conv, norm, attention, x, train=train)
        return norm_act_attend(norm, attention, conv(x), train=train, act=ACTIVATIONS[self.act])


UNITS = {
    "norm, gate": (Unit(attention=ECA), True, "cpu"),
    "norm, silu, gate": (Unit(act="silu", attention=partial(SqueezeExcite, 4)), True, "cpu"),
    "norm, silu, gate in one pass": (Unit(act="silu", attention=partial(SqueezeExcite, 4)), True, "tpu"),
    "norm, relu, gate in one pass, evaluated": (Unit(act="relu", attention=ECA), False, "tpu"),
    "deferred": (Unit(defer=True), True, "tpu"),
    "deferred, gate": (Unit(defer=True, attention=partial(SqueezeExcite, 4)), True, "tpu"),
    "folded": (Unit(FoldedNorm), False, "cpu"),
    "folded, gate": (Unit(FoldedNorm, attention=ECA), False, "cpu"),
    "folded, silu, gate": (Unit(FoldedNorm, act="silu", attention=ECA), False, "tpu"),
}


@pytest.mark.parametrize("name", UNITS)
def test_norm_and_attention_as_one_step(name):
    module, train, platform = UNITS[name]
    folded = ("norm",) if module.norm is FoldedNorm else ()
    check_module(module, (2, 4, 3, 6), platform=platform, without=folded, train=train)


# --- Convolutions -----------------------------------------------------------------------------------------------------

SAME, NONE, UNEVEN = ((1, 1), (1, 1)), ((0, 0), (0, 0)), ((2, 0), (1, 3))
# Shape of the map and of the kernel, strides, padding, dilation, groups.
CONVOLUTIONS = {
    "pointwise": ((2, 4, 3, 6), (1, 1, 6, 5), (1, 1), NONE, (1, 1), 1),
    "pointwise with strides": ((2, 5, 4, 6), (1, 1, 6, 5), (2, 3), UNEVEN, (1, 1), 1),
    "pointwise of padded rows": ((1, 7, 7, 16), (1, 1, 16, 32), (1, 1), NONE, (1, 1), 1),
    "thin": ((2, 6, 5, 3), (3, 3, 3, 4), (1, 1), SAME, (1, 1), 1),
    "patches": ((1, 3, 3, 72), (3, 3, 72, 4), (1, 1), SAME, (1, 1), 1),
    "dense": ((2, 7, 6, 8), (3, 2, 8, 5), (1, 1), UNEVEN, (1, 2), 1),
    "dense with strides": ((2, 7, 6, 8), (3, 3, 8, 5), (2, 2), SAME, (1, 1), 1),
    "dense, wide": ((2, 5, 6, 66), (3, 3, 66, 2), (1, 1), SAME, (1, 1), 1),
    "dense, wide, with strides": ((2, 7, 6, 66), (3, 3, 66, 2), (2, 2), SAME, (1, 1), 1),
    "winograd": ((2, 17, 16, 64), (3, 3, 64, 65), (1, 1), ((1, 2), (1, 2)), (1, 1), 1),
    "depthwise": ((2, 7, 6, 8), (3, 3, 1, 8), (1, 1), SAME, (2, 1), 8),
    "depthwise with strides": ((2, 7, 6, 8), (3, 3, 1, 8), (2, 2), UNEVEN, (1, 1), 8),
    "narrow": ((2, 5, 6, 32), (3, 3, 2, 48), (2, 1), SAME, (1, 1), 16),
    "grouped": ((2, 5, 6, 24), (3, 3, 6, 8), (1, 1), SAME, (1, 1), 4),
    "grouped pointwise": ((2, 5, 6, 24), (1, 1, 12, 8), (1, 1), NONE, (1, 1), 2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_on_a_cpu(name, monkeypatch):
    monkeypatch.setattr(dense, "_MIN_K", 16)
    monkeypatch.setattr(dense, "_MIN_N", 32)
    x, kernel, *settings = CONVOLUTIONS[name]
    arrays = (np.random.default_rng(3).standard_normal(shape) for shape in (x, kernel))
    check(lambda x, kernel: convolve(x, kernel, *settings), *arrays, platform="cpu")


@pytest.mark.parametrize("name", ["dense with strides", "depthwise", "grouped"])
def test_convolution_elsewhere(name):
    x, kernel, *settings = CONVOLUTIONS[name]
    arrays = (np.random.default_rng(3).standard_normal(shape) for shape in (x, kernel))
    check(lambda x, kernel: convolve(x, kernel, *settings), *arrays, platform="tpu")


@pytest.mark.parametrize(("size", "strides", "platform"), [(1, 1, "cpu"), (3, 2, "cpu"), (3, 1, "tpu")])
def test_mixture_of_kernels(size, strides, platform):
    check_module(CondConv(4, size, experts=3, strides=strides), (2, 5, 4, 6), (2, 3), platform=platform)
