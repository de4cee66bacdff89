"""Read what a folder from a stranger holds: JSON of limited size and depth, and names of files that stay inside it.

Names in an index, a config or a record are names of files in the same folder and nothing else. A path that leads out,
by its parts or through a link, would have another file read, or overwritten.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from spinquant.errors import CheckpointError, SpinquantError

LARGEST = 1 << 27  # bytes of a JSON file; the index of the largest public checkpoints has some 10 MB
BESIDE = "spinquant"  # folder beside the weights that records how they were made
LONGEST_NAME = 255  # bytes of a file's name, in all usual file systems
DEEPEST = 64  # lists and objects inside each other


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises CheckpointError if the file cannot be read, is not a regular file, is larger than `LARGEST`, is not JSON, is
    nested deeper than `DEEPEST`, or is not an object.
    """
    return json_object(read_file(path), str(path))


def read_file(path: Path, largest: int = LARGEST, error: type[SpinquantError] = CheckpointError) -> bytes:
    """The bytes of a regular file of at most `largest` bytes; otherwise `error`, naming the file."""
    check_regular(path, largest, error)
    try:
        return path.read_bytes()
    except OSError as wrong:
        raise error(f"{path} cannot be read: {wrong.strerror or wrong}") from None


def check_regular(path: Path, largest: int | None = None, error: type[SpinquantError] = CheckpointError) -> None:
    """Raise `error` for what is not a regular file of at most `largest` bytes: a pipe would be waited for."""
    try:
        about = path.stat()
    except (OSError, ValueError) as wrong:  # ValueError: a NUL in the name
        raise error(f"{str(path)!r} cannot be read: {getattr(wrong, 'strerror', None) or wrong}") from None
    if not stat.S_ISREG(about.st_mode):
        raise error(f"{path} is not a regular file: expected one that can be read from start to end")
    if largest is not None and about.st_size > largest:
        raise error(f"{path} has {about.st_size} bytes: expected at most {largest}")


def json_object(data: bytes, origin: str) -> dict[str, Any]:
    """The JSON object in some bytes; origin: what an error names. Raises CheckpointError, as `read_json`."""
    try:
        found = json.loads(data)
        if b"\\u" in data or b"\xed" in data:  # half a surrogate pair, which no file can be written with
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{origin} is not valid JSON: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{origin} is nested too deeply: expected at most {DEEPEST} levels") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{origin} holds a JSON {type(found).__name__}: expected an object")
    level, depth = [found], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise CheckpointError(f"{origin} is nested too deeply: expected at most {DEEPEST} levels")
        inside = (value for part in level for value in (part.values() if isinstance(part, dict) else part))
        level = [value for value in inside if isinstance(value, dict | list)]
    return found


def file_in(folder: Path, name: Any) -> Path:
    """The path of a file that an index or a record of a folder names.

    Raises CheckpointError for anything but the name of a file in that folder: absolute paths, separators, `..`, NUL,
    names that no file system has, and links that lead out.
    """
    wrong = not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in ("/", "\\", "\0"))
    if wrong or Path(name).is_absolute() or Path(name).drive or len(name.encode(errors="surrogatepass")) > LONGEST_NAME:
        raise CheckpointError(f"{folder} names {name!r} as a file: expected the name of a file in that folder")
    path = folder / name
    check_inside(folder, path)
    return path


def beside(folder: Path, name: str) -> Path:
    """The path of a file of the folder `spinquant` beside the weights; CheckpointError if it leads out of `folder`."""
    path = folder / BESIDE / name
    check_inside(folder, path)
    return path


def check_inside(folder: Path, path: Path) -> None:
    """Raise CheckpointError for a file of a model folder that is a link out of it, but for those of the hub's cache."""
    if not leads_out(folder, path):
        return
    raise CheckpointError(
        f"{path} is a link out of its folder, to {path.resolve()}: such a link is not followed, since a folder from "
        "someone else could have any file read. If the folder is your own, replace the link by the file"
    )


def leads_out(folder: Path, path: Path) -> bool:
    """Whether a path inside a folder resolves to a place outside of it that is not its blob in the hub's cache."""
    home, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if real.is_relative_to(home):
        return False
    # The hub's cache: models--O--N/snapshots/COMMIT/FILE links to models--O--N/blobs/HASH.
    snapshots = next((parent for parent in (home, *home.parents) if parent.name == "snapshots"), None)
    return snapshots is None or not real.is_relative_to(snapshots.parent / "blobs")
