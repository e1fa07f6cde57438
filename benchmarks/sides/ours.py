"""se-flax in a comparison: `python -m benchmarks.sides.ours MODEL TASK BATCH IMAGE_SIZE [WORD ...]`.

Words: `plain` leaves out `se_flax.fuse` at inference, `onednn` takes oneDNN's matrix products at inference, `bfloat16`
computes in bfloat16 (parameters are float32 in training), `without` is the network without its attention.
"""

import sys
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import se_flax
from benchmarks.sides.pace import serve
from se_flax.runtime import keep_memory

# Matrix products by oneDNN, which XLA includes on x86, instead of XLA's default library.
ONEDNN = {
    "xla_cpu_use_onednn": True,
    "xla_cpu_experimental_onednn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}


def train_step(model: Any, batch: int, side: int) -> Any:
    """Returns a function that makes one update with SGD and momentum and waits for it."""
    images, labels = _images(batch, side), jnp.arange(batch) % 1000
    variables = jax.jit(model.init)(jax.random.key(0), images)
    optimizer = optax.sgd(0.01, momentum=0.9)
    state = (variables["params"], variables.get("batch_stats", {}), optimizer.init(variables["params"]))

    def step(state: Any, images: jax.Array) -> Any:
        params, stats, momentum = state

        def loss(params: Any) -> Any:
            logits, new = model.apply(
                {"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, momentum = optimizer.update(grads, momentum)
        return (optax.apply_updates(params, updates), stats, momentum), value

    compiled = jax.jit(step, donate_argnums=0)

    def work() -> None:
        nonlocal state
        state, value = compiled(state, images)
        value.block_until_ready()

    return work


def inference(model: Any, batch: int, side: int, words: set[str]) -> Any:
    """Returns a function that computes logits and waits for them."""
    images = _images(batch, side)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    if "plain" not in words:
        model, variables = se_flax.fuse(model, variables)
    if "bfloat16" in words:
        variables, images = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (variables, images))
    apply = jax.jit(model.apply, compiler_options=ONEDNN if "onednn" in words else None)
    return lambda: apply(variables, images).block_until_ready()


def _images(batch: int, side: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, side, side, 3)), jnp.float32)


def main() -> None:
    """Serves one comparison."""
    keep_memory()
    name, task, batch, side, *words = sys.argv[1:]
    precision = {"dtype": jnp.bfloat16} if "bfloat16" in words else {}
    bare = {"attention": None} if "without" in words else {}
    model = se_flax.create_model(name, **precision, **bare)
    if task == "train":
        work = train_step(model, int(batch), int(side))
    else:
        work = inference(model, int(batch), int(side), set(words))
    serve(work, jax=jax.__version__, se_flax=version("se-flax"), device=jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
