"""Batch-norm folding for inference, and sums of parallel convolutions as one."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name

from se_flax.errors import UserError
from se_flax.lowering.deferred_conv import DeferredConv
from se_flax.nn.conv import Conv
from se_flax.nn.network import Network, Path
from se_flax.nn.norm import BatchNorm, Coefficients
from se_flax.nn.parallel import Branch, ParallelBlock
from se_flax.nn.residual import ConvNorm

Array = jax.Array
Floats = np.ndarray[Any, np.dtype[np.float64]]

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
        if self.is_folded:
            return Coefficients(x, None, None, None)
        return super().coefficients(x, per_image=per_image)

    @property
    def is_folded(self) -> bool:
        """Whether the norm has no variables left."""
        return not self.is_initializing() and not self.has_variable("params", "bias")


def fuse(model: nn.Module, variables: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Folds batch norms into convolutions and adds up parallel ones, for faster inference with the same numbers.

    For a convolution W * x and the norm a * u + b of its output: the kernel becomes a * W and b its bias. Norms that
    are not the only reader of one convolution (pre-activation, mixed and conditional convolutions) stay as they are,
    and so do those inside attention modules and norms that normalise every image by itself.

    A sum of convolutions of one input (`nn.parallel.ParallelBlock`), of which some may be a norm alone or the identity,
    becomes its first convolution, whose kernel is the sum of all (Ding et al. 2021, section 3.3).

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
    call = _trace(partial(fused.init_with_output, jax.random.key(0)), fused)
    for path in call.convs:
        kernel = params[*path, "kernel"]
        params.setdefault((*path, "bias"), jnp.zeros(kernel.shape[-1], kernel.dtype))
    while True:
        for path, conv_path in call.pairs.items():
            _fold(params, conv_path, *_as_affine(params, statistics, path, call.norms[path].epsilon))
        # A norm of a sum is one of a convolution after the sum has become one.
        if not [total for total in call.sums if _add_up(total, call, params, statistics)]:
            break
        left = {"params": unflatten_dict(params), "batch_stats": unflatten_dict(statistics)}
        call = _trace(partial(fused.apply, left), fused)
    rest = {"batch_stats": unflatten_dict(statistics)} if statistics else {}
    return fused, {"params": unflatten_dict(params), **rest}


def _as_affine(params: Any, statistics: Any, path: Path, epsilon: float) -> tuple[Floats, Floats]:
    """Removes a norm's variables. Returns: float64 factor and offset, [C]."""
    scale = np.asarray(params.pop((*path, "scale"), 1.0), np.float64)  # a norm may have none
    bias = np.asarray(params.pop((*path, "bias")), np.float64)
    mean, var = (np.asarray(statistics.pop((*path, name)), np.float64) for name in ("mean", "var"))
    factor = scale / np.sqrt(var + epsilon)
    return factor, bias - mean * factor


def _fold(params: Any, conv_path: Path, factor: Floats, offset: Floats) -> None:
    """Folds factor * u + offset into the convolution that gives u."""
    at_kernel, at_bias = (*conv_path, "kernel"), (*conv_path, "bias")
    kernel, bias = (np.asarray(params[at], np.float64) for at in (at_kernel, at_bias))
    params[at_kernel] = jnp.asarray(kernel * factor, jnp.float32)
    params[at_bias] = jnp.asarray(bias * factor + offset, jnp.float32)


