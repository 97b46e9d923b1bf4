"""OpenCV, for what it does faster than all others: turning, exchanging channels, libwebp."""

import functools
from typing import Any


@functools.cache
def opencv() -> Any:
    """The library, with no threads of its own: one picture a process."""
    import cv2

    cv2.setNumThreads(1)
    return cv2
