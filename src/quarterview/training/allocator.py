"""Reuse of freed CPU memory by the C library's allocator.

By default the GNU C library maps every large block from the kernel and unmaps it when it is freed, so each
tensor of a training step costs thousands of page faults: 13% of the time of a ViT-B step on two cores
(docs/log.md).
"""

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h of the GNU C library
_NEVER, _PAD_BYTES = 2**31 - 1, 64 << 20


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for later allocations until this process ends.

    Returns:
        Whether this was possible: only the GNU C library supports it, others are left unchanged.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        library.gnu_get_libc_version  # noqa: B018
    except (OSError, AttributeError):
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _PAD_BYTES))
    return all([library.mallopt(name, value) for name, value in settings])  # noqa: C419, calls all
