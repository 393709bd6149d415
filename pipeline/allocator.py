"""What glibc's allocator is told: to keep the memory of activations where networks run; in the driver, to give it back.

Other C libraries have no such switches, and are left alone.
"""

from __future__ import annotations

import ctypes
import os

WORKER_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**27),
    "THP_MEM_ALLOC_ENABLE": "1",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "GOMP_SPINCOUNT": "10000",
}
"""Environment of workers: memory of activations is kept instead of being faulted in afresh at every layer, or, where
glibc gives a thread's large allocations back all the same, faulted in by huge pages (torch's own switch). On a GPU
windows of other sizes grow into what those before have left, which else lies there in pieces of the wrong size.

The last: a thread of a network that has done its part of a layer waits for the others some microseconds, then sleeps.
Else it keeps the processor for up to milliseconds from what is read and vectorized beside, on which the others wait:
beside one busy process on two cores a pass took up to twice as long.

Not MALLOC_ARENA_MAX=1 too: blocks were up to twice as fast, but one fragmented arena took a worker from 8 to 16 GiB.
"""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Of glibc's malloc.h."""


def keep_memory() -> None:
    """Have this process, which trains, keep the memory of activations and crops, and those that it starts likewise.

    For the start of a process. Else each step maps its largest tensors anew.
    """
    os.environ.update(WORKER_ENVIRONMENT)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def spare_memory() -> None:
    """Have this process, which plans, waits and publishes, keep one heap for all threads, and return what is much.

    For the start of a process. Else each thread's heap keeps its own leavings: a city of 16 times the area then took
    16 % more memory. What is kept is given back between the steps of publishing; returned block by block it would be
    mapped and cleared anew a hundred times, a third of the time that publishing takes.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 * 2**20)
        libc.mallopt(M_ARENA_MAX, 1)


def give_freed_memory_back() -> None:
    """Return to the system what has been freed: else each step's leavings lie under the next one's peak."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    import pyarrow as pa

    pa.default_memory_pool().release_unused()
