"""Network, training step and evaluation step of a run on a table."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from se_flax.ctr import FIBINET_SE, FM, FiBiNET, LogisticRegression, SqueezeExciteFields
from train.ctr.config import Model
from train.ctr.stream import Batch
from train.run.non_finite import keep_if_not

Array = jax.Array
_EMBEDDING = "embedding"  # what `flax.linen.Embed` calls its parameter


class State(flax.struct.PyTreeNode):
    """Everything that a step reads and writes, and the parameters to keep.

    Attributes:
      step: int32 scalar, updates done.
      params: float32 parameters.
      best: those of the best evaluation so far.
      opt_state: the optimizer's.
      key: uint32 key data, constant through the run; each step folds its number in.
    """

    step: Array
    params: dict
    best: dict
    opt_state: optax.OptState
    key: Array

    def keep(self) -> "State":
        """The state with its parameters as the best ones. They are copied: a step gives its state's memory away."""
        return self.replace(best=jax.tree.map(jnp.copy, self.params))


def build_model(settings: Model, num_ids: int) -> nn.Module:
    """The network that the settings name.

    Args:
      settings: see there.
      num_ids: rows of the embedding table.

    Returns:
      A module of `se_flax.ctr`.
    """
    if settings.name == "lr":
        return LogisticRegression(num_ids)
    if settings.name == "fm":
        return FM(num_ids, settings.embedding_size)
    forms = {"none": None, "fibinet": FIBINET_SE, "sigmoid": partial(SqueezeExciteFields)}
    attention = forms[settings.attention]
    if attention is not None and settings.reduction:
        attention = partial(attention, reduction=settings.reduction)
    return FiBiNET(
        num_ids,
        settings.embedding_size,
        tuple(settings.hidden),
        attention=attention,
        bilinear=settings.bilinear,
        dropout=settings.dropout,
    )


def init_state(model: nn.Module, optimizer: optax.GradientTransformation, fields: int, seed: int) -> State:
    """The state before the first step.

    Args:
      model: the network.
      optimizer: its optimizer.
      fields: ids per row.
      seed: of the parameters and of dropout.

    Returns:
      The state, on the default device.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))

    @jax.jit
    def build() -> State:
        params = model.init(init_key, jnp.zeros((1, fields), jnp.int32))["params"]
        return State(
            step=jnp.zeros((), jnp.int32),
            params=params,
            best=jax.tree.map(jnp.copy, params),
            opt_state=optimizer.init(params),
            key=jax.random.key_data(run_key),
        )

    return build()


def embedding_penalty(params: dict) -> Array:
    """Half the sum of squares of all embedding tables, linear weights included; float32 scalar."""
    tables = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if getattr(path[-1], "key", "") == _EMBEDDING
    ]
    return 0.5 * sum((jnp.square(table).sum() for table in tables), jnp.zeros(()))


def make_train_step(
    model: nn.Module, optimizer: optax.GradientTransformation, l2: float = 0.0, skip: bool = False
) -> Callable[[State, Batch], tuple[State, Array]]:
    """One compiled update.

    Args:
      model: the network.
      optimizer: its optimizer.
      l2: weight of `embedding_penalty` in the loss.
      skip: leave out updates whose loss or gradient norm is not finite; the step is counted.

    Returns:
      A function of state and batch (see `train.ctr.stream.batches`), which gives the next state and the mean log loss
      of the batch without the penalty, NaN for an update that was left out. It takes the state's memory.
    """

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: State, batch: Batch) -> tuple[State, Array]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def objective(params: dict) -> tuple[Array, Array]:
            logits = model.apply({"params": params}, batch["ids"], train=True, rngs={"dropout": key})
            losses = optax.sigmoid_binary_cross_entropy(logits, batch["labels"])
            loss = jnp.vdot(losses, batch["weights"]) / jnp.sum(batch["weights"])
            return loss + l2 * embedding_penalty(params) if l2 else loss, loss

        gradients, loss = jax.grad(objective, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        if skip:
            finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradients))
            new, loss = keep_if_not(finite, new, state).replace(step=new.step), jnp.where(finite, loss, jnp.nan)
        return new, loss

    return train_step


def make_eval_step(model: nn.Module) -> Callable[[dict, np.ndarray], Array]:
    """A compiled function of parameters and ids int32 [N, F] that gives the logits, float32 [N]."""
    return jax.jit(lambda params, ids: model.apply({"params": params}, ids))
