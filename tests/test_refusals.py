"""Every public function of arrays, with arrays of wrong ranks and dtypes: one sentence that says what was given."""

import functools
import inspect
import re

import flax.linen as nn
import jax
import numpy as np
import pytest

import se_flax
from se_flax import UserError, attention, functional
from se_flax.nn import head, norm, pooling
from train.config import Augment
from train.data import alternate_flip, augment, randaugment
from train.optim import losses, margins

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 2)
MAP, IMAGE, IMAGES = (2, 4, 4, 8), (4, 4, 3), (2, 4, 4, 3)
NO_MAP = [(), (8,), (2, 8), (1, 2, 2, 2, 2, 8)]
NO_IMAGES = [*NO_MAP, (2, 4, 8), (1, 2, 4, 4, 8)]
LAYERS = {"reduce": (8, 2), "reduce_bias": (2,), "expand": (2, 8), "expand_bias": (8,)}
NO_LAYERS = {"reduce": [(8,), (1, 1, 8, 2)], "reduce_bias": [(), (1, 2)], "expand": [()], "expand_bias": [(1, 8)]}
NO_IMAGE = [(), (4, 4), (4, 4, 1), (2, 4, 4, 3)]
WRONG_DTYPES = {
    "float": [np.int32, np.uint8, bool, np.complex64, "U3", object],
    "integer": [np.float32, bool, np.complex64, "U3", object],
    "real": [np.complex64, "U3", object],
}


class Case:
    """A function of arrays, arrays that it takes, and shapes that it does not.

    Args:
      call: of the arrays, in order.
      shapes: of the arrays that it takes, by name.
      wrong: shapes that it refuses, by name.
      **kinds: by name, where not float.
    """

    def __init__(self, call, shapes, wrong, **kinds):
        self.call, self.shapes, self.wrong, self.kinds = call, shapes, wrong, kinds

    def kind(self, name):
        return self.kinds.get(name, "float")

    def arrays(self):
        dtypes = {"float": np.float32, "integer": np.int32, "real": bool}
        return {name: np.ones(shape, dtypes[self.kind(name)]) for name, shape in self.shapes.items()}


def of_map(function, shape=MAP, wrong=NO_MAP):
    return Case(function, {"x": shape}, {"x": wrong})


def of_image(function):
    return of_map(function, IMAGE, NO_IMAGE)


def gate(made):
    """An attention module, with a mask too."""
    shapes, wrong = {"x": MAP, "mask": MAP[:3]}, {"x": NO_MAP, "mask": [(), (4,), MAP]}
    return Case(lambda x, mask: made.init(KEY, x, mask=mask), shapes, wrong, mask="real")


