"""Choice by platform, memoised partial functions (JAX's trace cache hits), and arrays that XLA may not recompute."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata

from se_flax.errors import UserError

Array = jax.Array

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

# A context of JAX's own: its value is part of the key of every cache of traces and compiled programs.
_forced = jax.make_user_context(default_value=None)


def by_platform(*operands: Any, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """Calls the form of a function that is made for the platform on which the program will run.

    All forms are traced and the compiler keeps one, as with `jax.lax.platform_dependent`. Within `force` the forced
    platform's alone is traced.

    Args:
      *operands: arrays.
      default: for platforms without a form of their own.
      **forms: by platform, such as `cpu=` and `tpu=`; results of the same shapes and dtypes.

    Returns:
      What the form returns.
    """
    if _forced.value is None:
        return jax.lax.platform_dependent(*operands, default=default, **forms)
    return forms.get(_forced.value, default)(*operands)


@contextlib.contextmanager
def force(platform: str) -> Iterator[None]:
    """Context in which functions are traced in the form of one platform on any machine, for tests and inspection.

        with force("tpu"):
            text = jax.make_jaxpr(step)(state, batch)

    What `jax.jit`, `jax.grad`, `jax.lax.scan` and the like trace inside is not reused outside, nor the other way round:
    JAX looks for cached traces and programs by this context too. A result of `jax.jit(f).lower`, `jax.make_jaxpr` or
    `jax.vjp` keeps the form in which it was traced. Threads that start inside do not see the context.

    Args:
      platform: one of `PLATFORMS`.

    Raises:
      UserError: another platform.
    """
    if platform not in PLATFORMS:
        raise UserError(f"got platform={platform!r}; give one of {', '.join(PLATFORMS)}")
    with _forced(platform):
        yield


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
    return by_platform(x, cpu=materialize, default=_as_it_is)


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
