"""Batch-norm folding for inference."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name

from se_flax.errors import UserError
from se_flax.lowering.deferred_conv import DeferredConv
from se_flax.nn.conv import Conv
from se_flax.nn.norm import BatchNorm, Coefficients

Array = jax.Array
Path = tuple[str, ...]

# Any size that every network takes; nothing is computed at it.
_TRACED_SIDE = 96
_NORM_FIELDS = ("norm", "linear_norm")


class FoldedNorm(BatchNorm):
    """Inference batch norm; the identity once it has been folded into the convolution before it.

    With variables it normalises with the running statistics.
    """

    def coefficients(self, x: Array | DeferredConv, *, train: bool = False, per_image: bool = False) -> Coefficients:
        """Arguments and result as for `BatchNorm`.

        Raises:
          UserError: training was asked for.
        """
        if train:
            raise UserError("a fused network has no batch norms to train; train the network that it was made from")
        if self.is_initializing() or self.has_variable("params", "bias"):
            return super().coefficients(x, per_image=per_image)
        return Coefficients(x, None, None, None)


def fuse(model: nn.Module, variables: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Folds batch norms into the convolutions in front of them, for faster inference with the same numbers.

    For a convolution W * x and the norm a * u + b of its output: the kernel becomes a * W and b its bias. Norms that
    are not the only reader of one convolution (pre-activation, mixed and conditional convolutions) stay as they are,
    and so do those inside attention modules and norms that normalise every image by itself.

    Args:
      model: a network of `create_model`, or another with the attributes `conv` and `norm` that are `se_flax.Conv` and
        `se_flax.BatchNorm` or partials of them.
      variables: its `params` and `batch_stats`.

    Returns:
      The fused network and its variables, to be applied like the given ones with `train=False`. Attention modules and
      the classifier keep their names and parameters.

    Raises:
      UserError: a network without such convolutions or norms, or variables without `params` and `batch_stats`.

    Examples:
      >>> import jax, numpy, se_flax
      >>> model = se_flax.create_model("seresnet20")
      >>> shapes = jax.eval_shape(model.init, jax.random.key(0), jax.numpy.zeros((1, 32, 32, 3)))
      >>> variables = jax.tree.map(lambda x: numpy.ones(x.shape, x.dtype), shapes)  # or a checkpoint's
      >>> fused, fused_variables = se_flax.fuse(model, variables)
      >>> list(fused_variables)
      ['params']
    """
    given: Any = model
    norms = {field: _folded(part) for field in _NORM_FIELDS if _is(part := getattr(given, field, None), BatchNorm)}
    if not _is(getattr(given, "conv", None), Conv) or "norm" not in norms:
        raise UserError(
            f"{type(model).__name__} has no se_flax.Conv and se_flax.BatchNorm in its attributes conv and norm, "
            "so there is nothing to fuse; use it as it is"
        )
    missing = {"params", "batch_stats"} - variables.keys()
    if missing:
        raise UserError(
            f"got variables without {' and '.join(sorted(missing))}; give both params and batch_stats, as model.init "
            "and load_pretrained return them, of a network that is not fused"
        )
    fused = given.clone(conv=partial(given.conv, use_bias=True), **norms)
    params, statistics = (flatten_dict(variables[name]) for name in ("params", "batch_stats"))
    convs, pairs = _trace(fused, getattr(given, "in_channels", 3))
    for path in convs:
        kernel = params[*path, "kernel"]
        params.setdefault((*path, "bias"), jnp.zeros(kernel.shape[-1], kernel.dtype))
    for path, (conv_path, epsilon) in pairs.items():
        scale = np.asarray(params.pop((*path, "scale"), 1.0), np.float64)  # a norm may have none
        bias = np.asarray(params.pop((*path, "bias")), np.float64)
        mean, var = (np.asarray(statistics.pop((*path, name)), np.float64) for name in ("mean", "var"))
        factor = scale / np.sqrt(var + epsilon)
        at_kernel, at_bias = (*conv_path, "kernel"), (*conv_path, "bias")
        kernel, offset = np.asarray(params[at_kernel], np.float64), np.asarray(params[at_bias], np.float64)
        params[at_kernel] = jnp.asarray(kernel * factor, jnp.float32)
        params[at_bias] = jnp.asarray((offset - mean) * factor + bias, jnp.float32)
    rest = {"batch_stats": unflatten_dict(statistics)} if statistics else {}
    return fused, {"params": unflatten_dict(params), **rest}


def _is(part: Any, kind: type) -> bool:
    while isinstance(part, partial):
        part = part.func
    return isinstance(part, type) and issubclass(part, kind)


def _folded(norm: Any) -> Any:
    return partial(FoldedNorm, *norm.args, **norm.keywords) if isinstance(norm, partial) else FoldedNorm


def _trace(model: nn.Module, channels: int) -> tuple[set[Path], dict[Path, tuple[Path, float]]]:
    """Finds the convolutions that got a bias, and the norms that alone read what one of them returned."""
    convs: dict[str, Path] = {}
    norms: dict[str, tuple[Path, float]] = {}

    def mark(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, FoldedNorm) and context.method_name == "coefficients":
            name = f"norm {len(norms)}"
            norms[name] = module.path, module.epsilon
            return call(checkpoint_name(args[0], name), *args[1:], **kwargs)
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        result = call(*args, **kwargs)
        if isinstance(module, Conv) and module.use_bias:
            name = f"conv {len(convs)}"
            convs[name] = module.path
            return checkpoint_name(result, name)
        return result

    images = jax.ShapeDtypeStruct((1, _TRACED_SIDE, _TRACED_SIDE, channels), jnp.float32)
    with nn.intercept_methods(mark):
        program = jax.make_jaxpr(model.init)(jax.random.key(0), images)
    links = _sole_readers(program.jaxpr)
    return set(convs.values()), {path: (convs[links[name]], e) for name, (path, e) in norms.items() if name in links}


def _sole_readers(program: Any) -> dict[str, str]:
    """Of the marked values of a traced program: which norm reads which convolution, where nothing else does."""
    marked: dict[Any, str] = {}
    readers: dict[Any, list[str]] = {}
    for equation in program.eqns:
        name = equation.params["name"] if equation.primitive.name == "name" else ""
        for value in equation.invars:
            if not hasattr(value, "val"):  # a constant has no reader to count
                readers.setdefault(value, []).append(name)
        if name:
            marked[equation.outvars[0]] = name
    for value in program.outvars:
        if not hasattr(value, "val"):
            readers.setdefault(value, []).append("")
    found = {value: readers.get(value, []) for value, name in marked.items() if name.startswith("conv")}
    return {names[0]: marked[value] for value, names in found.items() if len(names) == 1 and names[0][:4] == "norm"}
