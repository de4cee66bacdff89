"""Read and write a file at given offsets (pread, pwrite), on systems without these calls by a seek under a lock.

Windows has neither `os.preadv` nor `os.pwrite`, and a file's position there is shared by all threads.
"""

import os
import threading

BINARY = getattr(os, "O_BINARY", 0)  # for os.open: without it Windows converts line endings
_seeking = threading.Lock()


def read_at(file: int, view: bytearray | memoryview, offset: int) -> int:
    """Read into a buffer from an offset; returns the number of bytes read, fewer at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(file, [view], offset)
    with _seeking:
        os.lseek(file, offset, os.SEEK_SET)
        data = os.read(file, len(view))
    view[: len(data)] = data
    return len(data)


def write_at(file: int, data: bytes | memoryview, offset: int) -> int:
    """Write at an offset; returns the number of bytes written, which may be fewer."""
    if hasattr(os, "pwrite"):
        return os.pwrite(file, data, offset)
    with _seeking:
        os.lseek(file, offset, os.SEEK_SET)
        return os.write(file, data)
