"""Memory of a process that computes on a CPU."""

import ctypes

import jax
from jax.experimental.xla_metadata import set_xla_metadata

Array = jax.Array

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1


def keep_memory() -> bool:
    """Keeps freed memory in the process instead of giving it back to the system after every call.

    A training step on a CPU takes gigabytes for its temporaries and frees them. By default glibc maps and unmaps blocks
    of that size each time, and touching their pages anew costs a large part of the arithmetic's time. The process's
    size stays at its peak, where training has it most of the time; beside an accelerator that is the host's share.

    To be called before JAX is used: only the thread that glibc's main heap belongs to keeps its blocks, so computations
    run in the thread that asks for them (`jax_cpu_enable_async_dispatch` is off), and JAX reads that once, when it
    looks for devices. On several CPU devices computations have threads of their own, and nothing is gained.

    Returns:
      Whether it could be done; on other systems than Linux with glibc nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    if not (mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER)):
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return True


def computed_once(x: Array) -> Array:
    """Lets all readers of an array share one computation of it on a CPU; the identity elsewhere.

    XLA's fusion on a CPU computes what is cheap again for each reader. A residual network's sum is cheap, and has two:
    the next block's convolution and its sum. So every sum of a stage starts again from the first block's, which takes
    more and more maps to read, and keeps all of them.

    Args:
      x: any array.

    Returns:
      The same.
    """
    return jax.lax.platform_dependent(x, cpu=written, default=_as_it_is)


def _as_it_is(x: Array) -> Array:
    # With a name: JAX traces the same function once for all arrays of a shape.
    return x


def written(x: Array) -> Array:
    """`computed_once` in code that only a CPU runs: whatever x is made of ends in memory, not in its readers' loops.

    So does the gradient on its way back: what is added up to it is written before anything reads it.

    Args:
      x: any array.

    Returns:
      The same.
    """
    # A function of its own, that is not to be merged into the program, is what its operand is computed for.
    with set_xla_metadata(inlineable="false"):
        return _same(x)


@jax.jit
def _same(x: Array) -> Array:
    # The bare identity would be taken out before XLA sees it.
    return jax.lax.optimization_barrier(x)