FUNCTIONAL = {
    "hard_sigmoid": of_map(functional.hard_sigmoid, wrong=[]),
    "hard_swish": of_map(functional.hard_swish, wrong=[]),
    "check_map": of_map(lambda x: functional.check_map(x, "a function")),
    "spatial_axes": Case(functional.spatial_axes, {"x": MAP}, {"x": NO_MAP}, x="real"),
    "mask_of": Case(
        functional.mask_of, {"x": MAP, "mask": MAP[:3]}, {"x": [(), (8,)], "mask": [(), (4,), MAP]}, mask="real"
    ),
    "squeeze": Case(
        lambda x, mask: functional.squeeze(x, mask=mask),
        {"x": MAP, "mask": MAP[:3]},
        {"x": NO_MAP, "mask": [(), (4,), MAP]},
        mask="real",
    ),
    "squeeze_mean_max": of_map(functional.squeeze_mean_max),
    "spatial_descriptor": of_map(functional.spatial_descriptor),
    "excite": Case(functional.excite, {"z": (2, 8), **LAYERS}, {"z": [()], **NO_LAYERS}),
    "excite_mean_max": Case(
        functional.excite_mean_max, {"z": (2, 5, 8), **LAYERS}, {"z": [(), (8,), (3, 5, 8)], **NO_LAYERS}
    ),
    "channel_gate_mean_max": Case(functional.channel_gate_mean_max, {"x": MAP, **LAYERS}, {"x": NO_MAP, **NO_LAYERS}),
    "pointwise": Case(
        functional.pointwise,
        {"z": (2, 8), "kernel": (8, 3), "bias": (3,)},
        {"z": [()], "kernel": [(), (8,), (1, 1, 8, 3), (7, 3)], "bias": [(), (1, 3), (4,)]},
    ),
    "scale": Case(functional.scale, {"x": MAP, "gate": MAP}, {"x": [(), (8,), (4, 4, 8)], "gate": [(), (8,), (2, 8)]}),
    "channel_conv": Case(
        functional.channel_conv,
        {"z": (2, 8), "kernel": (3,), "bias": ()},
        {"z": [()], "kernel": [(), (4,), (3, 1, 1)], "bias": [(1,), (8,)]},
    ),
}
NOT_OF_ARRAYS = {"lookup", "round_to_multiple", "reduced_width", "eca_kernel_size"}
ATTENTION = {
    name: gate(getattr(attention, name)())
    for name in ("SqueezeExcite", "EffectiveSE", "ECA", "CBAM", "ScSE", "GlobalContext")
}
NN = {
    "Conv": of_map(functools.partial(se_flax.Conv(8).init, KEY)),
    "BatchNorm": of_map(functools.partial(norm.BatchNorm().init, KEY), wrong=[(), (8,)]),
    "GroupNorm": of_map(functools.partial(norm.GroupNorm(4).init, KEY), wrong=NO_IMAGES),
    "LayerNorm": of_map(functools.partial(norm.LayerNorm().init, KEY), wrong=[()]),
    "EvoNormS0": of_map(functools.partial(norm.EvoNormS0(4).init, KEY), wrong=NO_IMAGES),
    "group_moments": of_map(lambda x: norm.group_moments(x, 4), wrong=NO_IMAGES),
    "max_pool": of_map(pooling.max_pool, wrong=NO_IMAGES),
    "caffe_max_pool": of_map(pooling.caffe_max_pool, wrong=NO_IMAGES),
    "avg_pool": of_map(lambda x: pooling.avg_pool(x, 2, 2), wrong=NO_IMAGES),
    "blur_pool": of_map(pooling.blur_pool, wrong=NO_IMAGES),
    "unpool_nearest": of_map(lambda x: pooling.unpool_nearest(x, 8, 9), wrong=NO_IMAGES),
    "CosineClassifier": of_map(functools.partial(head.CosineClassifier(3).init, KEY), (2, 8), [(), (8,), (2, 4, 8)]),
    "Dense": of_map(functools.partial(head.Dense(3).init, KEY), (2, 8), [()]),
}
SCORED = {"logits": (2, 5), "labels": (2,)}
NOT_SCORED = {"logits": [(), (5,), (2, 2, 5)], "labels": [(), (3,), (2, 1, 1)]}
TRAIN = {
    "one_hot_smoothed": Case(
        lambda labels: losses.one_hot_smoothed(labels, 5), {"labels": (2,)}, {"labels": [(), (2, 5)]}, labels="integer"
    ),
    "cross_entropy": Case(
        lambda logits, labels, mask: losses.cross_entropy(logits, labels, mask=mask),
        {**SCORED, "mask": (2,)},
        {**NOT_SCORED, "mask": [(), (3,), (2, 1)]},
        labels="integer",
        mask="real",
    ),
    "cross_entropy of distributions": Case(
        losses.cross_entropy, {"logits": (2, 5), "labels": (2, 5)}, {"labels": [(2, 4), (3, 5)]}
    ),
    "topk_correct": Case(
        lambda logits, labels: losses.topk_correct(logits, labels, 1), SCORED, NOT_SCORED, labels="integer"
    ),
    "arcface": Case(margins.arcface, SCORED, {**NOT_SCORED, "labels": [(), (2, 5)]}, labels="integer"),
    "cosface": Case(margins.cosface, SCORED, {**NOT_SCORED, "labels": [(), (2, 5)]}, labels="integer"),
}
AUGMENT = {
    "example_keys": Case(
        lambda index: augment.example_keys(KEY, index), {"index": (2,)}, {"index": [(), (2, 1)]}, index="integer"
    ),
    "augment": of_map(lambda x: augment.augment(x, KEYS, Augment(flip=True)), IMAGES, [(4, 4, 3), (2, 4, 4, 1)]),
    "pad_and_crop": of_image(lambda x: augment.pad_and_crop(x, KEY, 1)),
    "flip": of_image(lambda x: augment.flip(x, KEY)),
    "colour_jitter": of_image(lambda x: augment.colour_jitter(x, KEY, 0.1, 0.1, 0.1, 0.1)),
    "shift_hue": of_map(lambda x: augment.shift_hue(x, 0.1), IMAGE, [(), (3, 4)]),
    "random_erase": of_image(lambda x: augment.random_erase(x, KEY, 0.5)),
    "cutout": of_image(lambda x: augment.cutout(x, KEY, 2)),
    "mix": Case(
        lambda images, labels: augment.mix(images, labels, KEYS, 0.2),
        {"images": IMAGES, "labels": (2, 5)},
        {"images": [(4, 4, 3), (2, 4, 4, 1)], "labels": [(2,), (3, 5)]},
    ),
}
ALTERNATE_FLIP = {
    "mirrored": Case(
        lambda images, epoch: alternate_flip.mirrored(images, KEY, epoch),
        {"images": IMAGES, "epoch": (2,)},
        {"images": [(4, 4, 3)], "epoch": [(), (3,)]},
        images="integer",
        epoch="integer",
    ),
}
RANDAUGMENT = {
    "randaugment": of_image(lambda x: randaugment.randaugment(x, KEY, 1, 5.0)),
    "apply_op": of_image(lambda x: randaugment.apply_op(x, 0, 5.0)),
    "blend": Case(
        lambda degenerate, image: randaugment.blend(degenerate, image, 0.5),
        {"degenerate": IMAGE, "image": IMAGE},
        {"image": [(), (3, 4)]},
    ),
    "luma": of_map(randaugment.luma, IMAGE, [(), (3, 4)]),
    "autocontrast": of_image(randaugment.autocontrast),
    "solarize": of_image(lambda x: randaugment.solarize(x, 100)),
    "posterize": of_image(lambda x: randaugment.posterize(x, 4)),
    "equalize": of_image(randaugment.equalize),
    "warp": Case(randaugment.warp, {"image": IMAGE, "matrix": (6,)}, {"image": NO_IMAGE, "matrix": [(), (2, 3), (5,)]}),
}
TABLE = {**FUNCTIONAL, **ATTENTION, **NN, **TRAIN, **AUGMENT, **ALTERNATE_FLIP, **RANDAUGMENT}


