"""Parameter groups: frozen parts and layer-wise learning rates."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from se_flax.errors import UserError
from se_flax.nn.network import Network, Path, lies_in
from se_flax.nn.norm import BatchNorm
from train.config import Optim
from train.optim.whitening import check_shape

PyTree = Any


def declared(model: nn.Module, wanted_by: str) -> Network:
    """The network as a `Network`, which declares the paths of its classifier and blocks.

    Args:
      model: any network.
      wanted_by: the setting that needs the paths, for the message.

    Raises:
      UserError: the network is not a `Network`.
    """
    if not isinstance(model, Network):
        raise UserError(
            f"{wanted_by} needs to know the classifier and the blocks of {type(model).__name__}, which does not say; "
            f"derive it from se_flax.nn.network.Network, or leave {wanted_by} as it is by default"
        )
    return model


def layer_depths(model: Network, params: Mapping[str, Any]) -> dict[Path, int]:
    """Depth of every parameter, counted in blocks from the classifier.

    Every block is a group; modules that are called before the first block are one group, the stem; a convolution or
    norm after a block belongs to that block. timm groups parameters for its layer-wise rates in the same way.

    Args:
      model: the network.
      params: its parameters, or their shapes, in the order of the calls (from `train.run.init.trace`).

    Returns:
      Depth by path of the parameter: 0 for the classifier, 1 for the last block, and so on to the stem.
    """
    numbers = {path: number for number, path in enumerate(model.block_paths, 1)}
    depths: dict[Path, int] = {}
    group = 0
    for path in flax.traverse_util.flatten_dict(dict(params)):
        above = (path[:length] for length in range(1, len(path)))
        group = next((numbers[module] for module in above if module in numbers), group)
        depths[path] = 0 if lies_in(path, model.head_path) else len(numbers) + 1 - group
    return depths


def layer_factors(settings: Optim, depths: Mapping[Path, int]) -> dict[Path, float]:
    """Factor of the learning rate of every parameter.

    The factor is 1 for the classifier, and `backbone_multiplier * layer_decay**d` at depth d (Clark et al. 2020,
    "ELECTRA", appendix A; Bao et al. 2021, "BEiT", appendix; there d counts Transformer layers). It also multiplies
    weight decay that is multiplied by the rate (AdamW's), as in timm.

    Args:
      settings: the run's `optim` section.
      depths: by path of the parameter, from `layer_depths`.

    Returns:
      Factors by path of the parameter.
    """
    return {
        path: settings.backbone_multiplier * settings.layer_decay**depth if depth else 1.0
        for path, depth in depths.items()
    }


def by_layer(settings: Optim) -> str:
    """Name of the setting that gives layers different rates; empty if there is none."""
    return next((name for name in ("layer_decay", "backbone_multiplier") if getattr(settings, name) != 1), "")


def rate_factors(settings: Optim, model: nn.Module, variables: Mapping[str, Any]) -> dict[Path, float]:
    """Factor of the learning rate of every parameter, from all settings that give parameters rates of their own.

    Biases of batch norms have `norm_bias_multiplier` beside `layer_factors` (Page 2019, "How to Train Your ResNet 8";
    Jordan 2024, section 3.3: 64).

    Args:
      settings: the run's `optim` section.
      model: the network.
      variables: its variables, or their shapes, in the order of the calls (from `train.run.init.trace`).

    Returns:
      Factors by path of the parameter; empty where all have the same rate.

    Raises:
      UserError: the rates are by layer, and the network does not declare its blocks.
    """
    slowed, faster = by_layer(settings), settings.norm_bias_multiplier
    if not slowed and faster == 1:
        return {}
    factors = dict.fromkeys(flax.traverse_util.flatten_dict(dict(variables["params"])), 1.0)
    if slowed:
        factors = layer_factors(settings, layer_depths(declared(model, f"optim.{slowed}"), variables["params"]))
    biases = {(*norm, "bias") for norm in norm_paths(variables)}
    return {path: factor * faster if path in biases else factor for path, factor in factors.items()}


def norm_paths(variables: Mapping[str, Any]) -> set[Path]:
    """Paths of the batch norms: the modules that have statistics."""
    return {path[:-1] for path in flax.traverse_util.flatten_dict(dict(variables.get("batch_stats", {})))}


def scale_layers(factors: Mapping[Path, float]) -> optax.GradientTransformation:
    """Multiplies the update of every parameter by its factor, see `rate_factors`."""

    def scale(updates: PyTree, params: PyTree) -> PyTree:
        del params
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.multiply(factors[tuple(key.key for key in path)], x), updates
        )

    return optax.stateless(scale)


@dataclass(frozen=True)
class Frozen:
    """The frozen parts of a network.

    Attributes:
      params: paths of frozen parameters.
      modules: classes whose submodules run in evaluation mode, without updates of their statistics.
    """

    params: frozenset[Path] = frozenset()
    modules: tuple[type[nn.Module], ...] = ()


NOTHING = Frozen()


def frozen_parts(settings: Optim, model: nn.Module, variables: Mapping[str, Any]) -> Frozen:
    """The parts that the settings freeze.

    `train_only="head"` freezes all but the classifier, and the frozen part runs in evaluation mode: batch norms use
    their running statistics without updating them, and stochastic depth is off. The dropout before the classifier stays
    on. `freeze_batch_norm` freezes only the batch norms: their statistics, and as in torchvision's `FrozenBatchNorm2d`
    and Keras's `trainable = False` also scale and bias. `whiten_stem` freezes the kernel of the first convolution.

    Args:
      settings: the run's `optim` section.
      model: the network.
      variables: its variables, or their shapes.

    Returns:
      Paths of parameters and classes of modules.

    Raises:
      UserError: no parameter would be trained, or the network does not declare its classifier or first convolution, or
        that convolution has too many filters to whiten.
    """
    paths = frozenset(flax.traverse_util.flatten_dict(dict(variables["params"])))
    if settings.train_only == "head":
        head = declared(model, "optim.train_only").head_path
        frozen = Frozen(frozenset(path for path in paths if not lies_in(path, head)), (nn.Module,))
    elif settings.freeze_batch_norm:
        norms = norm_paths(variables)
        frozen = Frozen(frozenset(path for path in paths if path[:-1] in norms), (BatchNorm, nn.BatchNorm))
    else:
        frozen = NOTHING
    if settings.whiten_stem:
        kernel = stem_kernel(model)
        check_shape(flax.traverse_util.flatten_dict(dict(variables["params"]))[kernel].shape)
        frozen = Frozen(frozen.params | {kernel}, frozen.modules)
    if frozen.params == paths:
        setting = "train_only='head'" if settings.train_only else "freeze_batch_norm=True"
        raise UserError(
            f"optim.{setting} freezes all {len(paths)} parameters of {type(model).__name__}, so that nothing would be "
            "trained; leave the setting out, or give a network whose classifier has parameters"
        )
    return frozen


def stem_kernel(model: nn.Module) -> Path:
    """Path of the kernel that `optim.whiten_stem` sets and freezes."""
    return (*declared(model, "optim.whiten_stem").stem_path, "kernel")


def split(params: PyTree, frozen: frozenset[Path]) -> tuple[PyTree, PyTree]:
    """Splits parameters into trained and frozen ones.

    The optimizer gets the first tree only: frozen parameters have no gradient, no weight decay, no share in the
    gradient's norm and no optimizer state.

    Args:
      params: nested dictionary of arrays.
      frozen: paths of the frozen parameters.

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


# Arguments that switch a Linen module to evaluation mode.
_EVALUATION = {"train": False, "use_running_average": True}


@contextmanager
def evaluation_mode(modules: tuple[type[nn.Module], ...]) -> Iterator[None]:
    """Calls the submodules of some classes with `train=False`, whatever the network passes to them.

    The argument may be called `train` or, as in Flax's own batch norm, `use_running_average`, and may be given by
    keyword, by position, or not at all.

    Args:
      modules: classes of submodules; the network itself is not affected.

    Raises:
      UserError: while a network is called: a submodule has its mode as an attribute, which a call cannot change.
    """

    def call(method: Any, args: Any, kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if isinstance(module, modules) and module.scope is not None and module.path:
            args, kwargs = _in_evaluation(module, context.orig_method, args, kwargs)
        return method(*args, **kwargs)

    with nn.intercept_methods(call):
        yield


def _in_evaluation(
    module: nn.Module, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A method's arguments, changed to evaluation mode."""
    parameters = inspect.signature(method).parameters
    by_position = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for name, wanted in _EVALUATION.items():
        attribute = getattr(module, name, None)
        if attribute is (not wanted):
            raise UserError(
                f"{type(module).__name__} at {'/'.join(module.path)} has the attribute {name}={attribute}, which "
                f"freezing cannot change; let it take {name} in the call"
            )
        if name in by_position[: len(args)]:
            place = by_position.index(name)
            args = (*args[:place], wanted, *args[place + 1 :])
        elif name in kwargs or _is_needed(parameters.get(name), wanted, attribute):
            kwargs = {**kwargs, name: wanted}
    return args, kwargs


def _is_needed(parameter: inspect.Parameter | None, wanted: bool, attribute: Any) -> bool:
    """Whether an omitted mode must be passed, because neither its default nor an attribute has the wanted value."""
    return parameter is not None and attribute is None and parameter.default is not wanted
