"""Memory of a training process on a CPU."""

import ctypes
import mmap
import os

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_KEEP = 2**31 - 1


def keep_memory() -> bool:
    """Keeps freed memory in the process, in large pages, instead of giving it back to the system after every step.

    A step on a CPU takes gigabytes for its temporaries and frees them. By default glibc maps and unmaps blocks of that
    size each time, and touching their pages anew costs as much as the arithmetic. The process's size stays at its peak,
    where training has it most of the time anyway.

    Returns:
      Whether it could be done; on other systems than Linux with glibc nothing changes.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc, free, madvise = libc.mallopt, libc.malloc, libc.free, libc.madvise
        advice, pages = mmap.MADV_HUGEPAGE, os.sysconf("SC_PHYS_PAGES")
    except (OSError, AttributeError, TypeError, ValueError):
        return False
    if not (mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _KEEP)):
        return False
    # The heap is grown once over the addresses that it may need, which takes no memory yet; pages come when touched.
    malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = pages * mmap.PAGESIZE // 2
    block = malloc(size)
    if block:
        start = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
        madvise(start, (block + size - start) // mmap.PAGESIZE * mmap.PAGESIZE, advice)
        free(block)
    return True