def _add_up(total: "tuple[_Parts, ...]", call: "_Call", params: Any, statistics: Any) -> bool:
    """Adds the branches of a sum to its first convolution, if all are linear and alike. Returns: whether they were."""
    (first_path, _), *others = total
    if not others or first_path is None or not _addable(total, call, params):
        return False
    first = call.convs[first_path]
    kernel, bias = (np.array(params[*first_path, name], np.float64) for name in ("kernel", "bias"))
    for conv_path, norm_path in others:
        if conv_path is not None:
            added, offset = (np.asarray(params.pop((*conv_path, name)), np.float64) for name in ("kernel", "bias"))
        else:  # a convolution that gives its input: one in the kernel's middle
            added, offset = np.zeros((1, 1, *kernel.shape[2:])), np.zeros(first.features)
            channels = np.arange(first.features)
            added[0, 0, channels % kernel.shape[2], channels] = 1.0
            if norm_path is not None:
                factor, offset = _as_affine(params, statistics, norm_path, call.norms[norm_path].epsilon)
                added = added * factor
        height, width = ((outer - inner) // 2 for outer, inner in zip(kernel.shape[:2], added.shape[:2], strict=True))
        kernel[height : height + added.shape[0], width : width + added.shape[1]] += added
        bias += offset
    params[*first_path, "kernel"], params[*first_path, "bias"] = (jnp.asarray(x, jnp.float32) for x in (kernel, bias))
    return True


def _addable(total: "tuple[_Parts, ...]", call: "_Call", params: Any) -> bool:
    """Whether every norm of the sum's convolutions is folded, and every convolution has the first one's settings."""
    first = call.convs[total[0][0]]  # type: ignore[index]
    shape = params[*total[0][0], "kernel"].shape  # type: ignore[misc]
    # The missing variables of a branch are what tells the block that it is in the first one.
    if all(branch == (None, None) for branch in total[1:]):
        return False
    for conv_path, norm_path in total:
        if conv_path is None:
            keeps_shape = first.strides == 1 and shape[2] * first.groups == first.features
            if not keeps_shape or (norm_path is not None and norm_path not in call.norms):
                return False
            continue
        if conv_path not in call.convs:  # in the first one already
            return False
        conv, sides = call.convs[conv_path], params[*conv_path, "kernel"].shape[:2]
        alike = all(getattr(conv, field) == getattr(first, field) for field in ("features", "strides", "groups"))
        centred = conv.padding == "symmetric" and conv.dilation == 1 and all(side % 2 for side in sides)
        fits = all(inner <= outer for inner, outer in zip(sides, shape[:2], strict=True))
        if not (alike and centred and fits) or (norm_path is not None and (*norm_path, "bias") in params):
            return False
    return True


def _is(part: Any, kind: type) -> bool:
    while isinstance(part, partial):
        part = part.func
    return isinstance(part, type) and issubclass(part, kind)


def _folded(norm: Any) -> Any:
    return partial(FoldedNorm, *norm.args, **norm.keywords) if isinstance(norm, partial) else FoldedNorm


_Parts = tuple[Path | None, Path | None]
"""The convolution and the norm of a branch."""


class _Call(NamedTuple):
    """What a traced call of a network has.

    Attributes:
      convs: convolutions with a bias.
      norms: norms that are not folded yet.
      pairs: of these, the ones that alone read what a convolution returned, with that convolution.
      sums: the branches of every sum.
    """

    convs: dict[Path, Any]
    norms: dict[Path, Any]
    pairs: dict[Path, Path]
    sums: list[tuple[_Parts, ...]]


def _trace(call: Any, model: nn.Module) -> _Call:
    """Traces `call(images)` of the network and finds its parts."""
    found = _Call({}, {}, {}, [])
    marks: dict[str, Path] = {}

    def mark(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, FoldedNorm) and context.method_name == "coefficients" and not module.is_folded:
            found.norms[module.path] = module
            name = f"norm {len(marks)}"
            marks[name] = module.path
            return call(checkpoint_name(args[0], name), *args[1:], **kwargs)
        if isinstance(module, ParallelBlock) and context.method_name == "add_branches":
            found.sums.append(tuple(map(_parts, args[1:])))
        result = call(*args, **kwargs)
        if isinstance(module, Conv) and module.use_bias and context.method_name == "__call__":
            found.convs[module.path] = module
            name = f"conv {len(marks)}"
            marks[name] = module.path
            return checkpoint_name(result, name)
        return result

    shape = (1, _TRACED_SIDE, _TRACED_SIDE, getattr(model, "in_channels", 3))
    # A convolution that is a feature map keeps its norm to itself.
    maps = {"return_features": True} if isinstance(model, Network) else {}
    with nn.intercept_methods(mark):
        program = jax.make_jaxpr(partial(call, **maps))(jax.ShapeDtypeStruct(shape, jnp.float32))
    for norm, conv in _sole_readers(program.jaxpr).items():
        found.pairs[marks[norm]] = marks[conv]
    return found


def _parts(branch: Branch | ConvNorm) -> _Parts:
    if isinstance(branch, ConvNorm):
        conv, norm = branch.names
        return (*branch.path, conv), (*branch.path, norm)
    return tuple(None if module is None else module.path for module in branch)  # type: ignore[return-value]


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
