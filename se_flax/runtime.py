"""Process-wide memory settings for computing on a CPU."""

import ctypes

import jax

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
