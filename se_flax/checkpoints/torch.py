"""PyTorch state dicts <-> Linen variables, by one rule.

Submodules are named after torch's module path, with list indexes joined by an underscore
(`layer1.0.conv1` <-> `layer1_0/conv1`), so keys are converted by a rule, not by a table. An underscore before a number
in torch's name is doubled (`repeat_1.0` <-> `repeat__1_0`):

| Linen | torch | layout |
|---|---|---|
| `params .../kernel`, rank 4 | `weight` | HWIO <-> OIHW |
| `params .../kernel`, rank 3 | `weight` | WIO <-> OIW |
| `params .../kernel`, rank 2 | `weight` | IO <-> OI |
| `params .../experts`, rank 5 | `weight`, rank 2 | EHWIO <-> E, (OIHW flattened) |
| `params .../scale` | `weight` | as is |
| `params .../gain` | `gain` | O <-> O111 |
| `params .../bias` | `bias` | as is |
| `batch_stats .../mean`, `.../var` | `running_mean`, `running_var` | as is |

PyTorch's `num_batches_tracked` counts training batches and is not used with a fixed momentum; import drops it and
export writes zero.
"""

import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from se_flax.checkpoints.convert import Layout, Path, import_variables, unprefixed
from se_flax.checkpoints.prefix import unwrapped
from se_flax.zoo import get_variant

_COUNTER = "num_batches_tracked"
_LEAVES = {
    "kernel": "weight",
    "experts": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# From torch's axes to ours, by rank of the kernel.
_TO_OURS = {4: (2, 3, 1, 0), 3: (2, 1, 0), 2: (1, 0)}
_TO_TORCH = {4: (3, 2, 0, 1), 3: (2, 1, 0), 2: (1, 0)}
_UNDERSCORES = re.compile(r"__|_(?=\d+(_\d+)*$)|(?<=\d)_(?=\d+$)")


def torch_key(path: Path) -> str:
    """Torch's key of a variable.

    Args:
      path: collection, submodules, leaf: `("params", "layer1_0", "conv1", "kernel")`.

    Returns:
      The key: `"layer1.0.conv1.weight"`.
    """
    modules = [_UNDERSCORES.sub(lambda found: "_" if found[0] == "__" else ".", part) for part in path[1:-1]]
    return ".".join([*modules, _LEAVES.get(path[-1], path[-1])])


def torch_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a variable in torch's layout.

    Args:
      path: the variable's, collection first.
      shape: in our layout.
    """
    if path[-1] == "experts":
        return (shape[0], math.prod(shape[1:]))
    if path[-1] == "gain":
        return (*shape, 1, 1, 1)
    axes = _TO_TORCH.get(len(shape)) if path[-1] == "kernel" else None
    return tuple(shape[a] for a in axes) if axes else tuple(shape)


def to_torch_layout(path: Path, value: np.ndarray) -> np.ndarray:
    """One variable in torch's layout.

    Args:
      path: the variable's, collection first.
      value: in our layout.

    Returns:
      Contiguous array.
    """
    if path[-1] == "experts":
        return np.ascontiguousarray(value.transpose(0, 4, 3, 1, 2)).reshape(torch_shape(path, value.shape))
    if path[-1] == "gain":
        return value.reshape(torch_shape(path, value.shape))
    axes = _TO_TORCH.get(value.ndim) if path[-1] == "kernel" else None
    return np.ascontiguousarray(value.transpose(axes)) if axes else value


def from_torch_layout(path: Path, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """One variable in our layout; the inverse of `to_torch_layout`.

    Args:
      path: the variable's, collection first.
      value: in torch's layout.
      shape: in ours.

    Returns:
      Array of that shape.
    """
    if path[-1] == "experts":
        experts, height, width, inputs, outputs = shape
        return value.reshape(experts, outputs, inputs, height, width).transpose(0, 3, 4, 2, 1)
    if path[-1] == "gain":
        return value.reshape(shape)
    axes = _TO_OURS.get(value.ndim) if path[-1] == "kernel" else None
    return value.transpose(axes) if axes else value


def _counters(targets: Mapping[str, Path]) -> set[str]:
    return {key.rsplit(".", 1)[0] + "." + _COUNTER for key, path in targets.items() if path[-1] == "mean"}


LAYOUT = Layout("state dict", torch_key, torch_shape, from_torch_layout, _counters)


def from_timm(
    name: str,
    state_dict: Mapping[str, np.ndarray],
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    **attributes: Any,
) -> dict[str, Any]:
    """Turns a PyTorch state dict into variables.

    Args:
      name: the network, one of `se_flax.list_models()`.
      state_dict: NumPy arrays by torch's keys, in torch's layout; or a training program's dictionary with it, under
        `state_dict`, `model` and the like. A prefix that all keys have (`module.`, `model._orig_mod.`) is removed if
        the keys fit without it, with a warning.
      num_classes: of the network. If the state dict has another number of classes, or no classifier, the classifier is
        initialised anew; 0 is a network without classifier.
      in_channels: of the network. From 3 to 1 the stem's kernel is summed over the colours, from 3 to another number
        the colours are repeated and scaled (timm's rule).
      **attributes: as given to `create_model`, if the network differs from its default.

    Returns:
      `{"params": ..., "batch_stats": ...}` of float32 arrays.

    Raises:
      UserError: keys are missing, unexpected or of another shape; one message lists all.
    """
    arrays, layout, notes = unprefixed(name, unwrapped(state_dict), LAYOUT, attributes)
    variables, _ = import_variables(
        name, arrays, layout, num_classes=num_classes, in_channels=in_channels, attributes=attributes
    )
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return variables


def to_timm(name: str, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Turns variables into a PyTorch state dict; the inverse of `from_timm`.

    Args:
      name: the network (for the message; its layout is in the variables' names).
      variables: `{"params": ..., "batch_stats": ...}`.

    Returns:
      NumPy arrays by torch's keys, in torch's layout.

    Raises:
      UserError: the network is unknown.
    """
    get_variant(name)
    state_dict = {}
    for path, value in flax.traverse_util.flatten_dict(dict(variables)).items():
        key = torch_key(path)
        state_dict[key] = to_torch_layout(path, np.asarray(value))
        if path[-1] == "mean":
            state_dict[key.rsplit(".", 1)[0] + "." + _COUNTER] = np.zeros((), np.int64)
    return state_dict