def public(module, kinds=(inspect.isfunction,)):
    """Names that a module defines itself, of functions (or of classes of Linen modules)."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "") == module.__name__
        and any(k(value) for k in kinds)
    }


def is_layer(value):
    return inspect.isclass(value) and issubclass(value, nn.Module)


def test_the_table_has_every_public_function_of_arrays():
    assert public(functional) - NOT_OF_ARRAYS == FUNCTIONAL.keys()
    bases = {"Attention", "ChannelAttention", "PointwiseParams"}
    assert public(attention, [is_layer]) - bases == ATTENTION.keys()
    settings = {"check_spread", "own_dense", "classify", "Coefficients", "NestedClassifier"}
    ours = set().union(*(public(m, [inspect.isfunction, is_layer]) for m in (norm, pooling, head)))
    assert ours - settings - {"ConvNorm"} <= NN.keys() | {"Conv"}
    assert public(losses) | public(margins) == {name for name in TRAIN if " " not in name}
    assert public(augment) - {"check", "check_pairs", "cutmix_box"} == AUGMENT.keys()
    assert public(randaugment) == RANDAUGMENT.keys()


@pytest.mark.parametrize("name", TABLE)
def test_what_is_right_is_taken(name):
    case = TABLE[name]
    jax.eval_shape(case.call, *case.arrays().values())


WRONG = [
    pytest.param(case, argument, shape, None, id=f"{name}-{argument}-{shape}")
    for name, case in TABLE.items()
    for argument, shapes in case.wrong.items()
    for shape in shapes
] + [
    pytest.param(case, argument, case.shapes[argument], dtype, id=f"{name}-{argument}-{np.dtype(dtype)}")
    for name, case in TABLE.items()
    for argument in case.shapes
    for dtype in WRONG_DTYPES[case.kind(argument)]
]


@pytest.mark.parametrize(("case", "argument", "shape", "dtype"), WRONG)
def test_a_wrong_rank_or_dtype_is_refused_in_one_sentence(case, argument, shape, dtype):
    arrays = case.arrays()
    arrays[argument] = np.ones(shape, arrays[argument].dtype if dtype is None else dtype)
    with pytest.raises(UserError) as caught:
        case.call(*arrays.values())
    message = str(caught.value)
    assert "\n" not in message and message.startswith("got ") and "; " in message
    if dtype is None:
        assert str(shape) in message
    else:
        assert f"dtype {np.dtype(dtype)}" in message


def test_lists_are_arrays():
    np.testing.assert_allclose(functional.hard_sigmoid([-4.0, 0.0, 4.0]), [0, 0.5, 1])
    message = "got an array of shape (2,) and dtype int64 for hard_sigmoid; give float [...]"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        functional.hard_sigmoid([1, 2])
