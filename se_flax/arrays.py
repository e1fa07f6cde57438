"""Refusal of arrays that a function does not take, in one sentence."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from se_flax.errors import UserError

Array = jax.Array

_KINDS = {
    "float": (jnp.floating,),
    "integer": (jnp.integer,),
    "real": (jnp.floating, jnp.integer, jnp.bool_),
}


def check_array(x: Any, what: str, *shapes: str, kind: str = "float", hint: str = "") -> Array:
    """Refuses anything but arrays of some shapes and kind.

    Args:
      x: what a function was called with: an array of NumPy's or JAX's, or numbers that make one.
      what: the function, or the argument and the function, for the message.
      *shapes: what it takes, `"[N, H, W, 3]"`: one axis per name, of that length where the name is a number; `...` for
        any number of axes.
      kind: `float`, `integer`, or `real` for floats, integers and booleans.
      hint: what to do, for the end of the message.

    Returns:
      The array as one of JAX's.

    Raises:
      UserError: another shape or kind.
    """
    given = x if hasattr(x, "shape") and hasattr(x, "dtype") else np.asarray(x)
    right_kind = any(jnp.issubdtype(given.dtype, allowed) for allowed in _KINDS[kind])
    if not right_kind or not any(_fits(given.shape, shape) for shape in shapes):
        raise UserError(
            f"got an array of shape {tuple(given.shape)} and dtype {given.dtype} for {what}; give {kind} "
            f"{' or '.join(shapes)}{hint}"
        )
    return jnp.asarray(given)


def _fits(shape: tuple[Any, ...], pattern: str) -> bool:
    names = pattern.strip("[]").split(", ") if pattern != "[]" else []
    if "..." in names:
        at = names.index("...")
        names[at : at + 1] = ["..."] * (len(shape) - len(names) + 1)
    # A side of unknown length may be the right one.
    return len(names) == len(shape) and all(
        int(name) == size for name, size in zip(names, shape, strict=True) if name.isdigit() and isinstance(size, int)
    )
