"""Process-wide memory settings for computing on a CPU."""

import ctypes

import jax

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1


def keep_memory() -> bool:
    """Keeps freed memory in the process instead of returning it to the system.

    A training step on a CPU allocates gigabytes of temporaries and frees them. By default glibc maps and unmaps blocks
    of that size in every step, and the page faults cost a large part of the step's time. With this setting the memory
    of the process stays at its peak.

    Call this function before JAX is used. glibc keeps the blocks of its main heap only, which belongs to the main
    thread, so computations must run in the calling thread: the function switches `jax_cpu_enable_async_dispatch` off,
    which JAX reads once, when it looks for devices. With several CPU devices computations have their own threads, and
    nothing is gained.

    Returns:
      Whether it was done; on other systems than Linux with glibc nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    if not (mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER)):
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return True
