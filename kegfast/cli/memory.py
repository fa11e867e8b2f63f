"""How the process asks the system for memory."""

import ctypes

_TRIM, _PAD, _MMAP = -1, -2, -3  # glibc's M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD


def keep_freed_memory() -> None:
    """Lets glibc keep up to 1 GB of what torch frees, instead of giving it back to the system at once.

    A training step asks for the same tensors again, and the system clears every page that it hands out anew:
    a tenth of the time of a generators' step on a CPU. Nothing happens where the C library is another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, megabytes in ((_MMAP, 32), (_TRIM, 1024), (_PAD, 64)):  # 32 MB is the most that it takes
            mallopt(option, megabytes << 20)
