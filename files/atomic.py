"""Writing a file so that a reader finds the old content or the new one, and never half of it.

Only this: what is written, and what a torn file means, is its caller's business.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(
    path: str | Path, *, temporary: str | None = None, sync: bool = True, replace: bool = True
) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its name when the block ends, and is removed where the block fails.

    Args:
        path: The file; its folder is made where it is missing.
        temporary: Name of the temporary file; default one of this process.
        sync: Whether to wait for the disk. Without it a power cut can leave the new name on an empty
            file, which is enough where the caller would notice.
        replace: Whether a file that is there gives way; else it stays, also where it came in the meantime.

    Yields:
        The temporary file, to be written to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(temporary or f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if not replace:
            with contextlib.suppress(OSError):  # there already; or a file system without links, where a look must do
                os.link(beside, path)
            if path.exists():
                beside.unlink()
                return
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_atomically(
    path: str | Path, content: bytes, *, temporary: str | None = None, sync: bool = True, replace: bool = True
) -> None:
    """Write all of a file as `replacing` does.

    Args:
        path: The file; its folder is made where it is missing.
        content: All of the file.
        temporary: Name of the temporary file.
        sync: Whether to wait for the disk.
        replace: Whether a file that is there gives way.
    """
    with replacing(path, temporary=temporary, sync=sync, replace=replace) as file:
        file.write(content)
