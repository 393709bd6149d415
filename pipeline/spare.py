"""Memory of large arrays, kept for the next: a system takes longer to give it anew than it takes to fill it."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray


class Spare:
    """As many arrays as were in use at once, each as large as the largest that it has been."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[NDArray[np.uint8]] = []

    @contextmanager
    def array(self, shape: tuple[int, ...]) -> Iterator[NDArray[np.uint8]]:
        """An array of undefined numbers. At the end of `with` it goes to whoever asks next."""
        size = math.prod(shape)
        with self._lock:
            flat = self._free.pop() if self._free else np.empty(0, np.uint8)
        if flat.size < size:
            flat = np.empty(size, np.uint8)
        try:
            yield flat[:size].reshape(shape)
        finally:
            with self._lock:
                self._free.append(flat)
