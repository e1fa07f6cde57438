"""Functions with their settings, which JAX knows again, and functions as arguments of a module."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax


@lru_cache(maxsize=1024)
def bound(function: Callable[..., Any], *settings: Any, **named: Any) -> Callable[..., Any]:
    """`functools.partial`, the same object for the same settings.

    JAX keeps what it traced of a function that is given to a transformation or a branch, and its derivative, by the
    function itself and the shapes of the arrays. A new closure for each layer is traced each time.

    Args:
      function: of these settings and of arrays.
      *settings: hashable, before the arrays.
      **named: hashable, by name.

    Returns:
      The function of the arrays alone.
    """
    return partial(function, *settings, **named)


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False, init=False)
class Function:
    """A function that is given to a call of a Linen module, and called like it.

    `nn.tabulate` takes every leaf of what a call was given for an array, and JAX warns of a leaf that is none (in a
    later version it is an error). This is a tree without leaves.

    Attributes:
      name: what the table shows.
    """

    name: str

    def __init__(self, function: Callable[..., Any]):
        own: Any = function
        while isinstance(own, partial):
            own = own.func
        object.__setattr__(self, "name", getattr(own, "__name__", type(own).__name__))
        # Not a field: the table would show it with all that it holds.
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns."""
        return self.function(*args, **kwargs)

    @property
    def function(self) -> Any:
        """The function itself, which JAX knows again where it is given to a transformation."""
        return self.__dict__["_function"]
