"""The zoo: names, refusals, and what every network in it promises."""

import functools
import inspect
import re
from functools import partial
from types import ModuleType

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from costs import count
from families import model_and_shapes, small_side
from parity import compare

import se_flax
from se_flax import SqueezeExcite, UserError, create_model, zoo
from se_flax.variant import Variant

NAMES = se_flax.list_models()
REFERENCES = {*compare.FIXTURES, *compare.SPECS}


def without_initialisers(monkeypatch):
    """Parameters of the declared shape and dtype, traced as one constant each: half the time of a trace."""
    param = nn.Module.param

    def constant(self, name, init_fn, *args, **kwargs):
        return param(
            self, name, lambda key, shape, dtype=jnp.float32, *rest: jax.lax.full(shape, 0, dtype), *args, **kwargs
        )

    monkeypatch.setattr(nn.Module, "param", constant)


def trace(name, **attributes):
    """Shapes of a network's output and variables at its own image size."""
    model = se_flax.create_model(name, **attributes)
    size = se_flax.get_variant(name).input_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    call = partial(model.init_with_output, return_features=True)
    return size, *jax.eval_shape(call, jax.random.key(0), images)


@pytest.mark.parametrize("name", NAMES)
def test_every_network_keeps_its_promises(name, monkeypatch):
    without_initialisers(monkeypatch)
    variant = se_flax.get_variant(name)
    size, (logits, maps), variables = trace(name, dtype=jnp.bfloat16)
    assert count(variables["params"]) == variant.num_params
    if name in REFERENCES:
        compare.check_layout(name, variables)
    assert variant.source
    # Arithmetic in bfloat16 leaves parameters, statistics and logits in float32.
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert logits.dtype == jnp.float32
    classes = se_flax.create_model(name).num_classes
    assert logits.shape == (1, classes) and classes >= 10
    assert len(maps) >= 3
    side = next(size / stride for stride in (1, 2, 4) if maps[0].shape[1] > size / stride - 3)
    for x in maps:
        assert x.ndim == 4 and x.dtype == jnp.bfloat16
        # Convolutions without padding (Inception-v3) leave up to two pixels out.
        assert x.shape[1] == x.shape[2] and -3 < x.shape[1] - side < 1
        side = x.shape[1] / 2


SMALLEST = [min(family.VARIANTS, key=lambda name, f=family: f.VARIANTS[name].num_params) for family in zoo.FAMILIES]


@pytest.mark.parametrize("name", SMALLEST)
def test_without_classes_a_network_gives_its_pooled_features(name, monkeypatch):
    without_initialisers(monkeypatch)
    _, (logits, _), full = trace(name)
    _, (pooled, _), headless = trace(name, num_classes=0)
    assert pooled.ndim == 2 and pooled.dtype == jnp.float32
    dense = (pooled.shape[1] + 1) * logits.shape[1]
    heads = {"repvit_m1": 2 * (dense + 2 * pooled.shape[1])}  # two, behind a norm each
    assert count(full["params"]) - count(headless["params"]) == heads.get(name, dense)


def test_names_are_sorted_and_match_a_pattern():
    assert sorted(NAMES) == NAMES and len(set(NAMES)) == len(NAMES)
    assert {"resnet20", "resnet50", "seresnet50", "seresnext50_32x4d"} <= set(NAMES)
    found = se_flax.list_models("*seresnet*")
    assert found == [name for name in NAMES if "seresnet" in name] and "seresnet50" in found
    assert se_flax.list_models("seresnet[35]*") == [name for name in NAMES if re.match(r"seresnet[35]", name)]
    assert se_flax.list_models("nothing*") == []


def test_every_family_is_in_the_zoo():
    assert sum(len(family.VARIANTS) for family in zoo.FAMILIES) == len(NAMES)


