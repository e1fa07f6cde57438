"""One training step of a network, compiled without the optimisations that take long and win nothing for a few calls."""

import jax
import jax.numpy as jnp
import numpy as np
from formulas import random_variables

from se_flax import layers
from se_flax.cpu_convolution import native

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def images_of(count, size, seed=0):
    return np.random.default_rng(seed).standard_normal((count, size, size, 3)).astype(np.float32)


def check_training_step(monkeypatch, model, size, learning_rate=0.01, count=4):
    """A step on a random batch reaches every parameter and statistic, and lowers the loss of that batch.

    Args:
      monkeypatch: puts XLA's convolution in the place of the CPU's forms of it, which take longer to compile.
      model: a network with at least `count` classes.
      size: side of the images.
      learning_rate: of plain gradient descent.
      count: images.
    """
    monkeypatch.setattr(layers, "convolve", native)
    images, labels = images_of(count, size), np.arange(count)
    variables = random_variables(model, images)

    def loss(params, stats):
        logits, new = model.apply(
            {"params": params, "batch_stats": stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(1)},
        )
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean(), new["batch_stats"]

    arguments = variables["params"], variables["batch_stats"]
    step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*arguments).compile(compiler_options=FAST)
    (before, stats), grads = step(*arguments)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0), jax.tree_util.keystr(path)
    for path, (old, new) in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda *pair: pair, arguments[1], stats), is_leaf=lambda node: isinstance(node, tuple)
    ):
        assert np.all(np.isfinite(new)) and np.any(old != new), jax.tree_util.keystr(path)
    params = jax.tree.map(lambda p, g: p - learning_rate * g, arguments[0], grads)
    (after, _), _ = step(params, stats)
    assert after < before
