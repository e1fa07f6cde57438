"""Small networks of every family, and variables of a network without compiling its initialisation."""

import jax
import jax.numpy as jnp
import numpy as np

import se_flax

SHORT = {"depths": (1, 1), "strides": (1, 2), "width": 8}


def short_layout(name, *stages):
    """Some stages of a mobile network."""
    layout = se_flax.get_variant(name).attributes()["layout"]
    return {"layout": tuple(layout[i] for i in stages)}


FAMILIES = {
    "seresnet20": {"depth": 1},
    "resnet50": {**SHORT, "attention": se_flax.CBAM},
    "ecaresnet50d": SHORT,
    "legacy_seresnet50": SHORT,
    "skresnet50": SHORT,
    "resnest50d": SHORT,
    "mobilenetv3_small_050": short_layout("mobilenetv3_small_050", 0, 3),
    "semnasnet_050": short_layout("semnasnet_050", 0, 2),
    "efficientnet_b0": short_layout("efficientnet_b0", 0, 2),
    "tf_efficientnet_cc_b0_4e": short_layout("tf_efficientnet_cc_b0_4e", 0, -1),
}
"""A network of every family, as small as its attributes make it."""


def random_variables(model, *shape, seed=0):
    """Variables for inputs of a shape: kernels keep the scale of maps, norms do something."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        z, name = rng.standard_normal(x.shape).astype(np.float32), path[-1].key
        if name in ("kernel", "experts"):
            return jnp.asarray(z * np.sqrt(2 / np.prod(x.shape[:-1]), dtype=np.float32))
        return jnp.asarray(1 + 0.1 * abs(z) if name in ("scale", "var") else 0.1 * z)

    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
    return jax.tree_util.tree_map_with_path(draw, shapes)
