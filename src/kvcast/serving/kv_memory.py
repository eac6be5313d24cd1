"""One region of memory for cached user KV, allocated in blocks that are freed after their last reader.

KV of different lengths comes and goes for weeks. An allocator that grows leaves holes (measured: 40% over what was
held, after a thousand histories of random length); here the holes are inside the region and the region never grows.
Bytes and references only; what is cached, and for how long, is the cache's.
"""

import contextlib
import math
import mmap
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvcast.protocol.errors import ServerFaultError

Floats = npt.NDArray[np.float32]

# Vector loads and the cache lines of two arrays do not meet.
ALIGNMENT = 64


def align(size: int) -> int:
    """Return `size` rounded up to whole cache lines."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def bytes_of(shapes: Sequence[tuple[int, ...]]) -> int:
    """Return the bytes of a block that holds FP32 arrays of these shapes."""
    return sum(align(4 * math.prod(shape)) for shape in shapes)


class KVMemory:
    """The region. `allocate` is called by one thread at a time; blocks may be dropped by any.

    Invariant: free and given-out blocks cover the region, once each; no two free blocks touch.
    """

    def __init__(self, size: int) -> None:
        """Reserve at most `size` bytes of address space; pages are taken when they are first written.

        Raises:
            ServerFaultError: the system does not give so much.
        """
        self.size = size // ALIGNMENT * ALIGNMENT
        try:
            # Private: the default, shared, would be counted as /dev/shm is, and get no large pages.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._region = mmap.mmap(-1, self.size, flags=flags) if self.size else None
        except (OSError, OverflowError) as error:
            raise ServerFaultError(f"user KV cache: cannot reserve {size / 1e6:.0f} MB of memory ({error})") from error
        if self._region is not None:
            # First touches by pages of 2 MB: 0.4 ms for 8 MB of KV instead of 3.6 (measured). Not every system can.
            with contextlib.suppress(OSError, AttributeError):
                self._region.madvise(mmap.MADV_HUGEPAGE)
        self._address = np.frombuffer(self._region or b"", np.uint8).ctypes.data
        # Free blocks by where they start and by where they end, so that neighbours find each other.
        self._free: dict[int, int] = {0: self.size} if self.size else {}
        self._starts: dict[int, int] = {self.size: 0} if self.size else {}
        # Readers end anywhere, also inside `allocate`; appending to a deque needs no lock.
        self._dropped: deque[tuple[int, int]] = deque()

    def allocate(self, shapes: Sequence[tuple[int, ...]]) -> tuple[Floats, ...] | None:
        """Return FP32 arrays of these shapes, in one block, with whatever numbers lie there; None if none is free.

        The block is free again when the arrays and all views of them are gone.
        """
        self._collect()
        size = bytes_of(shapes)
        fitting = [(end - start, start) for start, end in self._free.items() if end - start >= size]
        if not fitting or self._region is None or not size:
            return None
        _, start = min(fitting)  # the tightest, so that large ones stay large
        end = self._take(start)
        if start + size < end:
            self._put(start + size, end)
        block = np.frombuffer(self._region, np.uint8, size, start)
        # Views refer to `block`, and numpy keeps it as their base: it goes when the last of them goes.
        weakref.finalize(block, self._dropped.append, (start, start + size)).atexit = False
        arrays, offset = [], 0
        for shape in shapes:
            length = 4 * math.prod(shape)
            arrays.append(block[offset : offset + length].view(np.float32).reshape(shape))
            offset += align(length)
        return tuple(arrays)

    def locate(self, arrays: Sequence[Floats]) -> tuple[int, int]:
        """Return where the block of arrays that were given out starts and ends."""
        start = arrays[0].ctypes.data - self._address
        return start, start + bytes_of([array.shape for array in arrays])

    def list_free(self) -> list[tuple[int, int]]:
        """Return where the free blocks start and end."""
        self._collect()
        return list(self._free.items())

    def count_free(self) -> int:
        """Return the bytes that are not given out."""
        self._collect()
        return sum(end - start for start, end in self._free.items())

    def _collect(self) -> None:
        """Take dropped blocks back, joining neighbours."""
        while self._dropped:
            start, end = self._dropped.popleft()
            if end in self._free:
                end = self._take(end)
            if start in self._starts:
                start = self._starts[start]
                self._take(start)
            self._put(start, end)

    def _put(self, start: int, end: int) -> None:
        self._free[start], self._starts[end] = end, start

    def _take(self, start: int) -> int:
        """Take a free block out; return its end."""
        end = self._free.pop(start)
        del self._starts[end]
        return end
