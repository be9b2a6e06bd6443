"""Memory given out again once nobody holds it: fresh memory costs a page fault every 4 kB, more than filling it."""

import collections
import contextlib
import functools
import mmap
import weakref

import numpy as np

_KEPT = 8  # pieces; what comes back beyond these goes to the system


class Recycled:
    """Pieces of memory, each an array until its last tensor is gone. Safe to share between threads."""

    def __init__(self):
        self._free = collections.deque(maxlen=_KEPT)
        self._given = {}

    def take(self, num_bytes: int) -> np.ndarray:
        """(num_bytes,) uint8, to be given to torch.from_numpy and not cut: torch holds this very array, parts would not."""
        memory = None
        with contextlib.suppress(IndexError):
            memory = self._free.pop()  # the newest: it is still in the processor's cache
        if memory is None or len(memory) != num_bytes:
            memory = mmap.mmap(-1, num_bytes)
        array = np.frombuffer(memory, np.uint8)
        self._given[id(memory)] = weakref.ref(array, functools.partial(self._take_back, memory))
        return array

    def _take_back(self, memory: mmap.mmap, _) -> None:
        self._given.pop(id(memory), None)
        self._free.append(memory)
