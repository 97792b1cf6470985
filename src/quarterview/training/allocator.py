"""Memory on a CPU: what a step gives back, the next one takes again.

The C library maps every large block anew from the kernel and returns it at once, so each tensor of a
step pays for its pages, thousands of faults, every time: 13% of a step of ViT-B on two cores
(docs/log.md).
"""

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h of the GNU C library
_NEVER, _ROOM = 2**31 - 1, 64 << 20


def keep_freed_memory() -> bool:
    """Tell the C library to keep what is freed for what is asked next, until this process ends.

    Returns:
        Whether it could be told; others than the GNU C library cannot, and nothing changes.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        library.gnu_get_libc_version  # noqa: B018
    except (OSError, AttributeError):
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _ROOM))
    return all([library.mallopt(name, value) for name, value in settings])  # noqa: C419, each is told
