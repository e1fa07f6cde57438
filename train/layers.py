"""Which parts of a network a run trains, and how fast: from the classifier down to the stem."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from se_flax.layers import BatchNorm
from train.config import Optim

PyTree = Any
Path = tuple[str, ...]


def trace(model: nn.Module, image_size: int) -> dict[str, Any]:
    """Shapes of a network's variables, in the order in which it calls its parts.

    Args:
      model: the network.
      image_size: side of the images to trace it with.

    Returns:
      `{"params": ..., "batch_stats": ...}` of `jax.ShapeDtypeStruct`. The keys of `params` are in the order of the
      calls; anything that has been through a JAX transformation has them in the order of the alphabet.
    """
    order: list[str] = []

    def init(key: jax.Array, images: jax.Array) -> PyTree:
        variables = model.init(key, images)
        order.extend(variables["params"])
        return variables

    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    shapes = jax.eval_shape(init, jax.random.key(0), images)
    return {"batch_stats": {}, **shapes, "params": {name: shapes["params"][name] for name in order}}


def layer_depths(params: Mapping[str, Any]) -> dict[str, int]:
    """How far every part of a network is from its classifier.

    A part that has parts of its own is a block (`layer3_1`, `blocks_2_0`), and every block is a group. What is called
    before the first block is the stem, one group; a convolution or norm after a block belongs to that block; the dense
    layer at the end is the head. timm groups parameters for its layer-wise rates in the same way.

    Args:
      params: a network's parameters, or their shapes, with the parts in the order in which they are called (`trace`).

    Returns:
      Depth by name of the part: 0 for the head, 1 for the last block, and so on to the stem.
    """
    dense = [name for name, part in params.items() if len(getattr(part.get("kernel"), "shape", ())) == 2]
    groups: dict[str, int] = {}
    group = 0
    for name, part in params.items():
        if groups and any(isinstance(inner, Mapping) for inner in part.values()):
            group += 1
        groups[name] = group
    return {name: 0 if name in dense[-1:] else group + 1 - number for name, number in groups.items()}


def layer_factors(settings: Optim, depths: Mapping[str, int]) -> dict[str, float]:
    """What the learning rate of every part of the network is multiplied by.

    The head keeps its rate; a part at depth d has `backbone_multiplier * layer_decay**d` of it (Clark et al. 2020,
    "ELECTRA", appendix A; Bao et al. 2021, "BEiT", appendix; there d counts Transformer layers). Weight decay that is
    multiplied by the rate (AdamW's) is multiplied by this too, as in timm.

    Args:
      settings: the run's `optim` section.
      depths: by name of the part, from `layer_depths`.

    Returns:
      Factors by name of the part.
    """
    return {
        name: settings.backbone_multiplier * settings.layer_decay**depth if depth else 1.0
        for name, depth in depths.items()
    }


def scale_parts(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of every part of the network by a factor of its own, see `layer_factors`."""

    def scale(updates: PyTree, params: PyTree) -> PyTree:
        del params
        return {name: jax.tree.map(partial(jnp.multiply, factors[name]), part) for name, part in updates.items()}

    return optax.stateless(scale)


@dataclass(frozen=True)
class Frozen:
    """What training leaves as it is.

    Attributes:
      params: paths of parameters.
      modules: classes; submodules of these classes run in evaluation mode, and no statistics are recorded.
    """

    params: frozenset[Path] = frozenset()
    modules: tuple[type[nn.Module], ...] = ()


NOTHING = Frozen()


def frozen_parts(settings: Optim, variables: Mapping[str, Any]) -> Frozen:
    """What the settings freeze.

    `train_only="head"` freezes all but the classifier, and the frozen part runs in evaluation mode: batch norms use
    their running statistics and leave them, stochastic depth is off. The dropout before the classifier stays on.
    `freeze_batch_norm` freezes the batch norms alone: their statistics, and as in torchvision's `FrozenBatchNorm2d`
    and Keras's `trainable = False`, scale and bias too.

    Args:
      settings: the run's `optim` section.
      variables: of the network, or their shapes, see `trace`.

    Returns:
      Paths of parameters and classes of modules.
    """
    paths = flax.traverse_util.flatten_dict(dict(variables["params"]))
    if settings.train_only == "head":
        depths = layer_depths(variables["params"])
        return Frozen(frozenset(path for path in paths if depths[path[0]] > 0), (nn.Module,))
    if settings.freeze_batch_norm:
        norms = {path[:-1] for path in flax.traverse_util.flatten_dict(dict(variables["batch_stats"]))}
        return Frozen(frozenset(path for path in paths if path[:-1] in norms), (BatchNorm,))
    return NOTHING


def split(params: PyTree, frozen: frozenset[Path]) -> tuple[PyTree, PyTree]:
    """Parts parameters into those to train and those to keep.

    The optimizer sees the first tree only: frozen parameters have no gradient, no weight decay, no share in the
    gradient's norm and no optimizer state.

    Args:
      params: nested dictionary of arrays.
      frozen: paths of the parameters to keep.

    Returns:
      Two nested dictionaries, which `merge` joins.
    """
    if not frozen:
        return params, {}
    flat = flax.traverse_util.flatten_dict(params)
    trained = {path: x for path, x in flat.items() if path not in frozen}
    kept = {path: x for path, x in flat.items() if path in frozen}
    return flax.traverse_util.unflatten_dict(trained), flax.traverse_util.unflatten_dict(kept)


def merge(trained: PyTree, kept: PyTree) -> PyTree:
    """The inverse of `split`."""
    if not kept:
        return trained
    flat = flax.traverse_util.flatten_dict(trained) | flax.traverse_util.flatten_dict(kept)
    return flax.traverse_util.unflatten_dict(flat)


@contextmanager
def evaluation_mode(modules: tuple[type[nn.Module], ...]) -> Iterator[None]:
    """Calls the submodules of some classes with `train=False`, whatever the network passes them.

    Args:
      modules: classes; the network itself is never meant.
    """

    def call(method: Any, args: Any, kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        if "train" in kwargs and context.module.name is not None and isinstance(context.module, modules):
            kwargs = {**kwargs, "train": False}
        return method(*args, **kwargs)

    with nn.intercept_methods(call):
        yield
