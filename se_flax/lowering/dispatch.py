"""Memoised partial functions (JAX's trace cache hits), and arrays that XLA may not recompute."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata

Array = jax.Array


@lru_cache(maxsize=1024)
def memoized_partial(function: Callable[..., Any], *settings: Any, **named: Any) -> Callable[..., Any]:
    """Memoised `functools.partial`: equal settings give the same object.

    JAX's trace cache looks a function up by its identity and the shapes of the arrays. It would trace a new closure for
    every layer, and differentiate it, again.

    Args:
      function: of settings and arrays.
      *settings: positional arguments before the arrays; hashable.
      **named: keyword arguments; hashable.

    Returns:
      The function of the arrays alone.
    """
    return partial(function, *settings, **named)


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False, init=False)
class Function:
    """Wrapper of a function that is an argument of a Linen module's call: a pytree without leaves.

    `nn.tabulate` takes every leaf of a call's arguments for an array, and JAX warns of a leaf that is not one (a later
    version raises).

    Attributes:
      name: the function's name, for the table.
    """

    name: str

    def __init__(self, function: Callable[..., Any]):
        own: Any = function
        while isinstance(own, partial):
            own = own.func
        object.__setattr__(self, "name", getattr(own, "__name__", type(own).__name__))
        # Not a field: the table would show its repr.
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self.function(*args, **kwargs)

    @property
    def function(self) -> Any:
        """The wrapped function; JAX's trace cache is keyed by its identity."""
        return self.__dict__["_function"]


def share_computation(x: Array) -> Array:
    """Makes all consumers of an array share one computation of it on a CPU; the identity elsewhere.

    On a CPU, XLA's fusion recomputes a cheap producer in each consumer. A residual sum is cheap and has two consumers,
    the next block's convolution and its sum. So every sum of a stage would be recomputed from the stage's first block,
    reading one map more per block and keeping all of them alive.

    Args:
      x: any array.

    Returns:
      The same.
    """
    return jax.lax.platform_dependent(x, cpu=materialize, default=_as_it_is)


def _as_it_is(x: Array) -> Array:
    # Not a lambda, so that JAX's trace cache hits.
    return x


def materialize(x: Array) -> Array:
    """Materialises x: XLA may not fuse its producer into the consumers. For code that only a CPU runs.

    Its gradient is materialised likewise.

    Args:
      x: any array.

    Returns:
      The same.
    """
    # XLA computes the operand of a call to a function that may not be inlined.
    with set_xla_metadata(inlineable="false"):
        return _same(x)


@jax.jit
def _same(x: Array) -> Array:
    # JAX would remove a bare identity.
    return jax.lax.optimization_barrier(x)