def test_a_name_in_two_families_is_refused():
    def family(module, *names):
        it = ModuleType(module)
        it.VARIANTS = {name: Variant(nn.Dense, 0, 1, "") for name in names}
        return it

    with pytest.raises(ValueError, match="second defines 'b', which another family defines already"):
        zoo.collect((family("first", "a", "b"), family("second", "b", "c")))
    table = zoo.collect((family("first", "a"), family("second", "b")))
    with pytest.raises(TypeError):
        table["c"] = table["a"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: se_flax.create_model("seresnet51"), "unknown model 'seresnet51'; closest: seresnet"),
        (lambda: se_flax.get_variant("alexnet_of_2012"), "(se_flax.list_models() gives all)"),
        (
            lambda: se_flax.create_model("seresnet50", numclasses=10),
            "seresnet50 has no attribute 'numclasses'; closest: num_classes",
        ),
        (lambda: se_flax.create_model("resnet20", parent=None), "resnet20 has no attribute 'parent'"),
        (
            lambda: se_flax.create_model("resnet50", attention="se"),
            "got attention='se'; attention is given as a class: attention=se_flax.SqueezeExcite",
        ),
        (lambda: se_flax.create_model("resnet50", attention=16), "got attention=16; pass a class or a partial of one"),
        (
            lambda: se_flax.create_model("resnet50", attention=SqueezeExcite()),
            "got the attention module SqueezeExcite(...), one instance that all blocks would share; pass the class, or "
            "functools.partial(SqueezeExcite, ...)",
        ),
        (lambda: se_flax.create_model("resnet50", placement="befor"), "unknown placement 'befor'"),
        (lambda: se_flax.create_model("resnet50", num_classes=-1), "got num_classes=-1; give a whole number up to 100"),
        (
            lambda: se_flax.create_model("resnet50", num_classes=10**9),
            "=1000000000; give a whole number up to 100,000,000",
        ),
        (lambda: se_flax.create_model("resnet50", num_classes=10.0), "got num_classes=10.0; give a whole number"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_remedy(call, message):
    with pytest.raises(UserError, match=re.escape(message)):
        call()


def test_attributes_override_the_variants():
    attention = functools.partial(SqueezeExcite, reduction=8)
    model = se_flax.create_model("resnet50", num_classes=7, attention=attention, stages=[3, 4], dtype=jnp.bfloat16)
    assert (model.num_classes, model.attention, model.stages, model.dtype) == (7, attention, (3, 4), jnp.bfloat16)
    assert model.depths == (3, 4, 6, 3)


@pytest.mark.parametrize("name", SMALLEST)
def test_train_and_return_features_are_keywords_only(name):
    parameters = inspect.signature(type(se_flax.create_model(name)).__call__).parameters
    assert {parameters[key].kind for key in ("train", "return_features")} == {inspect.Parameter.KEYWORD_ONLY}
    assert parameters["train"].default is parameters["return_features"].default is False


@pytest.mark.parametrize("name", SMALLEST)
def test_feature_info_says_what_the_network_returns(name):
    model, shapes = model_and_shapes(name)
    side = small_side(name)
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    _, maps = jax.eval_shape(lambda v, x: model.apply(v, x, return_features=True), shapes, images)
    infos = se_flax.feature_info(model, side)
    assert [info.channels for info in infos] == [x.shape[-1] for x in maps]
    for info, x in zip(infos, maps, strict=True):
        assert 0 <= -(-side // info.stride) - x.shape[1] <= 4  # without padding some pixels go
    assert [info.stride for info in infos] == sorted({info.stride for info in infos})


def test_strides_are_those_of_the_papers():
    assert [info.stride for info in se_flax.feature_info("seresnet20")] == [1, 2, 4]
    assert [info.stride for info in se_flax.feature_info("inception_v3")] == [2, 4, 8, 16, 32]
    assert [(i.name, i.channels, i.stride) for i in se_flax.feature_info("seresnet50")][-1] == ("layer4", 2048, 32)


def test_feature_maps_have_names():
    model = se_flax.create_model("seresnet20")
    images = jnp.zeros((1, 16, 16, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    _, maps = jax.eval_shape(lambda v, x: model.apply(v, x, return_features=True), shapes, images)
    assert maps._fields == ("layer1", "layer2", "layer3") == tuple(i.name for i in se_flax.feature_info(model, 16))
    assert maps.layer3.shape == (1, 4, 4, 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: create_model("seresnet50.ra2_in1k"),
            "a checkpoint: se_flax.load_pretrained('seresnet50.ra2_in1k')",
        ),
        (lambda: create_model("resnet50", attention="eca"), "attention is given as a class: attention=se_flax.ECA"),
        (
            lambda: create_model("resnet50", attention="SE"),
            "attention=se_flax.SqueezeExcite",
        ),
        (lambda: create_model("resnet50", pretrained=True), "trained weights come from se_flax.load_pretrained"),
        (lambda: create_model("resnet50", features_only=True), "return_features=True"),
        (lambda: create_model("resnet50", in_chans=1), "here it is in_channels"),
        (lambda: create_model("resnet50", global_pool=""), "num_classes=0 gives the pooled features"),
    ],
)
def test_habits_of_other_libraries_are_answered(call, message):
    with pytest.raises(UserError, match=re.escape(message)):
        call()
