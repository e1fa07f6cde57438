"""The gradient of a training step against the fall of the loss along it."""

import jax
import jax.numpy as jnp
import numpy as np
from formulas import random_variables

from se_flax import layers
from se_flax.cpu_convolution import native

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""For programs that run twice: compiling is what takes long."""


def check_step(monkeypatch, model, images):
    """Every batch norm's statistics change, and along the gradient the loss falls as fast as the gradient says.

    Args:
      monkeypatch: takes XLA's convolution for the CPU's own forms, which have their tests and take longer to compile.
      model: a classifier with as many classes as there are images, or more.
      images: [N, H, W, C]; the labels are 0 to N - 1.
    """
    monkeypatch.setattr(layers, "convolve", native)
    variables = random_variables(model, images)

    def loss(params):
        logits, new = model.apply(
            {**variables, "params": params},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits))), new["batch_stats"]

    params = variables["params"]
    step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params).compile(compiler_options=QUICK)
    (before, stats), grads = step(params)
    square = sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(grads))
    assert np.isfinite(square) and square > 0
    for old, new in zip(jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(stats), strict=True):
        assert np.isfinite(new).all() and not np.array_equal(old, new)
    fall = 1e-3 * float(before)
    (after, _), _ = step(jax.tree.map(lambda p, g: p - np.float32(fall / square) * np.asarray(g), params, grads))
    assert 0.5 < (before - after) / fall < 1.5
