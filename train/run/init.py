"""A network's variables before the first step: traced once, then drawn without running the network.

Why not `jax.jit(model.init)`: in one program XLA compiles the draw of every kernel, half a minute for SE-ResNet-152.
Called operation by operation, `model.init` would compute the network too. So its jaxpr is taken, what the variables do
not need is left out (`dce_jaxpr`), and the rest is evaluated operation by operation, which compiles every kind of
kernel once. The same trace gives the shapes of the variables, for which nothing need be drawn.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.interpreters.partial_eval import dce_jaxpr

from train.optim.param_groups import NOTHING, Path, split
from train.run.step import TrainState

PyTree = Any


@dataclass(frozen=True)
class TracedNetwork:
    """A network whose `init` was traced, see `trace`.

    Attributes:
      model: the network.
      images: what it was traced with: float32 [1, side, side, channels].
      shapes: `{"params": ..., "batch_stats": ...}` of `jax.ShapeDtypeStruct`. The keys of `params` are in the order of
        the calls; anything that has been through a JAX transformation has them in the order of the alphabet.
      program: the jaxpr of `init`, from key and images to the leaves of `variables`.
      variables: structure of what `init` gives.
    """

    model: nn.Module
    images: jax.ShapeDtypeStruct
    shapes: dict[str, Any]
    program: Any
    variables: Any

    def draw(self, key: jax.Array) -> dict[str, Any]:
        """First variables, each kind of kernel compiled once.

        Args:
          key: of the parameters.

        Returns:
          `{"params": ..., "batch_stats": ...}`, the numbers of `model.init`.
        """
        needed, reads = dce_jaxpr(self.program.jaxpr, [True] * len(self.program.out_avals))
        arguments = key, jnp.zeros(self.images.shape, self.images.dtype)
        given = [argument for argument, read in zip(arguments, reads, strict=True) if read]
        drawn: dict[str, Any] = jax.tree.unflatten(
            self.variables, jax.core.eval_jaxpr(needed, self.program.consts, *given)
        )
        return drawn

    def zeros(self) -> dict[str, Any]:
        """Variables for a checkpoint to be read into, where nothing need be drawn."""
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.shapes)


def trace(model: nn.Module, image_size: int) -> TracedNetwork:
    """Traces a network's `init`, which asks every module whether its attributes make sense. Nothing is computed.

    Args:
      model: the network.
      image_size: side of the images to trace it with.

    Returns:
      The network with the shapes of its variables.
    """
    order: list[Path] = []

    def init(key: jax.Array, images: jax.Array) -> PyTree:
        variables = model.init(key, images)
        order.extend(flax.traverse_util.flatten_dict(variables["params"]))
        return variables

    images = jax.ShapeDtypeStruct((1, image_size, image_size, getattr(model, "in_channels", 3)), jnp.float32)
    program, shapes = jax.make_jaxpr(init, return_shape=True)(jax.random.key(0), images)
    params = flax.traverse_util.flatten_dict(shapes["params"])
    in_order = flax.traverse_util.unflatten_dict({path: params[path] for path in order})
    in_calls = {"batch_stats": {}, **shapes, "params": in_order}
    return TracedNetwork(model, images, in_calls, program, jax.tree.structure(shapes))


def init_state(
    network: TracedNetwork,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    ema: bool,
    frozen: frozenset[Path] = NOTHING.params,
    variables: Mapping[str, PyTree] | None = None,
    given: Mapping[Path, np.ndarray] | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
      network: from `trace`.
      optimizer: its optimizer.
      seed: of parameters and of all later randomness.
      ema: whether to keep a moving average.
      frozen: paths of parameters that the optimizer has no part in.
      variables: float32 `{"params", "batch_stats"}` to start from; None draws them.
      given: by path, parameters that stand in for those of `variables`.

    Returns:
      The state, on the default device.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))

    @jax.jit
    def build(start: Mapping[str, PyTree]) -> TrainState:
        params, stats = start["params"], start.get("batch_stats", {})
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=stats,
            opt_state=optimizer.init(split(params, frozen)[0]),
            # Copied: the step gives its state's memory away, and may not give one array away twice.
            ema=jax.tree.map(jnp.copy, {"params": params, "batch_stats": stats}) if ema else None,
            key=jax.random.key_data(run_key),
        )

    start = network.draw(init_key) if variables is None else variables
    if given:
        params = flax.traverse_util.flatten_dict(dict(start["params"])) | dict(given)
        start = {**start, "params": flax.traverse_util.unflatten_dict(params)}
    return build(start)
