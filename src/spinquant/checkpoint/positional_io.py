"""Read and write a file at given offsets: `os.preadv` and `os.pwrite`, or a seek under a lock without them.

Windows lacks them. There a file's offset is shared by all threads, so seeking and reading is one step.
"""

import os
import threading

BINARY = getattr(os, "O_BINARY", 0)  # for os.open: Windows changes line ends elsewhere
_seeking = threading.Lock()


def read_at(file: int, view: bytearray | memoryview, offset: int) -> int:
    """Fill a buffer from a byte of a file on; the number of bytes that were read, fewer at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(file, [view], offset)
    with _seeking:
        os.lseek(file, offset, os.SEEK_SET)
        data = os.read(file, len(view))
    view[: len(data)] = data
    return len(data)


def write_at(file: int, data: bytes | memoryview, offset: int) -> int:
    """Write from a byte of a file on; the number of bytes that were written, which may be fewer."""
    if hasattr(os, "pwrite"):
        return os.pwrite(file, data, offset)
    with _seeking:
        os.lseek(file, offset, os.SEEK_SET)
        return os.write(file, data)
