"""Functions with their settings, which JAX knows again."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any


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
