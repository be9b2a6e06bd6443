"""Memory given out again once nobody holds it: fresh memory costs a page fault every 4 kB, more than filling it."""

import collections
import contextlib
import math
import mmap
import weakref

import numpy as np
import torch

_KEPT, _KEPT_BYTES = 8, 2**28  # pieces, and bytes of pieces of one size; what comes back beyond these goes to the system


class Recycled:
    """Pieces of memory, each an array until its last tensor is gone. Safe to share between threads."""

    def __init__(self):
        self._free = collections.deque(maxlen=_KEPT)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, pin_memory: bool = False) -> torch.Tensor:
        """A tensor of unknown content; pinned memory is recycled by torch itself."""
        if pin_memory:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        return torch.from_numpy(self._take(math.prod(shape) * dtype.itemsize)).view(dtype).view(shape)

    def _take(self, num_bytes: int) -> np.ndarray:
        """(num_bytes,) uint8, to be given to torch.from_numpy and not cut: torch holds this very array, parts would not."""
        memory = None
        with contextlib.suppress(IndexError):
            memory = self._free.pop()  # the newest: it is still in the processor's cache
        if memory is None or len(memory) != num_bytes:
            memory = _fresh(num_bytes)
        array = np.frombuffer(memory, np.uint8)
        weakref.finalize(array, self._take_back, memory).atexit = False
        return array

    def _take_back(self, memory: mmap.mmap) -> None:
        with contextlib.suppress(IndexError):  # another thread has taken the last
            while (len(self._free) + 1) * len(memory) > _KEPT_BYTES:
                self._free.popleft()
        self._free.append(memory)


def _fresh(num_bytes: int) -> mmap.mmap:
    """In huge pages, where the system has them: a batch is written all over, and a page found 512 times more rarely."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, num_bytes)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
