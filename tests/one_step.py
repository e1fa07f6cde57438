"""One training step of a network: its gradient against the fall of the loss along it."""

import jax
import jax.numpy as jnp
import numpy as np
from formulas import random_variables

from se_flax.lowering.dispatch import force


def images_of(count, size, seed=0):
    return np.random.default_rng(seed).standard_normal((count, size, size, 3)).astype(np.float32)


def check_training_step(model, images, *, exact=True, seed=0):
    """Every parameter has a gradient, every statistic changes, and the loss falls as fast as the gradient says.

    In a TPU's form: a CPU's has its tests, also in whole networks (test_parity.py), and takes longer to compile.

    Args:
      model: a classifier with as many classes as there are images, or more.
      images: [N, H, W, C]; the labels are 0 to N - 1.
      exact: False for a network whose backward pass draws noise of its own: the loss must fall, at whatever rate.
      seed: of the variables; one that leaves some of every attention's few hidden units above zero.
    """
    variables = random_variables(model, images, seed=seed)

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
    with force("tpu"):
        step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params).compile()
    (before, stats), grads = step(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all() and np.any(leaf != 0), jax.tree_util.keystr(path)
    for old, new in zip(jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(stats), strict=True):
        assert np.isfinite(new).all() and not np.array_equal(old, new)
    square = sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(grads))
    fall = 1e-3 * float(before)
    (after, _), _ = step(jax.tree.map(lambda p, g: p - np.float32(fall / square) * np.asarray(g), params, grads))
    assert after < before
    if exact:
        assert 0.5 < (before - after) / fall < 1.5
