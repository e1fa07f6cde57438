"""A network's arguments as plain JSON and back, for the file beside saved weights."""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from se_flax import attention
from se_flax.errors import UserError, closest
from se_flax.nn import norm
from se_flax.nn.head import CosineClassifier
from se_flax.nn.norm import BatchNorm

# The classes that a file may name; reading a file imports and calls nothing else.
CLASSES = {
    cls.__name__: cls
    for cls in (
        attention.SqueezeExcite,
        attention.EffectiveSE,
        attention.ECA,
        attention.CBAM,
        attention.ScSE,
        attention.GlobalContext,
        BatchNorm,
        norm.GroupNorm,
        norm.LayerNorm,
        norm.EvoNormS0,
        CosineClassifier,
    )
}
DTYPES = ("float32", "bfloat16", "float16", "float64")


def to_json(value: Any) -> Any:
    """Turns an argument into JSON-able data.

    Args:
      value: None, bool, number, string, a list or tuple of values, a dtype, or a class of `CLASSES`, plain or as a
        `functools.partial`.

    Returns:
      The data.

    Raises:
      UserError: anything else.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, functools.partial) and not value.args:
        name = getattr(value.func, "__name__", "")
        if CLASSES.get(name) is value.func:
            # The axis belongs to the training program, not to the network.
            arguments = {key: to_json(item) for key, item in value.keywords.items() if key != "axis_name"}
            return {"class": name, "arguments": arguments}
    name = getattr(value, "__name__", "")
    if name and CLASSES.get(name) is value:
        return {"class": name, "arguments": {}}
    try:
        name = jnp.dtype(value).name
    except (TypeError, ValueError):  # raised by NumPy for objects that are not dtypes
        name = ""
    if name in DTYPES:
        return {"dtype": name}
    raise UserError(
        f"{value!r} cannot be saved as an argument of a network; plain values, dtypes and se_flax's own modules "
        f"({', '.join(CLASSES)}) can"
    )


def from_json(data: Any) -> Any:
    """The inverse of `to_json`; lists become tuples.

    Raises:
      UserError: the class or dtype is not allowed.
    """
    if isinstance(data, list):
        return tuple(from_json(item) for item in data)
    if not isinstance(data, Mapping):
        return data
    if data.keys() == {"dtype"}:
        if data["dtype"] not in DTYPES:
            raise UserError(f"unknown dtype {data['dtype']!r}; {closest(str(data['dtype']), DTYPES)}")
        return np.dtype(jnp.dtype(data["dtype"]))
    if data.keys() == {"class", "arguments"} and isinstance(data["arguments"], Mapping):
        if data["class"] not in tuple(CLASSES):  # which no kind of value breaks
            raise UserError(f"unknown module {data['class']!r}; {closest(str(data['class']), CLASSES)}")
        cls: Any = CLASSES[data["class"]]
        arguments = {str(key): from_json(item) for key, item in data["arguments"].items()}
        return functools.partial(cls, **arguments) if arguments else cls
    raise UserError(f"{dict(data)!r} is not an argument of a network")
