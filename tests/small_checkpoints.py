"""A small network's random weights, and folders of them as others write them, for tests of checkpoints."""

import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import se_flax
from se_flax import Preprocess

NAME = "seresnet20"
PREPARE = Preprocess(image_size=32, crop=1.0, interpolation="bilinear")


def flat(variables):
    return {"/".join(path): np.asarray(x) for path, x in flax.traverse_util.flatten_dict(dict(variables)).items()}


def assert_same_bits(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and a[key].tobytes() == b[key].tobytes(), key


def draw(name=NAME, **arguments):
    model = se_flax.create_model(name, **arguments)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, model.in_channels)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32) ** 2, shapes)


def timm_folder(path, variables, **config):
    path.mkdir(parents=True, exist_ok=True)
    state = se_flax.to_timm(NAME, variables)
    safetensors.numpy.save_file(state, path / "model.safetensors")
    cfg = {
        "input_size": [3, 40, 40],
        "crop_pct": 0.9,
        "interpolation": "bilinear",
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
    }
    config = {
        "architecture": NAME,
        "num_classes": 10,
        "pretrained_cfg": cfg,
        "label_names": list("abcdefghij"),
    } | config
    (path / "config.json").write_text(json.dumps(config))
    return path
